"""What covers a part of an input: a value, the input's mean, a blurred copy, noise, or anything a function gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvviz.errors import InvalidInput

Fill = float | Tensor | Literal["mean", "blur", "noise"] | Callable[[Tensor], Tensor] | None
FILLS = ("mean", "blur", "noise")


def filled(inputs: Tensor, fill: Any) -> Tensor:
    """What covers ``inputs`` (N, C, *S), broadcastable to them.

    Args:
        inputs: the inputs.
        fill: a number; a tensor broadcastable to the inputs; ``"mean"``, each image's mean of each channel;
            ``"blur"``, a Gaussian of an eighth of the shorter side; ``"noise"``, normal with each channel's mean and
            standard deviation, the same at every call; a function of the inputs; or ``None``, zero.

    Raises:
        InvalidInput: anything else, a shape that does not fit, or NaN or infinite values.
    """
    if callable(fill) and not isinstance(fill, Tensor):
        fill = fill(inputs.clone())  # it may work in place
    if isinstance(fill, str):
        if fill not in FILLS:
            raise InvalidInput(f"the fill is {fill!r}; expected a number, a tensor, a function or one of {FILLS}")
        if not inputs.is_floating_point() or inputs.dim() < 3:
            raise InvalidInput(
                f"the fill is {fill!r}, for inputs {tuple(inputs.shape)} of {inputs.dtype}; expected floating point, "
                "(N, C, *S)"
            )
        return {"mean": _mean, "blur": _blur, "noise": _noise}[fill](inputs)
    try:
        fraction = isinstance(fill, float) or (isinstance(fill, Tensor) and fill.is_floating_point())
        dtype = None if fraction and not inputs.is_floating_point() else inputs.dtype  # of whole numbers it is none
        content = torch.as_tensor(0 if fill is None else fill, dtype=dtype, device=inputs.device)
        content.expand(inputs.shape)
    except (RuntimeError, TypeError, ValueError) as error:
        shape = tuple(fill.shape) if isinstance(fill, Tensor) else repr(fill)
        raise InvalidInput(
            f"the fill is {shape}; expected a number or a tensor broadcastable to {tuple(inputs.shape)}"
        ) from error
    if not content.isfinite().all():
        raise InvalidInput("the fill holds NaN or infinite values; expected finite ones")
    return content


def _mean(inputs: Tensor) -> Tensor:
    return inputs.mean(tuple(range(2, inputs.dim())), keepdim=True)


def _noise(inputs: Tensor) -> Tensor:
    axes = tuple(range(2, inputs.dim()))
    spread, mean = torch.std_mean(inputs.float(), axes, keepdim=True)
    spread = spread.nan_to_num()  # of a single cell
    drawn = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(spread)
    return (mean + spread * drawn).to(inputs.dtype)


def _blur(inputs: Tensor) -> Tensor:
    """A separable Gaussian; beyond the border the border's pixels are repeated."""
    blurred = inputs
    sigma = max(1.0, min(inputs.shape[2:]) / 8)
    for axis in range(2, inputs.dim()):
        radius = min(math.ceil(3 * sigma), 4 * inputs.shape[axis])
        weight = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device="cpu") / sigma) ** 2)
        weight = (weight / weight.sum()).to(inputs).view(1, 1, -1)
        lines = blurred.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        blurred = F.conv1d(padded, weight).view(lines.shape).movedim(-1, axis)
    return blurred
