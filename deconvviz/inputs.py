"""Check what is given to a model, and say what is wrong before the model does."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deconvviz.errors import InvalidInput


def integer(item: Any) -> int:
    """An int, or what counts as one (NumPy's, a tensor of one); for a bool or anything else ``TypeError``."""
    item = item.item() if isinstance(item, Tensor) and item.numel() == 1 else item
    if isinstance(item, bool):
        raise TypeError("a bool is no index")
    return operator.index(item)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """An argument as an int; raises :class:`InvalidInput` unless it is a whole number, ``least`` or more."""
    try:
        number = integer(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InvalidInput(f"{name} is {value!r}; expected a whole number, {least} or more")
    return number


def require_autocast(dtype: Any) -> None:
    """Raise :class:`InvalidInput` unless an argument ``autocast`` is a dtype or ``None``."""
    if not isinstance(dtype, torch.dtype | None):
        raise InvalidInput(f"autocast is {dtype!r}; expected a dtype such as torch.bfloat16, or None")


def as_python(item: Any) -> Any:
    """Numbers and arrays of NumPy, in a nest of tuples and lists, as Python's; anything else as it is."""
    if isinstance(item, (np.generic, np.ndarray)):
        return item.tolist()
    return type(item)(map(as_python, item)) if type(item) in (tuple, list) else item


def like(model: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device of the model's parameters."""
    found = next((p for p in model.parameters() if p.is_floating_point()), None)
    return torch.zeros((), device="cpu") if found is None else found.detach()


def input_tensors(inputs: Any, model: nn.Module) -> tuple[Tensor, ...]:
    """``inputs``, a tensor or a tuple of tensors (N, ...), as a tuple that ``model`` can be asked about.

    Raises:
        InvalidInput: not floating-point tensors, an empty batch, NaN or infinite values, or a dtype or
            device that is not the model's.
    """
    tensors = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if not tensors:
        raise InvalidInput("inputs is empty; expected a tensor (N, C, H, W) or a tuple of tensors")
    state = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InvalidInput(
                f"inputs holds a {type(tensor).__name__}; expected tensors (N, C, H, W): of a picture "
                "deconvviz.images.to_input makes one"
            )
        if not tensor.is_floating_point():
            raise InvalidInput(
                f"inputs are {tensor.dtype}; expected floating point, normalised as the model was trained: "
                "inputs.float(), or deconvviz.images.to_input for a picture"
            )
        if tensor.dim() < 2 or tensor.shape[0] == 0:
            raise InvalidInput(
                f"inputs have shape {tuple(tensor.shape)}; expected a batch (N, ...) with N >= 1, usually "
                "(N, C, H, W): inputs.unsqueeze(0) makes one of a single picture"
            )
        if state is not None and tensor.device != state.device:
            raise InvalidInput(
                f"inputs are on {tensor.device}, the model on {state.device}: inputs.to('{state.device}')"
            )
        autocast = torch.is_autocast_enabled(tensor.device.type)
        if state is not None and not autocast and tensor.dtype not in {p.dtype for p in model.parameters()}:
            raise InvalidInput(
                f"inputs are {tensor.dtype}, the model's parameters {state.dtype}: inputs.to({state.dtype})"
            )
        require_finite(tensor)
    return tuple(tensors)


def input_images(inputs: Any, model: nn.Module) -> Tensor:
    """``inputs`` as the one tensor (N, ...) that ``model`` takes.

    Raises:
        InvalidInput: there are several tensors, or as of :func:`input_tensors`.
    """
    tensors = input_tensors(inputs, model)
    if len(tensors) > 1:
        raise InvalidInput(f"inputs holds {len(tensors)} tensors; expected one, (N, C, H, W)")
    return tensors[0]


def input_image(inputs: Any, model: nn.Module) -> Tensor:
    """``inputs`` as the one image (1, ...) that ``model`` takes.

    Raises:
        InvalidInput: there are several images, or as of :func:`input_images`.
    """
    image = input_images(inputs, model)
    if len(image) != 1:
        raise InvalidInput(f"image has shape {tuple(image.shape)}; expected one image (1, C, H, W): images[:1]")
    return image


def input_pictures(inputs: Any, model: nn.Module) -> Tensor:
    """``inputs`` as the one tensor (N, C, ..., H, W) that ``model`` takes.

    Raises:
        InvalidInput: it has no rows and columns, or as of :func:`input_images`.
    """
    images = input_images(inputs, model)
    if images.dim() < 4:
        raise InvalidInput(f"images have shape {tuple(images.shape)}; expected (N, C, H, W), or clips (N, C, T, H, W)")
    return images


def require_finite(tensor: Tensor) -> None:
    """Raise :class:`InvalidInput` if ``tensor`` holds NaN or infinite values."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise InvalidInput(
            f"inputs of shape {tuple(tensor.shape)} hold {bad} NaN or infinite values; what a model makes of "
            "them means nothing: clean them first, e.g. inputs.nan_to_num()"
        )
