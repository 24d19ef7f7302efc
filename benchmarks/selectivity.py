"""Do a map's nine patches agree more than nine patches of other maps? In a deeper layer of the same network.

Run with the folder of real weights and photographs: ``python benchmarks/selectivity.py FOLDER [CHECKPOINT]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from deconvviz import FilterGrid

LAYER, DEEPER = "features.10", 13
SIDE = 112


def vectors(model: torch.nn.Module, patches: list[Tensor]) -> Tensor:
    """The deeper layer's mean activation of each patch, scaled to one size: unit vectors (patches, maps)."""
    scaled = [torch.nn.functional.interpolate(p[None], (SIDE, SIDE), mode="bilinear", antialias=True) for p in patches]
    with torch.no_grad():
        found = torch.cat([model.features[:DEEPER](part).mean((2, 3)) for part in torch.cat(scaled).split(32)])
    found = found - found.mean(0)
    return torch.nn.functional.normalize(found, dim=1)


def agreement(group: Tensor) -> Tensor:
    """Mean similarity of the pairs in each group: (groups, k, maps) to (groups,)."""
    k = group.shape[1]
    return ((group @ group.transpose(1, 2)).sum((1, 2)) - k) / (k * (k - 1))


def main() -> None:
    folder = Path(sys.argv[1])
    model = torchvision.models.squeezenet1_0(weights=None)
    model.load_state_dict(torch.load(folder / "squeezenet1_0.pth", weights_only=True))
    model.eval()
    checkpoint = sys.argv[2] if len(sys.argv) > 2 else None
    if checkpoint and Path(checkpoint).exists():
        grid = FilterGrid.load(checkpoint, model, folder / "imagenet_sample")
    else:
        grid = FilterGrid(model, LAYER).fit(folder / "imagenet_sample", checkpoint=checkpoint, batch_size=16)
    layer = grid[LAYER]
    living = [fmap for fmap in range(len(layer)) if fmap not in set(layer.dead)]
    units = [(number, m, r) for m in living for r, number in enumerate(layer.numbers(m))]
    by_image: dict[int, list[tuple[int, int]]] = {}
    for number, m, r in units:
        by_image.setdefault(number, []).append((m, r))
    patches = {}
    for number, image in layer.images.images(by_image):
        for m, r in by_image[number]:
            (y0, y1), (x0, x1) = layer.box(m, r)
            patches[m, r] = image[:, y0:y1, x0:x1].clone()
    found = vectors(model, [patches[m, r] for _, m, r in units]).view(len(living), layer.strongest.values.shape[1], -1)
    real = agreement(found)
    generator = torch.Generator().manual_seed(0)
    flat, wins, random = found.flatten(0, 1), [], []
    for _ in range(20):
        order = torch.randperm(len(flat), generator=generator)
        drawn = agreement(flat[order].view_as(found))
        random.append(float(drawn.mean()))
        wins.append(float((real > drawn).double().mean()))
    print(f"{LAYER}: {len(living)} living maps of {len(layer)}")
    print(f"mean similarity of two of a map's patches: {real.mean():.3f}, of all maps': {sum(random) / 20:.3f}")
    print(f"a map's own patches agree more: {100 * sum(wins) / len(wins):.1f}% of the maps")


if __name__ == "__main__":
    main()
