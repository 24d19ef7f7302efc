"""A folder of pictures as a data set, and files told apart without reading all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deconvviz.errors import InvalidInput
from deconvviz.images import load_picture
from deconvviz.mining.archive import hash_of
from deconvviz.models.zoo import Transform

SUFFIXES = (".bmp", ".gif", ".jpg", ".jpeg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp")
GLIMPSE = 4096
"""Bytes that are read of a file's start, middle and end."""


class PictureFolder(Dataset[Any]):
    """The pictures in a folder and its subfolders, by path, as a model's inputs."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor] | None = None) -> None:
        self.root, self.transform = folder, transform or Transform()
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.files:
            raise InvalidInput(f"{folder} holds no picture ({', '.join(SUFFIXES)}), nor do its subfolders")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        return self.transform(load_picture(self.files[number]))


def glimpse(path: Path) -> str:
    """A hash of a file's size and some of its bytes (its time is another in every copy); or why it can't be read."""
    try:
        with path.open("rb") as file:
            size, parts = file.seek(0, os.SEEK_END), b""
            for place in (0, size // 2, max(size - GLIMPSE, 0)):
                file.seek(place)
                parts += file.read(GLIMPSE)
    except OSError as error:
        return type(error).__name__
    return hash_of(size, parts.hex())
