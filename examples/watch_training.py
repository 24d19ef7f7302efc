"""Figure 4 on CIFAR-10: how a small network's features come about, epoch by epoch.

    python examples/watch_training.py --data cifar10.zip --epochs 12 --out watched

The network and what was seen of it are kept in ``--out`` after each epoch, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cifar10
import torch

from deconvviz.errors import CheckpointError
from deconvviz.evolution import FeatureEvolution
from deconvviz.models import small_zfnet
from deconvviz.plotting import save_figure

LAYERS = ["relu1", "relu2", "relu3", "relu4", "relu5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder or .zip; default: torchvision's download")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--looks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 10, 12])
    parser.add_argument("--maps", type=int, default=16, help="random feature maps of each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("watched"), help="folder")
    options = parser.parse_args()
    training, test = cifar10.load(options.data)

    torch.manual_seed(options.seed)
    model = small_zfnet(len(training[1].unique()))
    torch.nn.init.normal_(model.conv1.weight, std=0.01)  # the paper's start: what is seen later was learned
    counts = {layer: model.get_submodule(layer.replace("relu", "conv")).out_channels for layer in LAYERS}
    fmaps = {layer: torch.randperm(count)[: options.maps].tolist() for layer, count in counts.items()}
    kept, file = (options.out / f"seed{options.seed}{suffix}" for suffix in (".pth", ".npz"))
    run = f"seed {options.seed}, {options.epochs} epochs"
    evolution = FeatureEvolution(LAYERS, fmaps, training[0], options.looks, file=file, run=run, batch_size=256)

    def after_epoch(epoch: int) -> None:
        evolution(model, epoch)
        print(f"epoch {epoch}", flush=True)

    cifar10.train(model, training, options.epochs, seed=options.seed, after_epoch=after_epoch, file=kept)
    seen = evolution.result.epochs if file.exists() else ()
    if missed := [epoch for epoch in options.looks if epoch <= options.epochs and epoch not in seen]:
        raise CheckpointError(
            f"the training in {kept} is past epochs {missed}, which {file} has not seen; expected both of one run: "
            "delete both to start afresh"
        )
    figure = evolution.figure(mean=(0.5,) * 3, std=(0.5,) * 3)
    save_figure(figure, file.with_suffix(".png"))
    print(f"error {cifar10.error(model, training):.1f}% train, {cifar10.error(model, test):.1f}% test")
    print(evolution.result)
    for layer in LAYERS:
        likeness = evolution.result.likeness(layer).nanmedian(1).values.tolist()
        print(f"{layer}: median likeness to the look before {' '.join(f'{value:.2f}' for value in likeness)}")


if __name__ == "__main__":
    main()
