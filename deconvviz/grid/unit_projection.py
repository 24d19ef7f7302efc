"""Single units back to pixels, thousands of them: each from the crop that it sees.

A unit depends on its receptive field only. Forward and back need just that part of its image, aligned to the
layer's jump and kept inside the image, so that every layer falls on the same pixels and the border's padding
where it fell: see :attr:`~deconvviz.geometry.Axis.crop_size`. All crops of a layer have one size, so units of
any maps and images share a batch. Where a field covers most of the image, the crop is the image, and the units
of one image share its forward pass.

Axes: U units, C channels of the image, S spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deconvviz.boxes import Boxed
from deconvviz.capture import watch
from deconvviz.capture.reading import LayerCall
from deconvviz.geometry import ReceptiveField
from deconvviz.inputs import like
from deconvviz.layers import find_call, only_output
from deconvviz.memory import out_of_memory
from deconvviz.projection import back_to_inputs, project
from deconvviz.tape import Tape, flatten

CPU_BUDGET, DEVICE_BUDGET = 64 * 2**20, 2**30
"""Bytes that all the values of one batch's pass may take together, of which a part is alive at a time."""


@dataclass(frozen=True, eq=False)
class Unit:
    """One unit of a layer, in one image (C, *S)."""

    image: Tensor
    fmap: int
    position: tuple[int, ...]
    """In map cells."""


def project_units(
    model: nn.Module,
    layer: LayerCall,
    field: ReceptiveField,
    units: Sequence[Unit],
    overlap: str = "sum",
    gradient: bool = False,
    seed: str = "activation",
    budget: int | None = None,
) -> list[Tensor]:
    """Each unit's projection (C, *crop) over its crop of the image; outside it, a projection is zero.

    Args:
        model: in eval mode.
        layer: its output is (N, maps, *cells), the cells along the image's axes.
        field: what the layer's units see of images of this shape.
        units: any number; they go through in batches whose values fit ``budget`` bytes, halved where the
            memory does not suffice.
        overlap, gradient: as :class:`~deconvviz.deconvnet.Deconvnet`'s.
        seed: start from the unit's ``"activation"`` or from ``"one"``.
    """
    kind = like(model)
    if budget is None:
        budget = CPU_BUDGET if kind.device.type == "cpu" else DEVICE_BUDGET
    run = _Run(model, layer, field, overlap, gradient, seed, kind)
    projections: dict[int, Tensor] = {}
    shared, alone = _sharing(field, units)
    for group in shared:
        try:
            projections |= zip(group, run.of_one_image([units[i] for i in group]), strict=True)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            alone += group
    size = 0
    while alone:
        part = [units[i] for i in alone[: max(1, budget // size) if size else 1]]
        try:
            pixels, size = run.of_crops(part)
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not out_of_memory(error):
                raise
            budget = size * len(part) // 2
            continue
        projections |= zip(alone, pixels.unbind(), strict=False)
        alone = alone[len(part) :]
    return [projections[i] for i in range(len(units))]


def _sharing(field: ReceptiveField, units: Sequence[Unit]) -> tuple[list[list[int]], list[int]]:
    """The units of each image that has several, where it is taken whole; and all others."""
    if not takes_whole(field):
        return [], list(range(len(units)))
    by_image: dict[int, list[int]] = {}
    for i, unit in enumerate(units):
        by_image.setdefault(unit.image.data_ptr(), []).append(i)
    groups = by_image.values()
    return [group for group in groups if len(group) > 1], [group[0] for group in groups if len(group) == 1]


def takes_whole(field: ReceptiveField) -> bool:
    """Whether crops would be most of the image: then the units of an image share its whole pass instead."""
    crop, image = (math.prod(sizes) for sizes in zip(*((a.crop_size, a.image) for a in field.axes), strict=True))
    return field.covers_image or 4 * crop > 3 * image


def crops_are_parts(model: nn.Module, layer: LayerCall, field: ReceptiveField, image: Tensor, whole: Tensor) -> bool:
    """Whether units have the same values in crops of an image (1, C, *S) as in the ``whole`` output of the layer.

    A model may refuse a crop's size, or do otherwise with it.
    """
    units = [Unit(image[0], 0, tuple((n - 1) * half // 2 for n in whole.shape[2:])) for half in range(3)]
    crops = torch.stack([unit.image[crop_of(field, unit.position)] for unit in units])
    try:
        _, output = watch(model, (crops,), (), layer)
        found = _at(flatten(output)[0], [(i, *_cell(field, unit)[1:]) for i, unit in enumerate(units)])
    except Exception:  # whatever a model raises
        return False
    expected = _at(whole, [(0, *unit.position) for unit in units])
    rounding = torch.finfo(whole.dtype).eps ** 0.5
    scale = float(whole.nan_to_num().abs().max())
    return torch.allclose(found, expected, rounding, rounding * scale, equal_nan=True)


def _at(activation: Tensor, places: Sequence[tuple[int, ...]]) -> Tensor:
    """All maps (U, maps) at each (image, *position) of an activation (N, maps, *cells)."""
    return activation.movedim(1, -1)[torch.tensor(places, device="cpu").unbind(1)]


def crop_of(field: ReceptiveField, position: Sequence[int]) -> tuple[slice, ...]:
    """The part of an image (C, *S) that the unit at ``position`` is computed from."""
    if takes_whole(field):  # the layer may have other axes than the image, or none
        return slice(None), *(slice(0, axis.image) for axis in field.axes)
    starts = [axis.crop_start(i) for axis, i in zip(field.axes, position, strict=True)]
    pairs = zip(field.axes, starts, strict=True)
    return slice(None), *(slice(start, start + axis.crop_size) for axis, start in pairs)


@dataclass(frozen=True, eq=False)
class _Run:
    """What the batches have in common; the arguments are :func:`project_units`'s."""

    model: nn.Module
    layer: LayerCall
    field: ReceptiveField
    overlap: str
    gradient: bool
    seed: str
    like: Tensor

    def of_crops(self, units: Sequence[Unit]) -> tuple[Tensor, int]:
        """The projections of one batch (U, C, *crop), and the bytes of the values of one unit's pass."""
        crops = torch.stack([unit.image[crop_of(self.field, unit.position)] for unit in units])
        tape, value, activation = self._watched(crops)
        (pixels,) = back_to_inputs(tape, value, self._seeds(activation, units, axis=1), self.overlap)
        return pixels[0].cpu(), _bytes(tape, value) // len(units)

    def of_one_image(self, units: Sequence[Unit]) -> Tensor:
        """The projections of units of one image (U, C, *S), by one forward pass."""
        tape, value, activation = self._watched(units[0].image[None])

        def seeds(part: slice) -> Tensor | Boxed:
            return self._seeds(activation, units[part], axis=0)

        (pixels,) = project(tape, value, seeds, len(units), self.overlap)
        return pixels[:, 0].cpu()

    def _watched(self, images: Tensor) -> tuple[Tape, int, Tensor]:
        inputs = images.to(self.like.device, self.like.dtype)
        tape, output = watch(self.model, (inputs,), (), self.layer, self.gradient)
        return tape, only_output(find_call(tape, *self.layer)), flatten(output)[0]

    def _seeds(self, activation: Tensor, units: Sequence[Unit], axis: int) -> Tensor | Boxed:
        """A signal (M, N, maps, *cells) from one unit each: along the projections M of one image (``axis`` 0), or
        along the images N (1)."""
        rows = torch.arange(len(units), device="cpu")
        maps, *cells = torch.tensor([_cell(self.field, unit) for unit in units], device="cpu").T
        content = activation.new_zeros((len(units), activation.shape[1]), dtype=self.like.dtype)
        where = rows % len(activation), maps, *cells
        values = activation[where]
        content[rows, maps] = values.to(content.dtype) if self.seed == "activation" else 1
        content = content.view(*content.shape, *[1] * len(cells)).unsqueeze(1 - axis)
        if not cells:
            return content
        return Boxed(content, torch.stack(cells).unsqueeze(2 - axis), tuple(activation.shape[2:]))


def _cell(field: ReceptiveField, unit: Unit) -> tuple[int, ...]:
    """Map and position of a unit in the layer's output for its crop."""
    if takes_whole(field):
        return unit.fmap, *unit.position
    pairs = zip(field.axes, unit.position, strict=True)
    return unit.fmap, *(i - axis.crop_start(i) // max(axis.jump, 1) for axis, i in pairs)


def _bytes(tape: Tape, value: int) -> int:
    steps = tape.leading_to(value)
    numbers = {i for step in steps for i in (*step.inputs, *step.outputs) if i is not None}
    return sum(tape.values[i].shape.numel() * tape.values[i].dtype.itemsize for i in numbers)
