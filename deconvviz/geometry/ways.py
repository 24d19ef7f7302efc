"""How each operation changes what a unit sees, along one axis: one table, :data:`WAYS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deconvviz.geometry.field import Axis
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.rules.maxima import average_arguments, pool_arguments
from deconvviz.tape import Slot, Step

Field = tuple[Axis, ...]


def union(a: Axis, b: Axis, name: str) -> Axis:
    """What a unit sees through two branches."""
    if a.reason or b.reason:
        return a if a.reason else b
    if (a.dim, a.jump) != (b.dim, b.jump):
        return replace(a, reason=f"{name} joins different scales")
    first, end = min(a.offset, b.offset), max(a.offset + a.size, b.offset + b.size)
    coarsest = math.lcm(a.coarsest, b.coarsest)
    a = replace(a, near=max(a.near, b.near), far=min(a.far, b.far))
    return replace(a, offset=first, size=end - first, coarsest=coarsest, rigid=a.rigid or b.rigid)


@dataclass(frozen=True)
class Seen:
    """One output of a step, as seen from its inputs."""

    step: Step
    shapes: Sequence[tuple[int, ...]]
    shape: tuple[int, ...]
    name: str
    output: int

    def through(self, field: Field, n: int) -> Field:
        """What the output's units see through the ``n``-th input."""
        way = WAYS.get(self.step.operation)
        if self.step.derived:
            return self._global(field, f"a mask in {self.name}")
        if way is None:
            return self._global(field, self.name)
        return tuple(axis if axis.reason else way(self, axis, n) for axis in field)

    def _global(self, field: Field, reason: str) -> Field:
        return tuple(axis if axis.reason else replace(axis, reason=reason) for axis in field)

    def all(self, axis: Axis) -> Axis:
        """The whole axis is mixed here."""
        return replace(axis, reason=self.name)

    def moved(self, axis: Axis, dim: int | None) -> Axis:
        """The same field along another dimension; mixed if there is none."""
        return self.all(axis) if dim is None else replace(axis, dim=dim)

    def dims(self, position: int, name: str, n: int, default: Any = None) -> list[int]:
        """The dimensions that an argument names, counted from 0; all for ``None``."""
        rank = len(self.shapes[n])
        given = self.step.argument(position, name, default)
        if given is None or given == () or isinstance(given, bool):  # std(False) is of everything, and biased
            given = range(rank)
        numbers = [given] if isinstance(given, int) else given
        return [d % rank for d in numbers]


# ── how each operation changes a field, along one axis ───────────────────────────────────────────────────────


def _pointwise(seen: Seen, axis: Axis, n: int) -> Axis:
    """Each unit sees what the same unit of the input sees."""
    return axis


def _broadcast(seen: Seen, axis: Axis, n: int) -> Axis:
    """As pointwise, shapes aligned at the right; a constant map along the axis has a size of its own."""
    from_right = axis.dim - len(seen.shapes[n])
    if seen.shapes[n][from_right] != seen.shape[from_right]:
        return seen.all(axis)
    constants = [t for t in (*seen.step.arguments, *seen.step.keywords.values()) if isinstance(t, Tensor)]
    rigid = any(t.dim() >= -from_right and t.shape[from_right] > 1 for t in constants)
    return replace(axis, dim=from_right + len(seen.shape), rigid=axis.rigid or rigid)


