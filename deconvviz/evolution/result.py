"""What a training looked like at some of its epochs: the result of a :class:`~deconvviz.evolution.FeatureEvolution`.

Axes: E looks, F chosen feature maps of a layer, C channels, S spatial axes of the image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import CheckpointError, FeatureMapOutOfRange, InvalidInput, UnknownLayer
from deconvviz.grid.feature_map import GREY, FeatureMap, fitted
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD, displayable, to_pixels
from deconvviz.mining.archive import load_archive, save_archive
from deconvviz.plotting.evolution import Strip, evolution_strips

CELL = 64
"""Pixels of a cell of the figure."""
SETTLED = 0.8
"""The median likeness from which on a layer counts as settled."""
_PICTURES = ("patches", "projections")


@dataclass(frozen=True, eq=False)
class Look:
    """The strongest unit of each chosen feature map after one epoch."""

    epoch: int
    weights: str
    """The model's fingerprint."""
    maps: Mapping[str, tuple[FeatureMap, ...]]
    """By layer; each with one unit, or none if every image gave NaN or infinite values."""

    @classmethod
    def of(cls, epoch: int, weights: str, maps: Mapping[str, Sequence[FeatureMap]]) -> Look:
        """With pictures as a file holds them: float32, on the CPU."""
        return cls(epoch, weights, {layer: tuple(map(_plain, of_layer)) for layer, of_layer in maps.items()})


