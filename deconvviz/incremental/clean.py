"""The pass without a patch: its steps, made cheaper where that changes nothing, and what every value holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap

from deconvviz.incremental.crops import CleanValue
from deconvviz.incremental.kernels import Kernel, filtering, product
from deconvviz.incremental.rewriting import cheaper
from deconvviz.incremental.work import first_alone
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.tape import Step, Tape, flatten

if TYPE_CHECKING:
    from deconvviz.incremental.group import Batch


class CleanPass:
    """A recorded pass of one image, ready to be computed again for patched copies of it.

    Args:
        tape: a complete pass of a single image (1, C, *S).
        wanted: the values that will be asked for.
    """

    def __init__(self, tape: Tape, wanted: Sequence[int]) -> None:
        self.tape, self.wanted = tape, tuple(wanted)
        (self.input,) = tape.inputs
        needed = {id(step) for value in wanted for step in tape.leading_to(value)}
        self.steps = cheaper([step for step in tape.steps if id(step) in needed], tape.values, self.wanted)
        self.last = {value: i for i, step in enumerate(self.steps) for value in step.inputs}
        self.contents = self._run(tape.tensors[0])
        self._values: dict[object, CleanValue] = {}
        self._kernels: dict[int, Kernel] = {}
        self._wholes: dict[tuple[int, bool], Callable[[Batch], Any]] = {}

    def shape(self, value: int | None) -> tuple[int, ...]:
        """A value's shape."""
        return () if value is None else tuple(self.contents[value].shape)

    def value(self, value: int, axes: tuple[int, ...], part: tuple[int, int, int] | None = None) -> CleanValue:
        """A value, to gather boxes from; or a part of it: along which axis, from where, of what length."""
        key = (value, axes, part)
        if key not in self._values:
            content = self.contents[value]
            self._values[key] = CleanValue(content if part is None else content.narrow(*part), axes)
        return self._values[key]

    def kernel(self, step: Step) -> Kernel:
        """A recorded convolution, without its padding, or a linear step; made ready once."""
        if id(step) not in self._kernels:
            bias, autocast = step.argument(2, "bias"), self.tape.autocast
            if step.operation == "linear":
                kernel = product(step.argument(1, "weight"), bias, autocast)
            else:
                weight, stride, _, dilation, groups = filter_arguments(*step.arguments, **step.keywords)
                stride, dilation = (each(item, weight.dim() - 2) for item in (stride, dilation))
                kernel = filtering(weight, bias, stride, dilation, groups, autocast)
            self._kernels[id(step)] = kernel
        return self._kernels[id(step)]

    def whole(self, i: int, in_place: bool) -> Callable[[Batch], Any]:
        """What computes step ``i`` on whole values; ``in_place`` as it was recorded, else in new memory."""
        if (i, in_place) not in self._wholes:
            self._wholes[i, in_place] = whole(self, self.steps[i], in_place)
        return self._wholes[i, in_place]

    def _run(self, image: Tensor) -> dict[int, Tensor]:
        """Every value of the pass, channels_last where it can be."""
        contents = {self.input: channels_last(image)}
        with self.tape.context():
            for step in self.steps:
                outputs = flatten(step.rerun(*(contents[value] for value in step.inputs)))
                contents.update({v: o for v, o in zip(step.outputs, outputs, strict=False) if v is not None})
        return contents


