"""Coarse to fine: compute every few windows of a sweep, then more where the map changes, and interpolate the rest.

It is not exact, and says so: what was computed, and how well what was not agrees with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import InvalidInput
from deconvviz.inputs import whole_number
from deconvviz.occlusion.sweep import Rows


@dataclass(frozen=True)
class Refine:
    """Sweep coarsely, and look closely only where the map changes (Krypton's drill-down): inexact, and it says so.

    ``factor``: every factor-th window along each axis is computed first. ``share``: of all windows, how many more,
    between the coarse ones that differ most. ``checks``: how many of the interpolated windows are computed after
    all, drawn with ``seed``, to measure the agreement.
    """

    factor: int = 2
    share: float = 0.05
    checks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("factor", 1), ("checks", 0), ("seed", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if not (isinstance(self.share, (int, float)) and 0 <= self.share <= 1):
            raise InvalidInput(f"share is {self.share!r}; expected 0 to 1")


@dataclass(frozen=True)
class Refinement:
    """What a refined sweep computed, and how well the rest agrees with what it stands for."""

    computed: Tensor
    """(Y, X): true where the window was computed, false where it was interpolated between others."""
    checked: int
    """Interpolated windows that were computed after all (they now hold their exact values)."""
    largest_error: float
    """Of the first target's score over the checked windows, as a share of the map's range."""
    correlation: float
    """Between the interpolated and the exact scores of the checked windows; NaN if they do not vary."""


Plane = NDArray[np.float64]
Places = NDArray[np.int64]
Evaluate = Callable[[NDArray[np.int64]], Rows]


def refined(
    evaluate: Evaluate, grid: tuple[int, int], guide: Callable[[Rows], Tensor], refine: Refine
) -> tuple[Rows, Refinement]:
    """Evaluate a coarse subset of a grid (Y, X) of windows, then where it changes most, and interpolate the rest.

    Args:
        evaluate: gives the results of the windows of these numbers (y * X + x), which are in ascending order.
        grid: Y and X.
        guide: the number (W,) of each window that says where the map changes.
        refine: how coarse, and how much more.
    """
    rows, columns = (np.unique([*range(0, n, refine.factor), n - 1]) for n in grid)
    known = np.zeros(grid, dtype=bool)
    known[np.ix_(rows, columns)] = True
    coarse, left = np.flatnonzero(known), np.flatnonzero(~known)
    results = evaluate(coarse)
    rough = guide(results).double().view(len(rows), len(columns)).numpy()
    change = _change(rough, rows, columns, grid).ravel()[left]
    more = np.sort(left[np.argsort(-change, kind="stable")[: round(refine.share * np.prod(grid))]])
    exact = [(coarse, results), *([(more, evaluate(more))] if len(more) else [])]
    guess = _interpolated(rough, rows, columns, grid).ravel()
    left = np.setdiff1d(left, more)
    checks = np.sort(np.random.default_rng(refine.seed).permutation(left)[: refine.checks])
    error, correlation = 0.0, float("nan")
    if len(checks):
        exact.append((checks, evaluate(checks)))
        found = guide(exact[-1][1]).double().numpy()
        everything = np.concatenate([rough.ravel(), found])
        error = float(np.abs(found - guess[checks]).max() / max(np.ptp(everything), 1e-300))
        if len(checks) > 1 and np.ptp(found) > 0 and np.ptp(guess[checks]) > 0:
            correlation = float(np.corrcoef(found, guess[checks])[0, 1])
    whole = {name: _spread(values, rows, columns, grid) for name, values in results.items()}
    for numbers, found_rows in exact:
        known.ravel()[numbers] = True
        for name, value in found_rows.items():
            whole[name][torch.from_numpy(numbers)] = value
    return whole, Refinement(torch.from_numpy(known), len(checks), error, correlation)


def _spread(values: Tensor, rows: Places, columns: Places, grid: tuple[int, int]) -> Tensor:
    """Results of the windows at ``rows`` x ``columns`` to the whole grid: numbers between them, labels the nearest."""
    coarse = values.unflatten(0, (len(rows), len(columns)))
    if not values.is_floating_point():
        nearest = (torch.from_numpy(_nearest(places, n)) for places, n in ((rows, grid[0]), (columns, grid[1])))
        return coarse[torch.meshgrid(*nearest, indexing="ij")].flatten(0, 1)
    planes = coarse.flatten(2).double().numpy()
    between = [_interpolated(planes[..., i], rows, columns, grid).ravel() for i in range(planes.shape[-1])]
    return torch.from_numpy(np.stack(between, 1)).to(values).view(-1, *values.shape[1:])


def _interpolated(rough: Plane, rows: Places, columns: Places, grid: tuple[int, int]) -> Plane:
    """Bilinear, from the values at ``rows`` x ``columns`` to the whole grid."""
    across = np.stack([np.interp(np.arange(grid[1]), columns, line) for line in rough])
    return np.stack([np.interp(np.arange(grid[0]), rows, line) for line in across.T], 1)


def _change(rough: Plane, rows: Places, columns: Places, grid: tuple[int, int]) -> Plane:
    """For each cell of the grid, the range of the coarse values about it."""
    y = np.clip(np.searchsorted(rows, np.arange(grid[0]), side="right") - 1, 0, max(len(rows) - 2, 0))
    x = np.clip(np.searchsorted(columns, np.arange(grid[1]), side="right") - 1, 0, max(len(columns) - 2, 0))
    y1, x1 = np.minimum(y + 1, len(rows) - 1), np.minimum(x + 1, len(columns) - 1)
    corners = np.stack([rough[np.ix_(a, b)] for a in (y, y1) for b in (x, x1)])
    spread: Plane = np.ptp(corners, axis=0)
    return spread


def _nearest(places: Places, n: int) -> Places:
    """Of each of n cells, which of ``places`` is nearest."""
    return np.abs(np.arange(n)[:, None] - places[None]).argmin(1)
