"""Which part of each value a patch changes: boxes of one size, and how operations with windows move them.

Per axis, for a changed stretch [a, a + n), a kernel K (dilation included), stride S, padding P and output length O:
the first changed output is ceil((a + P - K + 1) / S), at least 0; the last is floor((a + n - 1 + P) / S), at most
O - 1 (Krypton, SIGMOD 2019). All windows of a sweep share one size, the largest needed; at the borders the boxes
shift inside, so they may hold a few unchanged cells more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Firsts = NDArray[np.int64]
"""For each axis and each window of a sweep, the first cell of its box."""


@dataclass(frozen=True, eq=False)
class Region:
    """The changed boxes of one value (N, ...), one for each window of a sweep."""

    axes: tuple[int, ...]
    """The value's spatial axes, in ascending order; axis 0 is the batch's."""
    space: tuple[int, ...]
    """The value's extent along them, in cells."""
    size: tuple[int, ...]
    """The boxes' extent, in cells."""
    firsts: Firsts

    @property
    def coverage(self) -> float:
        """The share of the value that a box covers."""
        return math.prod(self.size) / math.prod(self.space)

    def through(self, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int],
                space: Sequence[int]) -> Region:  # fmt: skip
        """The boxes of the outputs that a windowed operation reads from these, in an output of extent ``space``."""
        sizes, firsts = [], []
        for a, n, k, s, p, o in zip(self.firsts, self.size, kernel, stride, before, space, strict=True):
            first = np.clip(-((k - 1 - a - p) // s), 0, o - 1)
            last = np.clip((a + n - 1 + p) // s, first, o - 1)
            sizes.append(int((last - first).max()) + 1)
            firsts.append(np.minimum(first, o - sizes[-1]))
        return Region(self.axes, tuple(space), tuple(sizes), np.stack(firsts))

    def read_by(self, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int]) -> Region:
        """The boxes of the padded input that the outputs in these boxes read; cell 0 is the first before padding."""
        size = tuple((n - 1) * s + k for n, k, s in zip(self.size, kernel, stride, strict=True))
        columns = [np.asarray(item)[:, None] for item in (stride, before)]
        return Region(self.axes, self.space, size, self.firsts * columns[0] - columns[1])

    def at(self, axes: tuple[int, ...]) -> Region:
        """The same boxes where the spatial axes have moved to ``axes``."""
        return Region(axes, self.space, self.size, self.firsts)

    def grown_by(self, before: Sequence[int], space: Sequence[int]) -> Region:
        """The same boxes in a value with ``before`` more cells in front."""
        return Region(self.axes, tuple(space), self.size, self.firsts + np.asarray(before)[:, None])

    def same(self, other: Region) -> bool:
        """Whether the boxes are the same."""
        return self.size == other.size and np.array_equal(self.firsts, other.firsts)


def union(regions: Sequence[Region]) -> Region:
    """The smallest boxes of one size that hold those of each of ``regions``."""
    if all(regions[0].same(other) for other in regions[1:]):
        return regions[0]
    first = np.min([r.firsts for r in regions], axis=0)
    ends = np.max([r.firsts + np.asarray(r.size)[:, None] for r in regions], axis=0)
    size = (ends - first).max(axis=1)
    space = np.asarray(regions[0].space)
    return Region(
        regions[0].axes, regions[0].space, tuple(size.tolist()), np.minimum(first, (space - size)[:, None])
    )
