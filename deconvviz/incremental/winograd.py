"""Filters of 3 or 5 taps along an axis by Winograd's minimal filtering (Lavin & Gray, CVPR 2016), on a CPU.

Along an axis, m outputs of a filter of r taps take m * r products as a direct sum; and m + r - 1 as a product of
polynomials (Toom & Cook), which is taken at as many points, infinity the last. Three matrices lead there and back: from
cells to the points, from taps to the points, and from the points to outputs. In two dimensions the savings multiply:
four by four outputs of 3 x 3 taps take a quarter of the products. Without the point 0, the first cell and the first
output, a tile has one output less, so tiles of both kinds share the weights. The points decide how the result rounds
(Barabasz et al., ACM TOMS 2020): at these, one to eight times as coarsely as the direct sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial.polynomial import polyfromroots
from numpy.typing import NDArray
from torch import Tensor

POINTS = {
    1: [],
    3: [0, 5 / 8, -5 / 8, 3 / 2, -3 / 2],
    5: [0, 1 / 2, -1 / 2, 11 / 10, -11 / 10, 7 / 4, -7 / 4],
}
"""By the number of taps, where the polynomials are taken beside infinity: enough for four outputs."""
MOVED = 80
"""What it costs to bring a channel of one cell to a point, or of one point to an output, beside the products with the
matrices; in multiply-adds."""
FEW = 48
"""Tiles below which reading the weights takes longer than the direct sum."""
CACHED = 16_000_000
"""Bytes of tiles at a time: what larger ones take is given back to the system, and had anew for each."""


@dataclass(frozen=True)
class Tiles:
    """How one axis is cut: tiles of so many outputs of a filter of so many taps."""

    count: int
    outputs: int
    taps: int

    @property
    def cells(self) -> int:
        """Of one tile; also its points."""
        return self.outputs + self.taps - 1

    @classmethod
    def over(cls, extent: int, taps: int) -> Tiles:
        """Those that take the fewest products for an extent of outputs."""
        most = len(POINTS[taps]) + 2 - taps
        kinds = [cls(-(-extent // outputs), outputs, taps) for outputs in (most, max(1, most - 1))]
        return min(kinds, key=lambda tiles: tiles.count * tiles.cells)


class Winograd:
    """A filter with stride 1, on (N, C, H, W).

    Args:
        weight: (O, C, *taps), taps that :meth:`can` filter.
        bias: (O,).
        direct: the same filter of images and their padding, for those where it takes less.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, direct: Callable[[Tensor, Sequence[int]], Tensor]) -> None:
        self._weight, self._direct = weight, direct
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias

    @staticmethod
    def can(taps: Sequence[int]) -> bool:
        """Whether there are points for these numbers of taps."""
        return len(taps) == 2 and {*taps} <= POINTS.keys() and max(taps) > 1

    def __call__(self, images: Tensor, padding: Sequence[int] = (0, 0)) -> Tensor:
        """(N, O, *outputs), of the padded images."""
        count, inward, *extent = images.shape
        outward, _, *taps = self._weight.shape
        height, width = (n + 2 * p - t + 1 for n, p, t in zip(extent, padding, taps, strict=True))
        down, across = (Tiles.over(n, t) for n, t in zip((height, width), taps, strict=True))
        tiles, outputs, cells = down.count * across.count, down.outputs * across.outputs, down.cells * across.cells
        matrices = cells * (cells * inward + outputs * outward)
        cost = tiles * (matrices + cells * (inward * outward + MOVED * (inward + outward)))
        if count * tiles < FEW or cost > math.prod(taps) * height * width * inward * outward:
            return self._direct(images, padding)
        top, left = padding
        rest = [left, left + across.count * across.outputs - width, top, top + down.count * down.outputs - height]
        padded = (F.pad(images, rest) if any(rest) else images).movedim(1, 3)
        output = padded.new_empty(count, height, width, outward)
        parts = max(1, round(count * tiles * cells * (inward + outward) * padded.element_size() / CACHED))
        for some, place in zip(padded.tensor_split(parts), output.tensor_split(parts), strict=True):
            if len(some):
                self._filter(some, place, down, across)
        return output.movedim(3, 1)

    @cached_property
    def _weights(self) -> Tensor:
        """(X, Y, C, O): the filter at the points of both axes."""
        down, across = (_transforms(taps).taps for taps in self._weight.shape[2:])
        pairs = torch.from_numpy(np.einsum("xj,yi->xyij", across, down)).flatten(2)
        taps = self._weight.permute(2, 3, 1, 0).flatten(2).flatten(0, 1).double()
        weights = self._weight.new_empty(*pairs.shape[:2], *self._weight.shape[1::-1])
        for some, place in zip(pairs, weights, strict=True):
            place.copy_((some @ taps).view_as(place))
        return weights

    def _filter(self, images: Tensor, output: Tensor, down: Tiles, across: Tiles) -> None:
        """Write the outputs (N, H, W, O) of images (N, h, w, C)."""
        to, back = _matrices((down.outputs, down.taps), (across.outputs, across.taps), images.dtype)
        cells = images.unfold(1, down.cells, down.outputs).unfold(2, across.cells, across.outputs)
        cells = cells.permute(5, 4, 0, 1, 2, 3).reshape(len(to), -1)
        points = torch.mm(to, cells).view(across.cells, down.cells, -1, images.shape[3])
        products = points.new_empty(*points.shape[:3], len(self._bias))
        weights = self._weights[-across.cells :, -down.cells :]
        for point, weight, product in zip(points, weights, products, strict=True):
            torch.bmm(point, weight, out=product)
        sums = torch.mm(back, products.view(len(to), -1))
        for i, part in enumerate(sums.view(len(back), len(images), down.count, across.count, -1)):
            x, y = divmod(i, down.outputs)
            place = output[:, y :: down.outputs, x :: across.outputs]
            torch.add(self._bias, part[:, : place.shape[1], : place.shape[2]], out=place)


class Transforms(NamedTuple):
    """Of a tile of most outputs along one axis: three matrices, in double precision."""

    cells: NDArray[np.float64]
    """From its cells to the points."""
    taps: NDArray[np.float64]
    """From the filter's taps to the points."""
    outputs: NDArray[np.float64]
    """From the points to its outputs."""


@functools.cache
def _transforms(taps: int) -> Transforms:
    points = np.asarray(POINTS[taps], float)
    n = len(points) + 1
    cells, scales = np.zeros((n, n)), np.ones((n, 1))
    cells[-1] = polyfromroots(points)
    for i, point in enumerate(points):
        others = np.delete(points, i)
        cells[i, :-1] = polyfromroots(others)
        scales[i] = np.prod(point - others)

    def powers(most: int) -> NDArray[np.float64]:
        """(n, most): of the points, from the zeroth; of infinity the last alone."""
        return np.vstack([points[:, None] ** np.arange(most), np.arange(most) == most - 1])

    return Transforms(cells, powers(taps) / scales, powers(n + 1 - taps).T)


@functools.cache
def _matrices(down: tuple[int, int], across: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From a tile's cells to the points of both axes, and from there to its outputs; by the outputs and taps."""
    to = back = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for outputs, taps in (across, down):
        cells, _, sums = map(torch.from_numpy, _transforms(taps))
        less = len(sums) - outputs
        to, back = torch.kron(to, cells[less:, less:]), torch.kron(back, sums[less:, less:])
    return to.to(dtype), back.to(dtype)
