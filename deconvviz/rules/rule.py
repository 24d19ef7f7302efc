"""What a row of the table is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from deconvviz.boxes import Boxed
from deconvviz.tape import Step, Value

EXACT, GENERALISED, GATE, GRADIENT, UNSUPPORTED = KINDS = (
    "exact",
    "generalised",
    "constant gate",
    "gradient",
    "unsupported",
)

Signals = Sequence[Tensor | None]
"""The signals at a step's outputs or inputs, each (M, *shape of the value) for M projections, or None."""
Run = Callable[[], Any]
Signal = TypeVar("Signal", Tensor, Boxed)


@dataclass(frozen=True)
class Context:
    """What going back needs besides the step: the pass's values and the unpooling policy."""

    values: Sequence[Value]
    overlap: str = "sum"


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    kind: str
    back: Callable[[Step, Signals, Context], Signals]
    """From the signals at the step's outputs to those at its inputs."""
    boxed: Callable[[Step, Sequence[Boxed | None], Context], Sequence[Boxed | None] | None] | None = None
    """The same for signals that live in boxes; ``None`` where only the whole signals will do."""
    gate: Callable[[Step], bool] | None = None
    """Whether a step's output is a gate where a map is multiplied or divided by it."""
    keeps_gate: bool = False
    """Whether a gate that goes in comes out, reshaped or scaled."""
    listed: bool = True
    """Whether ``check`` always lists it: it holds a nonlinearity or a pool."""
    classify: Callable[[Step, Sequence[Value]], str] | None = None
    """The kind of a step, where it depends on the arguments."""
    observe: Callable[[Step, Sequence[Value], Sequence[Tensor], Run], Any] | None = None
    """``observe(step, values, inputs, run)`` returns ``run()``, or the same bits had otherwise, and fills
    ``step.kept`` with what ``back`` needs."""
    rerun: Callable[..., Any] | None = None
    """``rerun(step, *inputs)`` computes a recorded step again, where calling the function would not do."""


def only(signals: Sequence[Signal | None]) -> Signal:
    """The one signal at a step's outputs: no way goes back through a step without any."""
    (signal,) = (signal for signal in signals if signal is not None)
    return signal
