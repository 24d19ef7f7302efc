"""Where each max fell, and how a signal is put back there (paper section 2.1, "unpooling").

A pool keeps, for every output cell, how far the maximum lies from the first place of its window, counted
along the flattened map. A window holds few distances, and their rest modulo 256, or a little less, tells them
apart: one byte a cell. Ties and all-zero windows take the first place in row-major order, as PyTorch's own
pools do, so switches never differ between runs.

Where windows overlap, several cells can have chosen the same input:

- ``overlap="sum"`` (default) adds their signals: the exact adjoint of pooling by these switches;
- ``overlap="overwrite"`` lets the last window in row-major order win: what ``nn.MaxUnpool2d`` does on
  one CPU thread, here on every device.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAPS = ("sum", "overwrite")
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """The pooling windows along each spatial dimension: first input indices, kernel, dilation, input size."""

    starts: tuple[Sizes, ...]
    kernel: Sizes
    dilation: Sizes
    size: Sizes

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def strided(size: Sizes, output: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Windows:
        """The windows of a max pool: cell o starts at input index ``o * stride - padding``."""
        starts = (tuple(range(-p, o * s - p, s)) for o, s, p in zip(output, stride, padding, strict=True))
        return Windows(tuple(starts), kernel, dilation, size)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def adaptive(size: Sizes, output: Sizes) -> Windows:
        """The windows of an adaptive pool: cell o covers ``[floor(o n / O), ceil((o + 1) n / O))``."""
        starts = tuple(tuple(i * n // o for i in range(o)) for n, o in zip(size, output, strict=True))
        kernel = tuple(math.ceil(n / o) + 1 for n, o in zip(size, output, strict=True))
        return Windows(starts, kernel, (1,) * len(kernel), size)

    def encode(self, indices: Tensor) -> Tensor:
        """Flat input indices (..., *output) to places: distances in the window, as a byte if it suffices."""
        modulus, _ = self._code
        if modulus == 256:  # as bytes wrap around
            places = indices.to(torch.uint8)
            for first in _firsts(self, indices.device, modulus):
                places -= first
            return places
        distances = indices - sum(_firsts(self, indices.device))
        return distances.to(torch.int32) if modulus is None else distances.remainder(modulus).to(torch.uint8)

    def decode(self, places: Tensor) -> Tensor:
        """The inverse of :meth:`encode`: flat input indices, int64."""
        modulus, distances = self._code
        if modulus is None:
            return places + sum(_firsts(self, places.device))
        table = torch.zeros(modulus, dtype=torch.long, device="cpu")
        for place, distance in distances.items():
            table[place] = distance
        return table.to(places.device)[places.long()] + sum(_firsts(self, places.device))

    def decode_part(self, places: Tensor, stride: Sequence[int], size: Sequence[int]) -> Tensor | None:
        """Places (..., *cells) of neighbouring windows, ``stride`` apart, to flat indices in the part (..., *size)
        of the map that begins with the first of them; ``None`` if places are not bytes, or if the map is so narrow that
        two cells of a window are equally far from its first."""
        modulus, distances = self._code
        if modulus is None or len(distances) < math.prod(self.kernel):
            return None
        widths = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        table = torch.zeros(modulus, dtype=torch.long, device="cpu")
        for within in itertools.product(*map(range, self.kernel)):
            steps = [i * dilation for i, dilation in zip(within, self.dilation, strict=True)]
            distance = sum(map(operator.mul, steps, self.widths))
            table[distance % modulus] = sum(map(operator.mul, steps, widths))
        starts = [
            torch.arange(n, device="cpu") * s * w
            for n, s, w in zip(places.shape[-len(size) :], stride, widths, strict=True)
        ]
        first = functools.reduce(lambda a, b: a.unsqueeze(-1) + b, starts)
        return table.to(places.device)[places.long()] + first.to(places.device)

    @functools.cached_property
    def _code(self) -> tuple[int | None, dict[int, int]]:
        """The modulus under which a window's distances all differ, if a byte holds it, and each one's rest."""
        if math.prod(self.kernel) <= 256:
            steps = zip(self.kernel, self.dilation, self.widths, strict=True)
            offsets = [range(0, kernel * dilation * width, dilation * width) for kernel, dilation, width in steps]
            distances = set(map(sum, itertools.product(*offsets)))
            for modulus in range(256, len(distances) - 1, -1):
                rests = {distance % modulus: distance for distance in distances}
                if len(rests) == len(distances):
                    return modulus, rests
        return None, {}

    @property
    def widths(self) -> list[int]:
        """How far apart neighbours along each dimension lie in the flattened map."""
        return [math.prod(self.size[axis + 1 :]) for axis in range(len(self.size))]

    @functools.cached_property
    def empty(self) -> bool:
        """Whether the windows lie wholly in the padding: all do if one does, as PyTorch's paddings are bounded."""
        axes = zip(self.starts, self.kernel, self.dilation, self.size, strict=True)
        return any(
            not any(0 <= start + dilation * i < size for i in range(kernel))
            for starts, kernel, dilation, size in axes
            for start in starts
        )


@functools.lru_cache(maxsize=256)
def _firsts(windows: Windows, device: torch.device, byte: int | None = None) -> list[Tensor]:
    """What each dimension adds to the index of a window's first place, shaped to broadcast over (*output)."""
    dtype = torch.long if byte is None else torch.uint8
    widths = windows.widths
    with torch.inference_mode(False):
        return [
            torch.tensor(
                [start * width % byte if byte else start * width for start in starts],
                dtype=dtype,
                device="cpu",
            )
            .to(device)
            .view(-1, *[1] * (len(widths) - 1 - axis))
            for axis, (starts, width) in enumerate(zip(windows.starts, widths, strict=True))
        ]


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
        if self.windows.empty:  # the maximum of nothing, at an index of nothing
            return signal.new_zeros((*signal.shape[:-spatial], *self.windows.size))
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
