"""Where each max fell, and how a signal is put back there (paper section 2.1, "unpooling").

A pool keeps, for every output cell, the place of the maximum inside its window: one byte where the
window has at most 256 places. Ties and all-zero windows take the first place in row-major order, as
PyTorch's own pools do, so switches never differ between runs.

Where windows overlap, several cells can have chosen the same input:

- ``overlap="sum"`` (default) adds their signals: the exact adjoint of pooling by these switches;
- ``overlap="overwrite"`` lets the last window in row-major order win: what ``nn.MaxUnpool2d`` does on
  one CPU thread, here on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAPS = ("sum", "overwrite")


@dataclass(frozen=True, slots=True)
class Windows:
    """The pooling windows along each spatial dimension: first input index, kernel, dilation, input size."""

    starts: tuple[Tensor, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def strided(
        cls,
        size: Sequence[int],
        output: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        *,
        device: torch.device,
    ) -> Windows:
        """The windows of a max pool: cell o starts at input index ``o * stride - padding``."""
        starts = tuple(
            torch.arange(o, device=device) * s - p for o, s, p in zip(output, stride, padding, strict=True)
        )
        return cls(starts, tuple(kernel), tuple(dilation), tuple(size))

    @classmethod
    def adaptive(cls, size: Sequence[int], output: Sequence[int], device: torch.device) -> Windows:
        """The windows of an adaptive pool: cell o covers ``[floor(o n / O), ceil((o + 1) n / O))``."""
        starts = tuple(torch.arange(o, device=device) * n // o for n, o in zip(size, output, strict=True))
        kernel = tuple(math.ceil(n / o) + 1 for n, o in zip(size, output, strict=True))
        return cls(starts, kernel, (1,) * len(kernel), tuple(size))

    def encode(self, indices: Tensor) -> Tensor:
        """Flat input indices (..., *output) to places inside the windows, in the smallest integer type."""
        # In floating point, where a floor is several times faster than an integer division; exact, as
        # every number here stays far below what the dtype counts in steps of one.
        exact = torch.float32 if math.prod(self.size) < 2**22 else torch.float64
        rest, weight = indices.to(exact), 1
        place: Tensor | None = None
        for axis in reversed(range(len(self.size))):
            coordinate = rest
            if axis:
                rest = (coordinate + 0.5).mul_(1 / self.size[axis]).floor_()
                coordinate = coordinate.sub_(rest, alpha=self.size[axis])
            offset = coordinate.sub_(self._along(axis)).mul_(weight / self.dilation[axis])
            place = offset if place is None else place.add_(offset)
            weight *= self.kernel[axis]
        places = math.prod(self.kernel)
        dtype = torch.uint8 if places <= 256 else torch.int16 if places <= 32768 else torch.int32
        return indices.to(dtype) if place is None else place.round_().to(dtype)

    def decode(self, places: Tensor) -> Tensor:
        """The inverse of :meth:`encode`: flat input indices, int64."""
        rest = places.long()
        flat = torch.zeros((), dtype=torch.long, device=places.device)
        weight = 1
        for axis in reversed(range(len(self.size))):
            offset = rest % self.kernel[axis]
            rest = torch.div(rest, self.kernel[axis], rounding_mode="floor")
            flat = flat + (self._along(axis) + offset * self.dilation[axis]) * weight
            weight *= self.size[axis]
        return flat

    def _along(self, axis: int) -> Tensor:
        """The window starts of one axis, shaped to broadcast over (*output)."""
        return self.starts[axis].view(-1, *[1] * (len(self.size) - 1 - axis))


@dataclass(frozen=True, slots=True)
class Switches:
    """The recorded places (N, C, *output) of the maxima of one pool over ``windows``."""

    places: Tensor
    windows: Windows

    @classmethod
    def record(cls, indices: Tensor, windows: Windows) -> Switches:
        """From the flat indices (N, C, *output) that ``return_indices=True`` gives."""
        return cls(windows.encode(indices), windows)

    def unpool(self, signal: Tensor, overlap: str = "sum") -> Tensor:
        """Signal (M, N, C, *output) at the pool's output to (M, N, C, *size) at its input."""
        spatial = len(self.windows.size)
        indices = self.windows.decode(self.places).flatten(-spatial)
        return unpool(signal, indices, self.windows.size, overlap)


def unpool(signal: Tensor, indices: Tensor, size: Sequence[int], overlap: str = "sum") -> Tensor:
    """Put ``signal`` (M, ..., *output) at flat ``indices`` (..., cells) of maps: (M, ..., *size)."""
    cells = indices.shape[-1]
    flat = signal.reshape(signal.shape[0], *indices.shape)
    if overlap == "overwrite":
        order = torch.arange(cells, device=indices.device).expand(indices.shape)
        winner = indices.new_full((*indices.shape[:-1], math.prod(size)), -1)
        winner.scatter_reduce_(-1, indices, order, "amax")
        flat = flat * (winner.gather(-1, indices) == order)
    out = flat.new_zeros((*flat.shape[:-1], math.prod(size)))
    out.scatter_add_(-1, indices.expand(flat.shape), flat)
    return out.view(*flat.shape[:-1], *size)
