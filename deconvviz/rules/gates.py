"""Gates and dropout masks are constants of the pass; elsewhere a sigmoid or softmax has its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from deconvviz.rules.linear import adjoint, as_fine, product_kind, pull_back, unbroadcast
from deconvviz.rules.linear import filter_back as fixed_filter_back
from deconvviz.rules.rectifiers import SMOOTH
from deconvviz.rules.rule import EXACT, GATE, GENERALISED, UNSUPPORTED, Context, Run, Signals, only
from deconvviz.tape import BROADCAST, SIGMOID, Gate, Slot, Step, Value


def always(step: Step) -> bool:
    """What is a gate wherever a map is multiplied by it: a sigmoid, a norm's statistic."""
    return True


def is_root(step: Step) -> bool:
    """Whether a power is one of a norm's statistics: a root, or the inverse of one."""
    exponent = step.argument(1, "exponent")
    return isinstance(exponent, float) and not exponent.is_integer()


def factor_kind(step: Step, values: Sequence[Value]) -> str:
    """A product with a gate (a sigmoid, a clamp), or a quotient by one (a statistic), is gated, and a rectifier where
    the gate is a function of the map itself; a parameter scales a layer."""
    k = _gate(step, values)
    if k is not None:
        return GATE if _slope(k, step, values) is None else GENERALISED
    if any(isinstance(item, nn.Parameter) for item in step.arguments):
        return GENERALISED
    return product_kind(step, values)


ACTIVATIONS = frozenset(("relu", *SMOOTH.split()))
"""What makes a gate of one half of a gated linear unit."""


def _gate(step: Step, values: Sequence[Value]) -> int | None:
    """Which of two inputs is the gate of a product, of two that can be that of the higher rank; or of a quotient, whose
    divisor alone can be. What is broadcast to the other, one number for a channel or a position, can be too; and if
    none can, the half of a gated linear unit that alone was activated, and for this product alone."""
    if len(step.inputs) != 2 or "rounding_mode" in step.keywords:
        return None
    pair, other = [values[i] for i in step.inputs], step.argument(1, "other")
    ranks = [-1 if value.gate is None else value.gate.rank for value in pair]
    ranks = [max(ranks[k], BROADCAST) if _broadcast(pair[k], pair[1 - k]) else ranks[k] for k in (0, 1)]
    divisor = step.operation != "mul"
    can_be = [k for k in (0, 1) if ranks[k] >= 0 and (not divisor or other == Slot(k))]
    halves = not divisor and pair[0].shape == pair[1].shape
    activated = [k for k in (0, 1) if halves and pair[k].operation in ACTIVATIONS and not pair[k].used]
    return max(can_be, key=lambda k: (ranks[k], k), default=activated[0] if len(activated) == 1 else None)


SCALES = "mul div divide true_divide to type type_as float double half bfloat16 clone contiguous"
CELLWISE = "sigmoid special_expit hardsigmoid tanh erf softplus relu6 clamp clip hardtanh neg square pow add sub rsub"
"""What a SiLU, Hardswish, Mish or GELU is written by hand with, besides: each cell is computed from that cell alone."""


def _slope(k: int, step: Step, values: Sequence[Value]) -> Tensor | None:
    """Where the gate of a product, its input ``k``, is a function of the map, cell by cell: its limit for large ones.

    So much of a large activation passes: x * relu6(x + 3) goes to 6 x. Of a map that was scaled by a number before, the
    gate may be a function of what was scaled.
    """
    gate, source = step.inputs[k], step.inputs[1 - k]
    if step.operation != "mul" or values[gate].gate is None or values[gate].shape != values[source].shape:
        return None
    while (way := _cell_by_cell(source, gate, values)) is None:
        before = values[source].step
        if before is None or before.operation not in SCALES.split() or len(before.inputs) != 1:
            return None
        (source,) = before.inputs
    ones = torch.ones([1] * len(values[source].shape), dtype=values[source].dtype, device="cpu")
    ends = []
    with torch.no_grad():
        for end in (math.inf, -math.inf):
            held = {source: ones * end}
            for value, how in way:
                held[value] = how.call(*(held[each] for each in how.inputs))
            ends.append(held[gate])
    slope = torch.maximum(*ends)
    return slope if bool(slope.isfinite().all()) else None


