"""Sprite sheets: a map's tiles in blocks side by side, and many maps' blocks on a wall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deconvviz.errors import InvalidInput
from deconvviz.grid.feature_map import GREY, fitted

WALL_SIDE = 8
"""Maps along each side of a wall's sheet."""
PERCENTILE = 99.0
"""Of a projection's magnitudes, shown at full contrast: in a small tile few pixels would leave the rest faint."""


@dataclass(frozen=True)
class Sizes:
    """In pixels, and JPEG's quality (1 to 95): what the folder's size depends on."""

    tile: int = 64
    thumbnail: int = 96
    """The side of a whole map on the wall."""
    photograph: int = 144
    """The longer side."""
    quality: int = 65

    def __post_init__(self) -> None:
        if min(self.tile, self.thumbnail, self.photograph) < 1 or not 1 <= self.quality <= 95:
            raise InvalidInput(f"the sizes are {self}; expected 1 pixel or more, and a quality of 1 to 95")


class MapSheet:
    """A map's units as tiles, in blocks (projections, patches, shuffled weights) side by side.

    A block is square-ish: 3 x 3 for nine units, row by row, the strongest first. Empty tiles are grey.
    """

    def __init__(self, k: int, blocks: int, sizes: Sizes) -> None:
        self.columns = math.ceil(math.sqrt(k))
        self.rows, self.side = math.ceil(k / self.columns), sizes.tile
        shape = self.rows * self.side, blocks * self.columns * self.side, 3
        self.pixels: NDArray[np.uint8] = np.full(shape, GREY, np.uint8)

    def put(self, block: int, rank: int, picture: NDArray[np.uint8]) -> None:
        """Draw a tile: pixels (h, w, 3)."""
        y, x = divmod(rank, self.columns)
        x += block * self.columns
        y, x = y * self.side, x * self.side
        self.pixels[y : y + self.side, x : x + self.side] = fitted(picture, self.side)

    def block(self, number: int) -> NDArray[np.uint8]:
        """One block's pixels."""
        width = self.columns * self.side
        return self.pixels[:, number * width : (number + 1) * width]

    def picture(self) -> Image.Image:
        """All blocks."""
        return Image.fromarray(self.pixels)


def wall_of(blocks: Sequence[NDArray[np.uint8]], thumbnail: int) -> Image.Image:
    """Up to 64 maps' blocks, reduced, in eight rows of eight."""
    side = WALL_SIDE * thumbnail
    wall = Image.new("RGB", (side, side), (GREY,) * 3)
    for i, block in enumerate(blocks):
        y, x = divmod(i, WALL_SIDE)
        small = Image.fromarray(np.ascontiguousarray(block)).resize((thumbnail, thumbnail), Image.Resampling.LANCZOS)
        wall.paste(small, (x * thumbnail, y * thumbnail))
    return wall
