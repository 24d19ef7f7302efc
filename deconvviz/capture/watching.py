"""Watch one forward pass, then leave the model as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from deconvviz.capture.as_found import left_as_found
from deconvviz.capture.memory import CONSTANT, Transformed, address
from deconvviz.capture.operations import Operation, operation, outline, replaced, written
from deconvviz.capture.places import Place, Places
from deconvviz.capture.writing import TapeWriter
from deconvviz.errors import OperationFailed, UnsupportedModel
from deconvviz.layers import described
from deconvviz.rules.gates import default_generator
from deconvviz.tape import Call, Step, Tape, autocast_on, flatten

REJECTIONS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError)
"""What PyTorch raises when it is given what it can't take."""


class _Stop(BaseException):
    """Ends a forward pass at the chosen layer; not an ``Exception``, so that models do not catch it."""


class Capture(TorchFunctionMode, Places):
    """One watched pass: a context manager around ``model(...)`` that fills :attr:`tape`.

    Args:
        model: the module whose call is watched.
        layer: ``(module name, number of the call)``: end the pass there by raising :class:`_Stop`, with the
            call's output in :attr:`output`. With ``None`` for the number the pass runs on, and a copy of the
            last call's output is kept.
        gradient: keep what the plain gradient of operations without a rule needs.
        own: the pass is ours, so it is noted which operation failed, in :attr:`failed`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: tuple[str, int | None] | None = None,
        gradient: bool = False,
        own: bool = True,
    ) -> None:
        TorchFunctionMode.__init__(self)
        Places.__init__(self)
        self.output: Any = None
        self._writer = TapeWriter(model, gradient)
        self.tape = self._writer.tape
        self._model, self._layer, self.own = model, layer, own
        self.failed: tuple[Exception, str] | None = None
        self.abandoned = self._ended = False

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
        self._writer.memory.clear()
        if self._ended:  # here, where what the tape asks of tensors is not watched
            self._writer.finish()

    def begin(self, tensors: Sequence[Tensor], listed: bool = False) -> None:
        """Track the input tensors, before the mode is on: those that can be a batch; a number is a constant."""
        tensors = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim()]
        self._writer.begin(tensors)
        self.tape.listed = listed
        if tensors:
            self.tape.autocast = autocast_on(tensors[0].device.type)

    def finish(self) -> None:
        """Note that the pass ran to its end: on leaving its tape is complete."""
        self._ended = True

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
        if "when training" in str(error):  # a batch norm's, of one value a channel
            return f"{place}: {error}. Call model.eval() first, or give several images"
        return (
            f"{place}: {error}. Give inputs that model(inputs) accepts, usually (N, 3, H, W) of the model's "
            "dtype and device"
        )

    # ── where: module calls ──────────────────────────────────────────────────────────────────────────

    def left(self, place: Place, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Write down a module's call, and stop at the chosen layer's."""
        value = self._writer.memory.value
        given = flatten(args) + flatten(kwargs) if kwargs else flatten(args)
        inputs, tensors = tuple(map(value, given)), flatten(output)
        outputs = tuple(map(value, tensors))
        if None in outputs:
            self._writer.unseen(place, module, tensors, [i for i in inputs if i is not None])
            outputs = tuple(map(value, tensors))
        self.tape.calls.append(Call(*place, inputs, outputs))
        if self._layer is None:
            return
        if place == self._layer:
            self.output = output
            raise _Stop
        if self._layer == (place[0], None):
            self.output = [tensor.detach().clone() for tensor in tensors]

    # ── what: operations ─────────────────────────────────────────────────────────────────────────────

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and write it down if it depends on the input."""
        kwargs = kwargs or {}
        what = operation(function)
        if what.query or self.abandoned or self.paused or (args and is_lazy(args[0])):
            return function(*args, **kwargs)
        try:
            return self._observe(what, function, args, kwargs)
        except Transformed:
            self.abandoned = True
            if self.own:
                raise UnsupportedModel(
                    f"{described(self._calls[-1][0])} uses torch.func or a tracer in its forward, so its operations "
                    "cannot be seen"
                ) from None
            return function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, outside the reach of the hooks that end a recorded pass
                self.abandoned = True
            raise

    def _observe(self, what: Operation, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        writer, memory, place = self._writer, self._writer.memory, self._calls[-1]
        if what.sets_data:  # x.data = y: from here on x is y
            writer.preserve(address(args[0]))
            mark = memory.mark(args[1])
            memory.know(args[0], CONSTANT if mark is None else mark)
            return function(*args)
        where, target = written(what, args, kwargs)
        aliases: Sequence[tuple[Tensor, Tensor | None]] = ()
        if target is not None:
            at = address(target)
            aliases = memory.sharing(target, at)
            writer.preserve(at)
            for alias, before in aliases:
                if before is None and memory.value(target) is None and where is not None:  # written via .data
                    writer.overwrite(place, target, target.detach().clone(), alias)
        if what.like:
            args = (*args[:1], *map(outline, args[1:]))
            kwargs = {name: outline(item) for name, item in kwargs.items()}
        arguments, keywords, tensors, values, derived = writer.bound(place, args, kwargs)
        depends = bool(values or derived)
        if what.to_numpy and depends:
            writer.content_goes_out()
        if not values or what.cut:
            output = function(*args, **kwargs)
            for tensor in flatten((args, kwargs)):
                if memory.mark(tensor) is None:  # a write to a view of it is to be noticed
                    memory.know(tensor, CONSTANT)
            writer.untracked(place, output, args, target, what.detached or derived)
        else:
            if target is not None and where is not None and memory.value(target) is None:
                arguments, keywords = replaced(arguments, keywords, where, target.detach().clone())
            step = writer.step(place, what.name, function, arguments, keywords, tuple(values), derived)
            output = self._run(step, tensors, args, kwargs)
            outputs = flatten(target if what.name == "setitem" else output)
            if target is not None and (not outputs or outputs[0] is not target):
                target = None
            step.written = where if target is not None else None
            writer.record(step, outputs)
        if depends and target is None and not isinstance(output, Tensor) and not flatten(output):
            self.tape.content_read = True
        if target is not None:
            for alias, before in aliases:
                writer.overwrite(place, alias, before, target)
        return output

    def _run(self, step: Step, tensors: Sequence[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operation gives; the step's rule keeps what it needs."""
        try:
            if step.rule.observe is None:
                return step.function(*args, **kwargs)
            return step.rule.observe(step, self.tape.values, tensors, lambda: step.function(*args, **kwargs))
        except REJECTIONS as error:
            if self.own:
                self.failed = (
                    error,
                    f"{described(step.module)} failed at {step.operation} on {_outlines(tensors)}",
                )
            raise


def _outlines(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)


def _raised_by_torch(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "torch"


@contextlib.contextmanager
def _others_paused() -> Iterator[None]:
    """A pass of ours, in a hook of one that is recorded, is no part of that."""
    modes = _get_current_function_mode_stack()
    running = [mode for mode in modes if isinstance(mode, Capture) and not mode.paused]
    for capture in running:
        capture.paused = True
    try:
        yield
    finally:
        for capture in running:
            capture.paused = False


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
    with _others_paused(), left_as_found(model), torch.inference_mode(False), torch.no_grad():
        inputs = [tensor.clone() for tensor in inputs]  # the pass may write to them
        generators = [torch.default_generator, default_generator(inputs[0].device)]
        random = [generator.get_state() for generator in generators]
        capture = Capture(model, layer, gradient)
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
        capture.tape.random = not all(
            torch.equal(state, generator.get_state()) for state, generator in zip(random, generators, strict=True)
        )
    return capture.tape, capture.output
