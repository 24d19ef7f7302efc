"""Table 3's ablations on a small ZFNet: what does each removed layer cost?

    python examples/ablate_layers.py --data cifar10.zip --epochs 10 --out ablations.json

Networks are trained one by one; finished ones are kept in ``--out``, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
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
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("ablations.json"))
    options = parser.parse_args()
    training, test = cifar10.load(options.data)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in options.seeds:
        for name in options.variants:
            key = f"{name} | seed {seed} | {options.epochs} epochs"
            if key not in results:
                start = time.perf_counter()
                torch.manual_seed(seed)
                model = cifar10.train(small_zfnet(**VARIANTS[name]), training, options.epochs, seed=seed)
                errors = [cifar10.error(model, training), cifar10.error(model, test)]
                results[key] = [*errors, time.perf_counter() - start]
                options.out.write_text(json.dumps(results, indent=1))
            train_error, test_error, seconds = results[key]
            print(
                f"{key}: error {train_error:.1f}% train, {test_error:.1f}% test ({seconds:.0f} s)", flush=True
            )


if __name__ == "__main__":
    main()
