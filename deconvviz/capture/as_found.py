"""What a pass of ours leaves: the model's modes and buffers and the random state as they were."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deconvviz.errors import UnsupportedModel


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the random state of Python, NumPy and PyTorch, on the CPU and on ``device``, back."""
    devices = [] if device.type in ("cpu", "meta") else [device]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def require_initialised(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModel` if a pass would initialise lazy layers."""
    if any(map(is_lazy, itertools.chain(model.parameters(), model.buffers()))):
        raise UnsupportedModel("the model has lazy layers that no pass has initialised: call model(images) once before")


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put buffers (batch norm's statistics) and the random state back, also after an error.

    Raises:
        UnsupportedModel: a pass would initialise its lazy layers.
    """
    require_initialised(model)
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    saved = [(module, dict(module._buffers)) for module in plain]  # a scripted module cannot lose or gain one
    buffers = list(model.buffers())
    contents = [(b, b.detach().clone()) for b in buffers if b.layout == torch.strided and not b.is_meta]
    device = next((t.device for t in itertools.chain(model.parameters(), buffers)), torch.device("cpu"))
    with random_state_kept(device):
        try:
            yield
        finally:
            for module, of_module in saved:
                for name in module._buffers.keys() - of_module.keys():
                    del module._buffers[name]
                module._buffers.update(of_module)
            for buffer, content in contents:
                _restore(buffer, content)


def _restore(buffer: Tensor, content: Tensor) -> None:
    """Write ``content`` back if it changed, behind the version counter: a pending backward stays valid."""
    if not torch.equal(buffer, content):
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.data.copy_(content)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and then each in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
