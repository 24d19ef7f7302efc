"""The rules on signals that live in a box (:mod:`deconvviz.boxes`): each moves or widens the box.

Along one axis, a box of n cells that starts at cell a goes back through windows of kernel k, stride s, padding p and
dilation d to a box of ``(n - 1) s + (k - 1) d + 1`` cells from ``a s - p``. Each function gives what the rule gives
on the whole signals, or ``None`` where the step does not keep a box a box.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deconvviz.boxes import Boxed
from deconvviz.rules.linear import each, filter_arguments, transposed_filter
from deconvviz.rules.maxima import average_arguments, pool_arguments
from deconvviz.rules.rule import GENERALISED, Context, only
from deconvviz.switches import Switches, unpool
from deconvviz.tape import Slot, Step

Boxes = Sequence[Boxed | None]


def pointwise(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """What changes each cell alone, and all positions alike: the rule itself, on what the box holds."""
    signal = only(signals)
    kept = step.kept if isinstance(step.kept, tuple) else (step.kept,)
    if any(_varies(item) for item in kept):
        return None
    backs = step.rule.back(step, [signal.content], context)
    return [None if back is None else signal.holding(back) for back in backs]


def _varies(item: object) -> bool:
    """Whether what a step kept holds more than a number for each channel."""
    return isinstance(item, Tensor) and item.dim() > 1 and max(item.shape[2:], default=1) > 1


def product(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """A gate that has the map's positions or one number for all, and its channels or one for all; or a rectifier."""
    if not step.constant:
        return None
    signal, (k,), gate = only(signals), step.constant, step.kept
    if step.kind == GENERALISED:
        return pointwise(step, signals, context)
    shape, other = (tuple(context.values[step.inputs[i]].shape) for i in (1 - k, k))
    if shape[2:] != signal.space or len(other) != len(shape) or shape[0] != other[0] or other[1] not in (1, shape[1]):
        return None
    if other[2:] == shape[2:]:
        gate = signal.part_of(gate)
    elif max(other[2:]) > 1:
        return None
    back = signal.holding(signal.content * gate.to(signal.content.dtype))
    return [back, None] if k == 1 else [None, back]


def add(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """A sum of equal shapes copies the signal to each of its terms."""
    same = all(context.values[i].shape == context.values[step.output].shape for i in step.inputs)
    if not same or "alpha" in step.keywords or len(step.arguments) > 2:
        return None
    return [only(signals)] * len(step.inputs)


def joined(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """Channels that were put side by side take their parts of the signal."""
    signal = only(signals)
    if step.argument(1, "dim", 0) != 1 or len(step.argument(0, "tensors")) != len(step.inputs):
        return None  # a constant among them has a part too
    parts = signal.content.split([context.values[i].shape[1] for i in step.inputs], 2)
    return [signal.holding(part) for part in parts]


def filter_back(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """The transposed filter, over the box."""
    if step.constant or not isinstance(step.argument(0, "input"), Slot):
        return None
    signal, space = only(signals), tuple(context.values[step.inputs[0]].shape[2:])
    weight, _, stride, padding, dilation, groups = filter_arguments(*step.arguments, **step.keywords)
    if len(space) != weight.dim() - 2 or isinstance(padding, str) or signal.content.is_complex():
        return None
    return [_through(signal, weight, stride, padding, dilation, groups, space)]


def average_back(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """Each average spread over its window, if all windows count alike: a filter of equal weights."""
    signal, spatial = only(signals), step.spatial
    kernel, stride, padding, ceil_mode, count_padding, divisor = average_arguments(*step.arguments, **step.keywords)
    space = tuple(context.values[step.inputs[0]].shape[2:])
    padded = any(each(padding, spatial))
    if len(space) != spatial or ceil_mode or (padded and not count_padding) or divisor:
        return None
    sizes = each(kernel, spatial)
    weight = signal.content.new_ones((signal.content.shape[2], 1, *sizes))
    weight /= weight[0].numel()
    return [_through(signal, weight, stride, padding, 1, len(weight), space)]


def _through(signal: Boxed, weight: Tensor, stride: object, padding: object, dilation: object, groups: int,
             space: tuple[int, ...]) -> Boxed:  # fmt: skip
    """The signal at a filter's input."""
    steps, pads, gaps = (each(item, len(space)) for item in (stride, padding, dilation))
    firsts, size = _before(signal, weight.shape[2:], steps, pads, gaps)
    content = transposed_filter(signal.content, weight, size, steps, [0] * len(space), gaps, groups)
    return Boxed(content, firsts, space).inside()


def _before(signal: Boxed, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
            dilation: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:  # fmt: skip
    """Where boxes start before windows, and their size there."""
    geometry = zip(signal.size, kernel, stride, dilation, strict=True)
    size = tuple((n - 1) * s + (k - 1) * d + 1 for n, k, s, d in geometry)
    columns = [torch.tensor(item, device="cpu").view(-1, 1, 1) for item in (stride, padding)]
    return signal.firsts * columns[0] - columns[1], size


def unpool_by_switches(step: Step, signals: Boxes, context: Context) -> Boxes | None:
    """Each value to the recorded place of its maximum, within the box."""
    signal = only(signals)
    switches: Switches = step.kept
    windows = switches.windows
    spatial = len(windows.size)
    if "adaptive" in step.operation or context.overlap != "sum" or windows.empty:
        return None  # of windows that overwrite each other, those outside the box count too
    _, stride, padding, _, _ = pool_arguments(*step.arguments, **step.keywords)
    steps, pads = each(stride, spatial), each(padding, spatial)
    firsts, size = _before(signal, windows.kernel, steps, pads, windows.dilation)
    indices = windows.decode_part(signal.part_of(switches.places), steps, size)
    if indices is None:
        return None
    indices = indices.flatten(-spatial)  # (M or 1, N, C, cells)
    if len(indices) == 1:
        content = unpool(signal.content, indices[0], size)
    else:
        content = unpool(signal.content[None], indices, size)[0]
    return [Boxed(content, firsts, windows.size)]
