"""Numbers over numbers: curves of a sweep (the paper's figure 5), a map's effect over its strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from deconvviz.errors import InvalidInput

if TYPE_CHECKING:
    from deconvviz.evidence import Evidence
    from deconvviz.invariance import InvarianceCurves


def invariance_curves(curves: InvarianceCurves, labels: Sequence[str] | None = None) -> Figure:
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
        marker = "o" if len(curves.amounts) == 1 else None  # a line through one point is not seen
        lines = axes.plot(curves.amounts, values.detach().cpu().T, linewidth=1.3, marker=marker)
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xlabel(f"{curves.transform}, {curves.unit}", fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.set_ylim(0, 1.02 if title.startswith("probability") else None)
    if labels:
        legend = figure.legend(lines, labels, loc="outside right center", fontsize=7, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def evidence_scatter(evidence: Evidence) -> Figure:
    """Draw one point a feature map: right is strong, up speaks for the class, down against it."""
    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    axes = figure.subplots()
    activation, effect = evidence.activation.detach().cpu(), evidence.effect.detach().cpu()
    best, strongest = int(effect.argmax()), evidence.strongest
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.scatter(activation, effect, s=8, color="tab:blue", alpha=0.6, linewidths=0)
    marks = {strongest: f"strongest: map {strongest}", best: f"largest effect: map {best}"}
    if best == strongest:
        marks = {best: f"strongest, largest effect: map {best}"}
    for number, text in marks.items():
        point = float(activation[number]), float(effect[number])
        right = point[0] > float(activation.mean() + activation.max()) / 2
        axes.plot(*point, "o", markersize=6, markerfacecolor="none", markeredgecolor="tab:red")
        offset, side = (-6, "right") if right else (6, "left")
        axes.annotate(text, point, (offset, 5), textcoords="offset points", ha=side, fontsize=7)
    axes.margins(0.08, 0.15)
    axes.set_title(f"{evidence.layer or 'the model'}: maps for class {evidence.target}", fontsize=9, parse_math=False)
    axes.set_xlabel("total activation", fontsize=8)
    axes.set_ylabel("fall of the score when ablated", fontsize=8)
    axes.tick_params(labelsize=7)
    return figure
