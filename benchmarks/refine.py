"""A refined sweep over photographs against the exact one and plain batching: time, and how alike the maps are.

ImageNet-trained SqueezeNet 1.0, a patch of 32 every 4 pixels, the probability of each photograph's most probable
class. Plain batching takes the same time for every window, so it is timed on some pictures and scaled.

    python benchmarks/refine.py FOLDER [--photographs 20] [--factor 2] [--share 0.2]

FOLDER holds ``squeezenet1_0.pth`` and ``imagenet_sample/*.jpg``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from measure import machine, side_by_side
from skimage.metrics import structural_similarity

from deconvviz import OcclusionSensitivity
from deconvviz.images import load_picture, to_input
from deconvviz.occlusion import Refine

PATCH, STRIDE = 32, 4
BATCHES = (8, 32)


def plain_seconds(model, image) -> float:
    """Of one picture in a batch, at the better batch size, as the model comes."""

    def run(batch):
        with torch.no_grad():
            for _ in range(64 // batch):
                model(image.repeat(batch, 1, 1, 1))

    return min(side_by_side({b: lambda b=b: run(b) for b in BATCHES}, runs=3).values()) / 64


def likeness(found, exact) -> float:
    """The mean structural similarity of two maps, over the exact one's range."""
    found, exact = found.double().numpy(), exact.double().numpy()
    return float(structural_similarity(found, exact, data_range=float(np.ptp(exact)) or 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photographs", type=int, default=20)
    parser.add_argument("--factor", type=int, default=Refine.factor)
    parser.add_argument("--share", type=float, default=Refine.share)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = torchvision.models.squeezenet1_0().eval()
    model.load_state_dict(torch.load(arguments.folder / "squeezenet1_0.pth", weights_only=True))
    pictures = sorted((arguments.folder / "imagenet_sample").glob("*.jpg"))
    chosen = pictures[:: max(1, len(pictures) // arguments.photographs)][: arguments.photographs]
    run = OcclusionSensitivity(model)
    cells, pixels, computed, exact_times, times = [], [], [], [], []
    for path in chosen:
        image = to_input(load_picture(path))[None]
        start = time.perf_counter()
        exact = run.maps(image, PATCH, STRIDE, "features.10")
        middle = time.perf_counter()
        refine = Refine(arguments.factor, arguments.share)
        found = run.maps(image, PATCH, STRIDE, "features.10", refine=refine)
        exact_times.append(middle - start)
        times.append(time.perf_counter() - middle)
        cells.append(likeness(found.score_cells[0, 0], exact.score_cells[0, 0]))
        pixels.append(likeness(found.score_pixels[0, 0], exact.score_pixels[0, 0]))
        computed.append(found.refinements[0].computed.float().mean().item())
    windows = exact.score_cells[0, 0].numel()
    plain = plain_seconds(model, image) * windows
    print(machine(), "\n")
    head = "factor | share | windows | plain (s) | exact (s) | refined (s) | over plain | computed"
    print(f"| {head} | mean SSIM in pixels | least | in cells | least |\n{'|---' * 12}|")
    print(f"| {arguments.factor} | {arguments.share} | {windows} | {plain:.1f} | {np.median(exact_times):.1f} "
          f"| {np.median(times):.2f} | {plain / np.median(times):.1f} | {np.mean(computed):.0%} "
          f"| {np.mean(pixels):.3f} | {np.min(pixels):.3f} | {np.mean(cells):.3f} | {np.min(cells):.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
