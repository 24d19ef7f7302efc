"""How each operation is computed only where a patch changed its input: one table, :data:`FORMS`.

A form looks at a recorded step once for a group of windows and either returns a :class:`Work`, which computes boxes
from boxes, or ``None``: then the step is computed on whole values, which is right for every operation. A row says
besides what of them goes as one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvviz.geometry.ways import kept_dims, whole_index
from deconvviz.incremental.crops import along, clean_boxes, from_rows, lay, to_rows
from deconvviz.incremental.padding import padded
from deconvviz.incremental.pools import adaptive, average_pooled, averaged, max_pooled
from deconvviz.incremental.regions import Boxes, Region, union
from deconvviz.incremental.whole import (
    TakesBatch,
    along_another,
    attention,
    each_cell,
    flattened,
    joined,
    never,
    of_any_rank,
    of_last_axes,
    of_rank,
    of_rows,
    undrawn,
)
from deconvviz.incremental.work import Form, Work, first_alone, opened, target, trailing
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.tape import Slot, Step, flatten

if TYPE_CHECKING:
    from deconvviz.incremental.group import Batch, Group


def filtered(group: Group, step: Step) -> Work | None:
    """A convolution, from the boxes it reads, padding included."""
    region, n = group.region(step.inputs[0]), step.spatial
    weight, _, stride, padding, dilation, _ = filter_arguments(*step.arguments, **step.keywords)
    if not first_alone(step) or not trailing(region, n):
        return None
    stride, dilation = each(stride, n), each(dilation, n)
    kernel = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    before = _same_padding(kernel) if padding == "same" else [0] * n if padding == "valid" else each(padding, n)
    space = group.shape(step.outputs[0])[2:]
    out = region.through(kernel, stride, before, space)
    wanted = out.read_by(kernel, stride, before)
    return Work([out], lambda batch: batch.clean.kernel(step)(batch.read(step.inputs[0], wanted)))


def pointwise(group: Group, step: Step) -> Work | None:
    """Each cell from the same cell of every operand; also of constants that differ from cell to cell."""
    rank = len(group.shape(step.outputs[0]))
    regions = [group.region(value) for value in step.inputs]
    if any(r.axes != regions[0].axes or r.space != regions[0].space for r in regions[1:]) or any(
        len(group.shape(value)) != rank for value in step.inputs
    ):
        return None
    axes, space = regions[0].axes, regions[0].space
    maps = []
    for constant in flatten([step.arguments, step.keywords]):
        shape = [1] * (rank - constant.dim()) + list(constant.shape)
        if len(shape) > rank or any(shape[axis] not in (1, n) for axis, n in zip((0, *axes), (1, *space), strict=True)):
            return None
        if constant is target(step) or any(shape[axis] != 1 for axis in axes):
            maps.append(constant)
    return _on_cells(group, step, union(regions), maps)


def channelwise(group: Group, step: Step) -> Work | None:
    """Each cell from the channels of that cell: what works along an axis that isn't spatial."""
    region, rank = group.region(step.inputs[0]), len(group.shape(step.inputs[0]))
    mixed = {
        "layer_norm": lambda: range(rank - len(step.argument(1, "normalized_shape")), rank),
        "rms_norm": lambda: range(rank - len(step.argument(1, "normalized_shape")), rank),
        "linear": lambda: (rank - 1,),
        "softmax": lambda: (step.argument(1, "dim", None),),
        "log_softmax": lambda: (step.argument(1, "dim", None),),
        "glu": lambda: (step.argument(1, "dim", -1),),
    }.get(step.operation, lambda: (1,))()
    if not first_alone(step) or None in mixed or {d % rank for d in mixed} & {0, *region.axes}:
        return None
    return _on_cells(group, step, region)


def reduced(group: Group, step: Step) -> Work | None:
    """A mean over all cells; or one number of the channels of each cell, as a norm's statistics are."""
    region, rank = group.region(step.inputs[0]), len(group.shape(step.inputs[0]))
    given = step.argument(2 if "norm" in step.operation else 1, "dim", None)
    if given is None or given == () or isinstance(given, bool) or not first_alone(step):
        return None
    dims = {d % rank for d in ([given] if isinstance(given, int) else given)}
    if dims & {0, *region.axes}:
        return averaged(group, step) if step.operation == "mean" else None
    dropped = dims if len(group.shape(step.output)) < rank else set()
    axes = tuple(axis - sum(d < axis for d in dropped) for axis in region.axes)
    return Work([region.at(axes)], lambda batch: step.rerun(batch.crops(step.inputs[0])))


