"""Write a pass down as it happens: tensors are numbered as values, operations become steps of a tape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deconvviz.capture.memory import CONSTANT, DERIVED, Memory, address, write_through, written_from
from deconvviz.capture.places import Place
from deconvviz.errors import NoForwardPass
from deconvviz.rules import GRADIENT, HIDDEN_CODE, PLAIN_GRADIENT, UNSUPPORTED, rule_of
from deconvviz.tape import CLAMP, SIGMOID, STATISTIC, Gate, Slot, Step, Tape, Value, autocast_on, flatten

PLAIN = frozenset((int, float, bool, str, type(None)))


class TapeWriter:
    """Fills :attr:`tape`; :attr:`memory` knows the tensors met.

    Args:
        model: the module whose pass this is.
        gradient: give operations without a rule the plain gradient's.
    """

    def __init__(self, model: nn.Module, gradient: bool = False) -> None:
        self.tape = Tape()
        self.memory = Memory()
        self._model, self._gradient = model, gradient
        self._foreign: dict[int, tuple[Tensor, int]] = {}
        """Parameters, buffers and other tensors used that are not of the pass, and their versions when first used."""
        self._held: set[int] | None = None
        self._gated = False
        self._inputs_at: set[int] = set()
        self._device = "cpu"

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Number the inputs."""
        self._device = tensors[0].device.type if tensors else "cpu"
        self.tape.inputs = [self._track(tensor) for tensor in tensors]
        self.tape.tensors = tuple(tensors)
        self._inputs_at = {address(tensor) for tensor in tensors}

    def finish(self) -> None:
        """The pass ran to its end: note what it used and did not write to itself, to see later whether it changed."""
        inputs = [(tensor, tensor._version) for tensor in self.tape.tensors if not tensor.is_inference()]
        foreign = [(tensor, version) for tensor, version in self._foreign.values() if tensor._version == version]
        self.tape.versions, self.tape.complete = inputs + foreign, True

    # ── arguments ────────────────────────────────────────────────────────────────────────────────────

    def bound(
        self, place: Place, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor], list[int], bool]:
        """An operation's arguments with a :class:`Slot` for each tensor that depends on the input; constants stay.

        Returns:
            The arguments, the keywords, the tensors that the slots stand for, their numbers, and whether others are
            masks, indices or detached tensors computed from the input.
        """
        tensors: list[Tensor] = []
        values: list[int] = []
        marks: set[int | None] = set()
        seen = place, tensors, values, marks
        arguments = []
        for item in args:
            arguments.append(item if type(item) in PLAIN else self._bind(item, seen))
        keywords = {}
        for name, item in kwargs.items():
            if name != "out":
                keywords[name] = item if type(item) in PLAIN else self._bind(item, seen)
        return tuple(arguments), keywords, tensors, values, DERIVED in marks

    def _bind(self, item: Any, seen: tuple[Place, list[Tensor], list[int], set[int | None]]) -> Any:
        if isinstance(item, Tensor):
            place, tensors, values, marks = seen
            mark = self.memory.mark(item)
            if mark is None and self._held is not None:
                mark = self._returned(item, place)
            if mark is None and id(item) not in self._foreign and not item.is_inference():
                self._foreign[id(item)] = item, item._version
            if mark is None or mark < 0:
                marks.add(mark)
                return self._constant(item)
            tensors.append(item)
            values.append(mark)
            return Slot(len(values) - 1)
        if isinstance(item, (list, tuple)):
            if type(item) is tuple and PLAIN.issuperset(map(type, item)):
                return item
            parts = [self._bind(part, seen) for part in item]
            return parts if isinstance(item, list) else tuple(parts)
        return item

    def _returned(self, tensor: Tensor, place: Place) -> int | None:
        """The value of a tensor that no operation gave, which may carry what went out to NumPy."""
        if carries(tensor) and not isinstance(tensor, nn.Parameter) and id(tensor) not in (self._held or ()):
            self.hidden(place, tensor, self.tape.inputs)
        return self.memory.value(tensor)

    def _constant(self, tensor: Tensor) -> Tensor:
        kind = type(tensor)
        if kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter)):  # this is slow
            return tensor
        if tensor.is_inference():  # autograd would refuse to keep it for the adjoint
            with torch.inference_mode(False):
                return tensor.clone()
        return self.memory.constant(tensor)

    # ── what no operation shows ──────────────────────────────────────────────────────────────────────

    def content_goes_out(self) -> None:
        """Content leaves for NumPy: from here on, a tensor that the model does not hold yet may carry it."""
        if self._held is None:
            self._held = {id(tensor) for module in self._model.modules() for tensor in flatten(vars(module))}

    def unseen(self, place: Place, module: nn.Module, outputs: Sequence[Tensor], sources: list[int]) -> None:
        """Write down that a module's outputs that no operation gave, nor it holds, come from its inputs."""
        held = {id(tensor) for tensor in flatten(vars(module))}
        if self._held is not None:
            held, sources = held & self._held, sources or self.tape.inputs
        for tensor in outputs:
            if carries(tensor) and self.memory.mark(tensor) is None:
                if id(tensor) in held or not sources:
                    self.memory.know(tensor, CONSTANT)
                else:
                    self.hidden(place, tensor, sources)

    def untracked(self, place: Place, output: Any, args: Any, target: Tensor | None, derived: bool) -> None:
        """Mark what an operation that carries no signal gave."""
        returned = self._held is not None and any(isinstance(item, np.ndarray) for item in args)
        for tensor in flatten(output if target is None else (output, target)):
            if returned and carries(tensor):
                self.hidden(place, tensor, self.tape.inputs)
            elif self.memory.value(tensor) is None or tensor is target:
                self.memory.know(tensor, DERIVED if derived else CONSTANT)

    def hidden(self, place: Place, tensor: Tensor, sources: Sequence[int]) -> None:
        """Write down that ``tensor`` comes from ``sources`` by what no operation shows."""
        slots, rule = tuple(map(Slot, range(len(sources)))), rule_of(HIDDEN_CODE)
        step = Step(*place, HIDDEN_CODE, _not_seen, slots, {}, tuple(sources), (), rule, rule.kind)
        self.record(step, [tensor])

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────

    def step(
        self,
        place: Place,
        operation: str,
        function: Any,
        arguments: Any,
        keywords: Any,
        values: Any,
        derived: bool,
    ) -> Step:
        """An operation about to run, with its row of the table."""
        rule = rule_of(operation)
        step = Step(*place, operation, function, arguments, keywords, values, (), rule, rule.kind)
        step.derived, step.autocast = derived, autocast_on(self._device)
        if rule.classify is not None:
            step.kind = rule.classify(step, self.tape.values)
        if step.kind == UNSUPPORTED and self._gradient:
            step.rule, step.kind = replace(PLAIN_GRADIENT, gate=rule.gate, keeps_gate=rule.keeps_gate), GRADIENT
        return step

    def record(self, step: Step, outputs: Sequence[Tensor]) -> None:
        """Number a step's outputs, which are now known, and append it if any carries a signal."""
        gate = None
        if step.rule.gate is not None and step.rule.gate(step):
            rank = {GRADIENT: SIGMOID, UNSUPPORTED: STATISTIC}.get(rule_of(step.operation).kind, CLAMP)
            gate, self._gated = Gate(len(self.tape.steps), rank), True
        elif self._gated and step.rule.keeps_gate:
            gates = [self.tape.values[value].gate for value in step.inputs]
            # a map that was gated is a map: it carries what the lower of the two can be
            gate = min((each for each in gates if each), key=lambda each: each.rank) if all(gates) else None
        for value in step.inputs:
            self.tape.values[value].used = True
        numbers: list[int | None] = []
        for tensor in outputs:
            if carries(tensor):
                numbers.append(self._track(tensor, gate, step))
            else:
                self.memory.know(tensor, DERIVED)
                numbers.append(None)
        step.outputs = tuple(numbers)
        if numbers.count(None) < len(numbers):
            self.tape.steps.append(step)

    def _track(self, tensor: Tensor, gate: Gate | None = None, step: Step | None = None) -> int:
        """Give a tensor the next number of a value."""
        number = len(self.tape.values)
        self.tape.values.append(Value(tensor.shape, tensor.stride(), tensor.dtype, gate, step))
        self.memory.know(tensor, number)
        return number

    # ── writes through shared memory ─────────────────────────────────────────────────────────────────

    def preserve(self, where: int) -> None:
        """Before a write to the memory ``where``: copies of the tape's inputs and constants on it."""
        self.memory.preserve(where)
        if where in self._inputs_at:
            tensors = [t.detach().clone() if address(t) == where else t for t in self.tape.tensors]
            self.tape.tensors, self._inputs_at = tuple(tensors), {address(t) for t in tensors}

    def overwrite(self, place: Place, alias: Tensor, before: Tensor | None, target: Tensor) -> None:
        """Write down that ``alias`` changed where ``target``, on the same memory, was written to."""
        new, old = self.memory.value(target), self.memory.value(alias)
        inputs = tuple(value for value in (new, old) if value is not None)
        size = alias.untyped_storage().nbytes() // alias.element_size()
        geometries = [(tuple(t.shape), t.stride(), t.storage_offset()) for t in (target, alias)]
        if not inputs or bool((written_from(geometries, size, alias.device) < 0).all()):
            return
        arguments = (
            target.detach().clone() if new is None else Slot(0),
            before if old is None else Slot(len(inputs) - 1),
        )
        function = functools.partial(write_through, geometries, size)
        self.record(self.step(place, "overwrite", function, arguments, {}, inputs, False), [alias])


def carries(tensor: Tensor) -> bool:
    """Whether a tensor can carry a signal: real or complex numbers, no integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _not_seen(*inputs: Tensor) -> Any:
    raise NoForwardPass(
        "a layer hides its operations (numpy, or code that is not PyTorch's), so what follows it can't be "
        "computed from the recorded pass: choose a layer before it"
    )
