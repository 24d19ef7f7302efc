"""What recording costs the user's own pass: ``model(images)`` with a Deconvnet attached, over without.

python benchmarks/recording.py
"""

from __future__ import annotations

import torch
import torchvision
from measure import machine, side_by_side

from deconvviz import Deconvnet


def main() -> None:
    print(machine(), "\n")
    print("| model | batch | plain (ms) | recorded (ms) | ratio |")
    print("|---|---|---|---|---|")
    for name in ("alexnet", "vgg16", "resnet50"):
        model = torchvision.models.get_model(name, weights=None).eval()
        for batch in (1, 8):
            images = torch.randn(batch, 3, 224, 224)

            def recorded(model=model, images=images):
                with Deconvnet(model):
                    model(images)

            with torch.no_grad():
                times = side_by_side(
                    {"plain": lambda m=model, i=images: m(i), "recorded": recorded},
                    runs=15 if batch == 1 else 5,
                    warm_up=3,
                )
            plain, ours = (1000 * times[k] for k in ("plain", "recorded"))
            print(f"| {name} | {batch} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