def whole(clean: CleanPass, step: Step, in_place: bool = False) -> Callable[[Batch], Any]:
    """Compute a step on whole values: as it was recorded if it treats axis 0 as a batch, else one by one."""
    shapes = [clean.shape(value) for value in (*step.inputs, *step.outputs)]
    batched = all(shape and shape[0] == 1 for shape in shapes) and _keeps_batch(step, shapes)
    lacking = [not shape or shape[0] != 1 for shape in shapes]
    inputs = len(step.inputs)
    padding = _kernel_padding(step) if batched else None

    def run(batch: Batch) -> Any:
        tensors = [batch.whole(value) for value in step.inputs]
        if padding is not None:
            return clean.kernel(step)(*tensors, *padding)
        if batched:
            return step.overwrite(*tensors) if in_place else step.rerun(*tensors)
        single = [t if lack else t.unsqueeze(1) for t, lack in zip(tensors, lacking, strict=False)]
        try:
            outputs = vmap(lambda *each: tuple(flatten(step.rerun(*each))))(*single)
        except (RuntimeError, ValueError, NotImplementedError):  # what vmap cannot follow, one by one
            each = [flatten(step.rerun(*one)) for one in zip(*single, strict=True)]
            outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return [o if lack else o.squeeze(1) for o, lack in zip(outputs, lacking[inputs:], strict=False)]

    return run


ALLOCATES = frozenset(f"{name}{n}d" for name in ("conv", "max_pool", "avg_pool") for n in (1, 2, 3)) | {
    "linear", "batch_norm", "addcmul", "cat", "add", "relu", "relu6", "hardswish", "silu", "clamp", "hardtanh"
}  # fmt: skip
"""Operations that give new tensors on whole values, or what they may overwrite."""


def _kernel_padding(step: Step) -> list[list[int]] | None:
    """What :meth:`CleanPass.kernel`'s takes beside its input, for a step that it computes; ``None`` for others."""
    if not first_alone(step) or step.operation not in ("linear", "conv2d"):
        return None
    if step.operation == "linear":
        return []
    _, _, padding, _, _ = filter_arguments(*step.arguments, **step.keywords)
    return None if isinstance(padding, str) else [each(padding, 2)]


_OF_RANK = frozenset(f"{name}{n}d" for name in ("conv", "max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3))
_OF_ANY_RANK = frozenset((
    "batch_norm", "group_norm", "instance_norm", "local_response_norm", "relu", "relu6", "leaky_relu",
    "prelu", "elu", "selu", "celu", "gelu", "silu", "hardswish", "mish", "softplus", "clamp", "hardtanh", "sigmoid",
    "hardsigmoid", "tanh", "linear", "dropout", "contiguous", "interpolate",
))  # fmt: skip
"""Operations that treat axis 0 as the batch's: the first ones of an input of their own rank."""


_OF_SEVERAL = frozenset(("add", "sub", "mul", "div", "addcmul"))
ATTENTION = "scaled_dot_product_attention"


def _keeps_batch(step: Step, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a recorded step can be called on a batch of values of ``shapes``, whose batch axis is 1."""
    rank = len(shapes[0])
    constants = flatten([step.arguments, step.keywords])
    if step.operation == "cat":
        dim = step.argument(1, "dim", 0)
        return not constants and dim % rank > 0 and all(len(shape) == rank for shape in shapes)
    attends = step.operation == ATTENTION and rank > 2
    if attends and any(isinstance(step.argument(i, name), Tensor) for i, name in enumerate(("query", "key", "value"))):
        return False
    if step.operation in _OF_SEVERAL or attends:
        return all(len(s) == rank for s in shapes) and all(
            c.dim() < rank or (c.dim() == rank and c.shape[0] == 1) for c in constants
        )
    if not first_alone(step):
        return False
    if step.operation == "flatten":
        return int(step.argument(1, "start_dim", 0)) % rank > 0
    if step.operation in ("softmax", "log_softmax"):
        dim = step.argument(1, "dim", None)
        return dim is not None and dim % rank > 0
    if step.operation == "layer_norm":
        return len(step.argument(1, "normalized_shape")) < rank
    if step.operation in _OF_RANK:
        return rank == int(step.operation[-2]) + 2
    return rank > 1 and step.operation in _OF_ANY_RANK and not (step.operation == "dropout" and step.kept is not None)


def channels_last(images: Tensor) -> Tensor:
    """(N, C, H, W) with each pixel's channels together; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
