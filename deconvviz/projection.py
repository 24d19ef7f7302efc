"""Signals back to pixels, many at a time: the deconvnet's walk over a recorded pass (paper section 2.1).

A *unit* is (feature map, position) of a layer's output. To see what made it fire, set every other
activation of the layer to zero and go back through the pass's steps in reverse, each by its row in
:data:`~deconvviz.rules.RULES`. Signals that meet (a skip, a concatenation) add up.

Signals carry a leading axis M of independent projections, so that many feature maps share one walk. Where
they would outgrow a memory budget they part, and go on a few at a time: through narrow layers many, through
wide ones few. A single unit's signal is carried in the box that it fills (:mod:`~deconvviz.boxes`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from deconvviz.boxes import Boxed, settled
from deconvviz.errors import NoForwardPass, UnsupportedOperation
from deconvviz.layers import address, described
from deconvviz.rules import HIDDEN_CODE, UNSUPPORTED, Context
from deconvviz.tape import Step, Tape

SMALLEST_BUDGET, DEVICE_BUDGET = 2**19, 2**30
"""Bytes that signals which go through a step together may always take there, on a CPU and on an accelerator."""

Signal = Tensor | Boxed


def back_to_inputs(tape: Tape, value: int, signal: Signal, overlap: str = "sum") -> list[Tensor]:
    """Walk ``signal`` (M, *shape of the value) from ``value`` back to the pass's inputs.

    Returns:
        One tensor (M, *shape of the input) per input, in the input's dtype.

    Raises:
        UnsupportedOperation: the signal reaches an operation without a rule.
        NoForwardPass: nothing seen in the pass leads from the inputs to ``value``.
    """
    with _plain(tape):
        pixels = [t.new_empty((len(signal), *t.shape)) for t in tape.tensors]
        walk = _Walk(_Way(tape, value, overlap), pixels, budget=sys.maxsize)
        walk.on({value: signal}, slice(0, len(signal)), 0)
    return pixels


def project(
    tape: Tape,
    value: int,
    seeds: Callable[[slice], Signal],
    count: int,
    overlap: str = "sum",
    budget: int | None = None,
) -> list[Tensor]:
    """Project ``count`` seeds; ``seeds(slice)`` makes some of them, (M, *shape of the value).

    Returns:
        One tensor (count, *shape of the input) per input; with the two first axes swapped it is contiguous.

    Raises:
        UnsupportedOperation, NoForwardPass: as :func:`back_to_inputs`.
    """
    way = _Way(tape, value, overlap)
    with _plain(tape):
        pixels = [t.new_empty((len(t), count, *t.shape[1:])).movedim(1, 0) for t in tape.tensors]
        walk = _Walk(way, pixels, way.budget() if budget is None else budget)
        first = slice(0, 1)  # alone, to see how wide it gets
        width = _bytes([seed := seeds(first)])
        walk.on({value: seed}, first, 0)
        for part in _pieces(slice(1, count), walk.budget, width):
            walk.on({value: seeds(part)}, part, 0)
    return pixels


def _pieces(part: slice, budget: int, width: int) -> list[slice]:
    """``part`` in pieces of as many projections, ``width`` bytes each, as fit ``budget``."""
    step = max(1, budget // max(1, width))
    return [slice(i, min(i + step, part.stop)) for i in range(part.start, part.stop, step)]


def _put(signal: Signal | None, whole: Tensor) -> None:
    """Write a signal into ``whole``."""
    if isinstance(signal, Tensor):
        whole.copy_(signal)
        return
    whole.zero_()
    if signal is not None:
        signal.added_to(whole)


@contextlib.contextmanager
def _plain(tape: Tape) -> Iterator[None]:
    """Without autograd, and in the signals' own dtype."""
    device = tape.tensors[0].device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


