"""Filters and matrix products as PyTorch's, to rounding, but faster where many batches use the same weights.

On a CPU in single precision oneDNN multiplies whole values by a matrix that is laid out for it once; ``linear`` lays
it out at every call. Wide filters of 3 x 3 cells are computed by Winograd's F(2 x 2, 3 x 3) (Lavin & Gray, CVPR 2016):
with 16 products for four outputs instead of 36, and smaller rounding errors than the direct sum's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[..., Tensor]

WIDE = 128
"""Channels in and out from which Winograd's products outweigh its sums; one of the two is twice as wide."""
FEW = 48
"""Tiles below which reading its weights takes longer than the direct sum."""
CACHED = 32_000_000
"""Bytes of tiles at a time, about what stays in a processor's last cache."""


def filtering(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    autocast: torch.dtype | None = None,
) -> Kernel:
    """A convolution of (B, C, *S), and of the padding on each axis: by default none."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    convolve = getattr(F, f"conv{weight.dim() - 2}d")

    def direct(boxes: Tensor, padding: int | Sequence[int] = 0) -> Tensor:
        return convolve(boxes, weight, bias, stride, padding, dilation, groups)

    outward, inward, *size = weight.shape
    wide = min(outward, inward) >= WIDE and max(outward, inward) >= 2 * WIDE
    fits = size == [3, 3] and groups == 1 and {*stride, *dilation} == {1} and weight.device.type == "cpu"
    precise = autocast is None and weight.dtype in (
        torch.float32,
        torch.float64,
    )  # its sums round in that dtype
    return Winograd(weight, bias, direct) if wide and fits and precise else direct


def product(weight: Tensor, bias: Tensor | None = None, autocast: torch.dtype | None = None) -> Kernel:
    """Rows (..., I) times a matrix (O, I), plus a bias."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    packs = weight.device.type == "cpu" and weight.dtype == torch.float32 and autocast is None
    if not packs or not _packing_works():
        return lambda rows: F.linear(rows, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    call = torch.ops.mkldnn._linear_pointwise
    return lambda rows: call(rows, packed, bias, "none", [], "")


class Winograd:
    """A filter of 3 x 3 cells, stride 1, on (B, C, H, W): each tile of 4 x 4 cells gives 2 x 2 outputs.

    Along an axis, the four cells of a tile become (x0 - x2, x1 + x2, x2 - x1, x1 - x3), the filter's three taps become
    (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2); of their four products, m0 + m1 + m2 and m1 - m2 - m3 are the
    outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, direct: Kernel) -> None:
        taps = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64, device="cpu") / 2
        cells = weight.double().flatten(2).movedim(2, 0).flatten(1)
        self._products = []
        for column in taps:  # as the tiles' columns go before their rows
            for row in taps:
                matrix = (torch.outer(row, column).flatten() @ cells).view(weight.shape[:2])
                self._products.append(product(matrix.to(weight.dtype)))
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias
        self._direct, self._channels = direct, sum(weight.shape[:2])

    def __call__(self, boxes: Tensor, padding: Sequence[int] = (0, 0)) -> Tensor:
        """(B, O, H - 2, W - 2), of the padded boxes."""
        if any(padding):
            boxes = F.pad(boxes, [padding[1], padding[1], padding[0], padding[0]])
        cells = boxes.movedim(1, 3)
        height, width = cells.shape[1] - 2, cells.shape[2] - 2
        tiles = ((height + 1) // 2) * ((width + 1) // 2)
        if tiles * len(cells) < FEW:
            return self._direct(boxes)
        outputs = cells.new_empty(len(cells), height, width, len(self._bias))
        bytes_each = 16 * tiles * self._channels * cells.element_size()
        parts = max(1, round(len(cells) * bytes_each / CACHED))
        for few, output in zip(cells.tensor_split(parts), outputs.tensor_split(parts), strict=True):
            if len(few):
                self._compute(few, output)
        return outputs.movedim(3, 1)

    def _compute(self, cells: Tensor, output: Tensor) -> None:
        count, height, width, _ = output.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2
        tall = cells.new_empty(4, count, rows, width + 2, cells.shape[3])
        _to_tiles(cells, 1, tall)
        tiles = cells.new_empty(4, 4, count, rows, columns, cells.shape[3])
        _to_tiles(tall, 3, tiles)
        flat = tiles.view(16, -1, cells.shape[3])
        products = [multiply(each) for multiply, each in zip(self._products, flat, strict=True)]
        halves = [_from_tiles(*products[i::4]) for i in range(4)]
        for x, column in enumerate(zip(*halves, strict=True)):
            for y, part in enumerate(_from_tiles(*column)):
                place = output[:, y::2, x::2]
                part = part.view(count, rows, columns, -1)[:, : place.shape[1], : place.shape[2]]
                torch.add(part, self._bias, out=place)


def _to_tiles(cells: Tensor, axis: int, tiles: Tensor) -> None:
    """Write to ``tiles`` (4, ...) what tiles of four cells, two apart, become along an axis."""
    count = tiles.shape[axis + 1]
    every = [cells[(slice(None),) * axis + (slice(i, i + 2 * count, 2),)] for i in range(4)]
    torch.sub(every[0], every[2], out=tiles[0])
    torch.add(every[1], every[2], out=tiles[1])
    torch.sub(every[2], every[1], out=tiles[2])
    whole = every[3].shape[axis]  # the last tile of an odd extent lacks a cell; what it gives is not used
    torch.sub(every[1].narrow(axis, 0, whole), every[3], out=tiles[3].narrow(axis, 0, whole))
    tiles[3].narrow(axis, whole, count - whole).zero_()


def _from_tiles(m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd outputs; overwrites its arguments."""
    m0.add_(m1).add_(m2)
    m1.sub_(m2).sub_(m3)
    return m0, m1


@functools.cache
def _packing_works() -> bool:
    """Whether this build of PyTorch has the operations, and they give what the public one gives."""
    rows = torch.arange(48, dtype=torch.float32, device="cpu").view(-1, 2) / 7
    matrix = rows[:3].cos()
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
        found = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.backends.mkldnn.is_available() and torch.allclose(found, F.linear(rows, matrix), rtol=1e-4)
