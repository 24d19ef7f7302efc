"""What one forward pass did, as a straight-line program.

A :class:`Tape` is the list of a pass's *steps* (operations on tensors that depend on the input) over
numbered *values* (those tensors). It holds shapes, constants by reference and what each rule keeps
(pool switches, masks, scales), not the activations: they can be had again by :meth:`Tape.replay`.
:mod:`capture` writes tapes; everything else reads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deconvviz.rules import Rule


class Slot(NamedTuple):
    """Stands in a step's arguments for the step's k-th input value."""

    k: int


SIGMOID, STATISTIC, BROADCAST, CLAMP = 3, 2, 1, 0
"""Ranks of what can be a gate: of two in a product the higher is it. What a clamp gave can also be the map beside one;
tanh ranks as a statistic; what is no gate itself, but broadcast to the map, lies between."""


class Gate(NamedTuple):
    """What a value carries unchanged (reshaped or scaled): the output of a step that can be a gate."""

    step: int
    rank: int


@dataclass(slots=True)
class Value:
    """A tensor of the pass that depends on the input: its geometry, not its content."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    gate: Gate | None = None
    step: Step | None = None
    """What gave it; nothing gave an input."""
    used: bool = False
    """Whether a step so far takes it."""

    @property
    def operation(self) -> str:
        """The operation that gave it; empty for an input."""
        return "" if self.step is None else self.step.operation