class _Way:
    """The way from a value back to the pass's :attr:`inputs`: :attr:`steps`, the last one first."""

    def __init__(self, tape: Tape, value: int, overlap: str) -> None:
        self.steps = tape.leading_to(value)[::-1]
        if not set(tape.inputs) & {value, *(i for step in self.steps for i in step.inputs)}:
            raise NoForwardPass(
                "the layer's output does not depend on the inputs through any operation seen in the pass "
                "(it may go through numpy, .detach() or code that hides its operations)"
            )
        self.inputs = tape.inputs
        self._tape, self._context = tape, Context(tape.values, overlap)

    def budget(self) -> int:
        """Bytes for the signals: as many as the largest value on the way took in the pass, or more if that is small."""
        values = [self._tape.values[i] for step in self.steps for i in (*step.inputs, *step.outputs) if i is not None]
        largest = max((value.shape.numel() * value.dtype.itemsize for value in values), default=0)
        cpu = self._tape.tensors[0].device.type == "cpu"
        return max(SMALLEST_BUDGET if cpu else DEVICE_BUDGET, largest)

    def through(self, step: Step, signals: dict[int, Signal]) -> int:
        """Replace the signals at a step's outputs by those at its inputs; the bytes that all take together there."""
        outputs = [None if i is None else signals.pop(i, None) for i in step.outputs]
        if all(output is None for output in outputs):
            return _bytes(signals.values())
        if step.kind == UNSUPPORTED:
            raise UnsupportedOperation(self._unsupported(step))
        backs = self._back(step, outputs)
        width = _bytes([*signals.values(), *outputs, *backs])
        for i, back in zip(step.inputs, backs, strict=True):
            if back is not None:
                signals[i] = signals[i] + back if i in signals else back
        return width

    def _back(self, step: Step, outputs: Sequence[Signal | None]) -> Sequence[Signal | None]:
        """In boxes if all signals are and the step's rule keeps them, else whole."""
        given = [output for output in outputs if output is not None]
        if step.rule.boxed is not None and all(isinstance(output, Boxed) for output in given):
            backs = step.rule.boxed(step, outputs, self._context)  # type: ignore[arg-type]
            if backs is not None:
                return [None if back is None else settled(back) for back in backs]
        whole = [output.whole() if isinstance(output, Boxed) else output for output in outputs]
        return step.rule.back(step, whole, self._context)

    def _unsupported(self, step: Step) -> str:
        place = address(step.module, step.number, self._tape.counts())
        or_else = ', or take the plain gradient at such operations: Deconvnet(model, on_unsupported="gradient")'
        return (
            f"no rule for {step.operation!r} in {described(place)}, so the deconvnet is not defined "
            f"there. Choose a layer before it{'' if step.operation == HIDDEN_CODE else or_else}"
        )


class _Walk:
    """Many signals on one way, which part where they outgrow ``budget`` bytes, into ``pixels`` at its end."""

    def __init__(self, way: _Way, pixels: Sequence[Tensor], budget: int) -> None:
        self._way, self._pixels, self.budget = way, pixels, budget
        self._widths = [0] * len(way.steps)

    def on(self, signals: dict[int, Signal], part: slice, start: int) -> None:
        """Take the signals of the projections ``part`` from the step ``start`` to the inputs."""
        steps = self._way.steps
        for i in range(start, len(steps)):
            pieces = _pieces(part, self.budget, self._widths[i])
            if len(pieces) > 1:
                for piece in pieces:
                    own = slice(piece.start - part.start, piece.stop - part.start)
                    self.on({number: signal[own] for number, signal in signals.items()}, piece, i)
                return
            self._widths[i] = self._way.through(steps[i], signals) // (part.stop - part.start)
        for whole, number in zip(self._pixels, self._way.inputs, strict=True):
            _put(signals.get(number), whole[part])


def _bytes(signals: Iterable[Signal | None]) -> int:
    contents = {id(s): s.content if isinstance(s, Boxed) else s for s in signals if s is not None}
    return sum(content.nbytes for content in contents.values())
