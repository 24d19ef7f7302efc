"""A page of real features of a real network: SqueezeNet 1.1 on three photographs, nothing downloaded.

Here the page is written: pictures, HTML, and an explorer of a middle layer's maps over crops of the photographs.
:mod:`~deconvviz.demo.results` computes what it shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deconvviz.demo.data import demo_labels, demo_model, demo_photographs
from deconvviz.demo.results import SIDE, STAGES, Photograph, Pixels, photographs
from deconvviz.filter_grid import FilterGrid
from deconvviz.images import atomic_write, save_picture, to_input
from deconvviz.plotting import save_figure
from deconvviz.templates import render

SHORT_SIDES = (224, 336, 448)
"""Of the photographs that are cropped, in pixels."""


def run_demo(out: str | os.PathLike[str] = "demo_out") -> Path:
    """Write the page and its pictures into the folder ``out``, and print each photograph's labels.

    Returns:
        The path of ``index.html``.

    Raises:
        WeightsError: the ``demo`` extra is not installed.
        PictureError: the folder cannot be written.
    """
    page, shown = Path(out, "index.html"), []
    for photograph in photographs():
        labels = ", ".join(f"{label} {probability:.1%}" for label, probability in photograph.labels)
        print(f"{photograph.name}: {labels}")
        for name, pixels in pictures_of(photograph):
            save_picture(pixels, page.parent / name)
        row = photograph.occlusion.figure(0, demo_labels())
        save_figure(row, page.parent / file_of(photograph.name, "occlusion"), dpi=110)
        shown.append(photograph)
    explore_crops(page.parent / "maps")
    with atomic_write(page, [".html"]) as file:
        file.write_text(render_page(shown), encoding="utf-8")
    return page


def file_of(*parts: str) -> str:
    """The name of the file that shows a photograph, or a part of what was found in it."""
    return f"{'-'.join(parts).replace('_', '-')}.png"


def pictures_of(photograph: Photograph) -> Iterator[tuple[str, Pixels]]:
    """The pictures that the page shows of a photograph, but figure 7's row: the file's name, and the pixels."""
    yield file_of(photograph.name), photograph.pixels
    for stage in photograph.stages:
        for unit in stage.units:
            pair = np.concatenate([unit.patch, unit.projection], axis=1)
            yield file_of(photograph.name, stage.name, f"map{unit.fmap}"), pair
    yield file_of(photograph.name, "patch"), photograph.compared.patch
    for method in photograph.methods:
        yield file_of(photograph.name, method.name), method.pixels


def render_page(shown: Sequence[Photograph]) -> str:
    """The page's HTML; whatever is put in is escaped."""
    return render("demo.html", photographs=shown, side=SIDE, file_of=file_of)


def explore_crops(folder: Path) -> None:
    """Write the explorer of a middle layer's maps over crops of the photographs; raises as the page."""
    grid = FilterGrid(demo_model(), f"features.{STAGES['middle']}")
    crops = Crops({name: list(crops_of(picture)) for name, picture in demo_photographs().items()})
    grid.fit(crops, progress=False).explore(
        folder, control=False, title="SqueezeNet 1.1 over the crops", progress=False
    )


class Crops(Dataset[Tensor]):
    """Crops of the photographs as a data set; :attr:`samples` names them."""

    def __init__(self, crops: Mapping[str, Sequence[Image.Image]]) -> None:
        self.samples = [(f"{name}, crop {i}", crop) for name, found in crops.items() for i, crop in enumerate(found)]

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
