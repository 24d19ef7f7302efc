"""One layer of a :class:`~deconvviz.filter_grid.FilterGrid`: its feature maps as a sequence of results."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from deconvviz.capture import evaluating, watch
from deconvviz.capture.reading import LayerCall
from deconvviz.errors import FeatureMapOutOfRange, InvalidInput, NoForwardPass
from deconvviz.geometry import Axis, ReceptiveField, receptive_field
from deconvviz.grid.feature_map import Box, FeatureMap
from deconvviz.grid.unit_projection import Unit, crop_of, crops_are_parts, project_units, takes_whole
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD
from deconvviz.inputs import whole_number
from deconvviz.layers import address, described, find_call, only_output
from deconvviz.mining.archive import checksum
from deconvviz.mining.data import Images
from deconvviz.mining.strongest import NOBODY, Strongest
from deconvviz.plotting.feature_maps import feature_maps

UNITS_AT_ONCE = 256
"""Whose images and projections are held in memory together, or one image's if it has more."""


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer is in a model's pass over images of one shape, and what its units see."""

    address: str
    call: LayerCall
    maps: int
    space: tuple[int, ...]
    """Cells of a map along each axis."""
    field: ReceptiveField


def find_places(model: nn.Module, layers: Sequence[tuple[str, int | None]], image: Tensor) -> tuple[LayerPlace, ...]:
    """The places of ``layers`` in a pass over an image (1, C, *S).

    Raises:
        LayerNotRun, AmbiguousLayer, InvalidInput: as their names say.
    """
    tape, _ = watch(model, (image,))
    places = []
    for name, number in layers:
        call = find_call(tape, name, number)
        what, value = described(name), only_output(call)
        shape = tuple(tape.values[value].shape)
        if len(shape) < 2 or shape[0] != len(image):
            raise InvalidInput(f"{what} gives shape {shape}; expected feature maps (N, C, ...)")
        field = receptive_field(tape, value)
        if [axis.dim for axis in field.axes] != list(range(2, len(shape))):
            reason = field.reason or f"the positions of {what} are not its last axes"
            field = ReceptiveField(tuple(Axis(axis.image, reason=reason) for axis in field.axes))
        where, layer = address(name, call.number, tape.counts()), (name, call.number)
        # a model that does otherwise with crops shares whole passes among its units
        if not (takes_whole(field) or crops_are_parts(model, layer, field, image, tape.replay(value))):
            field = ReceptiveField(tuple(replace(axis, rigid=True) for axis in field.axes))
        places.append(LayerPlace(where, layer, shape[1], shape[2:], field))
    return tuple(dict.fromkeys(places))  # a layer that was asked for by its call too is one


class Shown(NamedTuple):
    """One unit, projected."""

    fmap: int
    rank: int
    image: Tensor
    """Its whole image (C, *S)."""
    crop: tuple[slice, ...]
    """Of the image (C, *S)."""
    projection: Tensor
    """Over the crop (C, *crop); zero elsewhere."""
    control: Tensor | None
    """The same from ``one`` instead of the activation, in another model."""

    def patch(self, box: Box) -> Tensor:
        """The image's part in a box."""
        where = slice(None), *(slice(first, end) for first, end in box)
        return self.image[where]

    def inside(self, box: Box) -> tuple[slice, ...]:
        """Where a box inside the crop is in :attr:`projection` and :attr:`control`."""
        pairs = zip(box, self.crop[1:], strict=True)
        return slice(None), *(slice(b[0] - crop.start, b[1] - crop.start) for b, crop in pairs)

    def whole(self) -> Tensor:
        """The projection over the whole image (C, *S)."""
        pixels = torch.zeros_like(self.image)
        pixels[self.crop] = self.projection.to(pixels.dtype)
        return pixels


