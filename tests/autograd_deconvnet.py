"""The deconvnet of any network, as autograd computes it: a second implementation, to compare with.

The network runs once, forward, with autograd on and a mode that changes the derivative of each nonlinearity
where it is called: a rectifier's becomes g -> max(g, 0), and gates and the statistics of norms become
constants. Filters, pools and branches are left to autograd. Nothing of the package is used.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OTHER_RECTIFIERS = ("relu6", "hardtanh", "hardswish", "silu", "gelu")
GATES = ("sigmoid", "hardsigmoid")
NORMS = ("layer_norm", "normalize", "batch_norm in train mode")
POOLS = ("max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")


class AutogradDeconvnet(TorchFunctionMode):
    """One forward pass of ``model``, ready to go back to the pixels of ``images`` (N, C, ...).

    ``calls`` counts the operations of the pass by name; ``activations`` holds the outputs of its
    convolutions, in the order they ran; ``output`` is the model's.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.activations: dict[str, Tensor] = {}
        self.images = images.clone().requires_grad_()
        convolutions = (nn.Conv2d, nn.Conv3d)
        hooks = [
            module.register_forward_hook(functools.partial(self._keep, name))
            for name, module in model.named_modules()
            if isinstance(module, convolutions)
        ]
        try:
            with self:
                self.output = model(self.images)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.activations[name] = output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, with another derivative if it is one of those above."""
        kwargs = kwargs or {}
        name = function.__name__.rstrip("_")
        if name == "batch_norm" and kwargs["training"]:
            name = "batch_norm in train mode"
        self.calls[name] += 1
        if name not in ("relu", *OTHER_RECTIFIERS, *GATES, *NORMS):
            return function(*args, **kwargs)
        input = args[0]
        output = function(input.detach().clone(), *args[1:], **kwargs)
        if name in GATES:
            return output
        if name in NORMS:
            factor = norm_factor(name, input.detach(), **kwargs)
            return WithDerivative.apply(input, output, lambda signal: signal * factor)
        return WithDerivative.apply(input, output, lambda signal: signal.clamp(min=0))

    def project(self, layer: str, maps: Sequence[int]) -> Tensor:
        """The strongest activation of each map of a convolution, back to pixels: (N, M, C, ...)."""
        activation = self.activations[layer]
        columns = []
        for m in maps:
            seed = torch.zeros_like(activation)
            for image, plane in enumerate(activation.detach()[:, m]):
                seed[image, m].view(-1)[plane.argmax()] = plane.max()
            columns.append(self._back(activation, seed))
        return torch.stack(columns, 1)

    def attribute(self, output: Tensor, target: Sequence[int]) -> Tensor:
        """One number of each image's output, back to pixels: (N, C, ...)."""
        seed = torch.zeros_like(output)
        seed[(slice(None), *target)] = 1
        return self._back(output, seed)

    def _back(self, tensor: Tensor, seed: Tensor) -> Tensor:
        return torch.autograd.grad(tensor, self.images, seed, retain_graph=True)[0]


class WithDerivative(torch.autograd.Function):
    """An output computed elsewhere, with a derivative of our choice."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return output.clone()

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Any:
        return ctx.back(signal), None, None


def norm_factor(name: str, input: Tensor, weight: Any = None, eps: float = 0.0, **others: Any) -> Tensor:
    """What a norm multiplies its input by."""
    if name == "normalize":
        return 1 / input.norm(dim=others["dim"], keepdim=True)
    if name == "layer_norm":
        return weight / (input.var(-1, correction=0, keepdim=True) + eps).sqrt()
    channels = (1, -1, *[1] * (input.dim() - 2))
    over = [axis for axis in range(input.dim()) if axis != 1]
    return weight.view(channels) / (input.var(over, correction=0, keepdim=True) + eps).sqrt()
