"""A recorded pass's steps made cheaper where that changes nothing but rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deconvviz.incremental.work import first_alone
from deconvviz.precision import precise
from deconvviz.rules import EXACT
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.rules.maxima import pool_arguments
from deconvviz.tape import Slot, Step, Value

FILTERS = ("conv1d", "conv2d", "conv3d")
MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
JOINS = ("cat", "concat", "concatenate")


def cheaper(steps: Sequence[Step], values: Sequence[Value], wanted: Collection[int]) -> list[Step]:
    """The same steps with views as reshapes, as the memory may be laid out otherwise; with batch norms in the filters
    before them, or as what they do to each channel, in place; with average pools behind the filters of one cell that
    follow them; with max pools before what they take is joined; and with filters of one cell that take joined channels
    as a sum of filters.

    Args:
        steps: steps of a pass, in order; batch norms have fixed statistics.
        values: the pass's values.
        wanted: the values that have to stay.
    """
    numbers = itertools.count(len(values))
    steps = _in_pairs([_in_any_layout(step) for step in steps], wanted, _folded)
    steps = [_scaled(s, len(values[s.inputs[0]].shape)) if _is_norm(s) and first_alone(s) else s for s in steps]
    steps = _in_pairs(steps, wanted, lambda step, after: _pooled_later(step, after, numbers))
    steps = _in_pairs(steps, wanted, lambda step, after: _pooled_first(step, after, numbers, values))
    return _in_pairs(steps, wanted, lambda step, after: _apart(step, after, numbers, values))


def _in_any_layout(step: Step) -> Step:
    """A view in the model's own layout, which in another may take a copy."""
    if step.operation == "view" and not isinstance(step.argument(1, "dtype"), torch.dtype):
        arguments = (*step.arguments, *step.keywords.values())  # its keyword has another name
        return replace(step, operation="reshape", function=torch.Tensor.reshape, arguments=arguments, keywords={})
    if step.operation == "view_as":
        return replace(step, operation="reshape_as", function=torch.Tensor.reshape_as)
    return step


def of_channels(
    steps: Sequence[Step], values: Sequence[Value], value: int, channels: Tensor, wanted: Collection[int]
) -> list[Step] | None:
    """The same steps where of a value's channels only some are computed: the last filter or product has only these.

    Args:
        steps, values, wanted: as of :func:`cheaper`.
        value: a value (1, C, ...) that no step takes.
        channels: their numbers.

    Returns:
        ``None`` where what follows the last filter mixes its channels, or another needs them all.
    """
    by = {step.outputs[0]: i for i, step in enumerate(steps) if len(step.outputs) == 1}
    taken = [taken for step in steps for taken in set(step.inputs)]
    while value in by:
        i, step = by[value], steps[by[value]]
        if step.operation in FILTERS or step.operation == "linear":
            few = _with_channels(step, values, channels)
            return None if few is None else [*steps[:i], few, *steps[i + 1 :]]
        if not _keeps_channels(step, values) or taken.count(step.inputs[0]) > 1 or step.inputs[0] in wanted:
            return None
        (value,) = step.inputs
    return None


CHANNELWISE = (
    "relu relu6 hardtanh leaky_relu elu selu celu gelu silu hardswish mish softplus sigmoid hardsigmoid tanh "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "max_pool1d max_pool2d max_pool3d dropout dropout1d dropout2d dropout3d contiguous"
)
"""What treats every channel alike, and by itself."""


def _keeps_channels(step: Step, values: Sequence[Value]) -> bool:
    """Whether a step's channels come from the same channels of its one input."""
    if not first_alone(step) or len(values[step.inputs[0]].shape) < 2:
        return False
    shape = values[step.inputs[0]].shape
    if step.operation == "flatten":
        return step.argument(1, "start_dim", 0) == 1 and math.prod(shape[2:]) == 1
    if step.operation == "mean":
        dims = step.argument(1, "dim")
        dims = (dims,) if isinstance(dims, int) else dims or (0,)
        return not {d % len(shape) for d in dims} & {0, 1}
    if "pool" in step.operation and len(shape) != step.spatial + 2:  # without a batch axis, axis 1 is one of places
        return False
    return step.operation in CHANNELWISE.split()


