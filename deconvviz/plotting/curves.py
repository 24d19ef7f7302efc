"""Curves of a sweep: one plot a layer, one line an image (the paper's figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from matplotlib.figure import Figure
from torch import Tensor

from deconvviz.errors import InvalidInput


class Curves(Protocol):
    """What :func:`invariance_curves` draws: any object with these attributes."""

    @property
    def transform(self) -> str:
        """The transform's name."""

    @property
    def unit(self) -> str:
        """The amounts' unit."""

    @property
    def amounts(self) -> Sequence[float]:
        """A of them."""

    @property
    def distances(self) -> Mapping[str, Tensor]:
        """For each layer (N, A)."""

    @property
    def probability(self) -> Tensor | None:
        """(N, A), 0..1."""


def invariance_curves(curves: Curves, labels: Sequence[str] | None = None) -> Figure:
    """Draw the distance at each layer, then the probability, over the amount of the transform."""
    plots = {f"{layer}: distance": values for layer, values in curves.distances.items()}
    if curves.probability is not None:
        plots["probability of the class"] = curves.probability
    images = len(next(iter(plots.values()))) if plots else 0
    if labels is not None and len(labels) != images:
        raise InvalidInput(f"labels has {len(labels)} entries, expected {images}: one for each image.")
    figure = Figure(figsize=(3.2 * max(1, len(plots)), 2.8), layout="constrained")
    grid = figure.subplots(1, max(1, len(plots)), squeeze=False)[0]
    for axes, (title, values) in zip(grid, plots.items(), strict=False):
        lines = axes.plot(curves.amounts, values.detach().cpu().T, linewidth=1.3)
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xlabel(f"{curves.transform}, {curves.unit}", fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.set_ylim(0, 1.02 if title.startswith("probability") else None)
    if labels:
        figure.legend(lines, labels, loc="outside right center", fontsize=7, frameon=False)
    return figure
