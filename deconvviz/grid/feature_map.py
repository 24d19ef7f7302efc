"""What a feature map looks for: its strongest units in a data set, as a result to read or draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from deconvviz.errors import InvalidInput
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD, display_scale, displayable, to_pixels
from deconvviz.inputs import whole_number

Box = tuple[tuple[int, int], ...]
GREY = 128


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """One feature map of a layer and its strongest units, strongest first (paper figure 2)."""

    layer: str
    fmap: int
    values: tuple[float, ...]
    """The units' activations."""
    images: tuple[int, ...]
    """The numbers of their images in the data set, one unit an image."""
    names: tuple[str, ...]
    """The files of the images, or "image 7"."""
    positions: tuple[tuple[int, ...], ...]
    """In map cells, (y, x) for pictures."""
    boxes: tuple[Box, ...]
    """The receptive fields clipped to the image: pixels [first, end) of the model's input along each axis."""
    patches: tuple[Tensor, ...]
    """The boxes' parts of the images (C, h, w), normalised as the model takes them."""
    projections: tuple[Tensor, ...]
    """The boxes' parts of the units' projections (C, h, w); outside its box, a projection is zero."""
    mean: float
    """Mean activation over all images and positions."""
    active: float
    """The share of images that activate the map anywhere, 0..1."""
    histogram: tuple[int, ...]
    """How many images have their strongest value between two of :data:`~deconvviz.mining.strongest.EDGES`."""

    @property
    def dead(self) -> bool:
        """Whether no image activates the map: its units then show nothing."""
        return self.active == 0

    def image(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, cell: int = 96
    ) -> NDArray[np.uint8]:
        """Projections 3 x 3 beside patches 3 x 3 (for k = 9), as pixels (H, W, 3) with cells of one size.

        Args:
            mean, std: those that the images were normalised with.
            cell: the side of a cell in pixels; patches keep their aspect, on grey.

        Raises:
            InvalidInput: a side that is no whole number from 1 on.
        """
        cell = whole_number("cell", cell)
        nothing = np.zeros((0, 0, 3), np.uint8)  # a unit that sees padding alone
        sides = [
            [displayable(p) if p.numel() else nothing for p in self.projections],
            [to_pixels(p, mean, std) if p.numel() else nothing for p in self.patches],
        ]
        count = max(len(self.values), 1)
        columns = int(np.ceil(np.sqrt(count)))
        mosaics = [mosaic(pictures, columns, -(-count // columns), cell) for pictures in sides]
        gap = np.full((len(mosaics[0]), max(cell // 12, 1), 3), 255, np.uint8)
        return np.concatenate([mosaics[0], gap, mosaics[1]], axis=1)

    def scales(self) -> list[float]:
        """What full contrast stands for in each projection."""
        return [display_scale(projection) for projection in self.projections]


def mosaic(
    pictures: Sequence[NDArray[np.uint8]], columns: int, rows: int, cell: int, gap: int = 0
) -> NDArray[np.uint8]:
    """Pictures (h, w, 3) row by row on grey, each fitted into a cell with its aspect kept: (H, W, 3).

    Between cells are ``gap`` white pixels.
    """
    if columns * rows < len(pictures):
        raise InvalidInput(f"{len(pictures)} pictures, expected at most {columns * rows}: give more rows")
    step = cell + gap
    sheet = np.full((rows * step - gap, columns * step - gap, 3), 255 if gap else GREY, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * step, (i % columns) * step
        sheet[y : y + cell, x : x + cell] = fitted(picture, cell)
    return sheet


def fitted(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (h, w, 3) scaled into a grey square; few pixels stay visible as pixels."""
    height, width = picture.shape[:2]
    square = np.full((side, side, 3), GREY, np.uint8)
    if not picture.size:
        return square
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    method = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, method))
    y, x = (side - size[1]) // 2, (side - size[0]) // 2
    square[y : y + size[1], x : x + size[0]] = resized
    return square
