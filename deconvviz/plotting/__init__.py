"""Panels of pictures as matplotlib figures, with no global state touched.

The idea: computing never draws and drawing never computes. A panel is a grid of finished pixel arrays; it
is a plain ``Figure`` that belongs to the caller: ``pyplot`` is never asked, so no backend is chosen, no
window opens and nothing needs closing. The size follows from the cells::

    width, height = CELL_INCHES * columns, CELL_INCHES * rows   (and room for the titles and labels there are)

The caveat: each cell of a :func:`comparison_panel` is shown at its own scale, printed below it. Compare
structure between cells, not brightness.

>>> import numpy as np
>>> grey = np.full((32, 32, 3), 128, dtype=np.uint8)
>>> figure = panel([[grey, grey], [grey, None]], titles=["image", "deconvnet"], labels=["map 7", "map 42"])
>>> len(figure.axes)
4
"""

import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import InvalidInput
from deconvviz.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PICTURE_SUFFIXES,
    atomic_write,
    check_pixels,
    display_scale,
    displayable,
    to_pixels,
)

CELL_INCHES = 2.0
FIGURE_SUFFIXES = (*PICTURE_SUFFIXES, ".pdf", ".svg")
# The columns of a comparison panel: its title and the attribute of ``Comparison`` below it.
METHODS = {
    "deconvnet": "deconvnet",
    "saliency (captum)": "saliency",
    "guided backprop": "guided_backprop",
    "deconvnet, random weights": "randomized",
}


class Comparison(Protocol):
    """One row of :func:`comparison_panel`: any object with these attributes."""

    @property
    def label(self) -> str:
        """Names the row, such as ``"features.10 map 42"``."""

    @property
    def image(self) -> Tensor:
        """The normalised input (3, H, W)."""

    @property
    def deconvnet(self) -> Tensor:
        """The projection (C, H, W)."""

    @property
    def saliency(self) -> Tensor:
        """The gradient's magnitude (C, H, W)."""

    @property
    def guided_backprop(self) -> Tensor:
        """The guided gradient (C, H, W)."""

    @property
    def randomized(self) -> Tensor:
        """The projection by the same network with random weights (C, H, W)."""


def panel(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    scales: Sequence[Sequence[float | None]] | None = None,
) -> Figure:
    """Lay pictures out in a grid, each in a cell of the same size and in its own aspect.

    Args:
        rows: pixels (H, W, 3), or ``None`` for an empty cell; short rows end in empty cells.
        titles: above the columns, one each.
        labels: left of the rows, one each.
        scales: for each row, what full contrast stands for in each of its cells, printed below it;
            ``None`` prints nothing.

    Raises:
        InvalidInput: no cell, other pixels, or more or fewer titles, labels or scales than cells.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise InvalidInput(
            f"rows has {len(rows)} rows without a cell, expected one picture or more: add one."
        )
    _check_length("titles", titles, columns, "columns")
    _check_length("labels", labels, len(rows), "rows")
    _check_length("scales", scales, len(rows), "rows")
    room = 0.4 if labels else 0, (0.4 if titles else 0) + (0.2 * len(rows) if scales else 0)
    size = CELL_INCHES * columns + room[0], CELL_INCHES * len(rows) + room[1]
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, title in zip(grid[0], titles or [], strict=False):
        axes.set_title(_wrapped(title), fontsize=9, parse_math=False)
    for axes, label in zip(grid[:, 0], labels or [], strict=False):
        axes.set_ylabel(_wrapped(label), fontsize=9, parse_math=False)
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            if pixels is not None:
                check_pixels(pixels, f"rows[{y}][{x}]")
                grid[y, x].imshow(pixels, interpolation="antialiased")
    for y, row_scales in enumerate(scales or []):
        _check_length(f"scales[{y}]", row_scales, len(rows[y]), f"cells of rows[{y}]")
        for axes, scale in zip(grid[y], row_scales, strict=False):
            if scale is not None:
                axes.set_xlabel(f"±{scale:.1e}" if scale else "all zero", fontsize=7)
    return figure


def comparison_panel(
    comparisons: Iterable[Comparison],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Figure:
    """Show one row for each comparison: the image, then each of ``METHODS`` at its own scale.

    ``mean`` and ``std`` are those the images were normalised with. Raises ``InvalidInput`` as
    :func:`panel`, :func:`~deconvviz.images.displayable` and :func:`~deconvviz.images.to_pixels` do.
    """
    rows, labels, scales = [], [], []
    for comparison in comparisons:
        maps = [getattr(comparison, attribute) for attribute in METHODS.values()]
        rows.append([to_pixels(comparison.image, mean, std), *map(displayable, maps)])
        labels.append(comparison.label)
        scales.append([None, *map(display_scale, maps)])
    return panel(rows, ["image", *METHODS], labels, scales)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float = 100) -> None:
    """Write a figure as PNG, JPEG, PDF or SVG, by the suffix, as :func:`~deconvviz.images.atomic_write` does.

    ``dpi`` is in pixels per inch.
    """
    with atomic_write(path, FIGURE_SUFFIXES) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _check_length(name: str, given: Sequence[object] | None, expected: int, of: str) -> None:
    if given is not None and len(given) != expected:
        raise InvalidInput(f"{name} has {len(given)} entries, expected {expected}: one for each of the {of}.")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 26)  # what two inches hold at nine points
