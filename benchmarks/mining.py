"""Mining beside the bare loop of the same truncated forward pass, and how its cost grows."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torchvision
from measure import machine, report_peak, side_by_side

from deconvviz import FilterGrid

LAYERS = ["features.2", "features.3", "features.5", "features.7", "features.9", "features.10"]
MODELS = {
    "squeezenet1_0": (["features.5", "features.10"], lambda model, x: model.features[:11](x)),
    "resnet18": (["layer2", "layer3"], lambda model, x: torch.nn.Sequential(*list(model.children())[:7])(x)),
    "vgg16": (["features.15", "features.22"], lambda model, x: model.features[:23](x)),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval()


def photographs(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def against_the_bare_loop(name: str, n: int, batch_size: int = 16) -> None:
    layers, forward = MODELS[name]
    model, images = build(name), photographs(n)

    def bare() -> None:
        with torch.no_grad():
            for part in images.split(batch_size):
                forward(model, part)

    def mined() -> None:
        FilterGrid(model, layers).fit(images, batch_size=batch_size, progress=False)

    seconds = side_by_side({"bare": bare, "mined": mined}, runs=2)
    rates = [n / seconds[key] for key in ("bare", "mined")]
    print(
        f"| {name} | {', '.join(layers)} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f} |",
        flush=True,
    )


def growth() -> None:
    model = build("squeezenet1_0")
    deepest, six = (FilterGrid(model, layers) for layers in (LAYERS[-1], LAYERS))
    print("| images | layers | seconds | ms an image |\n|---|---|---|---|")
    for n, grid in [(100, deepest), (100, six), (300, deepest), (1000, deepest)]:
        data = Repeated(n)
        start = time.perf_counter()
        grid.fit(data, progress=False, batch_size=16)
        seconds = time.perf_counter() - start
        print(f"| {n} | {len(grid.layers)} | {seconds:.1f} | {1000 * seconds / n:.1f} |", flush=True)


class Repeated(torch.utils.data.Dataset):
    """As many images as wanted, from ten in memory."""

    def __init__(self, n: int) -> None:
        self.n, self.images = n, photographs(10)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i % 10].roll(i, -1)


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        grid = FilterGrid(build("squeezenet1_0"), LAYERS[-1])
        report_peak(lambda: grid.fit(Repeated(int(sys.argv[2])), progress=False, batch_size=16))
        return
    print(
        machine(),
        "\n\n| model | layers | bare loop (images/s) | mined (images/s) | ratio |\n|---|---|---|---|---|",
    )
    for name, n in {"squeezenet1_0": 256, "resnet18": 256, "vgg16": 64}.items():
        if len(sys.argv) < 2 or name in sys.argv:
            against_the_bare_loop(name, n)
    if len(sys.argv) < 2 or "growth" in sys.argv:
        print()
        growth()
        from measure import peak_memory

        for n in (100, 300, 1000):
            print(
                f"peak memory above the model's, {n} images: {peak_memory(str(Path(__file__)), 'peak', str(n)):.0f} MiB"
            )


if __name__ == "__main__":
    main()
