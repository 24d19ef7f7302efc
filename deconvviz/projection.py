"""Signals back to pixels, many at a time: the deconvnet's walk over a recorded pass (paper section 2.1).

A *unit* is (feature map, position) of a layer's output. To see what made it fire, set every other
activation of the layer to zero and go back through the pass's steps in reverse, each by its row in
:data:`~deconvviz.rules.RULES`. Signals that meet (a skip, a concatenation) add up.

Signals carry a leading axis M of independent projections, so that many feature maps share one walk; M is
cut into chunks that fit a memory budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deconvviz.errors import NoForwardPass, UnsupportedOperation
from deconvviz.layers import address
from deconvviz.rules import HIDDEN_CODE, UNSUPPORTED, Context
from deconvviz.tape import Tape

CPU_BUDGET, DEVICE_BUDGET = 32 * 2**20, 2**30
"""Bytes that the signals of one chunk may take at their widest step. On a CPU larger chunks only take memory;
an accelerator wants them."""


def back_to_inputs(tape: Tape, value: int, signal: Tensor, overlap: str = "sum") -> list[Tensor]:
    """Walk ``signal`` (M, *shape of the value) from ``value`` back to the pass's inputs.

    Returns:
        One tensor (M, *shape of the input) per input, in the input's dtype.

    Raises:
        UnsupportedOperation: the signal reaches an operation without a rule.
        NoForwardPass: nothing seen in the pass leads from the inputs to ``value``.
    """
    if not set(tape.inputs) & {value, *(i for step in tape.leading_to(value) for i in step.inputs)}:
        raise NoForwardPass(
            "the layer's output does not depend on the inputs through any operation seen in the pass "
            "(it may go through numpy, .detach() or code that hides its operations)"
        )
    context = Context(tape.values, overlap)
    signals: dict[int, Tensor] = {value: signal}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(signal.device.type, enabled=False):
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
            for i, back in zip(step.inputs, step.rule.back(step, outputs, context), strict=True):
                if back is not None:
                    signals[i] = signals[i] + back if i in signals else back
        return [
            signals.get(i, signal.new_zeros(())).expand(len(signal), *tensor.shape).to(tensor.dtype)
            for i, tensor in zip(tape.inputs, tape.tensors, strict=True)
        ]


def project(
    tape: Tape,
    value: int,
    seeds: Callable[[slice], Tensor],
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
    pixels = [t.new_empty((len(t), count, *t.shape[1:])).movedim(1, 0) for t in tape.tensors]
    for part in chunks(count, _bytes(tape, value), budget):
        for whole, back in zip(pixels, back_to_inputs(tape, value, seeds(part), overlap), strict=True):
            whole[part] = back
    return pixels


def chunks(count: int, size: int, budget: int) -> Iterator[slice]:
    """Cut ``range(count)`` into slices of items of ``size`` bytes that fit ``budget``."""
    step = max(1, budget // max(1, size))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _bytes(tape: Tape, value: int) -> int:
    """Bytes of one projection's signals at the widest step: its inputs and outputs."""
    width = tape.tensors[0].element_size()

    def size(values: Sequence[int | None]) -> int:
        return sum(tape.values[i].shape.numel() for i in values if i is not None)

    widest = max((size(step.inputs) + size(step.outputs) for step in tape.leading_to(value)), default=0)
    return width * max(widest, tape.values[value].shape.numel())
