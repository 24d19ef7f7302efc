"""Linear operations go back by their adjoint: transposed filters, copies, slices, spreads (no bias)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp, vmap

from deconvviz.rules.rule import EXACT, GATE, UNSUPPORTED, Context, Signals, only
from deconvviz.tape import Slot, Step, Value, flatten


def linear_kind(step: Step, values: Sequence[Value]) -> str:
    """A mask or index computed from the input is a constant gate."""
    return GATE if step.derived else EXACT


def product_kind(step: Step, values: Sequence[Value]) -> str:
    """Linear in one factor (for a quotient: the numerator); in two that depend on the input, not."""
    if len(step.inputs) > 1 or "rounding_mode" in step.keywords:
        return UNSUPPORTED
    if step.operation in LINEAR_IN_FIRST and not isinstance(step.argument(0, "input"), Slot):
        return UNSUPPORTED
    return linear_kind(step, values)


def fused_kind(step: Step, values: Sequence[Value]) -> str:
    """A sum of a term and a product is linear in the term, and in one of the factors."""
    factors = len(step.inputs) - isinstance(step.argument(0, "input"), Slot)
    return UNSUPPORTED if factors > 1 else linear_kind(step, values)


LINEAR_IN_FIRST = ("div", "divide", "true_divide", "grid_sample")


def adjoint(step: Step, signals: Signals, context: Context) -> Signals:
    """A linear operation has one Jacobian everywhere: it is pulled back at a placeholder."""
    signal = next(signal for signal in signals if signal is not None)
    at = [
        torch.empty_strided(value.shape, value.stride, dtype=as_fine(value.dtype, signal.dtype), device=signal.device)
        for value in (context.values[i] for i in step.inputs)
    ]
    return pull_back(step, signals, at)


def as_fine(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    """A dtype in the precision of another: real or complex as it is."""
    return other.to_complex() if dtype.is_complex else other.to_real()


def add_back(step: Step, signals: Signals, context: Context) -> Signals:
    """A sum copies the signal to each of its terms."""
    if "alpha" in step.keywords or len(step.arguments) > 2:
        return adjoint(step, signals, context)
    return [unbroadcast(only(signals), context.values[i].shape) for i in step.inputs]


ONE_BY_ONE = frozenset(("unfold", "bilinear", "scaled_dot_product_attention", "multi_head_attention_forward"))
"""Operations whose way back PyTorch can't batch: it would loop too, with a warning."""


def _one_by_one(pull: Callable[..., Any]) -> Callable[..., Any]:
    """``pull`` over the first axis, as ``vmap(pull)``."""

    def every(signals: tuple[Tensor, ...]) -> Any:
        backs = [pull(each) for each in zip(*signals, strict=True)]
        return tuple(map(torch.stack, zip(*backs, strict=True)))

    return every


def pull_back(step: Step, signals: Signals, at: Sequence[Tensor], one_by_one: bool = False) -> Signals:
    """The vector-Jacobian product of a step at its inputs ``at``, for each of the M signals."""
    tracked = [i for i, value in enumerate(step.outputs) if value is not None]
    given = [signals[i] for i in tracked]
    count = next(len(signal) for signal in given if signal is not None)

    step = _written_in(step, at[0].dtype)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = flatten(step.rerun(*inputs))
        return tuple(outputs[i] for i in tracked)

    outputs, pull = vjp(function, *at)[:2]
    every = _one_by_one(pull) if one_by_one or step.operation in ONE_BY_ONE else vmap(pull)
    back: Signals = every(
        tuple(
            output.new_zeros(()).expand(count, *output.shape) if signal is None else signal.to(output.dtype)
            for signal, output in zip(given, outputs, strict=True)
        )
    )
    return back


def _written_in(step: Step, dtype: torch.dtype) -> Step:
    """The step with a constant that it overwrites in the dtype of the signals, which would be rounded to its own."""
    where = step.written
    arguments: Any = step.keywords if isinstance(where, str) else step.arguments
    target = None if where is None else arguments[where]
    if not isinstance(target, Tensor) or target.dtype == dtype or not target.is_floating_point():
        return step
    if isinstance(where, str):
        return replace(step, keywords={**step.keywords, where: target.to(dtype)})
    return replace(step, arguments=tuple(target.to(dtype) if i == where else a for i, a in enumerate(arguments)))


def identity(step: Step, signals: Signals, context: Context) -> Signals:
    """Conversions: a signal keeps the dtype of the pixels all the way."""
    return [only(signals)]


