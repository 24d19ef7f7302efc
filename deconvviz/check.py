"""How every operation of a pass goes back: the table that ``Deconvnet.check`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deconvviz.layers import address
from deconvviz.rules import EXACT, GATE, HIDDEN_CODE, KINDS, UNSUPPORTED
from deconvviz.tape import Tape, flatten


@dataclass(frozen=True)
class CheckedOperation:
    """One operation that is not simply linear: where it ran, what it is and how it goes back."""

    address: str
    operation: str
    kind: str


@dataclass(frozen=True)
class CheckReport:
    """What :meth:`Deconvnet.check` found: prints as a table."""

    operations: tuple[CheckedOperation, ...]
    """Every operation with a nonlinearity or a pool, in the order they ran."""
    linear: int
    """How many other operations there were, all linear and exact."""

    @classmethod
    def of(cls, tape: Tape, whole: bool = True) -> CheckReport:
        """Read a tape; if it is not the ``whole`` pass, say that code is hidden somewhere."""
        counts = tape.counts()
        gates = {step.gate for step in tape.steps if step.gate is not None}
        listed = [(i, step) for i, step in enumerate(tape.steps) if step.rule.listed or step.kind != EXACT]
        rows = tuple(
            CheckedOperation(
                address(step.module, step.number, counts), step.operation, GATE if i in gates else step.kind
            )
            for i, step in listed
        )
        hidden = () if whole else (CheckedOperation("somewhere", HIDDEN_CODE, UNSUPPORTED),)
        return cls(rows + hidden, len(tape.steps) - len(rows))

    @property
    def counts(self) -> dict[str, int]:
        """How many of the operations go back in each way."""
        kinds = [operation.kind for operation in self.operations]
        return {kind: kinds.count(kind) for kind in KINDS}

    @property
    def supported(self) -> bool:
        """Whether every operation has a rule."""
        return not self.counts["unsupported"]

    def __str__(self) -> str:
        width = max([len(o.address) for o in self.operations] + [5])
        name = max([len(o.operation) for o in self.operations] + [9])
        lines = [f"{o.address:<{width}}  {o.operation:<{name}}  {o.kind}" for o in self.operations]
        total = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        head = f"{'layer':<{width}}  {'operation':<{name}}  goes back"
        return "\n".join([head, *lines, f"{total or 'none'}; and {self.linear} linear operations, exact"])


def explains(tape: Tape, inputs: Sequence[Tensor], output: Any) -> bool:
    """Whether a tape, replayed on other inputs, gives what the model gave for them; true where that says nothing."""
    constants = tape.random or tape.content_read or any(s.derived or s.operation == HIDDEN_CODE for s in tape.steps)
    pairs = [(i, t) for i, t in zip(tape.calls[-1].outputs, flatten(output), strict=False) if i is not None]
    if constants or any(tape.values[i].shape != t.shape for i, t in pairs):
        return True
    found = tape.replay_all([i for i, _ in pairs], inputs)
    return all(
        torch.allclose(found[i], t, 1e-3, 1e-3 * float(t.abs().nan_to_num().max()), equal_nan=True) for i, t in pairs
    )
