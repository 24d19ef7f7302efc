"""What the transfer examples share: labelled pictures of any source, so many a class, as a model takes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets

from deconvviz.errors import InvalidInput
from deconvviz.images import load_picture, to_input
from deconvviz.mining.archive import hash_of

VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


class Pictures(Dataset):
    """Pictures (3, size, size), greyscale as RGB, with labels: numbers of classes (N,), or for VOC 0 and 1 (N, 20)."""

    def __init__(self, source: Sequence[Any], labels: Tensor, classes: list[str], size: int) -> None:
        self.source, self.labels, self.classes, self.size = source, labels, classes, size

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """A hash of the classes, all labels and eight of the pictures."""
        some = [self[i * len(self) // 8][0] for i in range(8)]
        return hash_of(self.classes, self.labels, *some)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.source[index][0]
        picture = picture if isinstance(picture, Image.Image) else load_picture(picture)
        return to_input(picture, self.size, round(self.size * 8 / 7)), self.labels[index]


def load(name: str, root: Path, size: int, download: bool = False) -> tuple[Pictures, Pictures | None]:
    """A data set, and its own test part if it has one.

    ``name``: ``"caltech101"``, ``"caltech256"`` or ``"voc2012"`` as torchvision lays them out under ``root``, or
    ``"folder"`` with one folder of pictures a class.

    Raises:
        InvalidInput: there is no such data set, or not there.
    """
    try:
        if name == "voc2012":
            return tuple(_voc(root, part, size, download) for part in ("train", "val"))
        if name == "folder":
            found = datasets.ImageFolder(root, loader=load_picture)
            return Pictures(found, torch.tensor(found.targets), found.classes, size), None
        if name not in ("caltech101", "caltech256"):
            raise InvalidInput(f"no data set {name!r}; expected caltech101, caltech256, voc2012 or folder")
        found = (datasets.Caltech101 if name == "caltech101" else datasets.Caltech256)(root, download=download)
        return Pictures(found, torch.tensor(found.y), found.categories, size), None
    except (OSError, RuntimeError) as error:  # what torchvision raises where data is missing
        remedy = "one folder of pictures a class" if name == "folder" else "it as torchvision keeps it; or --download"
        raise InvalidInput(f"{root} does not hold {name} ({error}); expected {remedy}") from error


def _voc(root: Path, part: str, size: int, download: bool) -> Pictures:
    found = datasets.VOCDetection(root, "2012", part, download)
    names = [{thing.findtext("name") for thing in ElementTree.parse(path).iter("object")} for path in found.annotations]
    labels = torch.tensor([[float(kind in present) for kind in VOC_CLASSES] for present in names])
    return Pictures(found, labels, VOC_CLASSES, size)


def split(data: Pictures, per_class: int | None, test_per_class: int = 50, seed: int = 0) -> tuple[Subset, Subset]:
    """``per_class`` random pictures of each class to train on (``None``: four of five), others to test."""
    of_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(data.labels.tolist()):
        of_class[label].append(index)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label, found in sorted(of_class.items()):
        count = len(found) * 4 // 5 if per_class is None else per_class
        if len(found) <= count:
            name = data.classes[label]
            raise InvalidInput(
                f"class {name!r} has {len(found)} pictures; expected more than {count}: lower --per-class"
            )
        order = [found[i] for i in torch.randperm(len(found), generator=generator)]
        train += order[:count]
        test += order[count : count + test_per_class]
    return Subset(data, train), Subset(data, test)


def batches(data: Dataset, size: int = 32, seed: int | None = None) -> DataLoader:
    """Batches, shuffled by ``seed`` if one is given."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, size, shuffle=seed is not None, generator=generator)
