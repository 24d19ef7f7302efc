"""Figure 5 for SqueezeNet: docs/images/invariance_*.png.

    python docs/make_invariance.py WEIGHTS PHOTOGRAPHS

``WEIGHTS`` is a state dict of torchvision's ``squeezenet1_0``, ``PHOTOGRAPHS`` a folder with one picture of each
ImageNet class, sorted by class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from deconvviz.images import load_picture, to_input
from deconvviz.invariance import SWEEPS, invariance
from deconvviz.models.zoo import load_model
from deconvviz.plotting import save_figure

LAYERS = ("features.1", "features.12")
LABELS = {621: "lawn mower", 155: "shih-tzu", 88: "macaw", 817: "sports car", 967: "espresso"}


def main() -> None:
    weights, folder = sys.argv[1:]
    model = load_model("squeezenet1_0", weights).model
    paths = sorted(Path(folder).iterdir())
    images = torch.stack([to_input(load_picture(paths[label])) for label in LABELS])
    for transform in SWEEPS:
        curves = invariance(model, images, LAYERS, transform, targets=list(LABELS))
        path = Path(__file__).parent / "images" / f"invariance_{transform}.png"
        save_figure(curves.figure(list(LABELS.values())), path)
        for layer, distances in curves.distances.items():
            first = distances[:, 1 if transform != "translation" else len(curves.amounts) // 2 + 1]
            step, far = (first / distances.max(1).values).mean(), curves.amounts[1] - curves.amounts[0]
            print(f"{transform}: {far:g} {curves.unit} moves {layer} {step:.0%} as far as anything does")


if __name__ == "__main__":
    main()
