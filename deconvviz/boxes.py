"""Signals that live in a box: what is left of a signal that starts from single units.

A unit depends on a few cells of the values before it, so on its way back its signal is zero but for a box that
grows from step to step. A :class:`Boxed` signal holds that box alone: M projections of N images, each with a
box of its own, all of one size. Where the boxes cover most of a value they end, and the signal goes on whole.

Axes: M projections, N images, C channels, S spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE_FROM = 0.7
"""The share of a value from which its boxes are no longer worth the bookkeeping."""


@dataclass(frozen=True, eq=False)
class Boxed:
    """A signal (M, N, C, *space) that is zero outside its boxes."""

    content: Tensor
    """(M, N, C, *size)."""
    firsts: Tensor
    """(S, M or 1, N), int64 on the CPU: the boxes' first cells along each axis. A box may reach beyond the
    space; there the content is zero."""
    space: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The boxes' extent, in cells."""
        return tuple(self.content.shape[3:])

    @property
    def large(self) -> bool:
        """Whether a box covers most of the space."""
        return math.prod(self.size) >= WHOLE_FROM * math.prod(self.space)

    def holding(self, content: Tensor) -> Boxed:
        """The same boxes with other content."""
        return Boxed(content, self.firsts, self.space)

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, part: slice) -> Boxed:
        """Some of the projections."""
        firsts = self.firsts if self.firsts.shape[1] == 1 else self.firsts[:, part]
        return Boxed(self.content[part], firsts, self.space)

    def added_to(self, whole: Tensor) -> Tensor:
        """``whole`` (M, N, C, *space), changed in place: the signal is added to it."""
        rows: Iterable[int | slice] = [slice(None)] if self.firsts.shape[1] == 1 else range(len(self))
        for m, of_images in zip(rows, self.firsts.permute(1, 2, 0).tolist(), strict=True):
            for n, firsts in enumerate(of_images):
                cells = [
                    slice(max(first, 0), max(min(first + size, end), 0))
                    for first, size, end in zip(firsts, self.size, self.space, strict=True)
                ]
                held = [slice(c.start - first, max(c.stop - first, 0)) for c, first in zip(cells, firsts, strict=True)]
                place, part = (m, n, slice(None), *cells), (m, n, slice(None), *held)
                whole[place] += self.content[part]
        return whole

    def whole(self) -> Tensor:
        """The signal (M, N, C, *space) itself."""
        return self.added_to(self.content.new_zeros((*self.content.shape[:3], *self.space)))

    def part_of(self, value: Tensor) -> Tensor:
        """What ``value`` (N, C, *space) holds in the boxes: (M or 1, N, C, *size); beyond the space, anything."""
        axes, count, images = self.firsts.shape
        places = [
            torch.arange(images, device="cpu").view(1, -1, 1, *[1] * axes),
            torch.arange(value.shape[1], device="cpu").view(1, 1, -1, *[1] * axes),
        ]
        for axis, cells in enumerate(self._cells()):
            shape = [1] * axes
            shape[axis] = -1
            places.append(cells.clamp(0, self.space[axis] - 1).view(count, images, 1, *shape))
        return value[tuple(place.to(value.device) for place in places)]

    def inside(self) -> Boxed:
        """The same with zeros beyond the space."""
        content = self.content
        for axis, cells in enumerate(self._cells()):
            within = (cells >= 0) & (cells < self.space[axis])
            if not within.all():
                shape = [1] * len(self.space)
                shape[axis] = -1
                content = content * within.view(*within.shape[:2], 1, *shape).to(content.device, content.dtype)
        return self.holding(content)

    def _cells(self) -> list[Tensor]:
        """For each axis the cells (M or 1, N, size) of the boxes."""
        return [
            first.unsqueeze(-1) + torch.arange(n, device="cpu") for first, n in zip(self.firsts, self.size, strict=True)
        ]

    def __add__(self, other: Boxed | Tensor) -> Boxed | Tensor:
        """The sum of two signals at one value: in boxes that hold both, if they lie alike for all units."""
        if isinstance(other, Tensor):
            return self.added_to(other.clone())
        if other.firsts.shape == self.firsts.shape:
            shift = (other.firsts - self.firsts).flatten(1)
            if bool((shift == shift[:, :1]).all()):
                return _union(self, other, shift[:, 0].tolist())
        return self.added_to(other.whole())

    __radd__ = __add__


def _union(a: Boxed, b: Boxed, shift: Sequence[int]) -> Boxed:
    """The sum of two signals of which the second's boxes start ``shift`` cells after the first's."""
    padding: tuple[list[int], list[int]] = ([], [])
    axes = zip(a.size, b.size, shift, strict=True)
    for n, m, s in reversed(list(axes)):  # F.pad begins with the last
        end = max(n, s + m)
        padding[0].extend((max(-s, 0), end - n))
        padding[1].extend((max(s, 0), end - s - m))
    firsts = a.firsts + torch.tensor(shift, device="cpu").clamp(max=0).view(-1, 1, 1)
    return Boxed(F.pad(a.content, padding[0]) + F.pad(b.content, padding[1]), firsts, a.space)


def boxed(signal: Tensor) -> Boxed | Tensor:
    """A signal (M, N, C, *S) in boxes of one cell, if each of its (M, N) is zero everywhere else."""
    if signal.dim() < 4:
        return signal
    alive = signal.ne(0).any(2).flatten(2)
    if not bool((alive.sum(2) == 1).all()):
        return signal
    cells, space = alive.int().argmax(2), tuple(signal.shape[3:])
    where = cells[:, :, None, None].expand(*signal.shape[:3], 1)
    content = signal.flatten(3).gather(3, where).view(*signal.shape[:3], *[1] * len(space))
    return Boxed(content, torch.stack(torch.unravel_index(cells.cpu(), space)), space)


def settled(signal: Boxed) -> Boxed | Tensor:
    """The signal, whole if its boxes cover most of the space."""
    return signal.whole() if signal.large else signal
