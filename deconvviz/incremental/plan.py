"""Compute a recorded pass again for many patched copies of its image, only where each patch changed it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.incremental.clean import CleanPass, channels_last
from deconvviz.incremental.group import Batch, Group, largest_group
from deconvviz.incremental.regions import Firsts

CACHED, FEWEST = 16_000_000, 8
"""Bytes of one value of the windows that go on whole together, and their number at least, on a CPU."""


class Plan:
    """How to compute the wanted values of a clean pass for one batch of windows.

    The windows are cut into groups, each with boxes as small as it allows; once every group computes whole values,
    they go on together.

    Args:
        clean: the pass without a patch.
        firsts: where each window's box begins, (axes, windows), in pixels.
        size: the boxes' extent, in pixels.
        labels: (windows,); a group has one label (:func:`~deconvviz.incremental.alike.alike`).

    Attributes:
        cost: multiply-adds of all windows.
        whole_cost: multiply-adds of as many whole passes.
    """

    def __init__(
        self,
        clean: CleanPass,
        firsts: Firsts,
        size: Sequence[int],
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self._clean = clean
        count = firsts.shape[1]
        borders = np.flatnonzero(np.diff(labels)) + 1 if labels is not None else np.zeros(0, np.int64)
        parts = [
            part
            for alike in np.split(firsts, borders, axis=1)
            for part in np.array_split(alike, math.ceil(alike.shape[1] / largest_group(clean)), axis=1)
        ]
        self._counts = [part.shape[1] for part in parts]
        self.groups = [Group(clean, part, size) for part in parts]
        self.cost = sum(group.cost * part.shape[1] for group, part in zip(self.groups, parts, strict=True))
        self.whole_cost = self.groups[0].whole_cost * count
        self._together_from = max(group.whole_from for group in self.groups)

    @torch.no_grad()
    def run(self, patches: Tensor) -> Outcome:
        """Compute the wanted values for windows whose boxes hold ``patches`` (W, C, *size)."""
        clean, together = self._clean, self._together_from
        with clean.tape.context():
            parts = []
            for group, part in zip(self.groups, patches.split(self._counts), strict=True):
                parts.append(Batch(clean, group.regions, {clean.input: channels_last(part)}))
                group.run(parts[-1], range(together))
            later = {value for step in clean.steps[together:] for value in step.inputs}
            held = {v: torch.cat([part.whole(v) for part in parts]) for v in later if v in parts[0].held}
            for value in held.keys() - set(clean.wanted):
                for part in parts:
                    del part.held[value]
            end = self._together(held)
        return Outcome(parts, end)

    def _together(self, held: dict[int, Tensor]) -> Batch:
        """Compute the rest on whole values: a few windows at a time while their values outgrow the caches."""
        clean, group = self._clean, self.groups[0]
        steps = range(self._together_from, len(clean.steps))
        sizes = [max(clean.contents[v].nbytes for v in clean.steps[i].outputs if v is not None) for i in steps]
        large = [i for i, size in zip(steps, sizes, strict=True) if size * sum(self._counts) > CACHED]
        if large and clean.tape.tensors[0].device.type == "cpu":
            few = max(FEWEST, CACHED // max(sizes))
            batches = [
                Batch(clean, {}, dict(zip(held, pieces, strict=True)))
                for pieces in zip(*[whole.split(few) for whole in held.values()], strict=True)
            ]
            for batch in batches:
                group.run(batch, range(steps.start, large[-1] + 1))
            held = {value: torch.cat([batch.held[value] for batch in batches]) for value in batches[0].held}
            steps = range(large[-1] + 1, steps.stop)
        end = Batch(clean, {}, held)
        group.run(end, steps)
        return end


class Outcome:
    """The wanted values of a plan's windows."""

    def __init__(self, parts: Sequence[Batch], end: Batch) -> None:
        self._parts, self._end = parts, end

    def whole(self, value: int) -> Tensor:
        """A value whole, (W, ...)."""
        if value in self._end.held:
            return self._end.whole(value)
        return torch.cat([part.whole(value) for part in self._parts])

    def total(self, value: int, fmap: int) -> Tensor:
        """(W,): a feature map's total activation, on axis 1 of a value."""
        if value in self._end.held:
            return self._end.total(value, fmap)
        return torch.cat([part.total(value, fmap) for part in self._parts])