def _with_channels(step: Step, values: Sequence[Value], channels: Tensor) -> Step | None:
    """A filter or product of fewer channels."""
    if not first_alone(step):
        return None
    if step.operation == "linear":
        weight, bias, geometry, rank = step.argument(1, "weight"), step.argument(2, "bias"), [], 2
    else:
        weight, bias, *geometry = filter_arguments(*step.arguments, **step.keywords)
        rank = weight.dim()
    if len(values[step.output].shape) != rank or (geometry and geometry[-1] != 1):  # groups
        return None
    few = [None if part is None else part.detach()[channels.to(part.device)] for part in (weight, bias)]
    return replace(step, arguments=(Slot(0), *few, *geometry), keywords={})


def _in_pairs(
    steps: Sequence[Step], wanted: Collection[int], rewrite: Callable[[Step, Step], list[Step] | None]
) -> list[Step]:
    """What ``rewrite`` makes of each step and the one that alone takes its output; where it is ``None`` both stay."""
    users: dict[int | None, list[Step]] = {}
    for step in steps:
        for value in step.inputs:
            users.setdefault(value, []).append(step)
    kept: list[Step] = []
    gone: set[int] = set()
    for step in steps:
        if id(step) in gone:
            continue
        after = users.get(step.outputs[0], [])
        alone = len(step.outputs) == len(after) == 1 and step.outputs[0] not in wanted and first_alone(after[0])
        instead = rewrite(step, after[0]) if alone else None
        if instead is None:
            kept.append(step)
        else:
            kept += instead
            gone.add(id(after[0]))
    return kept