def _on_cells(group: Group, step: Step, region: Region, maps: Sequence[Tensor] = ()) -> Work:
    """Call a step on boxes as it would be on whole values; in place if nobody else needs what it overwrites.

    Of the constants ``maps``, which differ from cell to cell, it takes the boxes too.
    """
    in_place, rank = group.may_overwrite(step), len(group.shape(step.outputs[0]))
    step, constants = opened(step, maps), [group.clean.constant(m, rank, region.axes, region.space) for m in maps]

    def run(batch: Batch) -> Any:
        boxes = [batch.read(value, region) for value in step.inputs]
        boxes += [clean_boxes(constant, region) for constant in constants]
        return step.overwrite(*boxes) if in_place else step.rerun(*boxes)

    return Work([region], run)


def concatenated(group: Group, step: Step) -> Work | None:
    """Along channels, over the boxes that hold all of the terms' changes; constants are as in the clean pass."""
    regions = [group.region(value) for value in step.inputs]
    rank, dim = len(group.shape(step.outputs[0])), step.argument(1, "dim", 0)
    terms = step.argument(0, "tensors")
    if (
        dim % rank in (0, *regions[0].axes)
        or any(isinstance(item, Tensor) and item.dim() != rank for item in terms)
        or any(r.axes != regions[0].axes for r in regions[1:])
    ):
        return None
    region, joined = union(regions), step.output
    rest = [n for axis, n in enumerate(group.shape(joined)) if axis not in (0, *region.axes)]
    lengths = [group.shape(step.inputs[item.k])[dim] if isinstance(item, Slot) else item.shape[dim] for item in terms]
    smaller = [not isinstance(item, Slot) or not regions[item.k].same(region) for item in terms]
    stale = _runs(smaller, lengths)

    def run(batch: Batch) -> Tensor:
        crops, clean = batch.crops(step.inputs[0]), batch.clean
        output = crops.new_empty(len(crops), *region.size, *rest, dtype=clean.contents[joined].dtype)
        output = from_rows(output, region.axes)
        for start, length in stale:
            part = clean.value(joined, region.axes, (dim, start, length))
            clean_boxes(part, region, out=output.narrow(dim, start, length))
        for item, part in zip(terms, output.split(lengths, dim), strict=True):
            if isinstance(item, Slot):
                lay(part, region, batch.crops(step.inputs[item.k]), regions[item.k])
        return output

    return Work([region], run)


