"""Which parts of an input are covered, one after the other: sliding windows, or any masks.

Each window has a box along the spatial axes, all of one size (those at the borders shift inside), and a mask that
says which elements of the box are covered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows over an input (N, *shape)."""

    shape: tuple[int, ...]
    """The input's shape without the batch axis, (C, *S) for a picture."""
    starts: NDArray[np.int64]
    """(axes, W): where each window begins, on every axis of ``shape``."""
    extent: tuple[int, ...]
    """How far a window reaches on every axis; at the input's end it is cut off."""
    masks: Tensor | None = None
    """(W, C or 1, *S): which elements are covered, where that is not the whole window."""

    @classmethod
    def sliding(cls, shape: Sequence[int], extent: Sequence[int], strides: Sequence[int]) -> Windows:
        """Windows of ``extent`` at every multiple of ``strides``; the last one on an axis reaches the end.

        They are numbered as captum's ``Occlusion`` does: the first axis changes fastest.
        """
        counts = [
            math.ceil((n - window) / stride) + 1 for n, window, stride in zip(shape, extent, strides, strict=True)
        ]
        numbers = np.unravel_index(np.arange(math.prod(counts)), counts, order="F")
        starts = np.stack([number * stride for number, stride in zip(numbers, strides, strict=True)])
        return cls(tuple(shape), starts.astype(np.int64), tuple(extent))

    @classmethod
    def covering(cls, shape: Sequence[int], masks: Tensor) -> Windows:
        """One window for each of a stack of masks (W, *S) or (W, C, *S), true where the input is covered.

        Raises:
            InvalidInput: another shape, no mask, or one that covers nothing.
        """
        space = tuple(shape[1:])
        try:
            masks = torch.as_tensor(masks, device="cpu").reshape(masks.shape)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            raise InvalidInput(f"masks are a {type(masks).__name__}; expected a tensor (W, ...)") from None
        if not masks.dim() or not len(masks) or tuple(masks.shape[1:]) not in (space, tuple(shape)):
            raise InvalidInput(
                f"masks have shape {tuple(masks.shape)}; expected (W, {', '.join(map(str, space))}) or "
                f"(W, {', '.join(map(str, shape))}), true where the input is covered"
            )
        masks = masks.bool()
        flat = masks if masks.dim() == 1 + len(space) else masks.any(1)
        empty = (~flat.reshape(len(flat), -1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise InvalidInput(f"mask {empty[0]} covers nothing: leave it out")
        first, size = [np.zeros(len(masks), np.int64)], [shape[0]]
        for axis, n in enumerate(space):
            along = flat.any(tuple(a for a in range(1, flat.dim()) if a != axis + 1)).numpy()
            begin, end = along.argmax(1), n - along[:, ::-1].argmax(1)
            size.append(int((end - begin).max()))
            first.append(np.minimum(begin, n - size[-1]))
        masks = masks if masks.dim() == 1 + len(shape) else masks.unsqueeze(1)
        return cls(tuple(shape), np.stack(first), tuple(size), masks)

    def __len__(self) -> int:
        return self.starts.shape[1]

    @property
    def size(self) -> tuple[int, ...]:
        """The boxes' extent along the spatial axes."""
        return tuple(min(n, window) for n, window in zip(self.shape[1:], self.extent[1:], strict=True))

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """(spatial axes, W): where each box begins."""
        return np.minimum(self.starts[1:], (np.asarray(self.shape[1:]) - self.size)[:, None])

    def box(self, w: int) -> tuple[slice, ...]:
        """What window ``w`` covers, at most, on every axis of ``shape``."""
        return tuple(
            slice(int(a), min(int(a) + n, end))
            for a, n, end in zip(self.starts[:, w], self.extent, self.shape, strict=True)
        )

    def covered(self, chosen: NDArray[np.int64]) -> Tensor:
        """(B, C, *size) or (B, 1, *size): which elements of the chosen windows' boxes are covered."""
        if self.masks is not None:
            return torch.stack([self.masks[w][self._box(w)] for w in chosen.tolist()])
        covered = torch.ones((), dtype=torch.bool, device="cpu")
        firsts = np.concatenate([np.zeros((1, len(self)), np.int64), self.firsts])[:, chosen]
        for axis, (first, n) in enumerate(zip(firsts, (self.shape[0], *self.size), strict=True)):
            cells = first[:, None] + np.arange(n)
            start = self.starts[axis, chosen][:, None]
            inside = torch.from_numpy((cells >= start) & (cells < start + self.extent[axis]))
            if not inside.all():
                covered = covered & inside.view(len(inside), *[n if a == axis else 1 for a in range(len(self.shape))])
        return covered.expand(len(chosen), covered.shape[1] if covered.dim() else 1, *self.size)

    def patches(self, image: Tensor, fill: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        """(B, C, *size): the boxes of one image (C, *S), with ``fill`` (broadcastable to it) where they are covered."""
        places = (slice(None), *torch.from_numpy(self.firsts[:, chosen]))
        contents = []
        for item in (image, fill.expand(image.shape)):
            for axis, n in enumerate(self.size, start=1):
                item = item.unfold(axis, n, 1)
            contents.append(item[places].transpose(0, 1))
        boxes, fills = contents
        return torch.where(self.covered(chosen).to(image.device), fills, boxes)

    def cover(self, images: Tensor, fill: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        """(B * N, C, *S): copies of the images (N, C, *S), each window of ``chosen`` covered in all of them in turn."""
        images = images.to(torch.promote_types(images.dtype, fill.dtype))
        copies = images.repeat(len(chosen), *[1] * (images.dim() - 1)).unflatten(0, (len(chosen), len(images)))
        fill = fill.expand(images.shape)
        for i, w in enumerate(chosen.tolist()):
            if self.masks is None:
                box = (slice(None), *self.box(w))
                copies[i][box] = fill[box]
            else:
                copies[i] = torch.where(self.masks[w].to(images.device), fill, images)
        return copies.flatten(0, 1)

    def order(self) -> NDArray[np.int64]:
        """The windows so that neighbours in the order lie equally far from the borders.

        Boxes near a border grow less on their way through a network, so batches of equal ones are cheaper.
        """
        keys: list[NDArray[np.int64]] = [np.zeros(len(self), np.int64)]
        for first, n, size in zip(self.firsts, self.shape[1:], self.size, strict=True):
            keys.append(np.minimum(first, n - size - first) * 9 // n)
        return np.lexsort((*self.firsts[::-1], *keys[::-1]))

    def spread(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(R, *shape): of ``changes`` (W, R) the mean over the windows that cover an element; NaN where none does."""
        total, counts = np.zeros((changes.shape[1], *self.shape)), np.zeros((1, *self.shape))
        for w, change in enumerate(changes.reshape(*changes.shape, *[1] * len(self.shape))):
            box = (slice(None), *self.box(w))
            covered = 1 if self.masks is None else self.masks[w][self._box(w)].numpy()
            total[box] += change * covered
            counts[box] += covered
        with np.errstate(invalid="ignore"):
            return total / counts

    def _box(self, w: int) -> tuple[slice, ...]:
        """The box of window ``w`` in (C, *S), all channels."""
        spans = zip(self.firsts[:, w], self.size, strict=True)
        return slice(None), *(slice(int(a), int(a) + n) for a, n in spans)


def circles(space: Sequence[int], radius: int, stride: int) -> Tensor:
    """Masks (W, *S) of discs of ``radius`` pixels about every ``stride``-th pixel, row by row.

    Raises:
        InvalidInput: a radius or stride below 1.
    """
    if radius < 1 or stride < 1:
        raise InvalidInput(f"radius is {radius}, stride {stride}; expected 1 pixel or more each")
    centres = [np.arange(stride // 2, n, stride) for n in space]
    grid = np.stack([c.ravel() for c in np.meshgrid(*centres, indexing="ij")])
    distance = sum(
        (np.arange(n)[None] - grid[axis][:, None]).reshape(-1, *[n if a == axis else 1 for a in range(len(space))]) ** 2
        for axis, n in enumerate(space)
    )
    return torch.from_numpy(np.asarray(distance) <= radius**2)


def segments(labels: Tensor | NDArray[np.integer]) -> Tensor:
    """Masks (W, *S), one for each label of a label image (*S), such as superpixels; lowest label first.

    Raises:
        InvalidInput: not whole numbers.
    """
    image = torch.as_tensor(np.array(labels) if isinstance(labels, np.ndarray) else labels, device="cpu")
    if image.is_floating_point() or image.dtype == torch.bool or not image.numel():
        raise InvalidInput(f"labels are {image.dtype} {tuple(image.shape)}; expected whole numbers, one a pixel")
    return torch.stack([image == label for label in image.unique().tolist()])
