"""How every operation of a pass goes back: the table that ``Deconvnet.check`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deconvviz.layers import address
from deconvviz.rules import EXACT, GATE, GRADIENT, HIDDEN_CODE, KINDS, UNSUPPORTED
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
    """Every operation with a nonlinearity or a pool, in the order they ran. Of those without a rule, or with the
    plain gradient's, only the ones that a signal from the output reaches: none goes into a gate."""
    linear: int
    """How many operations were linear and exact."""

    @classmethod
    def of(cls, tape: Tape, whole: bool = True) -> CheckReport:
        """Read a tape; if it is not the ``whole`` pass, say that code is hidden somewhere."""
        counts, reached = tape.counts(), {id(step) for step in tape.signalled()}
        gates = {step.gate for step in tape.steps if step.gate is not None}
        rows: list[CheckedOperation] = []
        linear = 0
        for i, step in enumerate(tape.steps):
            kind = GATE if i in gates and id(step) not in reached else step.kind
            if not step.rule.listed and kind == EXACT:
                linear += 1
            elif id(step) in reached or kind not in (GRADIENT, UNSUPPORTED):
                rows.append(CheckedOperation(address(step.module, step.number, counts), step.operation, kind))
        if not whole:
            rows.append(CheckedOperation("somewhere", HIDDEN_CODE, UNSUPPORTED))
        return cls(tuple(rows), linear)

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
