"""Read some layers' outputs in passes that end as soon as all of them ran; nothing else is watched.

Much lighter than :func:`~deconvviz.capture.watch`: one hook a layer, no tape.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from deconvviz.errors import LayerNotRun
from deconvviz.layers import address, described, not_one
from deconvviz.tape import flatten

LayerCall = tuple[str, int]
"""A module's dotted name, and which of its calls in a pass, from 1."""


class _AllRead(BaseException):
    """Ends a pass whose layers have all run; not an ``Exception``, so that models do not catch it."""


@contextlib.contextmanager
def reading(
    model: nn.Module, layers: Sequence[LayerCall], use: Callable[[int, Tensor], None]
) -> Iterator[Callable[..., None]]:
    """Give a function that runs the model up to the last of ``layers``, and calls ``use`` at each.

    ``use(i, output)`` gets the output (N, C, *S) of ``layers[i]`` while the pass stands there: later layers may
    work in place, so it must take from it what it needs. The model's modes are its own: see :func:`evaluating`. Calls
    of the model in other threads are not read, and run to their ends.

    The function raises:
        LayerNotRun: the pass ended before a layer's call.
        InvalidInput: a layer gives more or less than one tensor.
    """
    wanted = {layer: i for i, layer in enumerate(layers)}
    counts: dict[str, int] = {}
    running: list[LayerCall] = []
    left: set[int] = set()
    thread = get_ident()

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        if get_ident() == thread:
            counts[name] += 1
            running.append((name, counts[name]))

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if get_ident() != thread:
            return
        i = wanted.get(running.pop())
        if output is None:  # the model may catch what was raised, and go on
            counts[name] -= 1
            return
        if i is None:
            return
        tensors = flatten(output)
        if len(tensors) != 1:
            raise not_one(described(name), len(tensors))
        use(i, tensors[0].detach())
        left.discard(i)
        if not left:
            raise _AllRead

    def run(*inputs: Any) -> None:
        counts.update(dict.fromkeys(names, 0))
        running.clear()
        left.update(range(len(layers)))
        with contextlib.suppress(_AllRead):
            model(*inputs)
        if left:
            name, number = layers[min(left)]
            raise LayerNotRun(f"{described(address(name, number, {name: 2}))} did not run in this pass")

    names = list(dict.fromkeys(name for name, _ in layers))
    hooks = []
    try:
        for name in names:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(functools.partial(before, name)))
            hooks.append(module.register_forward_hook(functools.partial(after, name), always_call=True))
        yield run
    finally:
        for handle in hooks:
            handle.remove()
