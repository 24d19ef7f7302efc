"""A layer's kernels as a mosaic, what is wrong with them as coloured frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from deconvviz.images import display_scale, displayable

if TYPE_CHECKING:
    from deconvviz.diagnostics.result import LayerDiagnosis

COLOURS = {
    "dead": "black",
    "grey": "tab:orange",
    "saturated": "tab:red",
    "duplicate": "tab:blue",
    "high-frequency": "tab:purple",
}
CELL_INCHES, KERNEL = 0.5, 0.75
"""A cell, and the share of it that a kernel's longer side takes."""


def mosaic(layer: LayerDiagnosis) -> Figure:
    """Show the kernels in their order about mid-grey, all at one scale; other than 3 input maps by their mean.

    A flagged filter has its number above and a frame in the colour of its first flag; the legend counts each flag.
    """
    columns = math.ceil(math.sqrt(1.5 * len(layer.filters)))
    rows = math.ceil(len(layer.filters) / columns)
    figure = Figure(figsize=(max(4.0, CELL_INCHES * columns), CELL_INCHES * rows + 1), layout="constrained")
    axes = figure.subplots()  # one for all: a layout of hundreds takes minutes
    scale = display_scale(layer.weights) or None
    half_height, half_width = (KERNEL / 2 * side / max(layer.kernel) for side in layer.kernel)
    for i, (found, kernel) in enumerate(zip(layer.filters, layer.weights, strict=True)):
        y, x = i // columns + 0.5, i % columns + 0.5
        left, right, top, bottom = x - half_width, x + half_width, y - half_height, y + half_height
        axes.imshow(displayable(kernel, scale), extent=(left, right, bottom, top), interpolation="nearest")
        if found.flags:
            axes.text(x, top - 0.05, str(found.number), fontsize=6, ha="center", va="bottom")
            corner, colour = (left, top), COLOURS[found.flags[0]]
            axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2.5))
    axes.set(xticks=[], yticks=[], frame_on=False, xlim=(0, columns), ylim=(rows, -0.1))
    figure.suptitle(f"{layer.layer or 'the model'}: {len(layer.filters)} kernels", fontsize=9, parse_math=False)
    counts = {flag: sum(flag in found.flags for found in layer.filters) for flag in COLOURS}
    frames = [
        Patch(facecolor="none", edgecolor=COLOURS[flag], linewidth=2, label=f"{flag}: {count}")
        for flag, count in counts.items()
        if count
    ]
    if frames:
        figure.legend(handles=frames, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure
