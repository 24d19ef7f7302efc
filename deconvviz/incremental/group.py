"""Some windows with boxes of one size: how each step is computed for them, and what they hold on their way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from deconvviz.incremental.clean import CleanPass
from deconvviz.incremental.crops import read
from deconvviz.incremental.forms import row_of
from deconvviz.incremental.regions import Boxes, Firsts, Region
from deconvviz.incremental.work import Work, target
from deconvviz.precision import at_least_float32
from deconvviz.tape import Slot, Step, flatten

DENSE_FROM = 0.95
"""The coverage from which a value is computed whole: gathering then costs more than it saves."""
GROUP = {"cpu": 32}
"""Most windows whose boxes have one size (256 on an accelerator): more of them leave the processor's caches."""


class Group:
    """How to compute some windows with boxes of one size at every step.

    Args:
        clean, firsts, size: as of :class:`Plan`.
        dense_from: the coverage from which a value is computed whole.

    Attributes:
        regions: of each value: its boxes, or ``None`` if it is computed whole.
        whole_from: the step from which on all are computed whole.
        cost: multiply-adds of one window.
        whole_cost: multiply-adds of one whole pass.
    """

    def __init__(self, clean: CleanPass, firsts: Firsts, size: Sequence[int], dense_from: float = DENSE_FROM) -> None:
        self.clean, self._dense_from = clean, dense_from
        shape = clean.shape(clean.input)
        ends = firsts + np.asarray(size)[:, None]
        image = Region(tuple(range(2, len(shape))), shape[2:], firsts, ends)
        self.regions: dict[int, Region | None] = {clean.input: image}
        self._fresh: set[int] = set()
        self.cost = self.whole_cost = 0
        self._works = [self._plan(i, step) for i, step in enumerate(clean.steps)]
        inside = [i for i, work in enumerate(self._works) if not work.whole]
        self.whole_from = inside[-1] + 1 if inside else 0

    def shape(self, value: int | None) -> tuple[int, ...]:
        """A value's shape in the clean pass."""
        return self.clean.shape(value)

    def region(self, value: int) -> Region:
        """The boxes of a value that has some."""
        return boxes_of(self.regions, value)

    def may_overwrite(self, step: Step) -> bool:
        """Whether a step works in place, and nothing else needs the boxes of the tensor that it overwrites."""
        slot = target(step)
        if not isinstance(slot, Slot):
            return False
        value = step.inputs[slot.k]
        last = self.clean.steps[self.clean.last[value]] is step and step.inputs.count(value) == 1
        return value in self._fresh and last and value not in self.clean.wanted

    def run(self, batch: Batch, steps: range) -> None:
        """Compute some of the steps; what no later step needs is forgotten."""
        clean = self.clean
        for i in steps:
            step = clean.steps[i]
            outputs = flatten(self._works[i].run(batch))
            batch.held.update({v: o for v, o in zip(step.outputs, outputs, strict=False) if v is not None})
            for value in clean.done[i]:
                batch.held.pop(value, None)

    def _plan(self, i: int, step: Step) -> Work:
        """Choose how to compute a step, and count it."""
        row, work = row_of(step.operation), None
        if row.form is not None and all(self.regions.get(value) is not None for value in step.inputs):
            work = row.form(self, step)
        if work is None or any(r is not None and r.coverage >= self._dense_from for r in work.regions):
            run = self.clean.whole(i, in_place=self.may_overwrite(step))
            work = Work([None] * len(step.outputs), run, row.fresh, whole=True)
        for value, region in zip(step.outputs, work.regions, strict=False):
            if value is not None:
                self.regions[value] = region
                if work.fresh:
                    self._fresh.add(value)
        if not work.fresh:  # the output shares the input's memory
            self._fresh.difference_update(step.inputs)
        cost, region = self.clean.costs[i], work.regions[0]
        self.whole_cost += cost
        self.cost += cost if region is None else math.ceil(cost * region.coverage)
        return work


class Batch:
    """Some windows on their way through the steps: what each value holds, in its boxes or whole."""

    def __init__(self, clean: CleanPass, regions: Mapping[int, Region | None], held: dict[int, Tensor]) -> None:
        self.clean, self._regions, self.held = clean, regions, held

    def crops(self, value: int) -> Tensor:
        """What the boxes of a value hold."""
        return self.held[value]

    def change(self, value: int, part: tuple[int, int, int] | None = None) -> Tensor:
        """(B, ...): by how much the sum of a value, or of a part of it, over its spatial axes differs from the clean
        one."""
        region, crops = boxes_of(self._regions, value), self.held[value]
        crops = crops if part is None else crops.narrow(*part)
        changed = crops.sum(region.axes, dtype=at_least_float32(crops))
        return changed - self.clean.value(value, region.axes, part).sums(region)

    def total(self, value: int, fmap: int) -> Tensor:
        """(B,): a feature map's total activation, on axis 1 of a value."""
        region, clean = self._regions.get(value), self.clean.contents[value]
        if region is None or 1 in region.axes:
            whole = self.whole(value)[:, fmap]
            return whole.reshape(len(whole), -1).sum(1, dtype=at_least_float32(whole))
        return clean[0, fmap].sum(dtype=at_least_float32(clean)) + self.change(value, (1, fmap, 1)).flatten(1).sum(1)

    def read(self, value: int, wanted: Boxes | Region, fill: float = 0.0) -> Tensor:
        """Other boxes of a value, the padding included (:func:`~deconvviz.incremental.crops.read`)."""
        region, crops = boxes_of(self._regions, value), self.held[value]
        if wanted is region:
            return crops
        return read(self.clean.value(value, region.axes), region, crops, wanted, fill)

    def whole(self, value: int) -> Tensor:
        """A value whole: (B, ...) if it has a batch axis of one, else (B, *its shape)."""
        region = self._regions.get(value)
        if region is None:
            return self.held[value]
        everything = Boxes(region.axes, region.space, region.firsts * 0)
        return self.read(value, everything)


def boxes_of(regions: Mapping[int, Region | None], value: int) -> Region:
    """The boxes of a value that has some; LookupError for others."""
    region = regions[value]
    if region is None:
        raise LookupError(value)
    return region


def largest_group(clean: CleanPass) -> int:
    """:data:`GROUP` for the device of a pass."""
    return GROUP.get(clean.tape.tensors[0].device.type, 256)
