"""Filters and matrix products as PyTorch's, to rounding, but faster where many batches use the same weights.

On a CPU in single precision oneDNN multiplies whole values by a matrix that is laid out for it once; ``linear`` lays
it out at every call. Filters of 3 or 5 taps are computed with fewer products, where that takes less time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvviz.incremental.winograd import Winograd

Kernel = Callable[..., Tensor]


def filtering(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    autocast: torch.dtype | None = None,
) -> Kernel:
    """A convolution of (B, C, *S), and of the padding on each axis: by default none."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    convolve = getattr(F, f"conv{weight.dim() - 2}d")

    def direct(boxes: Tensor, padding: int | Sequence[int] = 0) -> Tensor:
        return convolve(boxes, weight, bias, stride, padding, dilation, groups)

    fits = Winograd.can(weight.shape[2:]) and groups == 1 and {*stride, *dilation} == {1}
    if fits and weight.device.type == "cpu" and autocast is None and _products_are_precise(weight.dtype):
        return Winograd(weight, bias, direct)
    return direct


def _products_are_precise(dtype: torch.dtype) -> bool:
    """Whether matrices of a type are multiplied in it; after ``set_float32_matmul_precision("medium")`` they may not
    be, while filters are."""
    if dtype not in (torch.float32, torch.float64):
        return False
    matrix = torch.arange(32 * 32, dtype=dtype, device="cpu").view(32, 32).cos()
    exact = matrix.double() @ matrix.double()
    return torch.allclose((matrix @ matrix).double(), exact, rtol=0, atol=1e-5)


def product(weight: Tensor, bias: Tensor | None = None, autocast: torch.dtype | None = None) -> Kernel:
    """Rows (..., I) times a matrix (O, I), plus a bias."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    packs = weight.device.type == "cpu" and weight.dtype == torch.float32 and autocast is None
    if not packs or not _packing_works():
        return lambda rows: F.linear(rows, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    call = torch.ops.mkldnn._linear_pointwise
    return lambda rows: call(rows, packed, bias, "none", [], "")


@functools.cache
def _packing_works() -> bool:
    """Whether this build of PyTorch has the operations, and they give what the public one gives."""
    rows = torch.arange(48, dtype=torch.float32, device="cpu").view(-1, 2) / 7
    matrix = rows[:3].cos()
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
        found = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.backends.mkldnn.is_available() and torch.allclose(found, F.linear(rows, matrix), rtol=1e-4)
