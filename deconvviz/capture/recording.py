"""Record the passes that the user's own code makes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from deconvviz.capture.watching import Capture
from deconvviz.tape import Tape


class _RootHook:
    """A hook that holds its recorder weakly, and is inert in copies and pickles of the model."""

    def __init__(self, recorder: Recorder | None = None, method: str = "") -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self._method = method

    def __call__(self, *arguments: Any) -> None:
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None:
            getattr(recorder, self._method)(*arguments)

    def __reduce__(self) -> Any:
        return _RootHook, ()


class Recorder:
    """Records every forward pass of ``model`` until closed; :attr:`tape` is the last one's.

    Two hooks stay on the model's root; those on its layers live only while it runs. Passes made under
    :meth:`paused`, in a replica of ``DataParallel``, or without a floating-point tensor are not recorded.
    """

    def __init__(self, model: nn.Module, gradient: bool = False) -> None:
        self.tape: Tape | None = None
        self._gradient = gradient
        self._running: Capture | None = None
        self._depth = 0
        self._pauses = 0
        before, after = _RootHook(self, "_before"), _RootHook(self, "_after")
        self._model = weakref.ref(model)
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self.close = weakref.finalize(self, _remove, hooks)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not record passes made in this block."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._running is not None and self._running.abandoned:
            self._end()
        if self._pauses or module is not self._model():
            return
        self._depth += 1
        if self._depth > 1:
            return
        self.tape = None
        capture = Capture(module, gradient=self._gradient, own=False)
        capture.begin((args, kwargs))
        if capture.tape.inputs:
            self._running = capture.__enter__()
            capture._before("", module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._pauses or module is not self._model() or not self._depth:
            return
        self._depth -= 1
        if self._depth or self._running is None:
            return
        capture = self._running
        try:
            if output is not None and not capture.abandoned:
                capture._after("", module, args, kwargs, output)
                capture.finish()
                self.tape = capture.tape
        finally:
            self._end()

    def _end(self) -> None:
        capture, self._running, self._depth = self._running, None, 0
        if capture is not None:
            capture.__exit__(None, None, None)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