def _folded(step: Step, norm: Step) -> list[Step] | None:
    """A batch norm behind a filter, in the filter's weights."""
    if step.operation not in FILTERS or not first_alone(step) or not _is_norm(norm):
        return None
    weight, bias, *geometry = filter_arguments(*step.arguments, **step.keywords)
    scale, shift = _scale_and_shift(norm)
    shift = shift if bias is None else shift + bias.detach() * scale
    scaled = (weight.detach() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    arguments = (Slot(0), scaled, shift.to(weight.dtype), *geometry)
    return [replace(step, arguments=arguments, keywords={}, outputs=norm.outputs, written=None)]


def _is_norm(step: Step) -> bool:
    return step.operation == "batch_norm" and step.kind == EXACT


def _scale_and_shift(norm: Step) -> tuple[Tensor, Tensor]:
    """What a batch norm with fixed statistics multiplies each channel by, then adds; (C,) in double precision."""
    mean, variance, weight, bias = (
        norm.argument(1 + i, name) for i, name in enumerate(("running_mean", "running_var", "weight", "bias"))
    )
    scale = (precise(variance) + norm.argument(7, "eps", 1e-5)).rsqrt()
    scale = scale if weight is None else scale * weight.detach()
    shift = -precise(mean) * scale
    return scale, shift if bias is None else shift + bias.detach()


def _scaled(norm: Step, rank: int) -> Step:
    """A batch norm of values of ``rank`` axes, in one pass over them, in place."""
    dtype = norm.argument(1, "running_mean").dtype
    constants = [numbers.to(dtype).view(1, -1, *[1] * (rank - 2)) for numbers in _scale_and_shift(norm)]
    return replace(norm, operation="addcmul", function=_scale, arguments=(Slot(0), *constants), keywords={}, written=0)


def _scale(tensor: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, tensor, scale, out=tensor)


def _pooled_later(pool: Step, one: Step, numbers: Iterator[int]) -> list[Step] | None:
    """An average pool before a filter of one cell, behind it, where that leaves fewer channels to pool.

    Both are linear, one over the cells of a channel, one over the channels of a cell; the bias is added last, since a
    pool that counts its padding would lessen it at the border.
    """
    if not pool.operation.startswith("avg_pool") or not first_alone(pool) or not _narrows(one):
        return None
    weight, bias, *_ = filter_arguments(*one.arguments, **one.keywords)
    bare = replace(one, arguments=(Slot(0), weight), keywords={}, inputs=pool.inputs, outputs=pool.outputs)
    pool = replace(pool, inputs=one.inputs, outputs=one.outputs)
    if bias is None:
        return [bare, pool]
    pooled = next(numbers)
    added = (Slot(0), bias.detach().view(-1, *[1] * (weight.dim() - 2)))
    add = replace(one, operation="add", function=Tensor.add_, arguments=added, keywords={}, written=0)
    return [bare, replace(pool, outputs=(pooled,)), replace(add, inputs=(pooled,))]


def _pooled_first(join: Step, pool: Step, numbers: Iterator[int], values: Sequence[Value]) -> list[Step] | None:
    """A max pool with a stride behind a concatenation of channels, before it: fewer cells to join."""
    if pool.operation not in MAX_POOLS or not _joined(join, pool, values):
        return None
    _, stride, *_ = pool_arguments(*pool.arguments, **pool.keywords)
    if max(each(stride, 1)) == 1:
        return None
    pooled = tuple(next(numbers) for _ in join.inputs)
    pools = [replace(pool, inputs=(value,), outputs=(n,)) for value, n in zip(join.inputs, pooled, strict=True)]
    return [*pools, replace(join, inputs=pooled, outputs=pool.outputs)]


def _apart(join: Step, one: Step, numbers: Iterator[int], values: Sequence[Value]) -> list[Step] | None:
    """A filter of one cell behind a concatenation: of each part by itself, and added up.

    Where what is added up holds fewer channels than what was joined.
    """
    if not _narrows(one) or not (terms := _joined(join, one, values)):
        return None
    weight, bias, *_ = filter_arguments(*one.arguments, **one.keywords)
    channels = [values[value].shape[1] for value in terms]
    if len(terms) * len(weight) >= sum(channels):
        return None
    steps: list[Step] = []
    for value, part in zip(terms, weight.detach().split(channels, 1), strict=True):
        arguments = (Slot(0), part.contiguous(), None if steps else bias)
        filtered = replace(one, arguments=arguments, keywords={}, inputs=(value,), outputs=(next(numbers),))
        if steps:
            pair, both = (steps[-1].output, filtered.output), (Slot(0), Slot(1))
            add = replace(filtered, operation="add", function=Tensor.add_, arguments=both, inputs=pair, written=0)
            steps += [filtered, replace(add, outputs=(next(numbers),))]
        else:
            steps.append(filtered)
    return [*steps[:-1], replace(steps[-1], outputs=one.outputs)]


def _joined(join: Step, after: Step, values: Sequence[Value]) -> list[int]:
    """The pictures (N, C, *S) of one type, with the axes that ``after`` takes, whose channels a step joins; or none."""
    terms = join.argument(0, "tensors")
    if join.operation not in JOINS or not all(isinstance(item, Slot) for item in terms):
        return []
    joined = [join.inputs[item.k] for item in terms]
    if max(joined) >= len(values):  # of a rewritten step
        return []
    rank = len(values[joined[0]].shape)
    pictures = rank == after.spatial + 2 and len({values[value].dtype for value in joined}) == 1
    return joined if pictures and join.argument(1, "dim", 0) in (1, 1 - rank) else []


def _narrows(step: Step) -> bool:
    """Whether a filter of one cell has fewer channels out than in."""
    if step.operation not in FILTERS:
        return False
    weight, _, stride, padding, _, groups = filter_arguments(*step.arguments, **step.keywords)
    bare = isinstance(padding, str) or {*each(padding, 1)} == {0}
    one_cell = {*weight.shape[2:], *each(stride, 1), groups} == {1}
    return bare and one_cell and weight.shape[0] < weight.shape[1]
