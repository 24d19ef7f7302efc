"""What a pass of ours leaves: the model's buffers and the random state as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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
