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

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import InvalidInput
from deconvviz.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    PICTURE_SUFFIXES,
    atomic_write,
    check_pixels,
    crop_to_signal,
    display_scale,
    displayable,
    to_pixels,
)

CELL_INCHES, GAP_INCHES, SCALE_INCHES, LINE_INCHES = 2.0, 0.08, 0.2, 0.16
"""A cell with the gap around it, and what a scale and a line of text add."""
LONGEST = 10
"""Cells beside each other; what is longer goes on below."""
MAX_SIDE = 65_500
"""In pixels: of a JPEG; matplotlib draws a few more."""
FIGURE_SUFFIXES = (*PICTURE_SUFFIXES, ".pdf", ".svg")
Box = tuple[int, int, int, int]
# The columns of a comparison panel: its title and the attribute of ``Comparison`` below it.
METHODS = {
    "deconvnet": "deconvnet",
    "saliency (captum)": "saliency",
    "guided backprop": "guided_backprop",
    "deconvnet, shuffled": "randomized",
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
        """The projection by the same network with shuffled weights (C, H, W)."""


def panel(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    scales: Sequence[Sequence[float | None]] | None = None,
    frames: Sequence[Sequence[tuple[Box, str]]] | None = None,
) -> Figure:
    """Lay pictures out in a grid, each in a cell of the same size and in its own aspect.

    Args:
        rows: pixels (H, W, 3), or ``None`` for an empty cell; short rows end in empty cells, and those of more than
            ten cells go on below, under their own titles.
        titles: above the columns, one each.
        labels: left of the rows, one each.
        scales: for each row, what full contrast stands for in each of its cells, printed below it;
            ``None`` prints nothing.
        frames: for each row, the parts ``(y0, y1, x0, x1)`` of its first picture to frame, in pixels, ends excluded,
            and their names.

    Raises:
        InvalidInput: no cell, other pixels, or more or fewer titles, labels, scales or frames than cells.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise InvalidInput(f"rows has {len(rows)} rows without a cell, expected one picture or more: add one.")
    _check_length("titles", titles, columns, "columns")
    _check_length("labels", labels, len(rows), "rows")
    _check_length("scales", scales, len(rows), "rows")
    _check_length("frames", frames, len(rows), "rows")
    for y, row in enumerate(rows):
        if scales:
            _check_length(f"scales[{y}]", scales[y], len(row), f"cells of rows[{y}]")
        for x, pixels in enumerate(row):
            if pixels is not None:
                check_pixels(pixels, f"rows[{y}][{x}]")
    titles, labels = list(map(wrapped, titles or [])), list(map(wrapped, labels or []))
    left, top = _room(labels), _room(titles)
    across, spans = min(columns, LONGEST), [slice(first, first + LONGEST) for first in range(0, columns, LONGEST)]
    lines = [(y, span) for y in range(len(rows)) for span in spans]
    tops = [top if i == 0 or len(spans) > 1 else 0.0 for i in range(len(lines))]
    below = CELL_INCHES + (SCALE_INCHES if scales else 0)
    width, height = left + CELL_INCHES * across, sum(tops) + below * len(lines)
    figure, y1 = Figure(figsize=(width, height)), height
    for i, (y, span) in enumerate(lines):
        row, y1 = rows[y][span], y1 - tops[i]
        cells = [_cell(figure, left + CELL_INCHES * x, y1 - CELL_INCHES) for x in range(across)]
        for axes, title in zip(cells, titles[span] if tops[i] else [], strict=False):
            axes.set_title(title, fontsize=9, parse_math=False)
        if labels and span.start == 0:
            cells[0].set_ylabel(labels[y], fontsize=9, parse_math=False)
        for box, name in frames[y] if frames and span.start == 0 else []:
            _frame(cells[0], box, name)
        for axes, pixels in zip(cells, row, strict=False):
            if pixels is not None:
                axes.imshow(pixels, interpolation="antialiased")
        for axes, scale in zip(cells, scales[y][span] if scales else [], strict=False):
            if scale is not None:
                axes.set_xlabel(f"±{scale:.1e}" if scale else "all zero", fontsize=7)
        y1 -= below
    return figure


def comparison_panel(
    comparisons: Iterable[Comparison],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Figure:
    """Show one row for each comparison: the image, what the unit sees of it, then each of ``METHODS`` there.

    All cells but the first are the framed part of the image, which holds every method's signal; a scale is what the
    strongest pixel stands for, of a signal that started from one. ``mean`` and ``std`` are those the images were
    normalised with. Raises ``InvalidInput`` as :func:`panel`, :func:`~deconvviz.images.displayable` and
    :func:`~deconvviz.images.to_pixels` do.
    """
    rows, labels, scales, frames = [], [], [], []
    for comparison in comparisons:
        maps = [getattr(comparison, attribute) for attribute in METHODS.values()]
        reached = torch.stack([(signal != 0).any(0) for signal in maps]).any(0, keepdim=True)
        y0, y1, x0, x1 = box = crop_to_signal(reached, margin=2)
        parts, image = [signal[:, y0:y1, x0:x1] for signal in maps], to_pixels(comparison.image, mean, std)
        rows.append([image, image[y0:y1, x0:x1], *map(displayable, parts)])
        labels.append(comparison.label)
        scales.append([None, None, *map(display_scale, parts)])
        frames.append([(box, "")])
    figure = panel(rows, ["image", "what the unit sees", *METHODS], labels, scales, frames)
    for axes in figure.axes[:: 2 + len(METHODS)]:
        axes.set_xlabel("scales: for a signal of 1", fontsize=7)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float = 100) -> None:
    """Write a figure as PNG, JPEG, PDF or SVG, by the suffix, as :func:`~deconvviz.images.atomic_write` does.

    ``dpi`` is in pixels per inch; a figure that would be too large for a file or a viewer gets fewer.
    """
    width, height = figure.get_size_inches()
    dpi = min(dpi, MAX_SIDE / max(width, height), math.sqrt(MAX_PIXELS / (width * height)))
    with atomic_write(path, FIGURE_SUFFIXES) as temporary:
        figure.savefig(temporary, dpi=dpi)


def wrapped(text: str, inches: float = CELL_INCHES, points: float = 9) -> str:
    """A text in lines of so many inches; what a file's name holds beside text becomes "?"."""
    return textwrap.fill(text.encode(errors="replace").decode(), max(int(inches / points / 0.0085), 1))


def _cell(figure: Figure, x: float, y: float) -> Axes:
    """An empty cell whose lower left corner is so many inches from a figure's.

    Placed by hand: a layout engine takes minutes over hundreds of rows.
    """
    (width, height), side = figure.get_size_inches(), CELL_INCHES - GAP_INCHES
    corner = (x + GAP_INCHES / 2) / width, (y + GAP_INCHES / 2) / height
    axes = figure.add_axes((*corner, side / width, side / height))
    axes.set(xticks=[], yticks=[], frame_on=False)
    return axes


def _frame(axes: Axes, box: Box, name: str) -> None:
    y0, y1, x0, x1 = box
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="cyan"))
    axes.text(x0, y0, name, color="cyan", fontsize=6, va="bottom", parse_math=False, clip_on=True)


def _check_length(name: str, given: Sequence[object] | None, expected: int, of: str) -> None:
    if given is not None and len(given) != expected:
        raise InvalidInput(f"{name} has {len(given)} entries, expected {expected}: one for each of the {of}.")


def _room(texts: Sequence[str]) -> float:
    """Inches beside the cells for texts of several lines."""
    return LINE_INCHES * max(text.count("\n") + 1 for text in texts) + 0.1 if texts else 0.0
