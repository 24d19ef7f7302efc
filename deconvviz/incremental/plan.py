"""Compute a recorded pass again for many patched copies of its image, only where each patch changed it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deconvviz.incremental.clean import CleanPass, channels_last
from deconvviz.incremental.crops import clean_boxes, read
from deconvviz.incremental.forms import FORMS, Work
from deconvviz.incremental.regions import Firsts, Region
from deconvviz.tape import Slot, Step, flatten

DENSE_FROM = 0.9
"""The coverage from which a value is computed whole: gathering then costs more than it saves."""


class Plan:
    """How to compute the wanted values of a clean pass for one batch of windows.

    Args:
        clean: the pass without a patch.
        firsts: where each window's box begins, (axes, windows), in pixels.
        size: the boxes' extent, in pixels.

    Attributes:
        cost: multiply-adds of one window.
        whole_cost: multiply-adds of one whole pass.
    """

    def __init__(self, clean: CleanPass, firsts: Firsts, size: Sequence[int]) -> None:
        self.clean = clean
        shape = clean.shape(clean.input)
        image = Region(tuple(range(2, len(shape))), shape[2:], tuple(size), firsts)
        self.regions: dict[int, Region | None] = {clean.input: image}
        self._fresh: set[int] = set()
        self.cost = self.whole_cost = 0
        self._works = [self._plan(i, step) for i, step in enumerate(clean.steps)]

    def shape(self, value: int | None) -> tuple[int, ...]:
        """A value's shape in the clean pass."""
        return self.clean.shape(value)

    def region(self, value: int) -> Region:
        """The boxes of a value that has some."""
        region = self.regions[value]
        if region is None:
            raise LookupError(value)
        return region

    def may_overwrite(self, step: Step) -> bool:
        """Whether nothing but this step needs the boxes of the tensor that it overwrites."""
        target = step.argument(step.written, "") if isinstance(step.written, int) else None
        if not isinstance(target, Slot):
            return False
        value = step.inputs[target.k]
        last = self.clean.steps[self.clean.last[value]] is step and step.inputs.count(value) == 1
        return value in self._fresh and last and value not in self.clean.wanted

    @torch.no_grad()
    def run(self, patches: Tensor) -> Batch:
        """Compute the wanted values for windows whose boxes hold ``patches`` (B, C, *size)."""
        batch, clean = Batch(self, channels_last(patches)), self.clean
        with clean.tape.context():
            for i, (step, work) in enumerate(zip(clean.steps, self._works, strict=True)):
                outputs = flatten(work.run(batch))
                for value, output in zip(step.outputs, outputs, strict=False):
                    if value is not None:
                        batch.held[value] = output
                for value in set(step.inputs):
                    if clean.last[value] == i and value not in clean.wanted:
                        del batch.held[value]
        return batch

    def _plan(self, i: int, step: Step) -> Work:
        """Choose how to compute a step, and count it."""
        form, work = FORMS.get(step.operation), None
        if form is not None and all(self.regions.get(value) is not None for value in step.inputs):
            work = form(self, step)
        if work is None or any(r is not None and r.coverage >= DENSE_FROM for r in work.regions):
            work = Work([None] * len(step.outputs), self.clean.wholes[i])
        for value, region in zip(step.outputs, work.regions, strict=False):
            if value is not None:
                self.regions[value] = region
                if work.fresh:
                    self._fresh.add(value)
        if not work.fresh:  # the output shares the input's memory
            self._fresh.difference_update(step.inputs)
        cost = multiply_adds(step, [self.shape(value) for value in (*step.inputs, *step.outputs)])
        region = work.regions[0]
        self.whole_cost += cost
        self.cost += cost if region is None else math.ceil(cost * region.coverage)
        return work


class Batch:
    """One batch of windows on its way through a plan."""

    def __init__(self, plan: Plan, patches: Tensor) -> None:
        self.plan = plan
        self.held = {plan.clean.input: patches}

    def crops(self, value: int) -> Tensor:
        """What the boxes of a value hold."""
        return self.held[value]

    def clean_crops(self, value: int) -> Tensor:
        """What the boxes of a value hold in the clean pass."""
        region = self.plan.region(value)
        return clean_boxes(self.plan.clean.value(value, region.axes), region)

    def total(self, value: int, fmap: int) -> Tensor:
        """(B,): a feature map's total activation, on axis 1 of a value."""
        region, clean = self.plan.regions[value], self.plan.clean.contents[value]
        if region is None or 1 in region.axes:
            return self.whole(value)[:, fmap].flatten(1).sum(1)
        change = self.held[value][:, fmap] - self.clean_crops(value)[:, fmap]
        return clean[0, fmap].sum() + change.flatten(1).sum(1)

    def read(self, value: int, wanted: Region, fill: float = 0.0) -> Tensor:
        """Other boxes of a value, the padding included (:func:`~deconvviz.incremental.crops.read`)."""
        region = self.plan.region(value)
        if wanted is region:
            return self.held[value]
        return read(self.plan.clean.value(value, region.axes), region, self.held[value], wanted, fill)

    def whole(self, value: int) -> Tensor:
        """A value whole: (B, ...) if it has a batch axis of one, else (B, *its shape)."""
        region = self.plan.regions[value]
        if region is None:
            return self.held[value]
        everything = Region(region.axes, region.space, region.space, region.firsts * 0)
        return self.read(value, everything)


def multiply_adds(step: Step, shapes: Sequence[Sequence[int]]) -> int:
    """Of one step on one image: convolutions and matrix products."""
    if step.operation in ("conv1d", "conv2d", "conv3d"):
        return math.prod(shapes[-1]) * math.prod(step.argument(1, "weight").shape[1:])
    if step.operation == "linear":
        return math.prod(shapes[-1]) * int(shapes[0][-1])
    if step.operation in ("matmul", "bmm", "mm") and shapes[0]:
        return math.prod(shapes[-1]) * int(shapes[0][-1])
    return 0
