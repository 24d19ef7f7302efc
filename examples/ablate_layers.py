"""Table 3's ablations on a small ZFNet: what does each removed layer cost?

    python examples/ablate_layers.py --data cifar10.zip --epochs 12 --seeds 0 1 2 --out ablations

Networks are trained one by one and kept in ``--out`` after each epoch, so an interrupted run goes on where it was.
Printed: errors of each network, and of each variant their mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cifar10
import torch

from deconvviz.models import small_zfnet

VARIANTS = {
    "base": {},
    "without conv 3,4": {"without": ("conv3", "conv4")},
    "without fc 7": {"without": ("fc7",)},
    "without fc 6,7": {"without": ("fc6", "fc7")},
    "without conv 3,4, fc 6,7": {"without": ("conv3", "conv4", "fc6", "fc7")},
    "fc 128": {"fc": 128},
    "fc 512": {"fc": 512},
    "conv 3,4,5 = 128,256,128": {"conv345": (128, 256, 128)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder or .zip; default: torchvision's download")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dropout", type=float, default=0.5, help="after fc 6 and fc 7; 0 for none")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("ablations"), help="folder")
    options = parser.parse_args()
    training, test = cifar10.load(options.data)
    for name in options.variants:
        errors = []
        for seed in options.seeds:
            torch.manual_seed(seed)
            model = small_zfnet(len(training[1].unique()), **VARIANTS[name])
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = options.dropout
            file = options.out / f"{name} seed {seed}.pth"
            cifar10.train(model, training, options.epochs, seed=seed, file=file)
            errors.append([cifar10.error(model, training), cifar10.error(model, test)])
            print(
                f"{name}, seed {seed}: error {errors[-1][0]:.1f}% train, {errors[-1][1]:.1f}% test",
                flush=True,
            )
        if len(errors) > 1:
            std, mean = torch.std_mean(torch.tensor(errors), 0)
            train_error, test_error = (f"{m:.1f} ± {s:.1f}%" for m, s in zip(mean, std, strict=True))
            print(f"{name}, {len(errors)} seeds: error {train_error} train, {test_error} test", flush=True)


if __name__ == "__main__":
    main()
