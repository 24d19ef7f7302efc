"""How a kernel's energy is spread over frequencies, and what of it a stride can carry.

The response of a filter w at frequency f is Σ_p w_p exp(-2πi f·p) over its window's positions p, so its energy in a
band B of frequencies is the quadratic form w' K w with K_pq the band's mean of cos(2π f·(p - q)): one small matrix
for a band, whatever the number of filters. Frequencies are in cycles a pixel of the layer's input, -1/2..1/2.

>>> import torch
>>> board = (-1.0) ** torch.arange(9).view(1, 1, 3, 3)        # a checkerboard: one change a pixel
>>> bool(Spectrum((3, 3)).share(board, 1 / 3, 1) > 0.95)
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Spectrum:
    """Energies of kernels of one size, on a grid of 64 x 64 frequencies that has no point on the usual edges.

    Args:
        kernel: height and width in weights.
        dilation: of each.
    """

    def __init__(self, kernel: tuple[int, int], dilation: Sequence[int] = (1, 1)) -> None:
        axis = (torch.arange(64, dtype=torch.float64, device="cpu") + 0.5) / 64 - 0.5
        places = [torch.arange(k, dtype=torch.float64, device="cpu") * d for k, d in zip(kernel, dilation, strict=True)]
        self.frequencies = torch.cartesian_prod(axis, axis)
        self.waves = torch.exp(2j * math.pi * (self.frequencies @ torch.cartesian_prod(*places).T))

    def share(self, weights: Tensor, low: float, high: float) -> Tensor:
        """The share (O,), 0..1, of each kernel's energy at ``low`` to ``high`` cycles a pixel, of (O, I, kh, kw)."""
        size = self.frequencies.norm(dim=1)
        return self._energy(weights, (size >= low) & (size < high)) / weights.square().sum((1, 2, 3))

    def carried(self, weights: Tensor, stride: Sequence[int]) -> Tensor:
        """The energy (O,) at frequencies that an output of this stride can carry: below 1/(2·stride) on both axes."""
        return self._energy(weights, (self.frequencies.abs() < 0.5 / torch.tensor(stride, device="cpu")).all(1))

    def _energy(self, weights: Tensor, inside: Tensor) -> Tensor:
        band = self.waves[inside]
        matrix = (band.mH @ band).real / len(self.waves)
        flat = weights.double().flatten(2)
        return (flat @ matrix * flat).sum((1, 2))
