"""Watch one forward pass, then leave the model as it was found."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from deconvviz.capture.as_found import left_as_found
from deconvviz.capture.memory import CONSTANT, DERIVED, Memory, write_through, written_from
from deconvviz.capture.operations import (
    DETACHED,
    FRESH,
    LIKE,
    QUERIES,
    TO_NUMPY,
    operation_name,
    outline,
    replaced,
    written,
)
from deconvviz.capture.places import Place, Places
from deconvviz.errors import NoForwardPass, OperationFailed
from deconvviz.rules import GATES, HIDDEN_CODE, KEEPS_GATES, PLAIN_GRADIENT, UNSUPPORTED, rule_of
from deconvviz.tape import Call, Slot, Step, Tape, Value, flatten

PLAIN = frozenset((int, float, bool, str, type(None)))

REJECTIONS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError)
"""What PyTorch raises when it is given what it can't take."""


class _Stop(BaseException):
    """Ends a forward pass at the chosen layer; not an ``Exception``, so that models do not catch it."""


class Capture(TorchFunctionMode, Places):
    """One watched pass: a context manager around ``model(...)`` that fills :attr:`tape`.

    Args:
        model: the module whose call is watched.
        inputs: the tensors to track; ``None`` for all floating-point tensors that the call is given.
        layer: ``(module name, number of the call)``: end the pass there by raising :class:`_Stop`, with the
            call's output in :attr:`output`. With ``None`` for the number the pass runs on, and a copy of the
            last call's output is kept.
        gradient: keep what the plain gradient of operations without a rule needs.
        own: the pass is ours, so it is noted which operation failed, in :attr:`failed`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor] | None = None,
        layer: tuple[str, int | None] | None = None,
        gradient: bool = False,
        own: bool = True,
    ) -> None:
        TorchFunctionMode.__init__(self)
        Places.__init__(self)
        self.tape = Tape()
        self.output: Any = None
        self._memory = Memory()
        self._model, self._inputs, self._layer = model, inputs, layer
        self._gradient, self.own = gradient, own
        self._parameters: set[int] = set()
        self._held: set[int] | None = None
        """Once content went out to NumPy: what the model held by then, so what is not it come back."""
        self.failed: tuple[Exception, str] | None = None
        self.abandoned = False

    # ── entering and leaving ─────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Capture:
        self.hook(self._model, root=self.own)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        modes = _get_current_function_mode_stack()
        if self in modes:  # not always the last: a call that Ctrl-C ended leaves late
            above = [_pop_mode() for _ in modes[modes.index(self) :]][:-1]
            for mode in reversed(above):
                _push_mode(mode)
        self.unhook()
        self._memory.clear()

    def begin(self, arguments: Any) -> None:
        """Track the input tensors, before the mode is on."""
        tensors = flatten(arguments) if self._inputs is None else self._inputs
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.tape.inputs = [self._track(tensor) for tensor in tensors]
        self.tape.tensors = tuple(tensors)
        if self._inputs is None:
            self.tape.listed = any(isinstance(item, list) for item in arguments[0])
        if tensors and torch.is_autocast_enabled(tensors[0].device.type):
            self.tape.autocast = torch.get_autocast_dtype(tensors[0].device.type)

    def finish(self) -> None:
        """Note that the pass ran to its end."""
        self.tape.complete = True
        self.tape.versions += [
            (tensor, tensor._version) for tensor in self.tape.tensors if not tensor.is_inference()
        ]

    def rejection(self, error: Exception) -> str | None:
        """What PyTorch rejected and what to give; ``None`` for want of memory and for the model's own errors."""
        failed, self.failed = self.failed, None
        if "memory" in str(error):
            return None
        if failed is not None and failed[0] is error:
            place = failed[1]
        elif _raised_by_torch(error):
            place = f"the model failed on {_outlines(self.tape.tensors)}"
        else:
            return None
        return (
            f"{place}: {error}. Give inputs that model(inputs) accepts, usually (N, 3, H, W) of the model's "
            "dtype and device"
        )

    # ── where: module calls ──────────────────────────────────────────────────────────────────────────

    def left(self, place: Place, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Write down a module's call, and stop at the chosen layer's."""
        value = self._memory.value
        given = flatten(args) + flatten(kwargs) if kwargs else flatten(args)
        inputs, tensors = tuple(map(value, given)), flatten(output)
        outputs = tuple(map(value, tensors))
        if None in outputs:
            self._unseen(place, module, tensors, [i for i in inputs if i is not None])
            outputs = tuple(map(value, tensors))
        self.tape.calls.append(Call(*place, inputs, outputs))
        if self._layer is None:
            return
        if place == self._layer:
            self.output = output
            raise _Stop
        if self._layer == (place[0], None):
            self.output = [tensor.detach().clone() for tensor in tensors]

    def _unseen(self, place: Place, module: nn.Module, outputs: Sequence[Tensor], sources: list[int]) -> None:
        """Write down that a module's outputs that no operation gave, nor it holds, come from its inputs."""
        held = {id(tensor) for tensor in flatten(vars(module))}
        if self._held is not None:
            held, sources = held & self._held, sources or self.tape.inputs
        for tensor in outputs:
            if tensor.is_floating_point() and self._memory.mark(tensor) is None:
                if id(tensor) in held or not sources:
                    self._memory.know(tensor, CONSTANT)
                else:
                    self._hidden(tensor, place, sources)

    # ── what: operations ─────────────────────────────────────────────────────────────────────────────

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and write it down if it depends on the input."""
        kwargs = kwargs or {}
        operation = operation_name(function)
        if self.abandoned or operation in QUERIES:
            return function(*args, **kwargs)
        try:
            return self._observe(operation, function, args, kwargs)
        except Exception:
            raise
        except BaseException:  # Ctrl-C, outside the reach of the hooks that end a recorded pass
            self.abandoned = True
            raise

    def _observe(self, operation: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        memory = self._memory
        if operation == "set_data":  # x.data = y: from here on x is y
            self._preserve(args[0])
            mark = memory.mark(args[1])
            memory.know(args[0], CONSTANT if mark is None else mark)
            return function(*args)
        where, target = written(function, args, kwargs)
        aliases: list[tuple[Tensor, Tensor | None]] = []
        if target is not None:
            aliases = memory.sharing(target)
            self._preserve(target)
            for alias, before in aliases:
                if before is None and memory.value(target) is None and where is not None:  # written via .data
                    self._overwrite(target, target.detach().clone(), alias)
        if operation in LIKE:
            args = (*args[:1], *map(outline, args[1:]))
            kwargs = {name: outline(item) for name, item in kwargs.items()}
        tensors: list[Tensor] = []
        values: list[int] = []
        marks: set[int] = set()
        arguments = tuple(
            [item if type(item) in PLAIN else self._bind(item, tensors, values, marks) for item in args]
        )
        keywords = {
            name: item if type(item) in PLAIN else self._bind(item, tensors, values, marks)
            for name, item in kwargs.items()
            if name != "out"
        }
        if operation in TO_NUMPY and self._held is None and (values or DERIVED in marks):
            self._held = {id(t) for module in self._model.modules() for t in flatten(vars(module))}
        if not values or operation in DETACHED or operation in FRESH or operation in TO_NUMPY:
            output = function(*args, **kwargs)
            for tensor in flatten((args, kwargs)):
                if memory.mark(tensor) is None:  # a write to a view of it is to be noticed
                    memory.know(tensor, CONSTANT)
            self._untracked(output, args, target, operation in DETACHED or DERIVED in marks)
        else:
            if target is not None and where is not None and memory.value(target) is None:
                arguments, keywords = replaced(arguments, keywords, where, target.detach().clone())
            step = self._step(operation, function, arguments, keywords, tuple(values), DERIVED in marks)
            output = self._run(step, tensors, args, kwargs)
            outputs = flatten(target if operation == "setitem" else output)
            if target is not None and (not outputs or outputs[0] is not target):
                target = None
            step.written = where if target is not None else None
            self._record(step, outputs)
        if (values or DERIVED in marks) and target is None and not flatten(output):
            self.tape.content_read = True
        if target is not None:
            for alias, before in aliases:
                self._overwrite(alias, before, target)
        return output

    def _untracked(self, output: Any, args: Any, target: Tensor | None, derived: bool) -> None:
        """Mark what an operation that carries no signal gave."""
        returned = self._held is not None and any(isinstance(item, np.ndarray) for item in args)
        for tensor in flatten(output if target is None else (output, target)):
            if returned and tensor.is_floating_point():
                self._hidden(tensor, self.place, self.tape.inputs)
            elif self._memory.value(tensor) is None or tensor is target:
                self._memory.know(tensor, DERIVED if derived else CONSTANT)

    def _run(self, step: Step, tensors: Sequence[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operation gives; the step's rule keeps what it needs."""
        try:
            if step.rule.observe is None:
                return step.function(*args, **kwargs)
            return step.rule.observe(step, self.tape.values, tensors, lambda: step.function(*args, **kwargs))
        except REJECTIONS as error:
            if self.own:
                place = f"layer {step.module!r}" if step.module else "the model"
                self.failed = error, f"{place} failed at {step.operation} on {_outlines(tensors)}"
            raise

    def _step(
        self, operation: str, function: Any, arguments: Any, keywords: Any, values: Any, derived: bool
    ) -> Step:
        rule = rule_of(operation)
        step = Step(*self.place, operation, function, arguments, keywords, values, (), rule, rule.kind)
        step.derived = derived
        if rule.classify is not None:
            step.kind = rule.classify(step, self.tape.values)
        if step.kind == UNSUPPORTED and self._gradient:
            step.rule, step.kind = PLAIN_GRADIENT, PLAIN_GRADIENT.kind
        return step

    def _record(self, step: Step, outputs: Sequence[Tensor]) -> None:
        """Number a step's outputs, which are now known, and append it if any carries a signal."""
        gate = None
        if step.operation in GATES:
            gate = len(self.tape.steps)
        elif step.rule.back in KEEPS_GATES:
            gates = [self.tape.values[value].gate for value in step.inputs]
            gate = None if None in gates else gates[0]
        numbers: list[int | None] = []
        for tensor in outputs:
            if tensor.is_floating_point():
                numbers.append(self._track(tensor, gate))
            else:
                numbers.append(None)
                self._memory.know(tensor, DERIVED)
        step.outputs = tuple(numbers)
        if any(number is not None for number in numbers):
            self.tape.steps.append(step)

    def _track(self, tensor: Tensor, gate: int | None = None) -> int:
        """Give a tensor the next number of a value."""
        number = len(self.tape.values)
        self.tape.values.append(Value(tensor.shape, tensor.stride(), tensor.dtype, gate))
        self._memory.know(tensor, number)
        return number

    def _hidden(self, tensor: Tensor, place: Place, sources: Sequence[int]) -> None:
        """Write down that ``tensor`` comes from ``sources`` by what no operation shows."""
        slots, rule = tuple(map(Slot, range(len(sources)))), rule_of(HIDDEN_CODE)
        step = Step(*place, HIDDEN_CODE, _not_seen, slots, {}, tuple(sources), (), rule, rule.kind)
        self._record(step, [tensor])

    def _bind(self, item: Any, tensors: list[Tensor], values: list[int], marks: set[int]) -> Any:
        """``item`` with a slot for each tracked tensor; constants stay, by reference."""
        if isinstance(item, Tensor):
            mark = self._memory.mark(item)
            parameter = type(item) is nn.Parameter or isinstance(item, nn.Parameter)  # the first is faster
            if mark is None and self._held is not None and not parameter:
                mark = self._returned(item)
            if mark is not None:
                if mark >= 0:
                    tensors.append(item)
                    values.append(mark)
                    return Slot(len(values) - 1)
                marks.add(mark)
            if parameter:
                if id(item) not in self._parameters and not item.is_inference():
                    self._parameters.add(id(item))
                    self.tape.versions.append((item, item._version))
                return item
            if item.is_inference():  # autograd would refuse to keep it for the adjoint
                with torch.inference_mode(False):
                    return item.clone()
            return self._memory.constant(item)
        if isinstance(item, (list, tuple)) and not PLAIN.issuperset(map(type, item)):
            parts = [self._bind(part, tensors, values, marks) for part in item]
            return parts if isinstance(item, list) else tuple(parts)
        return item

    def _returned(self, tensor: Tensor) -> int | None:
        """The value of a tensor that no operation gave, after content went out to NumPy."""
        if tensor.is_floating_point() and self._held is not None and id(tensor) not in self._held:
            self._hidden(tensor, self.place, self.tape.inputs)
        return self._memory.value(tensor)

    # ── writes through shared memory ─────────────────────────────────────────────────────────────────

    def _preserve(self, target: Tensor) -> None:
        """Before ``target`` is written to: copies of the tape's inputs and constants on the same memory."""
        self.tape.tensors = self._memory.preserve(target, self.tape.tensors)

    def _overwrite(self, alias: Tensor, before: Tensor | None, target: Tensor) -> None:
        """Write down that ``alias`` changed where ``target``, on the same memory, was written to."""
        new, old = self._memory.value(target), self._memory.value(alias)
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
        self._record(self._step("overwrite", function, arguments, {}, inputs, False), [alias])


def _not_seen(*inputs: Tensor) -> Any:
    raise NoForwardPass(
        "a layer hides its operations (numpy, or code that is not PyTorch's), so what follows it can't be "
        "computed from the recorded pass: choose a layer before it"
    )


def _outlines(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)


def _raised_by_torch(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "torch"


def watch(
    model: nn.Module,
    inputs: Sequence[Tensor],
    additional: Sequence[Any] = (),
    layer: tuple[str, int | None] | None = None,
    gradient: bool = False,
) -> tuple[Tape, Any]:
    """Run ``model(*inputs, *additional)``, or its part up to a module's call, ``layer`` = (name, number).

    Returns:
        The tape, and the output of the model, or of the layer if one is given.
    """
    with left_as_found(model), torch.inference_mode(False), torch.no_grad():
        inputs = [tensor.clone() for tensor in inputs]  # the pass may write to them
        capture = Capture(model, inputs, layer, gradient)
        capture.begin(inputs)
        with capture:
            try:
                output = model(*inputs, *additional)
                capture.output = output if layer is None else capture.output
                capture.finish()
            except _Stop:
                pass
            except REJECTIONS as error:
                rejection = capture.rejection(error)
                if rejection is None:
                    raise
                raise OperationFailed(rejection) from error
    return capture.tape, capture.output
