"""Write docs/sanity_check.md: how much of a projection survives when every weight is shuffled.

    python docs/make_sanity_check.py WEIGHTS PHOTOGRAPHS

``WEIGHTS`` is a state dict of torchvision's ``squeezenet1_0``, ``PHOTOGRAPHS`` a folder of pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvviz import Deconvnet
from deconvviz.comparison import shuffled_weights
from deconvviz.images import load_picture, to_input
from deconvviz.models.zoo import load_model

LAYERS = ("features.5", "features.10")
PICTURES, MAPS = 10, 5

HEADER = """# Sanity check: what survives when the weights are shuffled

A picture that stays the same when the network has learned nothing shows the picture, not the network
(Adebayo et al. 2018; for the deconvnet, Nie et al. 2018). So: take a unit, project it, shuffle the entries
of every parameter, and project the same unit of the same photograph again. The correlation of the two, over
the pixels that either reaches, is 1 if learning made no difference and 0 if it made all of it. Beside it
stands the correlation with *another* map of the trained network at the same position (the next strongest).

{units} units: SqueezeNet 1.0 trained on ImageNet, {pictures} photographs, the {maps} strongest maps of each
of {layers}, each at its strongest position.

| layer | units | shuffled: mean | median | 10% to 90% | absolute values | another map: mean | absolute values |
|---|---|---|---|---|---|---|---|
"""

FOOTER = """
How to read it:

- *Shuffled* is what architecture and switches give without any learning. Above zero, part of what a
  projection shows would be there in an untrained network too; the rest comes from the weights.
- *Another map* is what two units at one place share. Near one, the projections of the strongest maps there
  hardly differ: the picture then says what the network passes on *at that place* more than what sets this
  map apart (Mahendran & Vedaldi 2016 find the same: the deconvnet is less selective for the neuron than it
  looks). Compare maps at the places where each is strongest, and look at several pictures of each.

So a projection is shown beside its shuffled one, and is evidence of what a unit responds to, not of why a
class was chosen.

Made by `python docs/make_sanity_check.py WEIGHTS PHOTOGRAPHS` (torch {torch}, shuffling seed 0).
"""


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over the pixels where either is not zero."""
    alive = (a != 0) | (b != 0)
    return float(np.corrcoef(a[alive].numpy(), b[alive].numpy())[0, 1])


def measure(model: torch.nn.Module, images: Tensor) -> dict[str, list[tuple[float, float, float, float]]]:
    """For each layer and unit: correlations (signed, absolute) with shuffled weights and with another map."""
    trained, shuffled = Deconvnet(model), Deconvnet(shuffled_weights(model))
    rows: dict[str, list[tuple[float, float, float, float]]] = {layer: [] for layer in LAYERS}
    for image in images.split(1):
        for layer in LAYERS:
            maps = trained.strongest(layer, MAPS + 1, inputs=image)[0].tolist()
            for fmap, other in zip(maps[:-1], maps[1:], strict=True):
                (place,) = trained.strongest_position(layer, fmap, inputs=image)
                options = {"inputs": image, "position": place, "seed": "one"}
                unit, another = trained.project(layer, [fmap, other], **options)[0]
                random = shuffled.project(layer, fmap, **options)[0]
                rows[layer].append(
                    (
                        correlation(unit, random),
                        correlation(unit.abs(), random.abs()),
                        correlation(unit, another),
                        correlation(unit.abs(), another.abs()),
                    )
                )
    return rows


def main() -> None:
    weights, folder = sys.argv[1:]
    model = load_model("squeezenet1_0", weights).model
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    images = torch.stack([to_input(load_picture(path)) for path in paths[:: len(paths) // PICTURES][:PICTURES]])
    rows = measure(model, images)
    text = HEADER.format(units=sum(map(len, rows.values())), pictures=PICTURES, maps=MAPS, layers=" and ".join(LAYERS))
    for layer, found in rows.items():
        signed, absolute, other, other_absolute = np.array(found).T
        low, high = np.quantile(signed, [0.1, 0.9])
        text += (
            f"| {layer} | {len(found)} | {signed.mean():.3f} | {np.median(signed):.3f} "
            f"| {low:.3f} to {high:.3f} | {absolute.mean():.3f} | {other.mean():.3f} | {other_absolute.mean():.3f} |\n"
        )
    text += FOOTER.format(torch=torch.__version__)
    Path(__file__).with_name("sanity_check.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
