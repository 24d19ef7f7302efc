"""Read any box of a value that a patch changed: the clean pass's cells, with the changed ones laid over them.

Cells are gathered as rows: a value (1, C, H, W) is laid out (H, W, C), so that a cell's channels lie together
(channels_last) and a batch of crops goes into the next filter without being reordered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.incremental.regions import Boxes, Firsts, Region
from deconvviz.precision import at_least_float32


class CleanValue:
    """A value of the clean pass (1, ...), to gather boxes from."""

    def __init__(self, value: Tensor, axes: tuple[int, ...]) -> None:
        self.axes = axes
        self.rows = to_rows(value, axes)[0]
        """(*space, ...), a cell's channels last."""
        self._padded: dict[object, Tensor] = {}
        self._sums: dict[tuple[int, ...], Tensor] = {}

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

    def sums(self, boxes: Region) -> Tensor:
        """(B, ...): what the boxes hold in all."""
        if boxes.size not in self._sums:
            sums = self.rows.to(at_least_float32(self.rows))
            for axis, n in enumerate(boxes.size):
                sums = sums.unfold(axis, n, 1).sum(-1)
            self._sums[boxes.size] = sums.flatten(0, len(boxes.size) - 1)
        places = [n - size + 1 for n, size in zip(boxes.space, boxes.size, strict=True)]
        index = _index(boxes.firsts, [1] * len(places), places)
        return self._sums[boxes.size].index_select(0, _tensor(index.ravel(), self.rows))


def read(clean: CleanValue, changed: Region, crops: Tensor, wanted: Boxes | Region, fill: float = 0.0) -> Tensor:
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
    shift = wanted.firsts - changed.firsts
    first, last = shift.min(axis=1), shift.max(axis=1)
    if (first == last).all() and (first >= 0).all() and (last + wanted.size <= changed.size).all():
        spans = [slice(d, d + n) for d, n in zip(first.tolist(), wanted.size, strict=True)]
        return along(crops, wanted.axes, spans)
    boxes = clean_boxes(clean, wanted, fill)
    lay(boxes, wanted, crops, changed)
    return boxes


def lay(boxes: Tensor, wanted: Boxes | Region, crops: Tensor, changed: Region) -> None:
    """Write ``crops``, the content of the boxes ``changed``, over what the boxes ``wanted`` share with them."""
    axes, shift = wanted.axes, changed.firsts - wanted.firsts
    if (shift == shift[:, :1]).all():
        spans, source = [], []
        for d, n, size in zip(shift[:, 0].tolist(), changed.size, wanted.size, strict=True):
            spans.append(slice(max(d, 0), min(d + n, size)))
            source.append(slice(spans[-1].start - d, spans[-1].stop - d))
        along(boxes, axes, spans).copy_(along(crops, axes, source))
        return
    rows = to_rows(crops, axes).flatten(0, len(axes)).to(boxes.dtype)
    places = _index(shift, changed.size, wanted.size)
    places += np.arange(len(places))[:, None] * math.prod(wanted.size)
    if (shift < 0).any() or (shift.max(axis=1) + changed.size > wanted.size).any():
        inside = _inside(shift, changed.size, wanted.size).reshape(places.shape)
        places, rows = places[inside], rows.index_select(0, _tensor(np.flatnonzero(inside), rows))
    _in_rows(boxes, axes).flatten(0, len(axes)).index_copy_(0, _tensor(places.ravel(), rows), rows)


def clean_boxes(clean: CleanValue, wanted: Boxes | Region, fill: float = 0.0, out: Tensor | None = None) -> Tensor:
    """The boxes ``wanted``, which may reach into the padding, as the clean pass has them.

    Args:
        clean, wanted, fill: as of :func:`read`.
        out: where to write them: a tensor, or along another axis a part of one, made by :func:`from_rows`.
    """
    ends = wanted.firsts.max(axis=1) + wanted.size
    before = [max(0, -a) for a in wanted.firsts.min(axis=1).tolist()]
    after = [max(0, end - n) for end, n in zip(ends.tolist(), clean.rows.shape, strict=False)]
    padded = clean.padded(before, after, fill)
    rows = padded.flatten(0, len(before) - 1)
    index = _index(wanted.firsts + np.asarray(before)[:, None], wanted.size, padded.shape[: len(before)])
    cells = _tensor(index.ravel(), rows)
    if out is not None:
        torch.index_select(rows, 0, cells, out=_in_rows(out, wanted.axes).flatten(0, len(before)))
        return out
    return from_rows(rows.index_select(0, cells).unflatten(0, (len(index), *wanted.size)), wanted.axes)


def to_rows(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """(B, ...) with its spatial axes moved to the front, behind the batch's, and each cell's channels together."""
    return _in_rows(tensor, axes).contiguous()


def _in_rows(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    return tensor.movedim(tuple(axes), tuple(range(1, 1 + len(axes))))


def from_rows(rows: Tensor, axes: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_rows`; a view."""
    return rows.movedim(tuple(range(1, 1 + len(axes))), tuple(axes))


def along(tensor: Tensor, axes: Sequence[int], slices: Sequence[slice]) -> Tensor:
    """``tensor`` sliced along ``axes``; a view."""
    whole = [slice(None)] * tensor.dim()
    for axis, part in zip(axes, slices, strict=True):
        whole[axis] = part
    return tensor[tuple(whole)]


def _index(firsts: Firsts, size: Sequence[int], space: Sequence[int]) -> Firsts:
    """The flat index (B, cells) of each cell of the boxes in an extent ``space``."""
    strides, offsets = _offsets(tuple(size), tuple(space))
    return (strides @ firsts)[:, None] + offsets


@functools.lru_cache(maxsize=1024)
def _offsets(size: tuple[int, ...], space: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """From one cell to the next along each axis of an extent ``space``, and from a box's first cell to each, flat."""
    strides = np.asarray([math.prod(space[axis + 1 :]) for axis in range(len(space))])
    return strides, strides @ np.indices(size, dtype=np.int64).reshape(len(size), -1)


def _tensor(numbers: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device)


def _inside(firsts: Firsts, size: Sequence[int], space: Sequence[int]) -> NDArray[np.bool_]:
    """Whether each cell (B, *size) of the boxes lies within ``space``."""
    inside = np.ones((firsts.shape[1], *[1] * len(size)), dtype=bool)
    for axis, (first, n, extent) in enumerate(zip(firsts, size, space, strict=True)):
        cells = first[:, None] + np.arange(n)
        within = (cells >= 0) & (cells < extent)
        inside = inside & within.reshape(len(cells), *[n if a == axis else 1 for a in range(len(size))])
    return inside
