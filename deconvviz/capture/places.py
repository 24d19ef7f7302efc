"""Where a pass is: hooks on every module say which one runs, and which of its calls it is."""

from __future__ import annotations

import functools
from collections import OrderedDict
from threading import get_ident
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Place = tuple[str, int]
"""A module's dotted name, and the number of its call, from 1."""


class Places:
    """The module calls that a pass is in; a subclass says in :meth:`left` what to do after each."""

    def __init__(self) -> None:
        self._calls: list[Place] = [("", 1)]
        """Those that run now, the innermost last."""
        self._counts: dict[str, int] = {}
        self._hooked: list[dict[int, Any]] = []
        self._key = RemovableHandle(OrderedDict()).id
        self.thread = get_ident()
        self.paused = False
        """The calls are of another pass for now."""

    def left(self, place: Place, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A call gave an output."""
        raise NotImplementedError

    def hook(self, model: nn.Module, root: bool) -> None:
        """Hook the modules of ``model``, with or without its ``root``.

        As ``register_forward_pre_hook`` and ``register_forward_hook(with_kwargs=True, always_call=True)`` do,
        at a quarter of their cost, which each recorded pass has.
        """
        key, hooked, enter, leave = self._key, self._hooked, self.enter, self.leave
        for name, module in model.named_modules():
            if name or root:
                before, after = module._forward_pre_hooks, module._forward_hooks
                kwargs, always = module._forward_hooks_with_kwargs, module._forward_hooks_always_called
                hooked += (before, after, kwargs, always)
                before[key] = functools.partial(enter, name)
                after[key] = functools.partial(leave, name)
                kwargs[key] = always[key] = True

    def unhook(self) -> None:
        """Take the hooks off."""
        key = self._key
        for hooks in self._hooked:
            hooks.pop(key, None)
        self._hooked.clear()

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """A module's call begins."""
        if get_ident() == self.thread and not self.paused:
            self._counts[name] = number = self._counts.get(name, 0) + 1
            self._calls.append((name, number))

    def leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        """It ended: with an output, or with none because it raised.

        A call in another thread may come without its keywords: these hooks leave the model while it goes on.
        """
        calls = self._calls
        if get_ident() != self.thread or self.paused:
            return
        if calls[-1][0] != name and all(name != place[0] for place in calls):
            return  # a call that another pre-hook ended before ours
        while (place := calls.pop())[0] != name:  # calls that a BaseException ended
            pass
        if output is None:  # the model may catch what was raised, and go on
            self._counts[name] -= 1
        else:
            self.left(place, module, args, kwargs, output)