@dataclass(frozen=True, eq=False)
class Evolution:
    """Feature maps through training (paper, figure 4); it prints as a table."""

    about: Mapping[str, Any]
    """Of which layers, feature maps, data and model, and the layers' ``frames``: (offset, jump, size) in pixels
    along each axis of what a unit sees, or (0, 0, image) where that is the whole image; the images' ``channels``."""
    looks: tuple[Look, ...]
    """By epoch."""

    @property
    def epochs(self) -> tuple[int, ...]:
        """E of them."""
        return tuple(look.epoch for look in self.looks)

    @property
    def layers(self) -> tuple[str, ...]:
        """As they were named."""
        return tuple(self.about["layers"])

    def fmaps(self, layer: str) -> tuple[int, ...]:
        """The numbers of a layer's F feature maps."""
        return tuple(found.fmap for found in self._of(self.looks[0], layer))

    def history(self, layer: str, fmap: int) -> tuple[FeatureMap, ...]:
        """One feature map at all looks: its strongest activation, image, patch and projection."""
        numbers = self.fmaps(layer)
        if fmap not in numbers:
            raise FeatureMapOutOfRange(f"map {fmap} of layer {layer!r} was not looked at: expected one of {numbers}")
        return tuple(self._of(look, layer)[numbers.index(fmap)] for look in self.looks)

    def values(self, layer: str) -> Tensor:
        """The strongest activations (E, F); NaN where there is none."""
        nothing = (float("nan"),)
        return torch.tensor(
            [[(found.values or nothing)[0] for found in self._of(look, layer)] for look in self.looks],
            device="cpu",
        )

    def images(self, layer: str) -> Tensor:
        """The numbers of the strongest images (E, F); -1 where the strongest activation is zero: a dead map."""
        return torch.tensor(
            [[found.images[0] if any(found.values) else -1 for found in self._of(look, layer)] for look in self.looks],
            device="cpu",
        )

    def jumps(self, layer: str) -> Tensor:
        """Where the strongest image is not that of the look before (E, F); never at the first look."""
        images = self.images(layer)
        return torch.cat([torch.zeros_like(images[:1], dtype=torch.bool), images[1:] != images[:-1]])

    def likeness(self, layer: str) -> Tensor:
        """Cosine of each look's projections with those of the look before (E - 1, F), -1..1.

        They are laid over each other as the unit sees them, wherever in its image it is. 0 where one of them is zero,
        NaN where both are.
        """
        cosines = torch.zeros(len(self.looks) - 1, len(self.fmaps(layer)), dtype=torch.float64, device="cpu")
        for e, (before, after) in enumerate(pairwise(self.looks)):
            for m, units in enumerate(zip(self._of(before, layer), self._of(after, layer), strict=True)):
                first, second = (self._projection(unit).double().flatten() for unit in units)
                if first.any() == second.any():  # 0/0 if both are zero
                    cosines[e, m] = first @ second / (first.norm() * second.norm())
        return cosines.clamp(-1, 1)

    def settled(self, layer: str, likeness: float = SETTLED) -> int | None:
        """The first epoch after which the median likeness is at no look below ``likeness``; ``None`` if not yet."""
        alike = (self.likeness(layer).nanmedian(1).values >= likeness).tolist()
        settled = None
        for epoch, still in zip(reversed(self.epochs[:-1]), reversed(alike), strict=True):
            if not still:
                break
            settled = epoch
        return settled

    def figure(
        self,
        maps: int = 6,
        patches: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> Figure:
        """Draw figure 4: each layer's projections, a row a map and a column an epoch; jumps are framed.

        Args:
            maps: how many of each layer's maps, the first ones.
            patches: what was projected below each projection.
            mean, std: those that the images were normalised with, see :func:`~deconvviz.images.to_pixels`.

        Raises:
            InvalidInput: ``maps`` is below 1, or the images are no pictures.
        """
        if maps < 1:
            raise InvalidInput(f"maps is {maps}; expected 1 or more")
        axes = {len(self.about["frames"][layer]) for layer in self.layers}
        if axes != {2}:
            raise InvalidInput(
                f"the images have {max(axes)} spatial axes, and the figure shows pictures (C, H, W): draw from values, "
                "jumps, likeness and history(layer, fmap)[look].projections"
            )
        strips = []
        for layer in self.layers:
            numbers, jumps, settled = self.fmaps(layer)[:maps], self.jumps(layer), self.settled(layer)
            rows, labels, framed = [], [], []
            for m, number in enumerate(numbers):
                history = self.history(layer, number)
                rows.append([fitted(displayable(self._projection(found)), CELL) for found in history])
                labels.append(str(number))
                framed.append(jumps[:, m].tolist())
                if patches:
                    rows.append([fitted(self._patch(found, mean, std), CELL) for found in history])
                    labels.append("")
                    framed.append([False] * len(history))
            when = f"settled at epoch {settled}" if settled is not None else "not settled"
            strips.append(Strip(f"{layer}: {when}", rows, labels, framed))
        return evolution_strips(strips, self.epochs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file, all of it or nothing; raises :class:`CheckpointError` if it can't."""
        looks, arrays = [], {}
        for e, look in enumerate(self.looks):
            of_layers = []
            for n, layer in enumerate(self.layers):
                of_maps = []
                for m, found in enumerate(look.maps[layer]):
                    of_maps.append({f.name: getattr(found, f.name) for f in fields(found) if f.name not in _PICTURES})
                    for kind in _PICTURES:
                        for unit, picture in enumerate(getattr(found, kind)):
                            arrays[f"{e}.{n}.{m}.{kind}.{unit}"] = picture.numpy()
                of_layers.append(of_maps)
            looks.append({"epoch": look.epoch, "weights": look.weights, "maps": of_layers})
        save_archive(path, {"evolution": self.about, "looks": looks}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evolution:
        """Read a file of :meth:`save`; raises :class:`CheckpointError` if it is damaged."""
        header, arrays = load_archive(path)
        try:
            about, looks = header["evolution"], []
            for e, look in enumerate(header["looks"]):
                maps = {
                    layer: tuple(
                        _feature_map(facts, {
                            kind: [torch.from_numpy(arrays[f"{e}.{n}.{m}.{kind}.{unit}"])
                                   for unit in range(len(facts["values"]))] for kind in _PICTURES
                        }) for m, facts in enumerate(look["maps"][n])
                    ) for n, layer in enumerate(about["layers"])
                }  # fmt: skip
                looks.append(Look(int(look["epoch"]), str(look["weights"]), maps))
            return cls(about, tuple(looks))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a file of FeatureEvolution: give another, or delete it to start afresh"
            ) from error

    def __str__(self) -> str:
        width = max(len("layer"), *map(len, self.layers))
        lines = [f"{'layer':<{width}} settled  jumps at epoch {' '.join(f'{epoch:>4}' for epoch in self.epochs[1:])}"]
        for layer in self.layers:
            settled = self.settled(layer)
            shares = self.jumps(layer)[1:].float().mean(1).tolist()
            when = "not yet" if settled is None else str(settled)
            lines.append(f"{layer:<{width}} {when:>7}  {'':14} {' '.join(f'{share:>4.0%}' for share in shares)}")
        return "\n".join(lines)

    def _of(self, look: Look, layer: str) -> tuple[FeatureMap, ...]:
        if layer not in look.maps:
            raise UnknownLayer(f"layer {layer!r} was not looked at; expected one of {self.layers}")
        return look.maps[layer]

    def _projection(self, found: FeatureMap) -> Tensor:
        """The unit's projection (C, *size) in the frame of what units of its layer see: all of one size.

        Where that reaches over the image's border it is zero.
        """
        sizes = (size for _, _, size in self.about["frames"][found.layer])
        framed = torch.zeros(self.about["channels"], *sizes, device="cpu")
        if found.projections:
            where = slice(None), *self._where(found)
            framed[where] = found.projections[0]
        return framed

    def _patch(self, found: FeatureMap, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
        """The unit's patch as pixels (h, w, 3) in the same frame; mid-grey over the border."""
        sizes = (size for _, _, size in self.about["frames"][found.layer])
        framed = np.full((*sizes, 3), GREY, np.uint8)
        if found.patches and found.patches[0].numel():
            framed[self._where(found)] = to_pixels(found.patches[0], mean, std)
        return framed

    def _where(self, found: FeatureMap) -> tuple[slice, ...]:
        """The place of the unit's box in the frame."""
        frame = self.about["frames"][found.layer]
        position = found.positions[0] or (0,) * len(frame)
        starts = [box[0] - offset - jump * i
                  for box, (offset, jump, _), i in zip(found.boxes[0], frame, position, strict=True)]  # fmt: skip
        lengths = (end - first for first, end in found.boxes[0])
        return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))


def _plain(found: FeatureMap) -> FeatureMap:
    pictures: dict[str, Any] = {kind: tuple(p.cpu().float() for p in getattr(found, kind)) for kind in _PICTURES}
    return replace(found, **pictures)


def _feature_map(facts: Mapping[str, Any], pictures: Mapping[str, Sequence[Tensor]]) -> FeatureMap:
    """From what JSON made of its facts."""
    given: dict[str, Any] = {name: _tuples(fact) for name, fact in facts.items()}
    return FeatureMap(**given | {kind: tuple(items) for kind, items in pictures.items()})


def _tuples(item: Any) -> Any:
    return tuple(map(_tuples, item)) if isinstance(item, list) else item
