"""Read any box of a value that a patch changed: the clean pass's cells, with the changed ones laid over them.

Cells are gathered as rows: a value (1, C, H, W) is laid out (H, W, C), so that a cell's channels lie together
(channels_last) and a batch of crops goes into the next filter without being reordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.incremental.regions import Boxes, Firsts, Region


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


def read(
    clean: CleanValue,
    changed: Region,
    crops: Tensor,
    wanted: Boxes | Region,
    fill: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """The boxes ``wanted`` (they may reach into the padding) of a value of which ``changed`` holds ``crops``.

    Args:
        clean: the value without a patch.
        changed: the boxes that the patches changed.
        crops: what they changed to, (B, ...).
        wanted: the boxes to read, in cells of the value; below 0 or past its end lies padding.
        fill: the padding's content.
        out: where to write them: a part, along another axis, of a tensor made by :func:`from_rows`.

    Returns:
        (B, ...) with the boxes' extent along the spatial axes.
    """
    shift = changed.firsts - wanted.firsts
    aligned = bool((shift == shift[:, :1]).all())
    if aligned:
        spans, source = [], []
        for d, n, size in zip(shift[:, 0].tolist(), changed.size, wanted.size, strict=True):
            span = slice(max(d, 0), min(d + n, size))
            spans.append(span)
            source.append(slice(span.start - d, span.stop - d))
        inner = along(crops, wanted.axes, source)
        if all(span == slice(0, size) for span, size in zip(spans, wanted.size, strict=True)):
            return inner if out is None else out.copy_(inner)
    boxes = clean_boxes(clean, wanted, fill, out)
    if aligned:
        along(boxes, wanted.axes, spans).copy_(inner)
        return boxes
    rows = to_rows(crops, wanted.axes).flatten(0, len(wanted.axes))
    inside = _inside(shift, changed.size, wanted.size).ravel()
    places = _index(shift, changed.size, wanted.size, each=math.prod(wanted.size)).ravel()[inside]
    if not inside.all():
        rows = rows.index_select(0, _tensor(np.flatnonzero(inside), rows))
    _in_rows(boxes, wanted.axes).flatten(0, len(wanted.axes)).index_copy_(0, _tensor(places, rows), rows)
    return boxes


def clean_boxes(
    clean: CleanValue, wanted: Boxes | Region, fill: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """The boxes ``wanted``, which may reach into the padding, as the clean pass has them; as :func:`read`."""
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
    return from_rows(rows.index_select(0, cells).unflatten(0, index.shape), wanted.axes)


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


def _index(firsts: Firsts, size: Sequence[int], space: Sequence[int], each: int = 0) -> Firsts:
    """The flat index (B, *size) of each cell of the boxes in an extent ``space``; box b is offset by b * ``each``."""
    index = np.arange(firsts.shape[1], dtype=np.int64).reshape(-1, *[1] * len(size)) * each
    for axis, (first, n) in enumerate(zip(firsts, size, strict=True)):
        cells = (first[:, None] + np.arange(n)) * math.prod(space[axis + 1 :])
        index = index + cells.reshape(len(cells), *[n if a == axis else 1 for a in range(len(size))])
    return index


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
