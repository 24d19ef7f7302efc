"""Which part of each value a patch changes, and how operations with windows move it.

Per axis, for a changed stretch [a, a + n), a kernel K (dilation included), stride S, padding P and output length O:
the first changed output is ceil((a + P - K + 1) / S), at least 0; the last is floor((a + n - 1 + P) / S), at most
O - 1 (Krypton, SIGMOD 2019). Each patch's stretches are kept as they are; what is computed for several patches
together are boxes of one size, the largest, shifted inside at the borders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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

    @cached_property
    def size(self) -> tuple[int, ...]:
        """The extent, in cells, of boxes that hold any window's change."""
        return tuple((self.ends - self.starts).max(axis=1).tolist())

    @cached_property
    def firsts(self) -> Firsts:
        """Where each window's box begins."""
        return np.minimum(self.starts, (np.asarray(self.space) - self.size)[:, None])

    @property
    def coverage(self) -> float:
        """The share of the value that a box covers."""
        return math.prod(self.size) / math.prod(self.space)

    def through(self, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int],
                space: Sequence[int]) -> Region:  # fmt: skip
        """What changes of the outputs of a windowed operation, in an output of extent ``space``."""
        if _by_cell(kernel, stride, before) and tuple(space) == self.space:
            return self
        k, s, p, o = (np.asarray(item)[:, None] for item in (kernel, stride, before, space))
        starts = np.minimum(np.maximum(-((k - 1 - self.starts - p) // s), 0), o - 1)
        ends = np.minimum(np.maximum((self.ends - 1 + p) // s, starts), o - 1) + 1
        return Region(self.axes, tuple(space), starts, ends)

    def read_by(self, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int]) -> Boxes | Region:
        """The boxes of the padded input that the outputs in these boxes read; cell 0 is the first before padding."""
        if _by_cell(kernel, stride, before):
            return self
        size = tuple((n - 1) * s + k for n, k, s in zip(self.size, kernel, stride, strict=True))
        columns = [np.asarray(item)[:, None] for item in (stride, before)]
        return Boxes(self.axes, size, self.firsts * columns[0] - columns[1])

    def at(self, axes: tuple[int, ...]) -> Region:
        """The same where the spatial axes have moved to ``axes``."""
        return replace(self, axes=axes)

    def grown_by(self, before: Sequence[int], space: Sequence[int]) -> Region:
        """The same in a value with ``before`` more cells in front."""
        shift = np.asarray(before)[:, None]
        return Region(self.axes, tuple(space), self.starts + shift, self.ends + shift)

    def same(self, other: Region) -> bool:
        """Whether the same changes."""
        return self is other or np.array_equal(self.starts, other.starts) and np.array_equal(self.ends, other.ends)


def _by_cell(kernel: Sequence[int], stride: Sequence[int], before: Sequence[int]) -> bool:
    """Whether each output reads the cell at its own place, and no other."""
    return all(n == 1 for n in (*kernel, *stride)) and not any(before)


def union(regions: Sequence[Region]) -> Region:
    """What any of ``regions`` changes, and what lies between: one of them, if it holds the others."""
    if all(regions[0].same(other) for other in regions[1:]):
        return regions[0]
    starts = np.min([r.starts for r in regions], axis=0)
    whole = replace(regions[0], starts=starts, ends=np.max([r.ends for r in regions], axis=0))
    return next((region for region in regions if region.same(whole)), whole)
