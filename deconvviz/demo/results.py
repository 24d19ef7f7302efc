"""What the demo computes of a photograph: pixels and numbers, no files.

For an early, a middle and a late layer the maps that fire hardest are projected from their single strongest position
(paper figure 2), and cut to what that unit can see. The strongest late one is also shown by captum's methods and by
the same network with shuffled weights. Then a patch moves over the photograph (paper figure 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.models import SqueezeNet

from deconvviz.comparison import compare, shuffled_weights
from deconvviz.deconvnet import Deconvnet
from deconvviz.demo.data import demo_labels, demo_model, demo_photographs
from deconvviz.images import crop_to_signal, displayable, to_input, to_pixels
from deconvviz.occlusion import OcclusionSensitivity
from deconvviz.occlusion.maps import OcclusionMaps
from deconvviz.plotting import METHODS

Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]
Position = tuple[int, ...]

STAGES = {"early": 4, "middle": 7, "late": 12}
"""The depth in ``features`` of each stage's layer: fire3, fire5 and fire9."""
UNITS = 4
SIDE = 224
TILE = 208
"""Sides in pixels: of the network's input, and of the square that a patch is shown in."""
PATCH, STRIDE = 32, 8
"""Of the occlusion, in pixels."""
PERCENTILE = 98.0
"""Of the magnitudes at full contrast: a unit's few strongest pixels would leave the rest faint."""


@dataclass(frozen=True, eq=False)
class Unit:
    """One feature map at its strongest position."""

    fmap: int
    position: Position
    """In map cells."""
    box: Box
    """Of the patch, in pixels of the input: y0, y1, x0, x1, ends excluded."""
    patch: Pixels
    """(TILE, TILE, 3)."""
    projection: Pixels
    """(TILE, TILE, 3), of the same box."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer, and the units that fire hardest in it, strongest first."""

    name: str
    layer: str
    units: Sequence[Unit]


class Method(NamedTuple):
    """One way to show a unit."""

    title: str
    name: str
    pixels: Pixels
    """(TILE, TILE, 3)."""


@dataclass(frozen=True, eq=False)
class Photograph:
    """All that the demo shows of one photograph."""

    name: str
    pixels: Pixels
    """The part of it that the network sees, at twice the size."""
    labels: Sequence[tuple[str, float]]
    """The most probable classes, likeliest first, and their probabilities."""
    stages: Sequence[Stage]
    methods: Sequence[Method]
    """:attr:`compared` by every method."""
    occlusion: OcclusionMaps
    """Of the last stage's layer and the most probable class."""

    @property
    def compared(self) -> Unit:
        """The strongest unit of the last stage."""
        return self.stages[-1].units[0]


def photographs() -> Iterator[Photograph]:
    """The demo's photographs one by one; raises :class:`WeightsError` if the ``demo`` extra is not installed."""
    model, pictures = demo_model(), demo_photographs()
    shuffled = shuffled_weights(model)
    for name, picture in pictures.items():
        yield _photograph(model, shuffled, name, picture)


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


def _photograph(model: SqueezeNet, shuffled: nn.Module, name: str, picture: Image.Image) -> Photograph:
    image = to_input(picture, SIDE)[None]
    with Deconvnet(model) as deconv, torch.no_grad():
        probabilities, classes = model(image)[0].softmax(0).topk(5)
        stages = [_stage(model, deconv, image, stage, depth) for stage, depth in STAGES.items()]
    names, late = demo_labels(), stages[-1]
    comparison = compare(model, image, late.layer, late.units[0].fmap, shuffled)
    return Photograph(
        name,
        to_pixels(to_input(picture, 2 * SIDE, 2 * 256)),
        [(names[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)],
        stages,
        [
            Method(title, attribute, _projection(getattr(comparison, attribute), late.units[0].box))
            for title, attribute in METHODS.items()
        ],
        OcclusionSensitivity(model).maps(image, PATCH, STRIDE, late.layer),
    )


def _stage(model: SqueezeNet, deconv: Deconvnet, image: Tensor, name: str, depth: int) -> Stage:
    """Project a layer's strongest units, each from its one position, beside what it sees."""
    found = strongest_units(model.features[: depth + 1](image)[0], UNITS)
    projections = deconv.project(f"features.{depth}", [fmap for fmap, _ in found])[0]
    pixels, units = to_pixels(image[0]), []
    for (fmap, position), projection in zip(found, projections, strict=True):
        box = _square(crop_to_signal(projection, margin=2))
        units.append(Unit(fmap, position, box, _tile(pixels, box), _projection(projection, box)))
    return Stage(name, f"features.{depth}", units)


def _square(box: Box) -> Box:
    """Grow the shorter side of a box about its middle, moved inside the input."""
    y0, y1, x0, x1 = box
    side = max(y1 - y0, x1 - x0)
    top, left = (min(max((a + b - side) // 2, 0), SIDE - side) for a, b in ((y0, y1), (x0, x1)))
    return top, top + side, left, left + side


def _projection(signal: Tensor, box: Box) -> Pixels:
    return _tile(displayable(signal, percentile=PERCENTILE), box)


def _tile(pixels: Pixels, box: Box) -> Pixels:
    """A square part of the input, enlarged to a tile: few pixels stay visible as pixels."""
    y0, y1, x0, x1 = box
    method = Image.Resampling.NEAREST if y1 - y0 < TILE // 4 else Image.Resampling.LANCZOS
    patch = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    return np.asarray(patch.resize((TILE, TILE), method))
