"""Signals through dense transposed Jacobians in float64, and the same signals by our walk over the tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deconvviz.capture import watch
from deconvviz.layers import find_call
from deconvviz.projection import back_to_inputs
from deconvviz.tape import Tape, flatten

Function = Callable[..., Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers: no two are equal."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Applied(nn.Module):
    """A module that applies a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


class Projected(NamedTuple):
    tape: Tape
    signal: Tensor
    """(3, *shape of the output): what was sent back."""
    back: list[Tensor]
    """(3, *shape of the input), for each input."""


def projected(model: Function, *inputs: Tensor, overlap: str = "sum", gradient: bool = False) -> Projected:
    """Three random signals from the output of a function or module, back to its inputs by the tape."""
    module = model if isinstance(model, nn.Module) else Applied(model)
    tape, output = watch(module, inputs, gradient=gradient)
    signal = random(3, *output.shape, seed=1)
    (value,) = find_call(tape, "", None).outputs
    assert value is not None
    return Projected(tape, signal, back_to_inputs(tape, value, signal, overlap))


def by_columns(function: Function, inputs: Sequence[Tensor], signal: Tensor) -> list[Tensor]:
    """``signal`` through the transposed Jacobian of an affine function: f(e_i) - f(0) is its column i."""
    zeros = [torch.zeros_like(tensor) for tensor in inputs]
    origin = function(*(zero.clone() for zero in zeros)).to(torch.float64)
    results = []
    for k, zero in enumerate(zeros):
        columns = []
        for i in range(zero.numel()):
            unit = [tensor.clone() for tensor in zeros]
            unit[k].view(-1)[i] = 1
            columns.append((function(*unit).to(torch.float64) - origin).flatten())
        results.append((signal.reshape(3, -1) @ torch.stack(columns, 1)).view(3, *zero.shape))
    return results


def by_autograd(function: Function, inputs: Sequence[Tensor], signal: Tensor) -> list[Tensor]:
    """``signal`` through the transposed dense Jacobian at ``inputs``."""
    jacobians = torch.autograd.functional.jacobian(
        lambda *tensors: function(*(tensor.clone() for tensor in tensors)), tuple(inputs)
    )
    flat = signal.reshape(3, -1)
    return [
        (flat @ jacobian.reshape(flat.shape[1], -1)).view(3, *tensor.shape)
        for jacobian, tensor in zip(flatten(jacobians), inputs, strict=True)
    ]


def assert_same(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """Equal to ``tolerance`` of the largest expected number."""
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.shape == theirs.shape
        error, scale = (ours - theirs).abs().max(), theirs.abs().max()
        assert error <= tolerance * scale, f"off by {error:.2g} of {scale:.2g}"
