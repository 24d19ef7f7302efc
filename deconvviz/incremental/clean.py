"""The pass without a patch: its steps, made cheaper where that changes nothing, and what every value holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deconvviz.incremental.crops import CleanValue
from deconvviz.incremental.forms import row_of
from deconvviz.incremental.kernels import Kernel, filtering, product
from deconvviz.incremental.rewriting import cheaper, of_channels
from deconvviz.incremental.whole import whole
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.tape import Slot, Step, Tape, flatten

if TYPE_CHECKING:
    from deconvviz.incremental.group import Batch


class CleanPass:
    """A recorded pass of one image, ready to be computed again for patched copies of it.

    Args:
        tape: a complete pass of a single image (1, C, *S).
        wanted: the values that will be asked for.
        channels: which channels of the first of them are; the others need not be computed.
    """

    def __init__(self, tape: Tape, wanted: Sequence[int], channels: Tensor | None = None) -> None:
        self.tape, self.wanted = tape, tuple(wanted)
        (self.input,) = tape.inputs
        steps = tape.leading_to(*wanted)
        fewer = None if channels is None else of_channels(steps, tape.values, wanted[0], channels, wanted)
        self._channels = None if fewer is None else channels
        self.steps = cheaper(fewer or steps, tape.values, self.wanted)
        self.last = {value: i for i, step in enumerate(self.steps) for value in step.inputs}
        self.done = [self._done(i, step) for i, step in enumerate(self.steps)]
        """Of each step: the values, none of those wanted, that no step after it takes."""
        self.contents = self._run(tape.tensors[0])
        self.costs = [multiply_adds(step, self.shapes(step)) for step in self.steps]
        """Multiply-adds of each step."""
        self._values: dict[object, CleanValue] = {}
        self._kernels: dict[int, Kernel] = {}
        self._wholes: dict[tuple[int, bool], Callable[[Batch], Any]] = {}

    def of(self, image: Tensor) -> CleanPass:
        """The pass of another image, (1, C, *S), by the same steps; what was made ready for them is shared."""
        other = copy.copy(self)
        other.contents, other._values = self._run(image), {}
        return other

    def outline(self) -> CleanPass:
        """The same with the image and the wanted values alone."""
        other = copy.copy(self)
        other.contents, other._values = {v: self.contents[v] for v in (self.input, *self.wanted)}, {}
        return other

    def complete(self) -> CleanPass:
        """The same with every value: of an outline they are computed again."""
        values = {value for step in self.steps for value in step.outputs if value is not None}
        return self if values <= self.contents.keys() else self.of(self.contents[self.input])

    def shape(self, value: int | None) -> tuple[int, ...]:
        """A value's shape."""
        return () if value is None else tuple(self.contents[value].shape)

    def shapes(self, step: Step) -> list[tuple[int, ...]]:
        """The shapes of a step's inputs, then of its outputs."""
        return [self.shape(value) for value in (*step.inputs, *step.outputs)]

    def value(self, value: int, axes: tuple[int, ...], part: tuple[int, int, int] | None = None) -> CleanValue:
        """A value, to gather boxes from; or a part of it: along which axis, from where, of what length."""
        key = (value, axes, part)
        if key not in self._values:
            content = self.contents[value]
            self._values[key] = CleanValue(content if part is None else content.narrow(*part), axes)
        return self._values[key]

    def constant(self, tensor: Tensor, rank: int, axes: tuple[int, ...], space: Sequence[int]) -> CleanValue:
        """A constant of the pass, broadcast to ``rank`` axes and to an extent ``space`` along some, to gather boxes
        from."""
        if (id(tensor), axes) not in self._values:
            shape = [1] * (rank - tensor.dim()) + list(tensor.shape)
            for axis, extent in zip(axes, space, strict=True):
                shape[axis] = extent
            self._values[id(tensor), axes] = CleanValue(tensor.detach().expand(shape), axes)
        return self._values[id(tensor), axes]

    def with_all_channels(self, value: int, content: Tensor) -> Tensor:
        """What a value (W, ...) holds, zero in the channels that are not computed."""
        if self._channels is None or value != self.wanted[0]:
            return content
        shape = list(content.shape)
        shape[1] = self.tape.values[value].shape[1]
        return content.new_zeros(shape).index_copy_(1, self._channels.to(content.device), content)

    def kernel(self, step: Step) -> Kernel:
        """A recorded convolution, without its padding, or a linear step; made ready once."""
        if id(step) not in self._kernels:
            autocast = self.tape.autocast
            if step.operation == "linear":
                kernel = product(step.argument(1, "weight"), step.argument(2, "bias"), autocast)
            else:
                weight, bias, stride, _, dilation, groups = filter_arguments(*step.arguments, **step.keywords)
                stride, dilation = (each(item, weight.dim() - 2) for item in (stride, dilation))
                kernel = filtering(weight, bias, stride, dilation, groups, autocast)
            self._kernels[id(step)] = kernel
        return self._kernels[id(step)]

    def whole(self, i: int, in_place: bool) -> Callable[[Batch], Any]:
        """What computes step ``i`` on whole values; ``in_place`` as it was recorded, else in new memory."""
        if (i, in_place) not in self._wholes:
            step = self.steps[i]
            self._wholes[i, in_place] = whole(self, step, row_of(step.operation).takes_batch, in_place)
        return self._wholes[i, in_place]

    @property
    def peak(self) -> int:
        """Bytes of the values that a pass of one image holds together, at most."""
        held = most = self.contents[self.input].nbytes
        for i, step in enumerate(self.steps):
            held += sum(self.contents[value].nbytes for value in step.outputs if value is not None)
            most = max(most, held)
            held -= sum(self.contents[value].nbytes for value in self.done[i])
        return most

    def _done(self, i: int, step: Step) -> list[int]:
        values = [value for value in {*step.inputs, *step.outputs}.difference(self.wanted) if value is not None]
        return [value for value in values if self.last.get(value, i) == i]

    def _run(self, image: Tensor) -> dict[int, Tensor]:
        """Every value of the pass, channels_last where it can be."""
        contents = {self.input: channels_last(image)}
        with self.tape.context():
            for step in self.steps:
                outputs = flatten(step.rerun(*(contents[value] for value in step.inputs)))
                contents.update({v: o for v, o in zip(step.outputs, outputs, strict=False) if v is not None})
        return contents


def channels_last(images: Tensor) -> Tensor:
    """(N, C, H, W) with each pixel's channels together; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def multiply_adds(step: Step, shapes: Sequence[Sequence[int]]) -> int:
    """Of one step on one image: convolutions and matrix products."""
    if step.operation in ("conv1d", "conv2d", "conv3d"):
        weight = step.argument(1, "weight")
        return math.prod(shapes[-1]) * math.prod((shapes[weight.k] if isinstance(weight, Slot) else weight.shape)[1:])
    if step.operation in ("linear", "matmul", "bmm", "mm") and shapes[0]:
        return math.prod(shapes[-1]) * int(shapes[0][-1])
    return 0
