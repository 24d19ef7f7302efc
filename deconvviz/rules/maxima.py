"""Pools and maxima go back to where the maximum was: the recorded switches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvviz.rules.linear import each, unbroadcast
from deconvviz.rules.rule import Context, Run, Signals, only
from deconvviz.switches import Switches, Windows, unpool
from deconvviz.tape import Slot, Step, Value, fill


def pool_arguments(input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                   ceil_mode: bool = False, return_indices: bool = False) -> tuple[Any, ...]:  # fmt: skip
    """A pool's kernel size, stride, padding, dilation and ceil mode, from the arguments of a call."""
    return kernel_size, stride or kernel_size, padding, dilation, ceil_mode


def average_arguments(input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
                      count_include_pad: bool = True, divisor_override: Any = None) -> tuple[Any, ...]:  # fmt: skip
    """The same of an average pool, and whether padding counts and what it divides by."""
    return kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad, divisor_override


def observe_pool(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Pool with PyTorch's own indices, so that the output keeps its bits, and keep them as switches."""
    name, spatial = step.operation.removesuffix("_with_indices"), step.spatial
    pool, input = getattr(F, name), inputs[0]
    if name.startswith("adaptive"):
        output, indices = pool(input, step.argument(1, "output_size"), return_indices=True)
        windows = Windows.adaptive(input.shape[-spatial:], output.shape[-spatial:])
    else:
        *sizes, ceil_mode = pool_arguments(*step.arguments, **step.keywords)
        output, indices = pool(input, *sizes, ceil_mode, return_indices=True)
        geometry = (tuple(each(item, spatial)) for item in sizes)
        windows = Windows.strided(input.shape[-spatial:], output.shape[-spatial:], *geometry)
    step.kept = Switches.record(indices, windows)
    asked = name != step.operation or step.function is torch.adaptive_max_pool1d  # unlike F.adaptive_max_pool1d
    return (output, indices) if asked else output


def unpool_by_switches(step: Step, signals: Signals, context: Context) -> Signals:
    """Each value to the recorded place of its maximum."""
    return [step.kept.unpool(only(signals), context.overlap)]


def observe_maximum(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep where the maximum over dimensions was, or which of two tensors was larger."""
    with torch.no_grad():
        first, second = (fill(step.argument(i, name), inputs) for i, name in ((0, "input"), (1, "other")))
        if isinstance(second, Tensor):
            constant = second if isinstance(step.argument(0, "input"), Slot) else first
            if len(step.inputs) == 2 or constant.any():
                step.kept = first >= second
        else:
            dims = step.argument(1, "dim")
            dims = tuple(range(first.dim())) if dims in (None, ()) else dims
            dims = tuple(d % first.dim() for d in ((dims,) if isinstance(dims, int) else dims))
            rest = [d for d in range(first.dim()) if d not in dims]
            flat = first.permute(*rest, *dims).flatten(len(rest)) if dims else first.unsqueeze(-1)
            step.kept = (dims, rest, flat.argmax(-1, keepdim=True))
    return run()


def route(step: Step, signals: Signals, context: Context) -> Signals:
    """To where the maximum was: the first, where several are equal."""
    signal = only(signals)
    shapes = [context.values[i].shape for i in step.inputs]
    if step.kept is None:
        return [signal.relu()]
    if isinstance(step.kept, Tensor):
        masks = (step.kept, ~step.kept)
        first = not isinstance(step.argument(0, "input"), Slot)
        return [unbroadcast(signal * mask, shape) for mask, shape in zip(masks[first:], shapes, strict=False)]
    dims, rest, indices = step.kept
    routed = unpool(signal.reshape(len(signal), *indices.shape), indices, [shapes[0][d] for d in dims])
    order = [rest.index(d) if d in rest else len(rest) + dims.index(d) for d in range(len(shapes[0]))]
    return [routed.permute(0, *(1 + d for d in order))]