@dataclass(slots=True)
class Step:
    """One operation: ``outputs = function(*arguments)``, with :class:`Slot` where the inputs go."""

    module: str
    number: int
    """The module call it ran in: dotted name, and which of the module's calls, from 1."""
    operation: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    rule: Rule
    kind: str
    kept: Any = None
    written: int | str | None = None
    """The argument that the operation overwrites (a position or keyword), if it works in place."""
    gate: int | None = None
    """The step whose output is the gate, if this is a product or quotient with one."""
    constant: tuple[int, ...] = ()
    """Which of the inputs are constants of the pass, such as that gate: no signal goes to them."""
    autocast: torch.dtype | None = None
    """The type that autocast asked for here, if it was on."""
    derived: bool = False
    """An argument is a mask, index or detached tensor computed from the input: a constant of the pass."""

    @property
    def output(self) -> int:
        """The value that the step gives, where it gives one.

        Raises:
            LookupError: it gives none, or several.
        """
        if len(self.outputs) != 1 or self.outputs[0] is None:
            raise LookupError(f"{self.operation} gives {self.outputs}")
        return self.outputs[0]

    @property
    def spatial(self) -> int:
        """Of a filter or a pool: along how many axes it runs, as its name says."""
        return int(self.operation.removesuffix("_with_indices")[-2])

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at ``position`` or under ``name``; ``dim`` also under NumPy's ``axis``."""
        if len(self.arguments) > position:
            return self.arguments[position]
        if name == "dim" and "axis" in self.keywords:
            name = "axis"
        return self.keywords.get(name, default)

    def rerun(self, *inputs: Tensor) -> Any:
        """Compute the step again from other tensors, changing none of them."""
        if self.rule.rerun is not None:
            return self.rule.rerun(self, *inputs)
        return self.call(*inputs)

    def call(self, *inputs: Tensor) -> Any:
        """Call the recorded function with ``inputs`` in the slots; an in-place one works on a copy."""
        if self.written is None:
            return self.overwrite(*inputs)
        arguments, keywords = self.filled(inputs)
        where: Any = arguments if isinstance(self.written, int) else keywords
        where[self.written] = target = where[self.written].clone()
        output = self.function(*arguments, **keywords)
        return target if output is None else output

    def overwrite(self, *inputs: Tensor) -> Any:
        """Call the recorded function with ``inputs`` in the slots; an in-place one changes them."""
        arguments, keywords = self.filled(inputs)
        return self.function(*arguments, **keywords)

    def filled(self, inputs: Sequence[Tensor | Slot]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments and keywords with ``inputs`` in the slots."""
        return list(fill(list(self.arguments), inputs)), fill(self.keywords, inputs)


class Call(NamedTuple):
    """One call of a module: which values went in and came out (``None``: a tensor not of the pass)."""

    name: str
    number: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


@dataclass(eq=False)
class Tape:
    """The steps, values and module calls of one pass."""

    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    tensors: tuple[Tensor, ...] = ()
    """The input tensors themselves, by reference."""
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    """The inputs, parameters and buffers used, with their version counters: an optimiser step makes the tape stale."""
    autocast: torch.dtype | None = None
    listed: bool = False
    """The inputs came in a list, as detectors take their pictures (C, H, W)."""
    complete: bool = False
    """The pass ran to its end (it was not stopped at a layer)."""
    random: bool = False
    """The pass drew random numbers; they are constants of it."""
    content_read: bool = False
    """The model looked at what a tensor holds (``if x.any()``, ``.item()``): for other inputs it may run otherwise."""

    def counts(self) -> dict[str, int]:
        """How many times each module ran."""
        counts: dict[str, int] = {}
        for call in self.calls:
            counts[call.name] = counts.get(call.name, 0) + 1
        return counts

    def stale(self) -> bool:
        """Whether an input, a parameter or a buffer was written to since."""
        return any(tensor._version != version for tensor, version in self.versions)

    def unbatched(self) -> bool:
        """Whether a filter took an input of the pass without a batch axis, as PyTorch's also can."""
        return any(
            step.operation in ("conv1d", "conv2d", "conv3d")
            and step.inputs[0] in self.inputs
            and len(self.values[step.inputs[0]].shape) == step.spatial + 1
            for step in self.steps
        )

    def leading_to(self, *wanted: int, given: Collection[int] = ()) -> list[Step]:
        """The steps that the values ``wanted`` depend on, in order, where others are ``given``."""
        needed, steps = set(wanted).difference(given), []
        for step in reversed(self.steps):
            if needed.intersection(step.outputs):
                needed.update(set(step.inputs).difference(given))
                steps.append(step)
        return steps[::-1]

    def signalled(self) -> list[Step]:
        """The steps that a signal from the model's output reaches, the last one first.

        Where the output is an object of the model's own, its tensors are taken to be those that no step uses.
        """
        unused = set(range(len(self.values))).difference(*(step.inputs for step in self.steps))
        reached, steps = {i for i in self.calls[-1].outputs if i is not None} or unused, []
        for step in reversed(self.steps):
            if not reached.isdisjoint(step.outputs):
                reached.update(value for k, value in enumerate(step.inputs) if k not in step.constant)
                steps.append(step)
        return steps

    def replay(self, wanted: int, inputs: Sequence[Tensor] | None = None) -> Tensor:
        """Value ``wanted`` computed again: no module, hook, random number or buffer is touched."""
        return self.replay_all([wanted], inputs)[wanted]

    def replay_all(
        self,
        wanted: Sequence[int],
        inputs: Sequence[Tensor] | None = None,
        given: Mapping[int, Tensor] | None = None,
        gradient: bool = False,
    ) -> dict[int, Tensor]:
        """Several values from one replay, or what they would be had other values been the ``given`` ones.

        With ``gradient`` autograd can go from them to what is given.
        """
        given = given or {}
        steps = self.leading_to(*wanted, given=given)
        last_use = {value: i for i, step in enumerate(steps) for value in step.inputs}
        held = dict(zip(self.inputs, self.tensors if inputs is None else inputs, strict=True)) | dict(given)
        with self.context(gradient):
            for i, step in enumerate(steps):
                tensors = [held[value] for value in step.inputs]
                for value in set(step.inputs):
                    if last_use[value] == i and value not in wanted:
                        del held[value]
                with self.casting(step):
                    outputs = flatten(step.rerun(*tensors))
                for number, output in zip(step.outputs, outputs, strict=False):
                    if number is not None and number not in given:
                        held[number] = output
        return {value: held[value] for value in wanted}

    def casting(self, step: Step) -> contextlib.AbstractContextManager[Any]:
        """Within :meth:`context`: a step's own autocast state, where the model changes it."""
        if step.autocast == self.autocast:
            return contextlib.nullcontext()
        return _autocast(self.tensors[0].device.type, step.autocast)

    @contextlib.contextmanager
    def context(self, gradient: bool = False) -> Any:
        """The pass's autocast state, without inference tensors, and without autograd unless asked for."""
        device = self.tensors[0].device.type
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradient),
            _autocast(device, self.autocast),
        ):
            yield


def _autocast(device: str, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def autocast_on(device: str) -> torch.dtype | None:
    """The type that autocast asks for on a device now, ``None`` if it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def fill(item: Any, inputs: Sequence[Tensor | Slot]) -> Any:
    """Put ``inputs`` into the slots of a nest of tuples, lists and dicts."""
    if isinstance(item, Slot):
        return inputs[item.k]
    if type(item) in (list, tuple):
        return type(item)(fill(part, inputs) for part in item)
    if isinstance(item, dict):
        return {key: fill(part, inputs) for key, part in item.items()}
    return item


def flatten(item: Any) -> list[Tensor]:
    """The tensors of a nest of tuples, lists and dicts (outputs that are dicts too, as Hugging Face's), in order."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, dict):
        item = item.values()
    elif not isinstance(item, (list, tuple)):
        return []
    found: list[Tensor] = []
    for part in item:  # most nests are one deep
        if isinstance(part, Tensor):
            found.append(part)
        elif part is not None:
            found += flatten(part)
    return found


def one_tensor(output: Any) -> Any:
    """The tensor that an output holds, alone or in a nest; an output that holds another number of them as it is."""
    tensors = flatten(output)
    return tensors[0] if len(tensors) == 1 else output
