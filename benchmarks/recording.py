"""What recording costs the user's own pass: ``model(images)`` with a Deconvnet attached, over without.

python benchmarks/recording.py
"""

from __future__ import annotations

import statistics
import time

import torch
import torchvision
from measure import machine

from deconvviz import Deconvnet

WARM_UP = 3


def main() -> None:
    print(machine(), "\n")
    print("| model | batch | plain (ms) | recorded (ms) | ratio |")
    print("|---|---|---|---|---|")
    for name in ("alexnet", "vgg16", "resnet50"):
        model = torchvision.models.get_model(name, weights=None).eval()
        for batch in (1, 8):
            plain, ours = times(model, torch.randn(batch, 3, 224, 224), runs=15 if batch == 1 else 5)
            print(f"| {name} | {batch} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} |", flush=True)


def times(model: torch.nn.Module, images: torch.Tensor, runs: int) -> list[float]:
    """Median milliseconds of a pass without and with a Deconvnet attached, in turns; attaching is not timed."""

    def seconds() -> float:
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start

    turns = []
    with torch.no_grad():
        for _ in range(WARM_UP + runs):
            plain = seconds()
            with Deconvnet(model):
                turns.append((plain, seconds()))
    return [1000 * statistics.median(column) for column in zip(*turns[WARM_UP:], strict=True)]


if __name__ == "__main__":
    main()
