"""What recording costs the user's own pass: ``model(images)`` with a Deconvnet attached, over without.

Processes differ by a third in how fast the same pass runs in them, so each row
is the median of several fresh ones, with the range of their ratios.

    python benchmarks/recording.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
import torchvision
from measure import machine

from deconvviz import Deconvnet

WARM_UP, PROCESSES = 3, 7


def main() -> None:
    if len(sys.argv) > 2:
        name, batch = sys.argv[1], int(sys.argv[2])
        model = torchvision.models.get_model(name, weights=None).eval()
        print(*times(model, torch.randn(batch, 3, 224, 224), runs=25 if batch == 1 else 7))
        return
    print(machine(), "\n")
    print("| model | batch | plain (ms) | recorded (ms) | ratio | lowest and highest |")
    print("|---|---|---|---|---|---|")
    for name in ("alexnet", "vgg16", "resnet50"):
        for batch in (1, 8):
            command = [sys.executable, __file__, name, str(batch)]
            outputs = [subprocess.check_output(command, text=True) for _ in range(PROCESSES)]
            plain, ours = zip(*(map(float, output.split()) for output in outputs), strict=True)
            ratios = [mine / theirs for theirs, mine in zip(plain, ours, strict=True)]
            middle = statistics.median
            print(f"| {name} | {batch} | {middle(plain):.1f} | {middle(ours):.1f} | {middle(ratios):.2f} "
                  f"| {min(ratios):.2f}, {max(ratios):.2f} |", flush=True)  # fmt: skip


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
