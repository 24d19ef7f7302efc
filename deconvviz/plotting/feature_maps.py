"""Feature maps of a layer as the paper's figure 2: projections beside patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from deconvviz.errors import InvalidInput

CELL_INCHES = 3.2


class FeatureMap(Protocol):
    """What :func:`feature_maps` draws: any object with these attributes."""

    @property
    def fmap(self) -> int:
        """Its number."""

    @property
    def values(self) -> Sequence[float]:
        """The activations of its units, strongest first."""

    @property
    def dead(self) -> bool:
        """Whether no image activates it."""

    def image(self, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
        """Projections beside patches, as pixels (H, W, 3)."""


def feature_maps(
    maps: Iterable[FeatureMap], title: str, mean: Sequence[float], std: Sequence[float], columns: int = 4
) -> Figure:
    """Show each map in a cell, its number and strongest activation above; dead ones are marked."""
    found = list(maps)
    if not found:
        raise InvalidInput("there is no map to draw; expected one or more")
    columns = min(columns, len(found))
    rows = math.ceil(len(found) / columns)
    size = CELL_INCHES * columns, CELL_INCHES * 0.62 * rows + 0.4
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, one in zip(grid.flat, found, strict=False):
        axes.imshow(one.image(mean, std), interpolation="antialiased")
        strongest = f"up to {one.values[0]:.3g}" if one.values else "no unit"
        axes.set_title(f"map {one.fmap}: {'dead' if one.dead else strongest}", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
