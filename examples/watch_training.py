"""Figure 4 on CIFAR-10: how a small network's features come about, epoch by epoch.

    python examples/watch_training.py --data cifar10.zip --epochs 12 --out watched

``--data`` is a folder or .zip of ``train|test/CLASS/*.jpg``; without it, ``cifar10_jpeg.zip`` in the folder that the
environment variable ``DECONVVIZ_DATA`` names, or else torchvision's download.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import cifar10
import torch

from deconvviz.evolution import FeatureEvolution
from deconvviz.models import small_zfnet
from deconvviz.plotting import save_figure

LAYERS = ["relu1", "relu2", "relu3", "relu4", "relu5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--looks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 10, 12])
    parser.add_argument("--maps", type=int, default=16, help="random feature maps of each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("watched"), help="folder")
    options = parser.parse_args()
    shared = os.environ.get("DECONVVIZ_DATA")
    data = options.data or (Path(shared, "cifar10_jpeg.zip") if shared else None)
    training, test = cifar10.load(data)

    torch.manual_seed(options.seed)
    model = small_zfnet()
    torch.nn.init.normal_(model.conv1.weight, std=0.01)  # the paper's start: what is seen later was learned
    counts = {layer: model.get_submodule(layer.replace("relu", "conv")).out_channels for layer in LAYERS}
    fmaps = {layer: torch.randperm(count)[: options.maps].tolist() for layer, count in counts.items()}
    file = options.out / f"evolution_seed{options.seed}.npz"
    evolution = FeatureEvolution(LAYERS, fmaps, training[0], options.looks, file=file, batch_size=256)

    def after_epoch(epoch: int) -> None:
        evolution(model, epoch)
        print(f"epoch {epoch}", flush=True)

    cifar10.train(model, training, options.epochs, seed=options.seed, after_epoch=after_epoch)
    figure = evolution.figure(mean=(0.5,) * 3, std=(0.5,) * 3)
    save_figure(figure, file.with_suffix(".png"))
    print(f"error {cifar10.error(model, training):.1f}% train, {cifar10.error(model, test):.1f}% test")
    print(evolution.result)
    for layer in LAYERS:
        likeness = evolution.result.likeness(layer).nanmedian(1).values.tolist()
        print(f"{layer}: median likeness to the look before {' '.join(f'{value:.2f}' for value in likeness)}")


if __name__ == "__main__":
    main()
