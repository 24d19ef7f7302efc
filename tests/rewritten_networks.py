"""The deconvnet by plain autograd: copies of networks, rewritten until their gradient is the projection.

Nothing here uses the package. In a copy, each activation module has a backward of its own (rectify the
signal), gates and the statistics of layer norms are detached, and what torchvision calls as a function is
a module, so that captum can hook it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.googlenet import BasicConv2d as GoogLeNetConv2d
from torchvision.models.inception import BasicConv2d as InceptionConv2d
from torchvision.ops.misc import SqueezeExcitation


def with_relu_modules(model: nn.Module) -> nn.Module:
    """A copy in which the ReLUs that GoogLeNet, Inception and DenseNet call as a function are modules."""
    model = copy.deepcopy(model)
    if isinstance(model, DenseNet):
        head = ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())
        parts = [("features", model.features), *head, ("classifier", model.classifier)]
        return nn.Sequential(OrderedDict(parts)).eval()

    def sequence(module: nn.Module) -> nn.Module | None:
        if isinstance(module, (GoogLeNetConv2d, InceptionConv2d)):
            return nn.Sequential(module.conv, module.bn, nn.ReLU()).eval()
        return None

    return replaced(model, sequence)


def rectifying(model: nn.Module) -> nn.Module:
    """A copy whose gradient is the deconvnet; its activations are the model's."""

    def rewritten(module: nn.Module) -> nn.Module | None:
        match module:
            case nn.ReLU() | nn.ReLU6() | nn.Hardswish() | nn.SiLU() | nn.GELU():
                return Rectifying(module)
            case SqueezeExcitation():
                return ConstantGate(module)
            case nn.LayerNorm():
                return ConstantStatistics(module)
        return None

    return replaced(copy.deepcopy(model), rewritten)


def replaced(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """``model`` with its modules replaced, where there is a replacement."""
    for name, child in model.named_children():
        setattr(model, name, replacement(child) or replaced(child, replacement))
    return model


class _RectifyTheSignal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return activation(x.clone())

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        return signal.clamp(min=0), None


class Rectifying(nn.Module):
    """An activation whose backward is g -> max(g, 0)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return _RectifyTheSignal.apply(x, self.activation)


class ConstantGate(nn.Module):
    """Squeeze and excitation whose gate lets no signal through."""

    def __init__(self, block: SqueezeExcitation) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        scale = self.block.fc2(self.block.activation(self.block.fc1(scale)))
        return self.block.scale_activation(scale).detach() * x


class ConstantStatistics(nn.Module):
    """Layer normalisation whose mean and deviation are constants."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        maps = isinstance(self.norm, LayerNorm2d)
        x = x.movedim(1, -1) if maps else x
        mean = x.mean(-1, keepdim=True)
        deviation = ((x - mean).square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
        x = (x - mean.detach()) / deviation.detach() * self.norm.weight + self.norm.bias
        return x.movedim(-1, 1) if maps else x


def gradient(model: nn.Module, images: Tensor, select: Callable[[Tensor], Tensor], layer: str = "") -> Tensor:
    """The gradient, with respect to the images, of the numbers selected in the output of ``layer``."""
    outputs: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    images = images.clone().requires_grad_()
    model(images)
    handle.remove()
    return torch.autograd.grad(select(outputs[-1]).sum(), images)[0]
