"""Filters of 3 x 3 cells by Winograd's minimal filtering (Lavin & Gray, CVPR 2016), on a CPU.

Along an axis, six cells give four outputs of a filter of three taps: by twelve products as a direct sum; by six as a
product of polynomials, which is taken at the points 0, +-A, +-B and infinity. In two dimensions that leaves a quarter
of the products. Three outputs are what four are without the point 0, the first cell and the first output, so tiles of
both kinds share the weights. At these points the result rounds about as the direct sum does; at the usual +-1 and +-2
two to four times worse (on the choice of points: Barabasz et al., ACM TOMS 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

A, B = 5 / 8, 3 / 2
TRANSFORMED = 100
"""What it costs to bring a channel of cells to one of the points, or of outputs back from it, in multiply-adds."""
FEW = 48
"""Tiles below which reading the weights takes longer than the direct sum."""
CACHED = 32_000_000
"""Bytes of tiles at a time, about what stays in a processor's last cache."""


class Winograd:
    """A filter of 3 x 3 cells, stride 1, on (N, C, H, W).

    Args:
        weight: (O, C, 3, 3).
        bias: (O,).
        direct: the same filter of images and their padding, for those where it takes less.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, direct: Callable[[Tensor, Sequence[int]], Tensor]) -> None:
        self._weight, self._direct = weight, direct
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias

    def __call__(self, images: Tensor, padding: Sequence[int] = (0, 0)) -> Tensor:
        """(N, O, H - 2, W - 2), of the padded images."""
        count, inward, *extent = images.shape
        outward = len(self._bias)
        height, width = (n + 2 * p - 2 for n, p in zip(extent, padding, strict=True))
        (rows, tall), (columns, wide) = _tiles(height), _tiles(width)
        products = rows * (tall + 2) * columns * (wide + 2)
        cost = products * (inward * outward + TRANSFORMED * (inward + outward))
        if count * rows * columns < FEW or cost > 9 * height * width * inward * outward:
            return self._direct(images, padding)
        top, left = padding
        rest = [left, left + columns * wide - width, top, top + rows * tall - height]
        cells = (F.pad(images, rest) if any(rest) else images).movedim(1, 3)
        output = cells.new_empty(count, height, width, outward)
        parts = max(1, round(count * products * (inward + outward) * cells.element_size() / CACHED))
        for some, place in zip(cells.tensor_split(parts), output.tensor_split(parts), strict=True):
            if len(some):
                self._filter(some, place, (rows, columns), (tall, wide))
        return output.movedim(3, 1)

    @cached_property
    def _weights(self) -> Tensor:
        """(6, 6, C, O): the filter at the points, the columns' first."""
        powers = torch.tensor([[1.0, p, p * p] for p in (A, -A, B, -B, 0.0)], dtype=torch.float64, device="cpu")
        square, other = A * A, B * B
        scale = [2 * square * (square - other)] * 2 + [2 * other * (other - square)] * 2 + [square * other]
        taps = torch.tensor([[0, 0, A**-3]], dtype=torch.float64, device="cpu")
        taps = torch.cat([taps, powers / torch.tensor(scale, dtype=torch.float64, device="cpu")[:, None]])
        pairs = torch.einsum("xj,yi->xyij", taps, taps).flatten(2)
        cells = self._weight.permute(2, 3, 1, 0).reshape(9, -1).double()
        weights = self._weight.new_empty(6, 6, self._weight.shape[1], len(self._weight))
        for some, place in zip(pairs, weights, strict=True):
            place.copy_((some @ cells).view_as(place))
        return weights

    def _filter(self, cells: Tensor, output: Tensor, tiles: Sequence[int], outputs: Sequence[int]) -> None:
        """Write the outputs (N, H, W, O) of cells (N, h, w, C)."""
        (rows, columns), (tall, wide) = tiles, outputs
        count, _, width, channels = cells.shape
        lines = cells.new_empty(6, count, rows, width, channels)
        lines = _to_points(cells, 1, tall, lines)
        places = cells.new_empty(6, len(lines), count, rows, columns, channels)
        places = _to_points(lines, 3, wide, places).flatten(2, 4)
        values = cells.new_empty(*places.shape[:-1], len(self._bias))
        for place, weights, value in zip(places, self._weights, values, strict=False):
            torch.bmm(place, weights[: len(lines)], out=value)
        for x, (power, column) in enumerate(_from_points(values, wide)):
            for y, (other, part) in enumerate(_from_points(column, tall)):
                to = output[:, y::tall, x::wide]
                part = part.view(count, rows, columns, -1)[:, : to.shape[1], : to.shape[2]]
                torch.add(self._bias, part, alpha=A ** (power + other), out=to)


def _tiles(outputs: int) -> tuple[int, int]:
    """How many tiles of four or of three outputs take the fewest products along an axis; and which of the two."""
    return min(((-(-outputs // each), each) for each in (4, 3)), key=lambda tiles: tiles[0] * (tiles[1] + 2))


def _to_points(cells: Tensor, axis: int, outputs: int, points: Tensor) -> Tensor:
    """Write tiles along an axis of some cells at infinity, A, -A, B, -B and, for tiles of four outputs, 0; (6, ...)."""
    count = points.shape[axis + 1]

    def cell(i: int) -> Tensor:
        first = i - (4 - outputs)
        return cells[(slice(None),) * axis + (slice(first, first + outputs * (count - 1) + 1, outputs),)]

    square, other = A * A, B * B
    one, two, three, four, five = map(cell, range(1, 6))
    even = torch.sub(four, two, alpha=other, out=points[0])
    odd = torch.sub(three, one, alpha=other, out=points[2])
    torch.add(even, odd, alpha=A, out=points[1])
    torch.sub(even, odd, alpha=A, out=odd)
    even = torch.sub(four, two, alpha=square, out=points[5])
    odd = torch.sub(three, one, alpha=square, out=points[4])
    torch.add(even, odd, alpha=B, out=points[3])
    torch.sub(five, three, alpha=square, out=points[0]).sub_(odd, alpha=other)
    torch.sub(even, odd, alpha=B, out=odd)
    if outputs == 4:
        even.sub_(two, alpha=other).add_(cell(0), alpha=square * other)
    return points[: outputs + 2]


def _from_points(values: Tensor, outputs: int) -> list[tuple[int, Tensor]]:
    """The outputs of tiles (outputs + 2, ...), each to be multiplied by a power of A; overwrites the values."""
    infinity, plus, minus, plus_other, minus_other = values[:5]
    odd, even = plus - minus, plus.add_(minus)
    odd_other, even_other = torch.sub(plus_other, minus_other, out=minus), plus_other.add_(minus_other)
    ratio = B / A
    first = [(0, values[5].add_(even).add_(even_other))] if outputs == 4 else []
    last = infinity.add_(odd).add_(odd_other, alpha=ratio**3)
    return [*first, (1, odd.add_(odd_other, alpha=ratio)), (2, even.add_(even_other, alpha=ratio**2)), (3, last)]
