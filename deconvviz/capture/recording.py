"""Record the passes that the user's own code makes."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from deconvviz.capture.memory import Transformed
from deconvviz.capture.watching import Capture
from deconvviz.tape import Tape, flatten


class _RootHook:
    """A hook that holds its recorder weakly, and is inert in copies and pickles of the model."""

    def __init__(self, recorder: Recorder | None = None, method: str = "") -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self._method = method

    def __call__(self, *arguments: Any) -> Any:
        recorder = None if self._recorder is None else self._recorder()
        return None if recorder is None else getattr(recorder, self._method)(*arguments)

    def __reduce__(self) -> Any:
        return _RootHook, ()


class _Keywords(dict[str, Any]):
    """The keywords of a recorded call: they go when its frame goes, also by Ctrl-C, which calls no hook."""


class Recorder:
    """Records every forward pass of ``model`` until closed; :attr:`tape` is the last one's.

    Two hooks stay on the model's root; those on its layers live only while it runs. Our own passes, those
    in a replica of ``DataParallel``, under ``torch.func`` or ``torch.export``, and those without a floating-point
    tensor are not recorded.
    """

    def __init__(self, model: nn.Module, gradient: bool = False) -> None:
        self.tape: Tape | None = None
        self._gradient = gradient
        self._running: list[Capture] = []
        self._frame = 0
        self._depth = 0
        self._model = weakref.ref(model)
        before, after = _RootHook(self, "_before"), _RootHook(self, "_after")
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self.close = weakref.finalize(self, _close, hooks, self._running)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._ignored(module):
            return None
        if self._running and _on_stack(self._frame):
            self._depth += 1
            return None
        _leave(self._running)
        self.tape = None
        capture = Capture(module, gradient=self._gradient, own=False)
        try:
            capture.begin(flatten((args, kwargs)), any(isinstance(item, list) for item in args))
        except Transformed:
            return None
        if not capture.tape.inputs:
            return None
        self._running.append(capture.__enter__())
        self._frame, self._depth = id(sys._getframe(2)), 0
        capture.enter("", module, args)
        keywords = _Keywords(kwargs)
        weakref.finalize(keywords, _leave, self._running, self._frame)
        return args, keywords

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._ignored(module) or not self._running:
            return
        self._depth -= 1
        if self._depth >= 0:
            return
        capture = self._running[0]
        try:
            if output is not None and not capture.abandoned:
                capture.leave("", module, args, kwargs, output)
                capture.finish()
                self.tape = capture.tape
        finally:
            _leave(self._running)

    def _ignored(self, module: nn.Module) -> bool:
        """Whether this is a replica, another thread's call beside a running one, or inside our own pass."""
        elsewhere = any(capture.thread != threading.get_ident() for capture in self._running)
        modes = _get_current_function_mode_stack()
        own = any(isinstance(mode, Capture) and mode.own for mode in modes)
        return module is not self._model() or elsewhere or own


def _close(hooks: list[RemovableHandle], running: list[Capture]) -> None:
    for hook in hooks:
        hook.remove()
    _leave(running)


def _leave(running: list[Capture], frame: int | None = None) -> None:
    """Stop recording the call, unless its ``frame`` still runs."""
    if frame is None or not _on_stack(frame):
        while running:
            running.pop().__exit__(None, None, None)


def _on_stack(frame: int) -> bool:
    """Whether this thread is inside the frame of this id."""
    inner = sys._getframe()
    while inner is not None and id(inner) != frame:
        inner = inner.f_back  # type: ignore[assignment]
    return inner is not None
