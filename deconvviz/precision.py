"""What to compute in: half precision ends at 65504, and not every device has float64."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype of what is summed from ``tensor``: its own, but float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def precise(tensor: Tensor) -> Tensor:
    """In float64, as PyTorch's own kernels have it, or as it is on a device that has none (MPS)."""
    return tensor.double() if _has_double(tensor.device) else tensor


@functools.cache
def _has_double(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True
