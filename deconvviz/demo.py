"""A page of real features of a real network: SqueezeNet 1.1 on three photographs, nothing downloaded.

For an early, a middle and a late layer the maps that fire hardest are projected from their single strongest
position (paper figure 2), and cut to what that unit can see. The strongest late one is also shown by captum's
methods and by the same network with shuffled weights. Then a patch moves over the photograph (paper figure 7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models import SqueezeNet

from deconvviz.comparison import compare, shuffled_weights
from deconvviz.deconvnet import Deconvnet
from deconvviz.demo_data import demo_labels, demo_model, demo_photographs
from deconvviz.filter_grid import FilterGrid
from deconvviz.images import atomic_write, crop_to_signal, displayable, save_picture, to_input, to_pixels
from deconvviz.occlusion import OcclusionSensitivity
from deconvviz.plotting import METHODS, save_figure

Box = tuple[int, int, int, int]
Position = tuple[int, ...]

STAGES = {"early": 4, "middle": 7, "late": 12}
"""The depth in ``features`` of each stage's layer: fire3, fire5 and fire9."""
UNITS = 4
SIDE = 224
SHORT_SIDES = (224, 336, 448)
TILE = 208
"""Sides in pixels: of the network's input, of the photographs that are cropped, and of the square that a patch is
shown in."""
PATCH, STRIDE = 32, 8
"""Of the occlusion, in pixels."""
PERCENTILE = 98.0
"""Of the magnitudes at full contrast: a unit's few strongest pixels would leave the rest faint."""


@dataclass(frozen=True)
class Unit:
    """One feature map at its strongest position; ``file`` shows the patch and the projection side by side."""

    fmap: int
    position: Position
    """In map cells."""
    box: Box
    """Of the patch, in pixels of the input: y0, y1, x0, x1, ends excluded."""
    file: str


@dataclass(frozen=True)
class Stage:
    """A layer, and the units that fire hardest in it, strongest first."""

    name: str
    layer: str
    units: Sequence[Unit]


@dataclass(frozen=True)
class Photograph:
    """All that the page shows of one photograph; ``file`` is the part of it that the network sees."""

    name: str
    file: str
    labels: Sequence[tuple[str, float]]
    """The most probable classes, likeliest first."""
    stages: Sequence[Stage]
    compared: Unit
    """The unit of the last stage that is shown by every method; ``file`` is its patch."""
    methods: Sequence[tuple[str, str]]
    """The name and the file of each method's picture of it."""
    occlusion: Occlusion


@dataclass(frozen=True)
class Occlusion:
    """Figure 7's row of a photograph: what falls where a patch covers it."""

    file: str
    label: str
    """The most probable class."""
    clean: float
    lowest: float
    """Its probability without a patch, and with the patch at the place that lowers it most."""
    fmap: int
    layer: str


def run_demo(out: str | os.PathLike[str] = "demo_out") -> Path:
    """Write the page and its pictures into the folder ``out``, and print each photograph's labels.

    Returns:
        The path of ``index.html``.

    Raises:
        WeightsError: the ``demo`` extra is not installed.
        PictureError: the folder cannot be written.
    """
    page = Path(out, "index.html")
    html = render_page(show_photographs(page.parent))
    explore_crops(page.parent / "maps")
    with atomic_write(page, [".html"]) as file:
        file.write_text(html, encoding="utf-8")
    return page


def show_photographs(folder: Path) -> list[Photograph]:
    """Write the page's pictures into ``folder``, and print each photograph's labels; raises as the page."""
    model, photographs = demo_model(), demo_photographs()
    shuffled = shuffled_weights(model)
    return [_show(model, shuffled, name, picture, folder) for name, picture in photographs.items()]


def explore_crops(folder: Path) -> None:
    """Write the explorer of a middle layer's maps over crops of the photographs; raises as the page."""
    grid = FilterGrid(demo_model(), f"features.{STAGES['middle']}")
    crops = Crops({name: list(crops_of(picture)) for name, picture in demo_photographs().items()})
    grid.fit(crops, progress=False).explore(folder, control=False, title="SqueezeNet 1.1 over the crops")


