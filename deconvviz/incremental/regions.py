"""Which part of each value a patch changes, and how operations with windows move it.

Per axis, for a changed stretch [a, a + n), a kernel K (dilation included), stride S, padding P and output length O:
the first changed output is ceil((a + P - K + 1) / S), at least 0; the last is floor((a + n - 1 + P) / S), at most
O - 1 (Krypton, SIGMOD 2019). Each patch's stretches are kept as they are; what is computed for several patches
together are boxes of one size, the largest, shifted inside at the borders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Firsts = NDArray[np.int64]
"""For each axis and each window of a group, the first cell of its box."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one size in a value (N, ...); those that are read may reach into the padding around it."""

    axes: tuple[int, ...]
    """The value's spatial axes, in ascending order; axis 0 is the batch's."""
    size: tuple[int, ...]
    """The boxes' extent, in cells."""
    firsts: Firsts


@dataclass(frozen=True, eq=False)
class Region:
    """What each window of a group changes of one value (N, ...)."""

    axes: tuple[int, ...]
    """The value's spatial axes, in ascending order; axis 0 is the batch's."""
    space: tuple[int, ...]
    """The value's extent along them, in cells."""
    starts: Firsts
    ends: Firsts
    """For each axis and window the stretch that changes, the end excluded."""

    @functools.cached_property
    def size(self) -> tuple[int, ...]:
        """The extent, in cells, of boxes that hold any window's change."""
        return tuple((self.ends - self.starts).max(axis=1).tolist())

    @functools.cached_property
    def firsts(self) -> Firsts:
        """Where each window's box begins."""
        return np.minimum(self.starts, _column(self.space) - _column(self.size))

    @functools.cached_property
    def coverage(self) -> float:
        """The share of the value that a box covers."""
        return math.prod(self.size) / math.prod(self.space)

    def through(self, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int],
                space: Sequence[int]) -> Region:  # fmt: skip
        """What changes of the outputs of a windowed operation, in an output of extent ``space``."""
        kernel, stride, before, space = map(tuple, (kernel, stride, before, space))
        if space == self.space and _by_cell(kernel, stride, before):
            return self
        k, s, p, o = map(_column, (kernel, stride, before, space))
        starts = np.minimum(np.maximum((self.starts + (p - k + s)) // s, 0), o - 1)
        ends = np.minimum(np.maximum((self.ends + (p - 1 + s)) // s, starts + 1), o)
        return Region(self.axes, space, starts, ends)

    def read_by(self, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int]) -> Boxes | Region:
        """The boxes of the padded input that the outputs in these boxes read; cell 0 is the first before padding."""
        kernel, stride, before = map(tuple, (kernel, stride, before))
        if _by_cell(kernel, stride, before):
            return self
        size = tuple((n - 1) * s + k for n, k, s in zip(self.size, kernel, stride, strict=True))
        return Boxes(self.axes, size, self.firsts * _column(stride) - _column(before))

    def at(self, axes: tuple[int, ...]) -> Region:
        """The same where the spatial axes have moved to ``axes``."""
        return replace(self, axes=axes)

    def grown_by(self, before: Sequence[int], space: Sequence[int]) -> Region:
        """The same in a value with ``before`` more cells in front."""
        shift = _column(tuple(before))
        return Region(self.axes, tuple(space), self.starts + shift, self.ends + shift)

    def same(self, other: Region) -> bool:
        """Whether the same changes."""
        return self is other or bool((self.starts == other.starts).all() and (self.ends == other.ends).all())


@functools.lru_cache(maxsize=1024)
def _column(numbers: tuple[int, ...]) -> Firsts:
    """One number for each axis, for all windows."""
    return np.asarray(numbers, np.int64)[:, None]


@functools.lru_cache(maxsize=1024)
def _by_cell(kernel: tuple[int, ...], stride: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Whether each output reads the cell at its own place, and no other."""
    return all(n == 1 for n in (*kernel, *stride)) and not any(before)


def union(regions: Sequence[Region]) -> Region:
    """What any of ``regions`` changes, and what lies between: one of them, if it holds the others."""
    if all(regions[0].same(other) for other in regions[1:]):
        return regions[0]
    starts = functools.reduce(np.minimum, [region.starts for region in regions])
    whole = replace(regions[0], starts=starts, ends=functools.reduce(np.maximum, [region.ends for region in regions]))
    return next((region for region in regions if region.same(whole)), whole)
