"""The forms of padding: with a constant, or with cells of the value itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvviz.incremental.crops import from_rows, to_rows
from deconvviz.incremental.regions import Boxes, Region
from deconvviz.incremental.work import Work, first_alone
from deconvviz.tape import Step

if TYPE_CHECKING:
    from deconvviz.incremental.group import Batch, Group

MIRRORS = ("reflect", "replicate")
"""Modes of padding with cells from near the border."""


def padded(group: Group, step: Step) -> Work | None:
    """A constant moves the boxes, and adds channels to their cells; negative widths cut cells off."""
    region, pads = group.region(step.inputs[0]), list(step.argument(1, "pad"))
    old, new, mode = group.shape(step.inputs[0]), group.shape(step.outputs[0]), step.argument(2, "mode", "constant")
    pads += [0] * (2 * len(old) - len(pads))
    widths = [(pads[-2 - 2 * axis], pads[-1 - 2 * axis]) for axis in range(len(old))]
    around = [widths[axis] for axis in region.axes]
    if not first_alone(step) or widths[0] != (0, 0) or 0 in new:
        return None
    if mode in MIRRORS:
        return _mirrored(group, step, around) if sum(map(any, widths)) == sum(map(any, around)) else None
    if mode != "constant":
        return None
    cell, before = [1] * len(around), [width for width, _ in around]
    out = region.through(cell, cell, before, [new[axis] for axis in region.axes])
    boxes = out.read_by(cell, cell, before)
    fill = float(step.argument(3, "value") or 0.0)
    channels = [0 if len(old) - 1 - i // 2 in region.axes else n for i, n in enumerate(pads)]

    def run(batch: Batch) -> Tensor:
        cells = batch.read(step.inputs[0], boxes, fill)
        return F.pad(cells, channels, value=fill) if any(channels) else cells

    return Work([out], run, fresh=False)


def _mirrored(group: Group, step: Step, widths: Sequence[tuple[int, int]]) -> Work | None:
    """Each cell is one of the value's: in the padding one as far within the border, or the one there."""
    region, mode = group.region(step.inputs[0]), step.argument(2, "mode")
    if min(map(min, widths)) < 0:
        return None
    numbers = [torch.arange(n, dtype=torch.float64, device="cpu").view(1, 1, n) for n in region.space]
    sources = [F.pad(n, pair, mode).long().flatten().numpy() for n, pair in zip(numbers, widths, strict=True)]
    starts, ends = np.empty_like(region.starts), np.empty_like(region.ends)
    for axis, source in enumerate(sources):
        changed = (source >= region.starts[axis][:, None]) & (source < region.ends[axis][:, None])
        starts[axis], ends[axis] = changed.argmax(axis=1), len(source) - changed[:, ::-1].argmax(axis=1)
    out = Region(region.axes, tuple(map(len, sources)), starts, ends)
    around = [n + sum(pair) for n, pair in zip(out.size, widths, strict=True)]  # what its padding shows lies within
    size = np.minimum(around, region.space)
    before, most = np.asarray(widths)[:, :1], (np.asarray(region.space) - size)[:, None]
    boxes = Boxes(region.axes, tuple(size.tolist()), np.clip(out.firsts - before, 0, most))
    places = [np.arange(out.firsts.shape[1])[:, None]]
    for source, firsts, n, read in zip(sources, out.firsts, out.size, boxes.firsts, strict=True):
        places.append(source[firsts[:, None] + np.arange(n)] - read[:, None])
    index = [
        torch.from_numpy(place).view(len(place), *[-1 if a == axis else 1 for a in range(1, len(places))])
        for axis, place in enumerate(places)
    ]

    def run(batch: Batch) -> Tensor:
        rows = to_rows(batch.read(step.inputs[0], boxes), region.axes)
        return from_rows(rows[tuple(place.to(rows.device) for place in index)], region.axes)

    return Work([out], run)
