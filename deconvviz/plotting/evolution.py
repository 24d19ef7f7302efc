"""Feature maps through training as the paper's figure 4: a row a map, a column an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from deconvviz.errors import InvalidInput
from deconvviz.plotting import wrapped

CELL_INCHES, STRIP_INCHES, LINE_INCHES = 0.62, 1.8, 0.14
"""A picture; a layer at least, for its texts; a line of these."""
CAPTION = "columns: epochs; rows: feature maps; framed: the strongest image changed"


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
    width, height = CELL_INCHES * len(epochs), CELL_INCHES * max(len(strip.rows) for strip in strips)
    inches = max(width + 0.4, STRIP_INCHES)
    titles = [wrapped(strip.title, inches - 0.2, 8) for strip in strips]
    caption = wrapped(CAPTION, columns * inches, 7)
    above, below = (LINE_INCHES * (max(text.count("\n") for text in texts) + 1) for texts in (titles, [caption]))
    line = above + height + 0.35
    size = columns * inches, lines * line + 0.1 + below
    figure = Figure(figsize=size)
    for i, (strip, title) in enumerate(zip(strips, titles, strict=True)):
        x0 = i % columns * inches + (inches - width) / 2 + 0.1
        y0 = size[1] - i // columns * line - above - 0.25 - height
        axes = figure.add_axes((x0 / size[0], y0 / size[1], width / size[0], height / size[1]), frame_on=False)
        for y, row in enumerate(strip.rows):
            for x, pixels in enumerate(row):
                axes.imshow(
                    pixels,
                    extent=(x + 0.03, x + 0.97, y + 0.97, y + 0.03),
                    aspect="auto",
                    interpolation="antialiased",
                )
                if strip.framed[y][x]:
                    axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, edgecolor="tab:red"))
        axes.set(xlim=(0, len(epochs)), ylim=(height / CELL_INCHES, 0))
        axes.set_xticks([x + 0.5 for x in range(len(epochs))], [str(epoch) for epoch in epochs], fontsize=6)
        axes.set_yticks([y + 0.5 for y in range(len(strip.rows))], strip.labels, fontsize=6)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.set_title(title, fontsize=8, parse_math=False)
    figure.supxlabel(caption, fontsize=7)
    return figure
