"""Mining beside the bare loop of the same truncated forward pass, and how its cost grows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torchvision
from measure import machine, peak_memory, report_peak, side_by_side

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


def images() -> None:
    grid = FilterGrid(build("squeezenet1_0"), LAYERS[-1])
    print("\n| images | seconds | ms an image | peak memory above the model's (MiB) |\n|---|---|---|---|")
    for n in (100, 300, 1000):
        data = Repeated(n)
        start = time.perf_counter()
        grid.fit(data, progress=False, batch_size=16)
        seconds = time.perf_counter() - start
        peak = peak_memory(__file__, "peak", str(n))
        print(f"| {n} | {seconds:.1f} | {1000 * seconds / n:.1f} | {peak:.0f} |", flush=True)


def layers(n: int = 100) -> None:
    model, data = build("squeezenet1_0"), photographs(n)

    def mined(count: int) -> Callable[[], object]:
        return lambda: FilterGrid(model, LAYERS[-count:]).fit(data, batch_size=16, progress=False)

    seconds = side_by_side({str(count): mined(count) for count in range(1, 7)}, runs=3)
    print("\n| layers | ms an image | over the deepest alone |\n|---|---|---|")
    for count, taken in seconds.items():
        print(f"| {count} | {1000 * taken / n:.1f} | {taken / seconds['1']:.2f} |", flush=True)


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
    parts = sys.argv[1:] or [*MODELS, "images", "layers"]
    print(machine())
    print("\n| model | layers | bare loop (images/s) | mined (images/s) | ratio |\n|---|---|---|---|---|")
    for name in (name for name in MODELS if name in parts):
        against_the_bare_loop(name, 64 if name == "vgg16" else 256)
    for growth in (images, layers):
        if growth.__name__ in parts:
            growth()


if __name__ == "__main__":
    main()