def _cell_by_cell(source: int, value: int, values: Sequence[Value]) -> list[tuple[int, Step]] | None:
    """The values, and their steps, by which each cell of a value is computed from the same cell of another.

    ``None`` if it is computed from anything else of the input too.
    """
    way: dict[int, Step] = {}
    ahead = {value}.difference((source,))
    while ahead:
        value = ahead.pop()
        step = values[value].step
        if step is None or step.operation not in (SCALES + " " + CELLWISE).split():
            return None
        way[value] = step
        ahead.update(set(step.inputs).difference(way, (source,)))
    return sorted(way.items(), key=lambda item: item[0])


def _broadcast(value: Value, other: Value) -> bool:
    """Whether a value has one number for many of another's, also where it is expanded, and nowhere many for one."""
    cells = [[n if stride else 1 for n, stride in zip(v.shape, v.stride, strict=True)][::-1] for v in (value, other)]
    pairs = list(zip_longest(*cells, fillvalue=1))
    return all(n in (1, m) for n, m in pairs) and any(n != m for n, m in pairs)


def observe_gate(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep what a gate multiplies the map by, or its slope for large activations."""
    k = _gate(step, values)
    if k is not None:
        of = values[step.inputs[k]].gate
        step.gate = None if of is None else of.step
        step.constant, gate = (k,), inputs[k].detach()
        slope = _slope(k, step, values) if step.kind == GENERALISED else None
        kept = slope if slope is not None else gate if step.operation == "mul" else gate.reciprocal()
        step.kept = kept.to(gate, copy=True)
    return run()


def pass_gate(step: Step, signals: Signals, context: Context) -> Signals:
    """Through a product or quotient the signal is multiplied by the constant factor; none goes to a gate. Where that is
    a function of the map, the product is a rectifier, and its slope the factor."""
    if not step.constant:
        return adjoint(step, signals, context)
    signal, gate, (k,) = only(signals), step.kept, step.constant
    signal = signal.relu() if step.kind == GENERALISED else signal
    back = unbroadcast(signal * gate.to(signal.dtype), context.values[step.inputs[1 - k]].shape)
    return [back, None] if k == 1 else [None, back]


def weighted_kind(step: Step, values: Sequence[Value]) -> str:
    """A matrix product with attention weights is gated by them."""
    return GATE if _weights(step, values) is not None else product_kind(step, values)


def _weights(step: Step, values: Sequence[Value]) -> tuple[int, Gate] | None:
    """Which of two factors is attention weights, a softmax or sigmoid; none if both can be."""
    surely = [(k, gate) for k, value in enumerate(step.inputs) if (gate := values[value].gate) and gate.rank == SIGMOID]
    return surely[0] if len(step.inputs) == 2 and len(surely) == 1 else None


def observe_weights(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep the attention weights."""
    found = _weights(step, values)
    if found is not None:
        k, (step.gate, _) = found
        step.constant, step.kept = (k,), {k: inputs[k].detach().clone()}
    return run()


def attention_kind(step: Step, values: Sequence[Value]) -> str:
    """What the weights that queries and keys give mix are the values; in train mode some weights are dropped."""
    heads = step.operation == "multi_head_attention_forward"
    dropped = step.argument(10 if heads else 4, "dropout_p", 0.0) and (not heads or step.argument(13, "training", True))
    return GATE if isinstance(step.argument(2, "value"), Slot) and not dropped else UNSUPPORTED


def observe_mixing(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep all that a gated step takes besides what it mixes: queries and keys, or filters computed from the input."""
    if step.kind == GATE and len(inputs) > 1:
        mixed = step.argument(2, "value") if "attention" in step.operation else step.argument(0, "input")
        step.constant = tuple(k for k in range(len(inputs)) if k != mixed.k)
        step.kept = {k: inputs[k].detach().clone() for k in step.constant}
    return run()


def weigh_back(step: Step, signals: Signals, context: Context) -> Signals:
    """The adjoint in the one input that is no constant of the pass: the transposed matrix of the weights."""
    if not step.constant:
        return adjoint(step, signals, context)
    dtype = next(signal.dtype for signal in signals if signal is not None)
    inputs = [Slot(0) if k not in step.constant else step.kept[k].to(dtype) for k in range(len(step.inputs))]
    (k,) = set(range(len(inputs))).difference(step.constant)
    arguments, keywords = step.filled(inputs)
    alone = replace(step, arguments=tuple(arguments), keywords=keywords, inputs=(step.inputs[k],))
    (back,) = adjoint(alone, signals, context)
    return [back if i == k else None for i in range(len(inputs))]


def filter_kind(step: Step, values: Sequence[Value]) -> str:
    """Filters computed from the input, as attention weights, are a constant of the pass where they filter a map."""
    dynamic = len(step.inputs) > 1 and isinstance(step.argument(0, "input"), Slot)
    return GATE if dynamic else product_kind(step, values)


def filter_back(step: Step, signals: Signals, context: Context) -> Signals:
    """The transposed filter."""
    return (weigh_back if step.constant else fixed_filter_back)(step, signals, context)


def observe_glu(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep the gate half, as a constant."""
    dim: int = step.argument(1, "dim", -1)
    step.kept = (dim, inputs[0].detach().chunk(2, dim)[1].sigmoid())
    return run()


def gated_half(step: Step, signals: Signals, context: Context) -> Signals:
    """a * sigmoid(b): the signal goes to a."""
    signal, (dim, gate) = only(signals), step.kept
    signal = signal * gate.to(signal.dtype)
    return [torch.cat([signal, torch.zeros_like(signal)], dim + (dim >= 0))]


def dropout_kind(step: Step, values: Sequence[Value]) -> str:
    """In train mode the mask is a gate."""
    return GATE if step.argument(2, "training", step.keywords.get("train", True)) else EXACT


def observe_dropout(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep the drawn mask: what the operation, drawing the same numbers again, makes of ones and zeros."""
    if step.kind == EXACT:
        return run()
    generator = default_generator(inputs[0].device)
    before = generator.get_state()
    output = run()
    after = generator.get_state()
    with torch.no_grad():
        drawn = []
        for number in (1, 0):
            generator.set_state(before)
            drawn.append(step.call(torch.full_like(inputs[0], number)))
        generator.set_state(after)
    step.kept = (drawn[0] - drawn[1], drawn[1])
    return output


def rerun_dropout(step: Step, *inputs: Tensor) -> Any:
    """With the recorded mask, not a new one."""
    return step.call(*inputs) if step.kept is None else inputs[0] * step.kept[0] + step.kept[1]


def drop(step: Step, signals: Signals, context: Context) -> Signals:
    """In eval mode the identity; in train mode the recorded mask."""
    signal = only(signals)
    return [signal if step.kept is None else signal * step.kept[0].to(signal.dtype)]


def observe_gradient(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """A gradient belongs to one point, so keep the inputs."""
    step.kept = [tensor.detach().clone() for tensor in inputs]
    return run()


BATCHED = frozenset(("sigmoid", "hardsigmoid", "softmax", "log_softmax", "special_expit"))
"""Gradients that PyTorch takes at many signals at once; of others it may not."""


def gradient(step: Step, signals: Signals, context: Context) -> Signals:
    """The plain gradient at the recorded inputs."""
    signal = next(signal for signal in signals if signal is not None)
    at = [kept.to(as_fine(kept.dtype, signal.dtype), copy=True) for kept in step.kept]
    return pull_back(step, signals, at, one_by_one=step.operation not in BATCHED)


def observe_random(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep where the generator stood, to draw the same numbers again."""
    step.kept = default_generator(inputs[0].device).get_state()
    return run()


def rerun_random(step: Step, *inputs: Tensor) -> Any:
    """With the numbers drawn in the pass; the generator stays where it is."""
    generator = default_generator(inputs[0].device)
    now = generator.get_state()
    try:
        generator.set_state(step.kept)
        return step.call(*inputs)
    finally:
        generator.set_state(now)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random operations on ``device`` draw from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator
