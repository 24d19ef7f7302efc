"""Signals back to pixels, many at a time: the deconvnet's walk over a recorded pass (paper section 2.1).

A *unit* is (feature map, position) of a layer's output. To see what made it fire, set every other
activation of the layer to zero and go back through the pass's steps in reverse, each by its row in
:data:`~deconvviz.rules.RULES`. Signals that meet (a skip, a concatenation) add up.

Signals carry a leading axis M of independent projections, so that many feature maps share one walk; M is
cut into chunks that fit a memory budget. A single unit's signal is carried in the box that it fills
(:mod:`~deconvviz.boxes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from deconvviz.boxes import Boxed, settled
from deconvviz.errors import NoForwardPass, UnsupportedOperation
from deconvviz.layers import address
from deconvviz.rules import HIDDEN_CODE, UNSUPPORTED, Context
from deconvviz.tape import Step, Tape

CPU_BUDGET, DEVICE_BUDGET = 8 * 2**20, 2**30
"""Bytes that the signals of one chunk may take together at any step. On a CPU larger chunks take memory and gain a
fifth at most, in late layers; an accelerator wants them."""

Signal = Tensor | Boxed


def back_to_inputs(tape: Tape, value: int, signal: Signal, overlap: str = "sum") -> list[Tensor]:
    """Walk ``signal`` (M, *shape of the value) from ``value`` back to the pass's inputs.

    Returns:
        One tensor (M, *shape of the input) per input, in the input's dtype.

    Raises:
        UnsupportedOperation: the signal reaches an operation without a rule.
        NoForwardPass: nothing seen in the pass leads from the inputs to ``value``.
    """
    signals, _ = _walk(tape, value, signal, overlap)
    pixels = [t.new_zeros((len(signal), *t.shape)) for t in tape.tensors]
    for whole, back in zip(pixels, signals, strict=True):
        _put(back, whole)
    return pixels


def _put(signal: Signal | None, whole: Tensor) -> None:
    """Put a signal into ``whole``, which is zero."""
    if isinstance(signal, Boxed):
        signal.added_to(whole)
    elif signal is not None:
        whole.copy_(signal)


def _walk(tape: Tape, value: int, signal: Signal, overlap: str) -> tuple[list[Signal | None], int]:
    """The signals at the pass's inputs, and the bytes that all signals took together at the widest step."""
    if not set(tape.inputs) & {value, *(i for step in tape.leading_to(value) for i in step.inputs)}:
        raise NoForwardPass(
            "the layer's output does not depend on the inputs through any operation seen in the pass "
            "(it may go through numpy, .detach() or code that hides its operations)"
        )
    context = Context(tape.values, overlap)
    signals: dict[int, Signal] = {value: signal}
    widest = _bytes(signals.values())
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(tape.tensors[0].device.type, enabled=False),
    ):
        for step in reversed(tape.leading_to(value)):
            outputs = [None if i is None else signals.pop(i, None) for i in step.outputs]
            if all(output is None for output in outputs):
                continue
            if step.kind == UNSUPPORTED:
                place = address(step.module, step.number, tape.counts())
                or_else = (
                    ""
                    if step.operation == HIDDEN_CODE
                    else ", or take the plain gradient at such operations: "
                    'Deconvnet(model, on_unsupported="gradient")'
                )
                raise UnsupportedOperation(
                    f"no rule for {step.operation!r} in layer {place or 'the model'!r}, so the deconvnet "
                    f"is not defined there. Choose a layer before it{or_else}"
                )
            backs = _back(step, outputs, context)
            widest = max(widest, _bytes([*signals.values(), *outputs, *backs]))
            for i, back in zip(step.inputs, backs, strict=True):
                if back is not None:
                    signals[i] = signals[i] + back if i in signals else back
    return [signals.get(i) for i in tape.inputs], widest


def _back(step: Step, outputs: Sequence[Signal | None], context: Context) -> Sequence[Signal | None]:
    """Through one step: in boxes if all signals are and the step's rule keeps them, else whole."""
    given = [output for output in outputs if output is not None]
    if step.rule.boxed is not None and all(isinstance(output, Boxed) for output in given):
        backs = step.rule.boxed(step, outputs, context)  # type: ignore[arg-type]
        if backs is not None:
            return [None if back is None else settled(back) for back in backs]
    whole = [output.whole() if isinstance(output, Boxed) else output for output in outputs]
    return step.rule.back(step, whole, context)


def _bytes(signals: Iterable[Signal | None]) -> int:
    contents = {id(s): s.content if isinstance(s, Boxed) else s for s in signals if s is not None}
    return sum(content.nbytes for content in contents.values())


def project(
    tape: Tape,
    value: int,
    seeds: Callable[[slice], Signal],
    count: int,
    overlap: str = "sum",
    budget: int | None = None,
) -> list[Tensor]:
    """Project ``count`` seeds in chunks; ``seeds(slice)`` makes those of a chunk, (M, *shape of the value).

    Returns:
        One tensor (count, *shape of the input) per input; with the two first axes swapped it is contiguous.
    """
    if budget is None:
        budget = CPU_BUDGET if tape.tensors[0].device.type == "cpu" else DEVICE_BUDGET
    pixels = [t.new_zeros((len(t), count, *t.shape[1:])).movedim(1, 0) for t in tape.tensors]
    start, step = 0, 1  # the first one alone, to see what it takes
    while start < count:
        part = slice(start, min(start + step, count))
        signals, widest = _walk(tape, value, seeds(part), overlap)
        for whole, back in zip(pixels, signals, strict=True):
            _put(back, whole[part])
        step = max(1, budget * (part.stop - part.start) // max(1, widest))
        start = part.stop
    return pixels
