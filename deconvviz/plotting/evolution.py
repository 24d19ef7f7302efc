"""Feature maps through training as the paper's figure 4: a row a map, a column an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from deconvviz.errors import InvalidInput

CELL_INCHES, NARROWEST = 0.62, 4.6
"""The narrowest figure has room for the line below it."""


class Strip(NamedTuple):
    """One layer."""

    title: str
    rows: Sequence[Sequence[NDArray[np.uint8]]]
    """Of each row E square pictures (side, side, 3), all of one side."""
    labels: Sequence[str]
    """Left of the rows."""
    framed: Sequence[Sequence[bool]]
    """Which of the pictures have a frame."""


def evolution_strips(strips: Sequence[Strip], epochs: Sequence[int], columns: int = 3) -> Figure:
    """Draw layers beside each other, ``columns`` of them in a line; framed cells are those that jumped."""
    if not strips or not epochs:
        raise InvalidInput("there is nothing to draw; expected one layer and one epoch or more")
    columns = min(columns, len(strips))
    lines = -(-len(strips) // columns)
    height = max(len(strip.rows) for strip in strips)
    size = max(NARROWEST, columns * (CELL_INCHES * len(epochs) + 0.4)), lines * (CELL_INCHES * height + 0.5) + 0.2
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, strip in zip(grid, strips, strict=False):
        for y, row in enumerate(strip.rows):
            for x, pixels in enumerate(row):
                axes.imshow(pixels, extent=(x + 0.03, x + 0.97, y + 0.97, y + 0.03), interpolation="antialiased")
                if strip.framed[y][x]:
                    axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, edgecolor="tab:red"))
        axes.set(xlim=(0, len(epochs)), ylim=(height, 0), aspect="equal")
        axes.set_xticks([x + 0.5 for x in range(len(epochs))], [str(epoch) for epoch in epochs], fontsize=6)
        axes.set_yticks([y + 0.5 for y in range(len(strip.rows))], strip.labels, fontsize=6)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.set_title(strip.title, fontsize=8, parse_math=False)
    figure.supxlabel("columns: epochs; rows: feature maps; framed: the strongest image changed", fontsize=7)
    return figure
