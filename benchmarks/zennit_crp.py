"""Mining beside zennit-crp's ``FeatureVisualization``: the same model, layer and images, in turns.

Both find for each feature map the images where its largest activation is largest. zennit-crp runs the whole
model and a backward pass, since it ranks images by relevance as well; it has no way to leave that out.
zennit-crp is no dependency of the project: ``pip install zennit-crp``.
"""

from __future__ import annotations

import contextlib
import io
import tempfile

import numpy as np
import torch
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization
from measure import machine, side_by_side
from mining import build, photographs
from zennit.composites import EpsilonPlusFlat

from deconvviz import FilterGrid

MODELS = {"squeezenet1_0": "features.10", "resnet18": "layer3"}


class Labelled(torch.utils.data.Dataset):
    """Images in memory, all of class 0."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.images[i], 0


def compare(name: str, n: int = 128, batch_size: int = 16) -> None:
    layer, images = MODELS[name], photographs(n)
    model, same_model = build(name), build(name)
    for parameter in same_model.parameters():
        parameter.requires_grad_(False)
    found: dict[str, set[tuple[int, int]]] = {}

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            visualization = FeatureVisualization(
                CondAttribution(same_model),
                Labelled(images),
                {layer: ChannelConcept()},
                max_target="max",
                abs_norm=False,
                path=folder,
            )
            with contextlib.redirect_stderr(io.StringIO()):
                (files, *_) = visualization.run(EpsilonPlusFlat(), 0, n, batch_size)["a_max"]
            strongest = np.load(files + "data.npy")[:9]
        found["theirs"] = {(c, int(i)) for c, column in enumerate(strongest.T) for i in column}

    def ours() -> None:
        grid = FilterGrid(model, layer).fit(Labelled(images), batch_size=batch_size, progress=False)
        fire = [c for c, count in enumerate(grid.found.layers[0].active.tolist()) if count >= 9]
        found["ours"] = {(c, i) for c in fire for i in grid[layer].numbers(c)}

    seconds = side_by_side({"theirs": theirs, "ours": ours}, runs=2)
    agree = len(found["ours"] & found["theirs"]) / len(found["ours"])
    rates = [n / seconds[key] for key in ("theirs", "ours")]
    print(f"| {name} | {layer} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.1f} | {agree:.1%} |")


def main() -> None:
    print(
        machine(),
        "\n\n| model | layer | zennit-crp (images/s) | ours (images/s) | times | the same nine |\n"
        "|---|---|---|---|---|---|",
    )
    for name in MODELS:
        compare(name)


if __name__ == "__main__":
    main()
