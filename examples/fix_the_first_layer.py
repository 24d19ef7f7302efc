"""The paper's loop on a small net: look at the filters, find what is wrong, change it, look again (section 4.1).

    python examples/fix_the_first_layer.py --data cifar10.zip --epochs 12 --out first_layer

AlexNet's coarse start (a large kernel, stride 4) against ZFNet's (a smaller one, stride 2). Networks are kept in
``--out`` after each epoch, so an interrupted run goes on where it was; the kernels of both are drawn there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cifar10
import torch

from deconvviz.diagnostics import diagnose
from deconvviz.models import small_alexnet, small_zfnet
from deconvviz.plotting import save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder or .zip; default: torchvision's download")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("first_layer"))
    options = parser.parse_args()
    training, test = cifar10.load(options.data)
    for name, build in (("before", small_alexnet), ("after", small_zfnet)):
        for seed in options.seeds:
            torch.manual_seed(seed)
            model = build(len(training[1].unique()))
            torch.nn.init.normal_(model.conv1.weight, std=0.01)  # the paper's: what is seen later was learned
            path = options.out / f"{name}_seed{seed}.pth"
            cifar10.train(model, training, options.epochs, seed=seed, file=path)
            diagnosis = diagnose(model, test[0][:512])
            save_figure(diagnosis.figure("conv1"), path.with_suffix(".png"))
            train_error, test_error = cifar10.error(model, training), cifar10.error(model, test)
            print(f"{name}, seed {seed}: error {train_error:.1f}% train, {test_error:.1f}% test\n{diagnosis}\n")


if __name__ == "__main__":
    main()