def filter_arguments(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                     groups: int = 1) -> tuple[Any, ...]:  # fmt: skip
    """A convolution's weight, bias, stride, padding, dilation and groups, from the arguments of a call."""
    return weight, bias, stride, padding, dilation, groups


def filter_back(step: Step, signals: Signals, context: Context) -> Signals:
    """The transposed filter without its bias, all M projections in one batch."""
    weight, _, stride, padding, dilation, groups = filter_arguments(*step.arguments, **step.keywords)
    signal, shape = only(signals), context.values[step.inputs[0]].shape
    filtered = isinstance(step.argument(0, "input"), Slot) and len(shape) == weight.dim()
    if not filtered or isinstance(padding, str) or signal.is_complex():  # which takes the conjugate
        return adjoint(step, signals, context)
    steps, pads, gaps = (each(item, weight.dim() - 2) for item in (stride, padding, dilation))
    return [transposed_filter(signal, weight, shape[2:], steps, pads, gaps, groups)]


def transposed_filter(signal: Tensor, weight: Tensor, size: Sequence[int], stride: list[int], padding: list[int],
                      dilation: list[int], groups: int) -> Tensor:  # fmt: skip
    """A signal (M, N, O, *cells) at a filter's output to (M, N, I, *size) at its input."""
    # One signal goes back in autograd's own layout, so to its bits; many are faster channels_last.
    spatial, many = weight.dim() - 2, len(signal) > 1
    layout = torch.channels_last if spatial == 2 and many else torch.contiguous_format
    batch = signal.flatten(0, 1).contiguous(memory_format=layout)
    strided = stride[0] > 1 and len({*stride}) == 1 and {*dilation, groups} == {1}
    if len(batch) > 1 and spatial == 2 and strided and weight.shape[1] <= FEW:
        return _by_phase(batch, weight.to(batch.dtype), size, stride[0], padding).unflatten(0, signal.shape[:2])
    geometry = zip(size, batch.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    beyond = [n - ((cells - 1) * s - 2 * p + (k - 1) * d + 1) for n, cells, k, s, p, d in geometry]
    back = TRANSPOSED[spatial - 1](batch, weight.to(batch.dtype), None, stride, padding, beyond, groups, dilation)
    return back.unflatten(0, signal.shape[:2])


def _by_phase(signal: Tensor, weight: Tensor, size: Sequence[int], stride: int, padding: Sequence[int]) -> Tensor:
    """A transposed filter (O, I, K, K) with a stride S as one without: each of the S x S phases of the pixels has taps
    of its own, and puts out channels of its own, which are then laid between each other.

    Of the filter at the pixels it takes less than half the time, as its channels are few.
    """
    taps = [-(-k // stride) for k in weight.shape[2:]]
    (up, across), (outward, inward, *kernel) = taps, weight.shape
    whole = F.pad(weight, [0, across * stride - kernel[1], 0, up * stride - kernel[0]])
    phases = whole.view(outward, inward, up, stride, across, stride).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    found = F.conv2d(signal, phases.reshape(-1, outward, up, across), padding=(up - 1, across - 1))
    pixels = F.pixel_shuffle(found, stride)
    ends = [p + n - extent for p, n, extent in zip(padding, size, pixels.shape[2:], strict=True)]
    return F.pad(pixels, [-padding[1], ends[1], -padding[0], ends[0]])


FEW = 4
"""Channels, such as a picture's, up to which a transposed filter goes by phases."""
TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def transposed_matrix(step: Step, signals: Signals, context: Context) -> Signals:
    """The transposed matrix, without bias."""
    signal, weight = only(signals), step.argument(1, "weight")
    if not isinstance(step.argument(0, "input"), Slot) or weight.dim() == 1 or signal.is_complex():
        return adjoint(step, signals, context)
    return [signal @ weight.to(signal.dtype)]


def each(item: Any, count: int) -> list[int]:
    """One number per spatial dimension."""
    numbers = [int(number) for number in item] if isinstance(item, Sequence) else [int(item)]
    return numbers * count if len(numbers) == 1 else numbers


def unbroadcast(signal: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum (M, *broadcast shape) to (M, *shape): the adjoint of broadcasting."""
    extra = signal.dim() - 1 - len(shape)
    signal = signal.sum(tuple(range(1, 1 + extra))) if extra else signal
    narrow = [1 + d for d, n in enumerate(shape) if n == 1 and signal.shape[1 + d] != 1]
    return signal.sum(narrow, keepdim=True) if narrow else signal
