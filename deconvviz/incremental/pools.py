"""The forms of pools: the largest or the mean of windows, and of whole maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvviz.incremental.crops import along
from deconvviz.incremental.work import Work, trailing
from deconvviz.rules.linear import each
from deconvviz.rules.maxima import average_arguments, pool_arguments
from deconvviz.tape import Step

if TYPE_CHECKING:
    from deconvviz.incremental.group import Batch, Group


def max_pooled(group: Group, step: Step) -> Work | None:
    """A max pool: the padding is -inf."""
    n = step.spatial
    region, (*sizes, _) = group.region(step.inputs[0]), pool_arguments(*step.arguments, **step.keywords)
    if not trailing(region, n):
        return None
    kernel_size, stride, padding, dilation = (each(item, n) for item in sizes)
    kernel = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    out = region.through(kernel, stride, padding, group.shape(step.outputs[0])[2:])
    wanted = out.read_by(kernel, stride, padding)

    def run(batch: Batch) -> Tensor:
        return largest(batch.read(step.inputs[0], wanted, fill=-math.inf), kernel_size, stride, dilation)

    return Work([out], run, fresh=max(kernel_size) > 1)


def largest(boxes: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A max pool of (B, C, *S) without padding.

    On a CPU the largest of shifted copies, axis by axis: PyTorch's own goes through each window once for every cell.
    Of windows of one cell it is a view.
    """
    if boxes.device.type != "cpu":
        return cast(Tensor, getattr(F, f"max_pool{boxes.dim() - 2}d")(boxes, kernel_size, stride, 0, dilation))
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        reach = boxes.shape[axis] - d * (k - 1)
        first, *others = (along(boxes, [axis], [slice(d * i, d * i + reach, s)]) for i in range(k))
        boxes = torch.maximum(first, others[0]) if others else first
        for other in others[1:]:
            torch.maximum(boxes, other, out=boxes)
    return boxes


def average_pooled(group: Group, step: Step) -> Work | None:
    """An average pool: a sum over the zero-padded window, divided by what PyTorch divides by at that place."""
    n = step.spatial
    *sizes, _, padded, divisor = average_arguments(*step.arguments, **step.keywords)
    kernel, stride, padding = (each(item, n) for item in sizes)
    return _averaged(group, step, kernel, stride, padding, padded, divisor)


def _averaged(group: Group, step: Step, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              count_padding: bool, divisor: int | None) -> Work | None:  # fmt: skip
    n, region = len(kernel), group.region(step.inputs[0])
    if not trailing(region, n):
        return None
    space = group.shape(step.outputs[0])[2:]
    out = region.through(kernel, stride, padding, space)
    wanted = out.read_by(kernel, stride, padding)
    pool = getattr(F, f"avg_pool{n}d")
    factors: list[np.ndarray] = []
    for o, k, s, p, extent in zip(space, kernel, stride, padding, region.space, strict=True):
        start = np.arange(o) * s - p
        end = np.minimum(start + k, extent + p)
        if not count_padding:
            start, end = np.maximum(start, 0), np.minimum(end, extent)
        factors.append(np.ones(o) if divisor else k / (end - start))
    scale = math.prod(kernel) / divisor if divisor else 1.0

    def run(batch: Batch) -> Tensor:
        output = pool(batch.read(step.inputs[0], wanted), kernel, stride)
        if scale != 1:
            output *= scale
        for axis, (factor, size) in enumerate(zip(factors, out.size, strict=True)):
            if (factor != 1).any():
                values = factor[out.firsts[axis][:, None] + np.arange(size)]
                shape = [len(values), 1, *[size if a == axis else 1 for a in range(n)]]
                output *= torch.from_numpy(values.reshape(shape)).to(output)
        return output

    return Work([out], run)


def adaptive(group: Group, step: Step) -> Work | None:
    """To one cell: by differences. To as many as there are: nothing. To a divisor of them: an average pool."""
    n, region = step.spatial, group.region(step.inputs[0])
    space = group.shape(step.outputs[0])[-n:]
    if not trailing(region, n):
        return None
    if all(o == 1 for o in space):
        return _global_mean(group, step)
    if space == region.space:
        return Work([region], lambda batch: batch.crops(step.inputs[0]), fresh=False)
    if any(i % o for i, o in zip(region.space, space, strict=True)):
        return None
    kernel = [i // o for i, o in zip(region.space, space, strict=True)]
    return _averaged(group, step, kernel, kernel, [0] * n, True, None)


def averaged(group: Group, step: Step) -> Work | None:
    """A mean over all of the spatial axes, and no other."""
    region, dims = group.region(step.inputs[0]), step.argument(1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    rank = len(group.shape(step.inputs[0]))
    if dims is None or step.keywords.get("dtype") or {d % rank for d in dims} != set(region.axes):
        return None
    return _global_mean(group, step)


def _global_mean(group: Group, step: Step) -> Work:
    """The clean mean, and the mean of what changed."""
    value, shape = step.inputs[0], group.shape(step.outputs[0])
    region, clean = group.region(value), group.clean.contents[step.output]

    def run(batch: Batch) -> Tensor:
        mean = batch.change(value) / math.prod(region.space)
        return (clean + mean.view(-1, *shape[1:])).to(clean.dtype)

    return Work([None], run)