def _window(axis: Axis, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    return replace(
        axis,
        size=axis.size + (kernel - 1) * dilation * axis.jump,
        jump=axis.jump * stride,
        offset=axis.offset - padding * axis.jump,
    )


def _kernel_along(seen: Seen, axis: Axis) -> tuple[int, int, int] | None:
    """A filter's taps along an axis, the axis's number among those it runs along, and their count; ``None`` if it does
    not run along it, or comes from the image itself."""
    if not isinstance(seen.step.argument(0, "input"), Slot) or len(seen.step.inputs) > 1:
        return None
    kernel = seen.step.argument(1, "weight").shape[2:]
    a = axis.dim - (len(seen.shape) - len(kernel))
    return None if a < 0 else (kernel[a], a, len(kernel))


def _filter(seen: Seen, axis: Axis, n: int) -> Axis:
    along = _kernel_along(seen, axis)
    if along is None:
        return seen.all(axis)
    taps, a, spatial = along
    _, _, stride, padding, dilation, _ = filter_arguments(*seen.step.arguments, **seen.step.keywords)
    steps = each(dilation, spatial)[a]
    if isinstance(padding, str):
        pad = (taps - 1) * steps // 2 if padding == "same" else 0
    else:
        pad = each(padding, spatial)[a]
    return _window(axis, taps, each(stride, spatial)[a], pad, steps)


def _pool(seen: Seen, axis: Axis, n: int) -> Axis:
    step, spatial = seen.step, seen.step.spatial
    a = axis.dim - (len(seen.shape) - spatial)
    if step.operation.startswith("max"):
        *given, _ = pool_arguments(*step.arguments, **step.keywords)
    else:
        *given, _, _, _ = average_arguments(*step.arguments, **step.keywords)
        given.append(1)
    return seen.all(axis) if a < 0 else _window(axis, *(each(item, spatial)[a] for item in given))


def _unshuffled(seen: Seen, axis: Axis, n: int) -> Axis:
    """Blocks of pixels to channels."""
    if axis.dim < len(seen.shape) - 2:
        return seen.all(axis)
    block = seen.step.argument(1, "downscale_factor")
    return _window(axis, block, block, 0, 1)


def _enlarged(axis: Axis, factor: int, first: int, last: int) -> Axis:
    """To ``factor`` times as many units: unit i sees those of before that are ``first`` to ``last`` from it, in steps
    of the new jump. Not every unit sees all of them, so the field can be more than one sees."""
    jump = axis.jump // factor
    coarsest = math.lcm(axis.coarsest, axis.jump)
    size, offset = axis.size + (last - first) * jump, axis.offset + first * jump
    return replace(axis, size=size, jump=jump, offset=offset, coarsest=coarsest)


def _interpolated(seen: Seen, axis: Axis, n: int) -> Axis:
    """By a whole factor, and where output i lies at (i + 1/2) / factor - 1/2: corners that align depend on the size."""
    old, new, step = seen.shapes[n][axis.dim], seen.shape[axis.dim], seen.step
    scale, mode = step.argument(2, "scale_factor"), step.argument(3, "mode", "nearest")
    reach = {"nearest": 0, "nearest-exact": 0, "linear": 1, "bilinear": 1, "trilinear": 1, "bicubic": 2}.get(mode)
    if axis.dim < 2 or new % old or reach is None or step.argument(4, "align_corners"):
        return seen.all(axis)
    factor = new // old
    scale = scale[axis.dim - 2] if isinstance(scale, (list, tuple)) else scale
    if axis.jump % factor or scale not in (None, factor):
        return seen.all(axis)
    axis = replace(axis, rigid=axis.rigid or scale is None)
    if factor == 1 or reach == 0:
        return _enlarged(axis, factor, 1 - factor, 0)
    return _enlarged(axis, factor, (1 - factor - 2 * reach * factor) // 2 + 1, (1 - factor + 2 * reach * factor) // 2)


def _transposed_filter(seen: Seen, axis: Axis, n: int) -> Axis:
    along = _kernel_along(seen, axis)
    if along is None:
        return seen.all(axis)
    taps, a, spatial = along
    defaults = ((3, "stride", 1), (4, "padding", 0), (7, "dilation", 1))
    given = (each(seen.step.argument(i, name, default), spatial) for i, name, default in defaults)
    stride, padding, dilation = (item[a] for item in given)
    if axis.jump % stride:
        return seen.all(axis)
    return _enlarged(axis, stride, padding - (taps - 1) * dilation, padding)


def _shuffled(seen: Seen, axis: Axis, n: int) -> Axis:
    """Channels to blocks of pixels."""
    factor = seen.step.argument(1, "upscale_factor")
    pixels = axis.dim >= len(seen.shape) - 2 and axis.jump % factor == 0
    return _enlarged(axis, factor, 1 - factor, 0) if pixels else seen.all(axis)


def _adaptive_pool(seen: Seen, axis: Axis, n: int) -> Axis:
    """The identity if nothing is pooled; else its windows depend on the size of the image."""
    same = seen.shape[axis.dim] == seen.shapes[n][axis.dim]
    return replace(axis, rigid=True) if same else seen.all(axis)


def _padded(seen: Seen, axis: Axis, n: int) -> Axis:
    """Cells around a map: a constant, or those as far within the border (of the nearest: at most as far)."""
    widths, mode = seen.step.argument(1, "pad"), seen.step.argument(2, "mode", "constant")
    last = 2 * (len(seen.shapes[n]) - 1 - axis.dim)
    if last >= len(widths) or not any(widths[last : last + 2]):
        return axis
    if mode in ("reflect", "replicate"):
        near = 2 * axis.offset + axis.size
        far = near + 2 * (seen.shapes[n][axis.dim] - 1) * axis.jump
        axis = replace(axis, near=max(axis.near, near), far=min(axis.far, far), rigid=True)
    elif mode != "constant":
        return seen.all(axis)
    cut = min(widths[last : last + 2]) < 0
    return replace(axis, offset=axis.offset - widths[last] * axis.jump, rigid=axis.rigid or cut)


def _reduced(position: int) -> Callable[[Seen, Axis, int], Axis]:
    """An operation that leaves one number of what lies along some dimensions."""

    def way(seen: Seen, axis: Axis, n: int) -> Axis:
        dims = seen.dims(position, "dim", n)
        if axis.dim in dims:
            return seen.all(axis)
        kept = len(seen.shape) == len(seen.shapes[n])
        return replace(axis, dim=axis.dim - (0 if kept else sum(d < axis.dim for d in dims)))

    return way


def _along_dim(seen: Seen, axis: Axis, n: int) -> Axis:
    """An operation that mixes what lies along one dimension, by default the last, and is pointwise along the others."""
    return seen.all(axis) if axis.dim in seen.dims(1, "dim", n, -1) else axis


def _last_dims(seen: Seen, axis: Axis, n: int) -> Axis:
    """A norm over the last dimensions."""
    mixed = len(seen.step.argument(1, "normalized_shape"))
    return seen.all(axis) if axis.dim >= len(seen.shape) - mixed else axis


def _linear(seen: Seen, axis: Axis, n: int) -> Axis:
    mixed = axis.dim == len(seen.shape) - 1 or not isinstance(seen.step.argument(0, "input"), Slot)
    return seen.all(axis) if mixed else axis


def _batch_norm(seen: Seen, axis: Axis, n: int) -> Axis:
    """In eval mode pointwise; the batch's own statistics mix everything."""
    training = seen.step.argument(5, "training", False)
    return seen.all(axis) if training or seen.step.argument(1, "running_mean") is None else axis


def _reshaped(seen: Seen, axis: Axis, n: int) -> Axis:
    return seen.moved(axis, kept_dims(seen.shapes[n], seen.shape).get(axis.dim))


def kept_dims(old: Sequence[int], new: Sequence[int]) -> dict[int, int]:
    """The dimensions that a reshape keeps, and where they are in the new shape."""
    kept: dict[int, int] = {}
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [i], [j]
        i, j = i + 1, j + 1
        while (a := math.prod(old[d] for d in left)) != (b := math.prod(new[d] for d in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        left, right = [d for d in left if old[d] > 1], [d for d in right if new[d] > 1]
        if len(left) == len(right) == 1:
            kept[left[0]] = right[0]
    return kept


def _permuted(seen: Seen, axis: Axis, n: int) -> Axis:
    given = seen.step.arguments[1:] or (seen.step.keywords["dims"],)
    dims = given[0] if isinstance(given[0], (tuple, list)) else given
    return replace(axis, dim=[d % len(seen.shape) for d in dims].index(axis.dim))


def _transposed(seen: Seen, axis: Axis, n: int) -> Axis:
    rank = len(seen.shape)
    a, b = (seen.step.argument(1 + k, f"dim{k}", seen.step.argument(1 + k, f"axis{k}")) % rank for k in (0, 1))
    return replace(axis, dim={a: b, b: a}.get(axis.dim, axis.dim))


def _joined(seen: Seen, axis: Axis, n: int) -> Axis:
    dim = seen.step.argument(1, "dim", 0) % len(seen.shape)
    return seen.all(axis) if axis.dim == dim else axis


def _stacked(seen: Seen, axis: Axis, n: int) -> Axis:
    dim = seen.step.argument(1, "dim", 0) % len(seen.shape)
    return replace(axis, dim=axis.dim + (dim <= axis.dim))


def _cut(seen: Seen, axis: Axis, n: int) -> Axis:
    """Parts along a dimension: of channels; a part of the positions would start elsewhere."""
    dim = seen.step.argument(2, "dim", 0) % len(seen.shapes[n])
    return seen.all(axis) if axis.dim == dim else axis


def _indexed(seen: Seen, axis: Axis, n: int) -> Axis:
    """Numbers, slices, ``None`` and ``...``: a slice along the axis is a stride."""
    index = whole_index(seen.step.argument(1, "index"), len(seen.shapes[n]))
    if any(isinstance(item, (Tensor, list, Slot, bool)) for item in index):
        return seen.all(axis)
    old = new = 0
    for item in index:
        if item is None:
            new += 1
            continue
        if old == axis.dim:
            if not isinstance(item, slice):
                return seen.all(axis)
            first, end, step = item.indices(seen.shapes[n][old])
            moved = replace(axis, dim=new, jump=axis.jump * step, offset=axis.offset + first * axis.jump)
            return replace(moved, rigid=axis.rigid or first >= step or end != seen.shapes[n][old])
        old, new = old + 1, new + isinstance(item, slice)
    return seen.all(axis)


def whole_index(given: Any, rank: int) -> list[Any]:
    """What an index says of each dimension, those too that it leaves out or has in its ``...``."""
    index = list(given) if isinstance(given, tuple) else [given]
    missing = rank - sum(item is not None and item is not Ellipsis for item in index)
    where = next((k for k, item in enumerate(index) if item is Ellipsis), len(index))
    return index[:where] + [slice(None)] * missing + index[where + 1 :]


_ROWS: list[tuple[str, Callable[[Seen, Axis, int], Axis]]] = [
    (
        "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu hardswish mish softplus hardtanh threshold "
        "sigmoid hardsigmoid tanh special_expit clamp clip clamp_min abs exp erf log sqrt rsqrt square "
        "reciprocal __rdiv__ neg negative "
        "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout "
        "to cpu type float double half bfloat16 type_as contiguous clone local_response_norm channel_shuffle",
        _pointwise,
    ),
    ("add sub subtract rsub mul div divide true_divide maximum fmax expand expand_as pow", _broadcast),
    ("conv1d conv2d conv3d", _filter),
    (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices",
        _pool,
    ),
    (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
        _adaptive_pool,
    ),
    ("pixel_unshuffle", _unshuffled),
    ("pixel_shuffle", _shuffled),
    ("interpolate", _interpolated),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", _transposed_filter),
    ("pad", _padded),
    ("mean sum amax std var", _reduced(1)),
    ("norm linalg_norm linalg_vector_norm", _reduced(2)),
    ("softmax log_softmax glu", _along_dim),
    ("layer_norm rms_norm", _last_dims),
    ("linear", _linear),
    ("batch_norm", _batch_norm),
    ("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as", _reshaped),
    ("permute", _permuted),
    ("transpose swapaxes swapdims", _transposed),
    ("cat concat concatenate", _joined),
    ("stack", _stacked),
    ("chunk split split_with_sizes tensor_split", _cut),
    ("getitem", _indexed),
]
WAYS = {name: way for names, way in _ROWS for name in names.split()}
