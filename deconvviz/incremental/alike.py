"""Which windows to compute together: those that change about as much, so that boxes of one size waste little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deconvviz.incremental.clean import CleanPass
from deconvviz.incremental.group import Group, largest_group
from deconvviz.incremental.regions import Firsts

CLASSES = 8
"""Kinds of positions told apart along one axis."""
OVERHEAD = 3.0
"""What a group costs beside its windows, in windows."""
Labels = NDArray[np.int64]


def alike(clean: CleanPass, firsts: Firsts, size: Sequence[int]) -> Labels:
    """A label (W,) for each window; those of one label are computed together, and the higher ones cost more.

    How much a window changes of each value follows from its distance to the borders and its place within the
    network's stride, along each axis by itself. Positions along an axis are merged to a few kinds, those first whose
    common boxes cost least more; then the groups that these give are merged while that saves multiply-adds.

    Args:
        clean, firsts, size: as of :class:`~deconvviz.incremental.plan.Plan`.
    """
    group = Group(clean, firsts, size, dense_from=np.inf)
    extents, weights = [], []
    for step, cost in zip(clean.steps, clean.costs, strict=True):
        region = group.regions.get(step.outputs[0]) if step.outputs[0] is not None else None
        if cost and region is not None and len(region.axes) == len(firsts):
            extents.append((region.ends - region.starts) / np.asarray(region.space)[:, None])
            weights.append(cost)
    if not extents:
        return np.zeros(firsts.shape[1], np.int64)
    windows, weight = np.stack(extents).transpose(1, 2, 0), np.asarray(weights, float)  # (axes, W, layers)
    kinds = []
    for axis, places in enumerate(firsts):
        own, others = windows[[axis]], np.delete(windows, axis, axis=0).prod(axis=0).mean(axis=0)
        _, some, place = np.unique(places, return_index=True, return_inverse=True)
        _, kind = np.unique(own[0, some], axis=0, return_inverse=True)
        kinds.append(_merged(own, weight * others, kind.ravel()[place], CLASSES))
    _, kind = np.unique(np.ravel_multi_index(kinds, [CLASSES] * len(kinds)), return_inverse=True)
    return _merged(windows, weight, kind, len(kind), OVERHEAD, largest_group(clean))


def _merged(windows: NDArray[np.float64], weight: NDArray[np.float64], start: Labels, few: int,
            overhead: float = 0.0, most: float = np.inf) -> Labels:  # fmt: skip
    """Merge kinds of windows (axes, W, layers), the cheapest pair first, while that saves or there are over ``few``.

    A kind of n windows costs (n + ``overhead``) times its boxes; with over ``most`` windows it isn't made.
    """
    counts = np.bincount(start).astype(float)
    boxes = np.stack([windows[:, start == kind].max(axis=1) for kind in range(len(counts))], axis=1)
    labels = np.arange(len(counts))

    def cost(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.minimum(boxes.prod(axis=0), 1.0) @ weight

    costs = cost(boxes)

    def saved(i: int) -> NDArray[np.float64]:
        together = counts[i] + counts
        apart = (counts[i] + overhead) * costs[i] + (counts + overhead) * costs
        saving = apart - (together + overhead) * cost(np.maximum(boxes[:, [i]], boxes))
        saving[(counts == 0) | (together > most) | (np.arange(len(counts)) == i)] = -np.inf
        return saving if counts[i] else np.full(len(counts), -np.inf)

    savings = np.stack([saved(i) for i in range(len(counts))])
    left = len(counts)
    while left > 1:
        i, j = np.unravel_index(savings.argmax(), savings.shape)
        if savings[i, j] == -np.inf or (savings[i, j] <= 0 and left <= few):
            break
        boxes[:, i], counts[i] = np.maximum(boxes[:, i], boxes[:, j]), counts[i] + counts[j]
        costs[i] = cost(boxes[:, i])
        counts[j], labels[labels == j], left = 0, i, left - 1
        savings[j], savings[:, j] = -np.inf, -np.inf
        savings[i] = savings[:, i] = saved(int(i))
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(costs, kind="stable")] = np.arange(len(counts))
    return np.unique(ranks[labels[start]], return_inverse=True)[1].ravel()
