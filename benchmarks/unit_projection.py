"""Units of VGG16 from their crops, beside captum's loop of one unit at a time."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision
from captum.attr import NeuronDeconvolution
from measure import machine, peak_memory, report_peak

from deconvviz import FilterGrid

LAYERS = {"conv3_3": "features.15", "conv4_3": "features.22", "conv5_3": "features.29"}


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None).eval()


def mined(model: torch.nn.Module, name: str) -> FilterGrid:
    images = torch.randn(24, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return FilterGrid(model, LAYERS[name]).fit(images, batch_size=4, progress=False)


def ours(grid: FilterGrid, name: str, maps: int) -> float:
    """Seconds a unit."""
    layer = grid[LAYERS[name]]
    start = time.perf_counter()
    count = sum(1 for _ in layer.units(range(maps)))
    return (time.perf_counter() - start) / count


def captums(grid: FilterGrid, name: str, units: int = 6) -> float:
    """Seconds a unit, of a loop over a few."""
    layer = grid[LAYERS[name]]
    attribution = NeuronDeconvolution(grid.model, grid.model.get_submodule(LAYERS[name]))
    images = dict(layer.images.images(layer.numbers(0)))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rank in range(units):
            image = images[layer.numbers(0)[rank]][None].clone()
            attribution.attribute(image, (0, *layer.position(0, rank)))
    return (time.perf_counter() - start) / units


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        grid = mined(build(), sys.argv[2])
        report_peak(lambda: ours(grid, sys.argv[2], 256))
        return
    model = build()
    print(machine(), "\n\n| layer | captum (ms a unit) | ours (ms a unit) | times |\n|---|---|---|---|")
    for name, maps in {"conv3_3": 64, "conv4_3": 8, "conv5_3": 12}.items():
        if len(sys.argv) < 2 or name in sys.argv:
            grid = mined(model, name)
            ours(grid, name, 1)
            theirs, seconds = captums(grid, name), ours(grid, name, maps)
            print(
                f"| {name} | {1000 * theirs:.0f} | {1000 * seconds:.1f} | {theirs / seconds:.1f} |",
                flush=True,
            )
    if len(sys.argv) < 2:
        script = str(Path(__file__))
        print(f"\npeak memory of 256 maps x 9 at conv3_3: {peak_memory(script, 'peak', 'conv3_3'):.0f} MiB")


if __name__ == "__main__":
    main()