@dataclass(frozen=True, eq=False)
class GridLayer(Sequence[FeatureMap]):
    """The feature maps of a layer; one is projected when it is asked for."""

    place: LayerPlace
    strongest: Strongest
    images: Images | None
    checksums: Mapping[int, int]
    """Of the images that have a unit, as they were mined."""
    model: nn.Module
    overlap: str
    gradient: bool

    def __len__(self) -> int:
        return self.place.maps

    def __getitem__(self, fmap: int) -> FeatureMap:  # type: ignore[override]
        return next(self.maps([fmap]))

    @property
    def name(self) -> str:
        """The layer's address."""
        return self.place.address

    @property
    def data(self) -> Images:
        """Where the units' images are; raises :class:`NoForwardPass` if the grid was loaded without them."""
        if self.images is None:
            raise NoForwardPass("the grid was loaded without its data: FilterGrid.load(path, model, data)")
        return self.images

    @property
    def dead(self) -> list[int]:
        """The maps that no image activates."""
        return (self.strongest.active == 0).nonzero()[:, 0].tolist()

    def maps(self, fmaps: Sequence[int] | None = None) -> Iterator[FeatureMap]:
        """Several maps, or all, in order; they share passes."""
        chosen = self.chosen(fmaps)
        for part in (chosen[i : i + 32] for i in range(0, len(chosen), 32)):
            shown: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
            for unit in self.units(part):
                box = self.box(unit.fmap, unit.rank)
                shown[unit.fmap, unit.rank] = (
                    unit.patch(box).clone(),
                    unit.projection[unit.inside(box)].clone(),
                )
            yield from (self._map(fmap, shown) for fmap in part)

    def figure(
        self,
        fmaps: Sequence[int] | None = None,
        random: int | None = None,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> Figure:
        """Figure 2's layout: each map's projections beside its patches.

        Args:
            fmaps: which maps; all by default.
            random: draw so many of them at random with ``seed``, of the living ones, as the paper's figure.
            mean, std: those that the images were normalised with, see :func:`~deconvviz.images.to_pixels`.
        """
        chosen = self.chosen(fmaps)
        if random is not None:
            random = whole_number("random", random)
            dead = set(self.dead)
            living = [fmap for fmap in chosen if fmap not in dead]
            chosen = sorted(Random(seed).sample(living, min(random, len(living))))
        return feature_maps(self.maps(chosen), f"{self.name or 'the model'}: {self.place.field}", mean, std)

    def units(self, fmaps: Sequence[int], control: nn.Module | None = None) -> Iterator[Shown]:
        """All units of these maps, projected, in the order of their images: each is read once.

        Args:
            fmaps: without repetition.
            control: a model in eval mode to project the same units of, besides.

        Raises:
            NoForwardPass: the grid was loaded without its data.
            InvalidInput: an image can't be read again, or is not the one that was mined.
            UnsupportedOperation: the way to the pixels passes an operation without a rule.
        """
        by_image: dict[int, list[tuple[int, int]]] = {}
        for fmap in fmaps:
            for rank, number in enumerate(self.numbers(fmap)):
                by_image.setdefault(number, []).append((fmap, rank))
        block: list[tuple[int, Unit]] = []
        for number, image in self.data.images(by_image):
            if checksum(image) != self.checksums.get(number):
                raise InvalidInput(
                    f"{self.data.name(number)} is not the image that was mined: the data set gives another one each "
                    "time it is asked, or has changed; expected the same: leave out random crops and flips, fit again"
                )
            block += [(rank, Unit(image, fmap, self.position(fmap, rank))) for fmap, rank in by_image[number]]
            if len(block) >= UNITS_AT_ONCE:
                yield from self._shown(block, control)
                block = []
        yield from self._shown(block, control)

    def _shown(self, block: Sequence[tuple[int, Unit]], control: nn.Module | None) -> Iterator[Shown]:
        """Some units by rank, projected together."""
        place, units = self.place, [unit for _, unit in block]
        project = functools.partial(
            project_units, overlap=self.overlap, gradient=self.gradient, layer=place.call, field=place.field
        )
        with evaluating(self.model):
            pixels = project(self.model, units=units)
        others = [None] * len(units) if control is None else project(control, units=units, seed="one")
        for (rank, unit), projection, other in zip(block, pixels, others, strict=True):
            crop = crop_of(place.field, unit.position)
            yield Shown(unit.fmap, rank, unit.image, crop, projection, other)

    def numbers(self, fmap: int) -> list[int]:
        """The images of a map's units, strongest first."""
        return [number for number in self.strongest.images[fmap].tolist() if number != NOBODY]

    def position(self, fmap: int, rank: int) -> tuple[int, ...]:
        """A unit's position in map cells."""
        return tuple(self.strongest.positions[fmap, rank].tolist())

    def box(self, fmap: int, rank: int) -> tuple[tuple[int, int], ...]:
        """The pixels that a unit sees; of a layer without positions the whole image."""
        axes, position = self.place.field.axes, self.position(fmap, rank)
        return self.place.field.box(position) if len(position) == len(axes) else tuple((0, a.image) for a in axes)

    def chosen(self, fmaps: Sequence[int] | None) -> list[int]:
        """Maps by number, from the end if negative; all for ``None``."""
        count = self.place.maps
        try:
            wanted = list(range(count) if fmaps is None else map(operator.index, fmaps))
        except TypeError as error:
            raise InvalidInput(
                f"fmaps is {fmaps!r}; expected numbers of maps: layer[3] is one, layer.maps(range(1, 3)) several"
            ) from error
        if wrong := [fmap for fmap in wanted if not -count <= fmap < count]:
            raise FeatureMapOutOfRange(f"map {wrong[0]} of layer {self.name!r}: expected 0 to {count - 1}")
        return [fmap % count for fmap in wanted]

    def _map(self, fmap: int, shown: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> FeatureMap:
        numbers, state = self.numbers(fmap), self.strongest
        ranks = range(len(numbers))
        return FeatureMap(
            layer=self.name,
            fmap=fmap,
            values=tuple(state.values[fmap].tolist()[: len(numbers)]),
            images=tuple(numbers),
            names=tuple(self.data.name(number) for number in numbers),
            positions=tuple(self.position(fmap, rank) for rank in ranks),
            boxes=tuple(self.box(fmap, rank) for rank in ranks),
            patches=tuple(shown[fmap, rank][0] for rank in ranks),
            projections=tuple(shown[fmap, rank][1] for rank in ranks),
            mean=state.mean(fmap),
            active=int(state.active[fmap]) / max(state.seen, 1),
            histogram=tuple(state.histogram[fmap].tolist()),
        )
