"""Read any box of a value that a patch changed: the clean pass's cells, with the changed ones laid over them.

Cells are gathered as rows: a value (1, C, H, W) is laid out (H, W, C), so that a cell's channels lie together
(channels_last) and a batch of crops goes into the next filter without being reordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deconvviz.incremental.regions import Firsts, Region


class CleanValue:
    """A value of the clean pass (1, ...), to gather boxes from."""

    def __init__(self, value: Tensor, axes: tuple[int, ...]) -> None:
        self.axes = axes
        self.rows = to_rows(value, axes)[0]
        """(*space, ...), a cell's channels last."""
        self._padded: dict[object, Tensor] = {}

    def padded(self, before: Sequence[int], after: Sequence[int], fill: float) -> Tensor:
        """The value with ``fill`` around it; kept."""
        if not any(before) and not any(after):
            return self.rows
        key = (*before, *after, fill)
        if key not in self._padded:
            space = self.rows.shape[: len(before)]
            whole = [b + n + a for b, n, a in zip(before, space, after, strict=True)]
            padded = self.rows.new_full((*whole, *self.rows.shape[len(before) :]), fill)
            padded[tuple(slice(b, b + n) for b, n in zip(before, space, strict=True))] = self.rows
            self._padded[key] = padded
        return self._padded[key]


def read(clean: CleanValue, changed: Region, crops: Tensor, wanted: Region, fill: float = 0.0) -> Tensor:
    """The boxes ``wanted`` (they may reach into the padding) of a value of which ``changed`` holds ``crops``.

    Args:
        clean: the value without a patch.
        changed: the boxes that the patches changed.
        crops: what they changed to, (B, ...).
        wanted: the boxes to read, in cells of the value; below 0 or past its end lies padding.
        fill: the padding's content.

    Returns:
        (B, ...) with the boxes' extent along the spatial axes.
    """
    theirs, ours = changed.firsts, wanted.firsts
    shift = theirs - ours
    aligned = bool((shift == shift[:, :1]).all())
    if aligned:
        spans = [
            (max(int(d), 0), min(int(d) + n, size))
            for d, n, size in zip(shift[:, 0], changed.size, wanted.size, strict=True)
        ]
        source = tuple(slice(a - int(d), b - int(d)) for (a, b), d in zip(spans, shift[:, 0], strict=True))
        inner = along(crops, wanted.axes, source)
        if all(span == (0, size) for span, size in zip(spans, wanted.size, strict=True)):
            return inner
    space = changed.space
    before = [max(0, -int(a)) for a in wanted.firsts.min(axis=1)]
    after = [
        max(0, int(a) + n - s) for a, n, s in zip(wanted.firsts.max(axis=1), wanted.size, space, strict=True)
    ]
    padded = clean.padded(before, after, fill)
    cells, channels = padded.shape[: len(space)], padded.shape[len(space) :]
    rows = padded.reshape(math.prod(cells), -1)
    index = _index(ours + np.asarray(before)[:, None], wanted.size, cells)
    if aligned:
        gathered = rows.index_select(0, torch.from_numpy(index.ravel()).to(rows.device))
        boxes = from_rows(gathered.view(-1, *wanted.size, *channels), wanted.axes)
        along(boxes, wanted.axes, tuple(slice(*span) for span in spans)).copy_(inner)
        return boxes
    index = np.where(
        _inside(ours - theirs, wanted.size, changed.size),
        _index(ours - theirs, wanted.size, changed.size, each=math.prod(changed.size)) + len(rows),
        index,
    )
    both = torch.cat([rows, to_rows(crops, wanted.axes).reshape(-1, rows.shape[1])])
    gathered = both.index_select(0, torch.from_numpy(index.ravel()).to(rows.device))
    return from_rows(gathered.view(-1, *wanted.size, *channels), wanted.axes)


def clean_boxes(clean: CleanValue, region: Region) -> Tensor:
    """The boxes of ``region`` as the clean pass has them."""
    space = region.space
    rows = clean.rows.reshape(math.prod(space), -1)
    index = torch.from_numpy(_index(region.firsts, region.size, space).ravel()).to(rows.device)
    boxes = rows.index_select(0, index).view(-1, *region.size, *clean.rows.shape[len(space) :])
    return from_rows(boxes, region.axes)


def to_rows(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """(B, ...) with its spatial axes moved to the front, behind the batch's, and each cell's channels together."""
    return tensor.movedim(tuple(axes), tuple(range(1, 1 + len(axes)))).contiguous()


def from_rows(rows: Tensor, axes: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_rows`; a view."""
    return rows.movedim(tuple(range(1, 1 + len(axes))), tuple(axes))


def along(tensor: Tensor, axes: Sequence[int], slices: Sequence[slice]) -> Tensor:
    """``tensor`` sliced along ``axes``; a view."""
    whole = [slice(None)] * tensor.dim()
    for axis, part in zip(axes, slices, strict=True):
        whole[axis] = part
    return tensor[tuple(whole)]


def _index(firsts: Firsts, size: Sequence[int], space: Sequence[int], each: int = 0) -> Firsts:
    """The flat index (B, *size) of each cell of the boxes in an extent ``space``; box b is offset by b * ``each``."""
    index = np.arange(firsts.shape[1], dtype=np.int64).reshape(-1, *[1] * len(size)) * each
    for axis, (first, n) in enumerate(zip(firsts, size, strict=True)):
        cells = (first[:, None] + np.arange(n)) * math.prod(space[axis + 1 :])
        index = index + cells.reshape(len(cells), *[n if a == axis else 1 for a in range(len(size))])
    return index


def _inside(firsts: Firsts, size: Sequence[int], space: Sequence[int]) -> np.ndarray:
    """Whether each cell (B, *size) of the boxes lies within ``space``."""
    inside = np.ones((firsts.shape[1], *[1] * len(size)), dtype=bool)
    for axis, (first, n, extent) in enumerate(zip(firsts, size, space, strict=True)):
        cells = first[:, None] + np.arange(n)
        within = (cells >= 0) & (cells < extent)
        inside = inside & within.reshape(len(cells), *[n if a == axis else 1 for a in range(len(size))])
    return inside
