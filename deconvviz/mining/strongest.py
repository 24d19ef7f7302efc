"""The k strongest units of every feature map of a layer, kept while images go by.

For each map: one unit an image, at the image's strongest position, ranked by::

    (larger value, lower image number, lower position)

A total order, so that parts of a data set can be merged in any order and grouping to the same bits. The state's
size depends on the maps and on k, not on the data. Counts are integers, and sums are kept one a merged part and
added exactly (``math.fsum``) when they are read, for the same reason.

>>> state = Strongest.empty(maps=2, axes=2, k=2)
>>> state = state.updated(torch.tensor([[[[0., 3.]], [[1., 1.]]], [[[5., 0.]], [[0., 0.]]]]), torch.tensor([7, 8]))
>>> state.values.tolist(), state.images.tolist(), state.positions[:, 0].tolist()
([[5.0, 3.0], [1.0, 0.0]], [[8, 7], [7, 8]], [[0, 0], [0, 0]])

Axes: C maps, k ranks (strongest first), D spatial axes, N images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NOBODY = 2**62
"""The image number of an empty rank: behind all others."""
EDGES = tuple(2.0 ** (i / 2) for i in range(-20, 21))
"""Edges of the histogram's bins: half octaves. The first bin holds what is below, the last what is not."""


@dataclass(frozen=True, eq=False)
class Strongest:
    """The state of one layer; every method gives a new one, so an interrupted batch leaves no trace."""

    values: Tensor
    """(C, k) float32, the units' activations; -inf in an empty rank."""
    images: Tensor
    """(C, k) int64, the numbers of the units' images; :data:`NOBODY` in an empty rank."""
    positions: Tensor
    """(C, k, D) int64, in map cells."""
    active: Tensor
    """(C,) int64, how many images activate the map anywhere (above zero)."""
    histogram: Tensor
    """(C, bins) int64, how many images have their strongest value between two of :data:`EDGES`."""
    sums: Tensor
    """(P, C) float64, the sum over images of the map's mean activation, for each of P merged parts; on the CPU, as MPS
    has no such numbers."""
    seen: int = 0
    """Images counted."""
    left_out: tuple[int, ...] = ()
    """Numbers of the images that were not: their activation holds a NaN or infinite value."""

    @classmethod
    def empty(cls, maps: int, axes: int, k: int, device: torch.device | str = "cpu") -> Strongest:
        """No image seen yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            torch.full((maps, k), -torch.inf, device=device),
            zeros(maps, k) + NOBODY,
            zeros(maps, k, axes),
            zeros(maps),
            zeros(maps, len(EDGES) + 1),
            torch.zeros(1, maps, dtype=torch.float64, device="cpu"),
        )

    def updated(self, activation: Tensor, images: Tensor) -> Strongest:
        """With more images: their activation (N, C, *S) and their numbers (N,).

        An image with a NaN or infinite value anywhere is :attr:`left_out`.
        """
        cells = activation.flatten(2) if activation.dim() > 2 else activation.unsqueeze(-1)
        values, means = cells.amax(2).float(), cells.mean(2, dtype=torch.float32)
        fine = means.isfinite().all(1)
        if not fine.all():
            left_out = (*self.left_out, *images[~fine].tolist())
            rest = self.updated(activation[fine], images[fine]) if fine.any() else self
            return replace(rest, left_out=left_out)
        bins = torch.bucketize(values, values.new_tensor(EDGES), right=True)
        counts = torch.zeros_like(self.histogram).scatter_add_(1, bins.T, torch.ones_like(bins.T))
        return replace(
            self._entered(cells, values.T, images, activation.shape[2:]),
            active=self.active + (values > 0).sum(0),
            histogram=self.histogram + counts,
            sums=torch.cat([self.sums[:-1], self.sums[-1:] + means.cpu().double().sum(0)]),
            seen=self.seen + len(images),
        )

    def _entered(self, cells: Tensor, values: Tensor, images: Tensor, space: torch.Size) -> Strongest:
        """With those of the values (C, N) that are among the strongest; ``cells`` is (N, C, prod(S))."""
        k = self.values.shape[1]
        last, numbers = self.values[:, -1:], images.expand(len(values), -1)
        enters = (values > last) | ((values == last) & (numbers < self.images[:, -1:]))
        maps = enters.any(1).nonzero()[:, 0]  # few, after the first images
        if not len(maps):
            return self
        all_values = torch.cat([self.values[maps], values[maps]], 1)
        all_images = torch.cat([self.images[maps], numbers[maps]], 1)
        chosen = _ranked(all_values, all_images, k)
        positions = self.positions[maps].gather(
            1, chosen.clamp(max=k - 1).unsqueeze(-1).expand(-1, -1, self.positions.shape[2])
        )
        row, rank = (chosen >= k).nonzero(as_tuple=True)
        flat = cells[chosen[row, rank] - k, maps[row]].argmax(1)  # of equal cells the first
        if space:
            positions[row, rank] = torch.stack(torch.unravel_index(flat, space), 1)
        return replace(
            self,
            values=self.values.index_copy(0, maps, all_values.gather(1, chosen)),
            images=self.images.index_copy(0, maps, all_images.gather(1, chosen)),
            positions=self.positions.index_copy(0, maps, positions),
        )

    def merged(self, other: Strongest) -> Strongest:
        """Of two parts of a data set, which share no image: that of both."""
        values, images, positions = (
            torch.cat([getattr(self, name), getattr(other, name).to(self.values.device)], 1)
            for name in ("values", "images", "positions")
        )
        chosen = _ranked(values, images, self.values.shape[1])
        return Strongest(
            values.gather(1, chosen),
            images.gather(1, chosen),
            positions.gather(1, chosen.unsqueeze(-1).expand(-1, -1, positions.shape[2])),
            self.active + other.active.to(self.active.device),
            self.histogram + other.histogram.to(self.histogram.device),
            torch.cat([self.sums, other.sums]).sort(0).values,
            self.seen + other.seen,
            tuple(sorted((*self.left_out, *other.left_out))),
        )

    def mean(self, fmap: int) -> float:
        """The mean activation of a map, over images and positions."""
        return math.fsum(self.sums[:, fmap].tolist()) / max(self.seen, 1)

    def to(self, device: torch.device | str) -> Strongest:
        """The same on another device."""
        tensors: dict[str, Any] = {
            name: item.to(device) for name, item in vars(self).items() if isinstance(item, Tensor) and name != "sums"
        }
        return replace(self, **tensors)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state as arrays, to be saved."""
        return {
            name: item.cpu().numpy() if isinstance(item, Tensor) else np.asarray(item, np.int64)
            for name, item in ((field.name, getattr(self, field.name)) for field in fields(self))
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: torch.device | str = "cpu") -> Strongest:
        """The inverse of :meth:`arrays`."""
        given: dict[str, Any] = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        seen, left_out = int(given.pop("seen")), tuple(given.pop("left_out").tolist())
        return cls(**given, seen=seen, left_out=left_out).to(device)


def _ranked(values: Tensor, images: Tensor, k: int) -> Tensor:
    """Where the k first of each row (C, n) are, by larger value, then lower image number: (C, k)."""
    by_image = images.argsort(stable=True, dim=1)
    by_value = values.gather(1, by_image).sort(dim=1, descending=True, stable=True).indices
    return by_image.gather(1, by_value[:, :k])
