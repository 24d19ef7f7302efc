"""Models whose every parameter matters, as if trained, and pictures for them.

At initialisation a torchvision model hides errors: biases are zero, batch norm is the identity, and
ConvNeXt's layer scale of 1e-6 silences its blocks.
"""

import copy
import functools

import torch
from conftest import build
from torch import Tensor, nn


@functools.lru_cache(maxsize=2)
def trained_like(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A torchvision classification model in eval mode, as if trained."""
    return as_if_trained(copy.deepcopy(build(name)), pictures(4, 96, torch.float32)).to(dtype)


@torch.no_grad()
def as_if_trained(model: nn.Module, images: Tensor) -> nn.Module:
    """Give ``model`` biases, batch-norm statistics (those of ``images``) and scales that do something."""
    generator = torch.Generator().manual_seed(1)

    def fill(parameter: Tensor, low: float, high: float) -> None:
        parameter.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm or isinstance(module, nn.LayerNorm):
            fill(module.weight, 0.5, 1.5)
            fill(module.bias, -0.5, 0.5)
        elif isinstance(getattr(module, "bias", None), Tensor):
            fill(module.bias, -0.1, 0.1)
        if batch_norm:
            module.train().momentum = 1.0  # the pass below sets mean and variance
        if hasattr(module, "layer_scale"):
            fill(module.layer_scale, 0.1, 1.0)
    model(images)
    return model.eval()


def pictures(count: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Seeded pictures (count, 3, size, size): coarse patches under fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return (nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the norm expected, which must not be zero."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    size = expected.norm().item()
    assert size > 0
    return (actual - expected).norm().item() / size