def _runs(chosen: Sequence[bool], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each run of ``chosen`` parts begins, and its length, in cells."""
    runs, start = [], 0
    for take, run in itertools.groupby(zip(chosen, lengths, strict=True), key=lambda part: part[0]):
        length = sum(n for _, n in run)
        if take:
            runs.append((start, length))
        start += length
    return runs


def rearranged(group: Group, step: Step) -> Work | None:
    """Axes moved, channels chosen or split: found by moving extents that occur nowhere else."""
    region, shape = group.region(step.inputs[0]), list(group.shape(step.inputs[0]))
    kept = (0, *region.axes)
    if not first_alone(step) or (step.operation in _CUTS and _cut(step) % len(shape) in kept):
        return None
    marks = [100_003 + 2 * i for i in range(len(kept))]
    for axis, mark in zip(kept, marks, strict=True):
        shape[axis] = mark
    try:
        outputs = flatten(step.call(torch.empty(shape, device="meta")))
    except (RuntimeError, IndexError, NotImplementedError):
        return None
    if len(outputs) != len(step.outputs):
        return None
    regions, extents = [], dict(zip(marks, (1, *region.space), strict=True))
    for output, value in zip(outputs, step.outputs, strict=True):
        sizes = list(output.shape)
        if any(sizes.count(mark) != 1 for mark in marks):
            return None
        places = [sizes.index(mark) for mark in marks]
        if places[0] != 0 or places != sorted(places):
            return None
        if value is not None and tuple(extents.get(n, n) for n in sizes) != group.shape(value):
            return None
        regions.append(region.at(tuple(places[1:])))
    return Work(regions, lambda batch: step.call(batch.crops(step.inputs[0])), fresh=False)


def indexed(group: Group, step: Step) -> Work | None:
    """Channels chosen; or a part of the cells, or every so many of them: windows of one cell with a stride."""
    work, region = rearranged(group, step), group.region(step.inputs[0])
    old, new = group.shape(step.inputs[0]), group.shape(step.outputs[0])
    index = whole_index(step.argument(1, "index"), len(old))
    if work is not None or not first_alone(step) or 0 in new or index[0] != slice(None):
        return work
    if any(not isinstance(item, slice) for item in index):
        return None
    spans = [index[axis].indices(old[axis]) for axis in region.axes]
    cell, before, stride = [1] * len(spans), [-first for first, _, _ in spans], [every for _, _, every in spans]
    out = region.through(cell, stride, before, [new[axis] for axis in region.axes])
    wanted = out.read_by(cell, stride, before)
    for axis, every in zip(region.axes, stride, strict=True):
        index[axis] = slice(None, None, every)
    return Work([out], lambda batch: batch.read(step.inputs[0], wanted)[tuple(index)], fresh=False)


_CUTS = frozenset(("chunk", "split", "tensor_split", "unbind"))


def _cut(step: Step) -> int:
    """The axis that a step cuts."""
    dim: int = step.argument(1 if step.operation == "unbind" else 2, "dim", 0)
    return dim


def reshaped(group: Group, step: Step) -> Work | None:
    """Channels regrouped (a channel shuffle's views) or axes of one cell added or dropped, the spatial axes kept."""
    region = group.region(step.inputs[0])
    old, new = group.shape(step.inputs[0]), group.shape(step.outputs[0])
    kept = kept_dims(old, new)
    if not set(region.axes) <= kept.keys() or not first_alone(step) or not new or new[0] != 1:
        return None
    axes = tuple(kept[axis] for axis in region.axes)
    rest = [n for axis, n in enumerate(new) if axis not in (0, *axes)]

    def run(batch: Batch) -> Tensor:
        rows = to_rows(batch.crops(step.inputs[0]), region.axes)
        return from_rows(rows.reshape(len(rows), *region.size, *rest), axes)

    return Work([region.at(axes)], run, fresh=False)


def unchanged(group: Group, step: Step) -> Work | None:
    """What gives the same content (contiguous, dropout in eval mode)."""
    region = group.region(step.inputs[0])
    if group.shape(step.outputs[0]) != group.shape(step.inputs[0]) or not first_alone(step):
        return None
    return Work([region], lambda batch: batch.crops(step.inputs[0]), fresh=False)


def dropped(group: Group, step: Step) -> Work | None:
    """Dropout: in eval mode nothing."""
    return unchanged(group, step) if step.kept is None else None


def enlarged(group: Group, step: Step) -> Work | None:
    """Interpolation by a whole factor: nearest neighbours, or (bi)linear with ``align_corners=False``.

    Linear: output i lies at (i + 1/2) / factor - 1/2, so a changed cell reaches half a cell further on both sides.
    """
    region, mode = group.region(step.inputs[0]), step.argument(3, "mode", "nearest")
    old, new = group.shape(step.inputs[0])[2:], group.shape(step.outputs[0])[2:]
    linear = mode in ("linear", "bilinear", "trilinear") and not step.argument(4, "align_corners")
    if not (linear or mode in ("nearest", "nearest-exact")) or step.argument(6, "antialias", False):
        return None
    if not trailing(region, len(new)) or any(b % a for a, b in zip(old, new, strict=True)):
        return None
    factor = [b // a for a, b in zip(old, new, strict=True)]
    scale = step.argument(2, "scale_factor")
    scales = scale if isinstance(scale, (list, tuple)) else [scale] * len(new)
    if scale is not None and any(a != b for a, b in zip(scales, factor, strict=True)):
        return None
    column, space = np.asarray(factor)[:, None], np.asarray(new)[:, None]
    margin = 1 if linear else 0
    starts, ends = np.maximum(region.starts - margin, 0) * column, (region.ends + margin) * column
    out = Region(region.axes, tuple(new), starts, np.minimum(ends, space))
    size = tuple(min(n // k + 2 * margin, m) for n, k, m in zip(out.size, factor, old, strict=True))
    most = np.asarray(old)[:, None] - np.asarray(size)[:, None]
    boxes = Boxes(region.axes, size, np.clip(out.firsts // column - margin, 0, most))  # at a border its own end
    offsets = (out.firsts - boxes.firsts * column).T.tolist()

    def run(batch: Batch) -> Tensor:
        cells = F.interpolate(
            batch.read(step.inputs[0], boxes),
            [n * k for n, k in zip(size, factor, strict=True)],
            mode=mode,
            align_corners=False if linear else None,
        )
        spans = [[slice(o, o + n) for o, n in zip(first, out.size, strict=True)] for first in offsets]
        if all(span == spans[0] for span in spans):
            return along(cells, out.axes, spans[0])
        parts = [along(cells[i : i + 1], out.axes, span) for i, span in enumerate(spans)]
        return torch.cat(parts)

    return Work([out], run)


def _same_padding(kernel: Sequence[int]) -> list[int]:
    return [(k - 1) // 2 for k in kernel]


class Row(NamedTuple):
    """What is known of some operations."""

    form: Form | None
    """From boxes to boxes; ``None`` if that is not known."""
    takes_batch: TakesBatch = never
    """Whether whole values of several windows go as one batch."""
    fresh: bool = False
    """Whole values come out in new memory, or in what the operation may overwrite."""


_ROWS: list[tuple[str, Row]] = [
    ("conv1d conv2d conv3d", Row(filtered, of_rank, fresh=True)),
    ("max_pool1d max_pool2d max_pool3d", Row(max_pooled, of_rank, fresh=True)),
    ("avg_pool1d avg_pool2d avg_pool3d", Row(average_pooled, of_rank, fresh=True)),
    ("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", Row(adaptive, of_rank)),
    ("mean sum amax std var norm linalg_norm linalg_vector_norm", Row(reduced)),
    (
        "relu relu6 leaky_relu elu selu celu gelu silu hardswish mish softplus clamp clip clamp_min hardtanh threshold "
        "sigmoid hardsigmoid tanh erf hardshrink softshrink softsign log_sigmoid neg exp log sqrt rsqrt abs reciprocal "
        "__rdiv__ pow float_power square add sub rsub mul div addcmul where maximum minimum",
        Row(pointwise, each_cell, fresh=True),
    ),
    ("type float double half bfloat16", Row(pointwise, each_cell)),
    ("prelu local_response_norm", Row(channelwise, of_any_rank)),
    ("linear", Row(channelwise, of_rows, fresh=True)),
    ("layer_norm", Row(channelwise, of_last_axes)),
    ("softmax log_softmax", Row(channelwise, along_another)),
    ("rms_norm glu", Row(channelwise)),
    ("batch_norm", Row(None, of_any_rank, fresh=True)),
    ("group_norm instance_norm", Row(None, of_any_rank)),
    ("scaled_dot_product_attention", Row(None, attention)),
    ("cat concat concatenate", Row(concatenated, joined, fresh=True)),
    (
        "permute transpose movedim moveaxis swapaxes swapdims chunk split narrow select tensor_split unbind "
        "index_select",
        Row(rearranged),
    ),
    ("getitem", Row(indexed)),
    ("flatten", Row(reshaped, flattened)),
    ("view reshape unflatten squeeze unsqueeze", Row(reshaped)),
    ("contiguous", Row(unchanged, of_any_rank)),
    ("clone", Row(unchanged)),
    (
        "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout",
        Row(dropped, undrawn),
    ),
    ("pad", Row(padded)),
    ("interpolate", Row(enlarged, of_any_rank)),
]
UNKNOWN = Row(None)

FORMS: dict[str, Row] = {name: row for names, row in _ROWS for name in names.split()}


def row_of(operation: str) -> Row:
    """The row of an operation; what has none is computed on whole values, window by window."""
    return FORMS.get(operation, UNKNOWN)
