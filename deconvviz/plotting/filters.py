"""A layer's kernels as a mosaic, what is wrong with them as coloured frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch

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
CELL_INCHES = 0.5


def mosaic(layer: LayerDiagnosis) -> Figure:
    """Show the kernels in their order about mid-grey, all at one scale; other than 3 input maps by their mean.

    A flagged filter has its number above and a frame in the colour of its first flag; the legend counts each flag.
    """
    columns = math.ceil(math.sqrt(1.5 * len(layer.filters)))
    rows = math.ceil(len(layer.filters) / columns)
    figure = Figure(figsize=(max(4.0, CELL_INCHES * columns), CELL_INCHES * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = display_scale(layer.weights) or None
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, found, kernel in zip(grid.flat, layer.filters, layer.weights, strict=False):
        axes.imshow(displayable(kernel, scale), interpolation="nearest")
        if found.flags:
            axes.set_frame_on(True)
            axes.set_title(str(found.number), fontsize=6, pad=1)
            for spine in axes.spines.values():
                spine.set(color=COLOURS[found.flags[0]], linewidth=2.5)
    figure.suptitle(f"{layer.layer}: {len(layer.filters)} kernels", fontsize=9, parse_math=False)
    counts = {flag: sum(flag in found.flags for found in layer.filters) for flag in COLOURS}
    frames = [
        Patch(facecolor="none", edgecolor=COLOURS[flag], linewidth=2, label=f"{flag}: {count}")
        for flag, count in counts.items()
        if count
    ]
    if frames:
        figure.legend(handles=frames, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure
