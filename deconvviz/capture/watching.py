"""Watch one forward pass, then leave the model as it was found."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from deconvviz.capture.operations import (
    DETACHED,
    FRESH,
    LIKE,
    QUERIES,
    operation_name,
    outline,
    replaced,
    write_through,
    written,
    written_from,
)
from deconvviz.errors import NoForwardPass, OperationFailed
from deconvviz.rules import GATES, HIDDEN_CODE, KEEPS_GATES, PLAIN_GRADIENT, UNSUPPORTED, rule_of
from deconvviz.tape import Call, Slot, Step, Tape, Value, flatten

CONSTANT, DERIVED = -1, -2
"""Marks of tensors born in the pass that carry no signal: independent of the input, or a mask, index or
detached tensor computed from it."""


PLAIN = frozenset((int, float, bool, str, type(None)))

REJECTIONS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError)
"""What PyTorch raises when it is given what it can't take."""


class _Stop(BaseException):
    """Ends a forward pass at the chosen layer; not an ``Exception``, so that models do not catch it."""


class Capture(TorchFunctionMode):
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
        super().__init__()
        self.tape = Tape()
        self.output: Any = None
        self._model, self._inputs, self._layer = model, inputs, layer
        self._gradient, self.own = gradient, own
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._parameters: set[int] = set()
        self._constants: dict[int, list[Tensor]] = {}
        self._places: list[tuple[str, int]] = [("", 1)]
        self._counts: dict[str, int] = {}
        self._hooks: list[Any] = []
        self.thread = threading.get_ident()
        self.failed: tuple[Exception, str] | None = None
        self.abandoned = False

    # ── entering and leaving ─────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Capture:
        for name, module in self._model.named_modules():
            if name or self.own:
                before = functools.partial(self._before, name)
                after = functools.partial(self._after, name)
                self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        modes = _get_current_function_mode_stack()
        if self in modes:  # not always the last: a call that Ctrl-C ended leaves late
            above = [_pop_mode() for _ in modes[modes.index(self) :]][:-1]
            for mode in reversed(above):
                _push_mode(mode)
        for hook in self._hooks:
            hook.remove()
        self._known.clear()

    def begin(self, arguments: Any) -> None:
        """Track the input tensors, before the mode is on."""
        tensors = flatten(arguments) if self._inputs is None else self._inputs
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.tape.inputs = [self._track(tensor) for tensor in tensors]
        self.tape.tensors = tuple(tensors)
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

    # ── where: module hooks ──────────────────────────────────────────────────────────────────────────

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self.thread:
            self._counts[name] = self._counts.get(name, 0) + 1
            self._places.append((name, self._counts[name]))

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() != self.thread or all(name != place[0] for place in self._places[::-1]):
            return  # another thread's, or a call that another pre-hook ended before ours
        while (place := self._places.pop())[0] != name:  # calls that a BaseException ended
            pass
        if output is None:  # the call raised, and the model may go on
            self._counts[name] -= 1
            return
        inputs = tuple(self._value(tensor) for tensor in (*flatten(args), *flatten(kwargs)))
        self._hidden(place, module, inputs, output)
        self.tape.calls.append(Call(*place, inputs, tuple(self._value(t) for t in flatten(output))))
        if place == self._layer:
            self.output = output
            raise _Stop
        if self._layer == (name, None):
            self.output = [tensor.detach().clone() for tensor in flatten(output)]

    def _hidden(self, place: tuple[str, int], module: nn.Module, inputs: Any, output: Any) -> None:
        """Write down that outputs which no operation gave, nor the module holds, come from its inputs."""
        unseen = [t for t in flatten(output) if t.is_floating_point() and self._mark(t) is None]
        held = {id(tensor) for tensor in flatten(vars(module))} if unseen else set()
        sources = tuple(value for value in inputs if value is not None)
        for tensor in unseen:
            if id(tensor) in held or not sources:
                self._know(tensor, CONSTANT)
            else:
                slots = tuple(map(Slot, range(len(sources))))
                rule = rule_of(HIDDEN_CODE)
                step = Step(*place, HIDDEN_CODE, _not_seen, slots, {}, sources, (), rule, rule.kind)
                self._record(step, [tensor])

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
        if operation == "set_data":  # x.data = y: from here on x is y
            self._preserve(args[0])
            mark = self._mark(args[1])
            self._know(args[0], CONSTANT if mark is None else mark)
            return function(*args)
        where, target = written(function, args, kwargs)
        aliases = [] if target is None or not target.numel() else self._aliases(target)
        if target is not None:
            self._preserve(target)
            for alias, before in aliases:
                if before is None and self._value(target) is None and where is not None:  # written via .data
                    self._overwrite(target, target.detach().clone(), alias)
        if operation in LIKE:
            args = (*args[:1], *map(outline, args[1:]))
            kwargs = {name: outline(item) for name, item in kwargs.items()}
        tensors: list[Tensor] = []
        values: list[int] = []
        marks: set[int] = set()
        arguments = tuple(
            item if type(item) in PLAIN else self._bind(item, tensors, values, marks) for item in args
        )
        keywords = {
            name: item if type(item) in PLAIN else self._bind(item, tensors, values, marks)
            for name, item in kwargs.items()
            if name != "out"
        }
        if not values or operation in DETACHED or operation in FRESH:
            output = function(*args, **kwargs)
            derived = operation in DETACHED or DERIVED in marks
            for tensor in flatten((args, kwargs)):
                if self._mark(tensor) is None:  # a write to a view of it is to be noticed
                    self._know(tensor, CONSTANT)
            for tensor in flatten(output):
                if self._value(tensor) is None or tensor is target:
                    self._know(tensor, DERIVED if derived else CONSTANT)
            if target is not None:
                for alias, before in aliases:
                    self._overwrite(alias, before, target)
            return output
        if target is not None and where is not None and self._value(target) is None:
            arguments, keywords = replaced(arguments, keywords, where, target.detach().clone())
        step = self._step(operation, function, arguments, keywords, tuple(values), DERIVED in marks)
        try:
            if step.rule.observe is None:
                output = function(*args, **kwargs)
            else:
                output = step.rule.observe(step, self.tape.values, tensors, lambda: function(*args, **kwargs))
        except REJECTIONS as error:
            if self.own:
                place = f"layer {step.module!r}" if step.module else "the model"
                self.failed = error, f"{place} failed at {operation} on {_outlines(tensors)}"
            raise
        outputs = flatten(target if operation == "setitem" else output)
        if target is not None and (not outputs or outputs[0] is not target):
            target = None
        step.written = where if target is not None else None
        self._record(step, outputs)
        if target is not None:
            for alias, before in aliases:
                self._overwrite(alias, before, target)
        return output

    def _step(
        self, operation: str, function: Any, arguments: Any, keywords: Any, values: Any, derived: bool
    ) -> Step:
        rule = rule_of(operation)
        module, number = self._places[-1]
        step = Step(module, number, operation, function, arguments, keywords, values, (), rule, rule.kind)
        step.derived = derived
        if rule.classify is not None:
            step.kind = rule.classify(step, self.tape.values)
        if step.kind == UNSUPPORTED and self._gradient:
            step.rule, step.kind = PLAIN_GRADIENT, PLAIN_GRADIENT.kind
        return step

    def _record(self, step: Step, outputs: Sequence[Tensor]) -> None:
        """Number a step's outputs, which are now known, and append it if any carries a signal."""
        gates = [self.tape.values[value].gate for value in step.inputs]
        gate = None
        if step.operation in GATES:
            gate = len(self.tape.steps)
        elif None not in gates and step.rule.back in KEEPS_GATES:
            gate = gates[0]
        step.outputs = tuple(
            self._track(tensor, gate) if tensor.is_floating_point() else self._know(tensor, DERIVED)
            for tensor in outputs
        )
        if any(output is not None for output in step.outputs):
            self.tape.steps.append(step)

    # ── which tensors are known ──────────────────────────────────────────────────────────────────────

    def _know(self, tensor: Tensor, mark: int) -> int | None:
        """Remember a tensor by its mark: the number of a value, which is returned, or no signal."""
        self._known[id(tensor)] = (weakref.ref(tensor), mark)
        return mark if mark >= 0 else None

    def _track(self, tensor: Tensor, gate: int | None = None) -> int:
        self.tape.values.append(Value(tensor.shape, tensor.stride(), tensor.dtype, gate))
        self._know(tensor, len(self.tape.values) - 1)
        return len(self.tape.values) - 1

    def _mark(self, tensor: Tensor) -> int | None:
        known = self._known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _value(self, tensor: Tensor) -> int | None:
        """The number of a tracked tensor, else ``None``."""
        mark = self._mark(tensor)
        return mark if mark is not None and mark >= 0 else None

    def _bind(self, item: Any, tensors: list[Tensor], values: list[int], marks: set[int]) -> Any:
        """``item`` with a slot for each tracked tensor; constants stay, by reference."""
        if isinstance(item, Tensor):
            mark = self._mark(item)
            if mark is not None and mark >= 0:
                tensors.append(item)
                values.append(mark)
                return Slot(len(values) - 1)
            if mark is not None:
                marks.add(mark)
            if isinstance(item, nn.Parameter):
                if id(item) not in self._parameters and not item.is_inference():
                    self._parameters.add(id(item))
                    self.tape.versions.append((item, item._version))
            elif item.is_inference():  # autograd would refuse to keep it for the adjoint
                with torch.inference_mode(False):
                    return item.clone()
            else:
                item = item.detach()
                self._constants.setdefault(_memory(item), []).append(item)
            return item
        if isinstance(item, (list, tuple)):
            if all(type(part) is int for part in item):  # a stride, a shape: the common case
                return item
            parts = [self._bind(part, tensors, values, marks) for part in item]
            return parts if isinstance(item, list) else tuple(parts)
        return item

    # ── writes through shared memory ─────────────────────────────────────────────────────────────────

    def _aliases(self, target: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """The other live tensors on ``target``'s memory, untracked ones with a copy from before the write."""
        memory = _memory(target)
        found: list[tuple[Tensor, Tensor | None]] = []
        for key, (reference, mark) in list(self._known.items()):
            tensor = reference()
            if tensor is None:
                del self._known[key]
            elif tensor is not target and memory and _memory(tensor) == memory:
                found.append((tensor, None if mark >= 0 else tensor.detach().clone()))
        return found

    def _preserve(self, target: Tensor) -> None:
        """Before ``target`` is written to: copies of the tape's inputs and constants on the same memory."""
        memory = _memory(target)
        tensors = self.tape.tensors
        self.tape.tensors = tuple(t.detach().clone() if _memory(t) == memory else t for t in tensors)
        for constant in self._constants.pop(memory, ()):
            constant.data = constant.clone()

    def _overwrite(self, alias: Tensor, before: Tensor | None, target: Tensor) -> None:
        """Write down that ``alias`` changed where ``target``, on the same memory, was written to."""
        new, old = self._value(target), self._value(alias)
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


def _memory(tensor: Tensor) -> int:
    """Where a tensor's storage lies; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


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


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put buffers (batch norm's statistics) and the random state back, also after an error."""
    saved = [(module, dict(module._buffers)) for module in model.modules()]
    contents = {
        buffer: buffer.detach().clone()
        for buffer in model.buffers()
        if buffer.layout == torch.strided and not buffer.is_meta
    }
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    devices = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            for module, buffers in saved:
                for name in module._buffers.keys() - buffers.keys():
                    del module._buffers[name]
                module._buffers.update(buffers)
            for buffer, content in contents.items():
                _restore(buffer, content)


def _restore(buffer: Tensor, content: Tensor) -> None:
    """Write ``content`` back if it changed, behind the version counter: a pending backward stays valid."""
    if not torch.equal(buffer, content):
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.data.copy_(content)
