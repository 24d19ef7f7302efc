"""Watch a forward pass, then leave the model as it was found.

Module hooks say *where* the pass is (``layer1.0.relu``, second call); a ``TorchFunctionMode`` sees *every*
operation called there: module, functional, ``Tensor`` method, in place. What depends on the input goes onto
a :class:`~deconvviz.tape.Tape`. This folder is the only one in the package that touches hooks or modes.

Two ways to watch:

- :func:`watch` runs a pass of its own, up to a chosen layer if wanted;
- :class:`Recorder` stays on a model and records each pass that the user's own code makes.

In-place writes through views are followed: every live tensor that shares the written memory gets a new
value, so ``x[:, :3] = y`` or a ``view().relu_()`` never leaves a stale one behind.
"""

from typing import Any

import torch
from torch import nn

from deconvviz.capture.as_found import evaluating, left_as_found, require_initialised
from deconvviz.capture.recording import Recorder
from deconvviz.capture.watching import Capture, watch
from deconvviz.errors import UnsupportedModel
from deconvviz.layers import described


def require_module(model: Any) -> nn.Module:
    """The module to watch (``DataParallel``'s wrapped one), or :class:`UnsupportedModel` if it can't be."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"model is a {type(model).__name__}; expected a torch.nn.Module: wrap a function in one")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    for name, module in model.named_modules():
        what = described(name)
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"{what} is scripted, so its operations cannot be seen: "
                "give the module from before torch.jit.script or torch.jit.trace"
            )
        if hasattr(module, "_orig_mod"):
            raise UnsupportedModel(
                f"{what} is compiled, so its operations cannot be seen: "
                "give the module from before torch.compile (its ._orig_mod)"
            )
        for function in _scripted_functions(module):
            raise UnsupportedModel(
                f"{what} calls the scripted function {function!r}, whose operations cannot be seen: "
                "use it as it was before torch.jit.script or torch.jit.trace"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(
                f"{what} is compiled, so its operations cannot be seen: "
                "give a copy, which is not compiled: copy.deepcopy(model)"
            )
    return model


def _scripted_functions(module: nn.Module) -> list[str]:
    """The scripted functions that a module holds, or that its forward names."""
    forward = getattr(type(module).forward, "__code__", None)
    known = getattr(type(module).forward, "__globals__", {})
    named = {name: known.get(name) for name in (forward.co_names if forward is not None else ())}
    return [name for name, item in (named | vars(module)).items() if isinstance(item, torch.jit.ScriptFunction)]


__all__ = ["Capture", "Recorder", "evaluating", "left_as_found", "require_initialised", "require_module", "watch"]