class Crops(Dataset[Tensor]):
    """Crops of the photographs as a data set; :attr:`samples` names them."""

    def __init__(self, crops: Mapping[str, Sequence[Image.Image]]) -> None:
        self.samples = [
            (f"{name}, crop {i}", crop) for name, found in crops.items() for i, crop in enumerate(found)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Tensor:
        return to_input(self.samples[number][1], SIDE, SIDE)


def crops_of(picture: Image.Image) -> Iterator[Image.Image]:
    """Square crops of one size, from a picture in three sizes."""
    for short in SHORT_SIDES:
        scale = short / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        for y in range(0, height - SIDE + 1, SIDE // 2):
            for x in range(0, width - SIDE + 1, SIDE // 2):
                yield resized.crop((x, y, x + SIDE, y + SIDE))


def render_page(photographs: Sequence[Photograph]) -> str:
    """The page's HTML; whatever is put in is escaped."""
    environment = Environment(
        loader=PackageLoader("deconvviz"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("demo.html").render(photographs=photographs, side=SIDE)


def strongest_units(activation: Tensor, count: int, apart: int = 2) -> list[tuple[int, Position]]:
    """The maps of an activation (C, H, W) that fire hardest at one position, strongest first.

    Of maps that peak within ``apart`` cells of each other only the strongest is kept, so that the units show
    several things; maps that peak that near the border see the padding, and are left out.

    Returns:
        Up to ``count`` units: the map, and the position (y, x) of its peak.
    """
    peaks, cells = activation.flatten(1).max(dim=1)
    height, width = activation.shape[1:]
    units: list[tuple[int, Position]] = []
    for fmap in peaks.argsort(descending=True).tolist():
        y, x = divmod(int(cells[fmap]), width)
        inside = min(y, x, height - 1 - y, width - 1 - x) >= apart
        if inside and all(max(abs(y - b), abs(x - a)) > apart for _, (b, a) in units):
            units.append((fmap, (y, x)))
    return units[:count]


def _show(
    model: SqueezeNet, shuffled: torch.nn.Module, name: str, picture: Image.Image, folder: Path
) -> Photograph:
    """Compute and save what the page shows of one photograph."""
    image = to_input(picture, SIDE)[None]
    with Deconvnet(model) as deconv, torch.no_grad():
        probabilities, classes = model(image)[0].softmax(0).topk(5)
        stages = [
            _stage(model, deconv, image, stage, depth, f"{name}-{stage}", folder)
            for stage, depth in STAGES.items()
        ]
    names = demo_labels()
    labels = [(names[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]
    print(f"{name}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in labels))
    save_picture(to_pixels(to_input(picture, 2 * SIDE, 2 * 256)), folder / f"{name}.png")

    unit = stages[-1].units[0]
    comparison = compare(model, image, stages[-1].layer, unit.fmap, shuffled)
    patch, methods = f"{name}-patch.png", []
    save_picture(_tile(to_pixels(image[0]), unit.box), folder / patch)
    for title, attribute in METHODS.items():
        file = f"{name}-{attribute}.png".replace("_", "-")
        pixels = displayable(getattr(comparison, attribute), percentile=PERCENTILE)
        save_picture(_tile(pixels, unit.box), folder / file)
        methods.append((title, file))
    compared = Unit(unit.fmap, unit.position, unit.box, patch)
    occlusion = _occlude(model, image, stages[-1].layer, names, folder / f"{name}-occlusion.png")
    return Photograph(name, f"{name}.png", labels, stages, compared, methods, occlusion)


def _occlude(model: SqueezeNet, image: Tensor, layer: str, names: Sequence[str], path: Path) -> Occlusion:
    """Move a patch over a photograph, and draw figure 7's row."""
    maps = OcclusionSensitivity(model).maps(image, PATCH, STRIDE, layer)
    save_figure(maps.figure(0, names), path, dpi=110)
    clean, lowest = float(maps.clean_scores), float(maps.score_cells.min())
    return Occlusion(path.name, names[int(maps.targets)], clean, lowest, int(maps.fmaps), layer)


def _stage(
    model: SqueezeNet, deconv: Deconvnet, image: Tensor, name: str, depth: int, prefix: str, folder: Path
) -> Stage:
    """Project a layer's strongest units, each from its one position, beside what it sees."""
    found = strongest_units(model.features[: depth + 1](image)[0], UNITS)
    projections = deconv.project(f"features.{depth}", [fmap for fmap, _ in found])[0]
    photograph, units = to_pixels(image[0]), []
    for (fmap, position), projection in zip(found, projections, strict=True):
        box = _square(crop_to_signal(projection, margin=2))
        tiles = _tile(photograph, box), _tile(displayable(projection, percentile=PERCENTILE), box)
        unit = Unit(fmap, position, box, f"{prefix}-map{fmap}.png")
        save_picture(np.concatenate(tiles, axis=1), folder / unit.file)
        units.append(unit)
    return Stage(name, f"features.{depth}", units)


def _square(box: Box) -> Box:
    """Grow the shorter side of a box about its middle, moved inside the input."""
    y0, y1, x0, x1 = box
    side = max(y1 - y0, x1 - x0)
    top, left = (min(max((a + b - side) // 2, 0), SIDE - side) for a, b in ((y0, y1), (x0, x1)))
    return top, top + side, left, left + side


def _tile(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """A square part of the input, enlarged to a tile: few pixels stay visible as pixels."""
    y0, y1, x0, x1 = box
    method = Image.Resampling.NEAREST if y1 - y0 < TILE // 4 else Image.Resampling.LANCZOS
    patch = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    return np.asarray(patch.resize((TILE, TILE), method))
