"""Every map of a layer over a folder of photographs, from the files to the page: minutes and megabytes.

Run with the folder of real weights and photographs: ``python benchmarks/whole_wall.py FOLDER``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from measure import machine

from deconvviz import FilterGrid

LAYER = "features.10"


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    folder = Path(sys.argv[1])
    model = torchvision.models.squeezenet1_0(weights=None)
    model.load_state_dict(torch.load(folder / "squeezenet1_0.pth", weights_only=True))
    model.eval()
    with tempfile.TemporaryDirectory() as out:
        times = [time.perf_counter()]
        grid = FilterGrid(model, LAYER).fit(folder / "imagenet_sample", batch_size=16, progress=False)
        times.append(time.perf_counter())
        grid.explore(out)
        times.append(time.perf_counter())
        size, photographs = megabytes(Path(out)), megabytes(Path(out, "images"))
    layer = grid[LAYER]
    units = sum(len(layer.numbers(fmap)) for fmap in range(len(layer)))
    print(machine(), "\n")
    print("| images | maps | units | mining (s) | page (s) | minutes | page (MB) | of it photographs |")
    print("|---|---|---|---|---|---|---|---|")
    mining, page = times[1] - times[0], times[2] - times[1]
    print(
        f"| {layer.strongest.seen} | {len(layer)} | {units} | {mining:.0f} | {page:.0f} "
        f"| {(mining + page) / 60:.1f} | {size:.1f} | {photographs:.1f} |"
    )


if __name__ == "__main__":
    main()
