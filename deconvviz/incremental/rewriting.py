"""A recorded pass's steps made cheaper where that changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deconvviz.incremental.work import first_alone
from deconvviz.precision import precise
from deconvviz.rules import EXACT
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.tape import Slot, Step, Value

FILTERS = ("conv1d", "conv2d", "conv3d")


def cheaper(steps: Sequence[Step], values: Sequence[Value], wanted: Collection[int]) -> list[Step]:
    """The same steps with batch norms in the filters before them, or as what they do to each channel, in place; and
    with average pools behind the filters of one cell that follow them.

    Args:
        steps: steps of a pass, in order; batch norms have fixed statistics.
        values: the pass's values.
        wanted: the values that have to stay.
    """
    return _pooled_later(_without_norms(steps, values, wanted), wanted)


def _without_norms(steps: Sequence[Step], values: Sequence[Value], wanted: Collection[int]) -> list[Step]:
    """Each batch norm that alone follows a filter is folded into its weights; others are a product and a sum."""
    kept, after = [], _followers(steps, wanted)
    gone: set[int] = set()
    for step in steps:
        norm = after.get(id(step))
        if id(step) in gone:
            continue
        if step.operation in FILTERS and norm is not None and _is_norm(norm):
            gone.add(id(norm))
            step = _fold(step, norm)
        elif _is_norm(step) and first_alone(step):
            step = _scaled(step, len(values[step.inputs[0]].shape))
        kept.append(step)
    return kept


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


def _fold(step: Step, norm: Step) -> Step:
    weight, bias, *geometry = _filter(step)
    scale, shift = _scale_and_shift(norm)
    shift = shift if bias is None else shift + bias.detach() * scale
    scaled = (weight.detach() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    arguments = (Slot(0), scaled, shift.to(weight.dtype), *geometry)
    return replace(step, arguments=arguments, keywords={}, outputs=norm.outputs, written=None)


def _pooled_later(steps: Sequence[Step], wanted: Collection[int]) -> list[Step]:
    """An average pool before a filter of one cell goes behind it, where that leaves fewer channels to pool.

    Both are linear, one over the cells of a channel, one over the channels of a cell; the bias is added last, since a
    pool that counts its padding would lessen it at the border.
    """
    kept, after = [], _followers(steps, wanted)
    number = max((v for step in steps for v in step.outputs if v is not None), default=0)
    gone: set[int] = set()
    for step in steps:
        one = after.get(id(step))
        if id(step) in gone:
            continue
        if not step.operation.startswith("avg_pool") or one is None or not _narrows(one):
            kept.append(step)
            continue
        gone.add(id(one))
        weight, bias, *_ = _filter(one)
        kept.append(replace(one, arguments=(Slot(0), weight), keywords={}, inputs=step.inputs, outputs=step.outputs))
        pool = replace(step, inputs=one.inputs, outputs=one.outputs)
        if bias is None:
            kept.append(pool)
            continue
        number += 1  # what the pool gives is a new value
        added = (Slot(0), bias.detach().view(-1, *[1] * (weight.dim() - 2)))
        add = replace(one, operation="add", function=Tensor.add_, arguments=added, keywords={}, written=0)
        kept += [replace(pool, outputs=(number,)), replace(add, inputs=(number,))]
    return kept


def _narrows(step: Step) -> bool:
    """Whether a filter of one cell has fewer channels out than in."""
    if step.operation not in FILTERS:
        return False
    weight, stride, padding, _, groups = filter_arguments(*step.arguments, **step.keywords)
    bare = isinstance(padding, str) or {*each(padding, 1)} == {0}
    one_cell = {*weight.shape[2:], *each(stride, 1), groups} == {1}
    return bare and one_cell and weight.shape[0] < weight.shape[1]


def _filter(step: Step) -> list[Any]:
    """A convolution's weight, bias, stride, padding, dilation and groups."""
    names = (("weight", None), ("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    return [step.argument(1 + i, name, default) for i, (name, default) in enumerate(names)]


def _followers(steps: Sequence[Step], wanted: Collection[int]) -> dict[int, Step]:
    """By the id of a step with one input and output: the step that alone takes that output, which isn't wanted."""
    users: dict[int | None, list[Step]] = {}
    for step in steps:
        for value in step.inputs:
            users.setdefault(value, []).append(step)
    followers = {}
    for step in steps:
        after = users.get(step.outputs[0], [])
        alone = len(step.outputs) == len(after) == 1 and step.outputs[0] not in wanted
        if alone and first_alone(step) and first_alone(after[0]):
            followers[id(step)] = after[0]
    return followers
