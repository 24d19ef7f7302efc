"""What the training examples share: CIFAR-10 as tensors, the paper's training, accuracy.

The data is a folder or a .zip with ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, or, without one, torchvision's
download. Images are (N, 3, 32, 32) in -1..1.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from deconvviz.errors import InvalidInput

Split = tuple[Tensor, Tensor]


def load(data: Path | None) -> tuple[Split, Split]:
    """The training and the test split, each as (images, labels)."""
    if data is None:
        sets = [torchvision.datasets.CIFAR10("cifar10", train, download=True) for train in (True, False)]
        return tuple((_normalised(s.data), torch.tensor(s.targets)) for s in sets)
    return _split(data, "train"), _split(data, "test")


def _split(data: Path, name: str) -> Split:
    pictures = [(label, np.asarray(picture)) for label, picture in _pictures(data, name)]
    if not pictures:
        raise InvalidInput(f"{data} has no {name}/CLASS/*.jpg")
    classes = sorted({label for label, _ in pictures})
    labels = torch.tensor([classes.index(label) for label, _ in pictures])
    return _normalised(np.stack([picture for _, picture in pictures])), labels


def _pictures(data: Path, split: str) -> Iterator[tuple[str, Image.Image]]:
    if data.is_dir():
        for path in sorted(data.glob(f"{split}/*/*.jpg")):
            yield path.parent.name, Image.open(path).convert("RGB")
        return
    with zipfile.ZipFile(data) as archive:
        for name in sorted(archive.namelist()):
            parts = Path(name).parts
            if name.endswith(".jpg") and parts[-3] == split:
                yield parts[-2], Image.open(io.BytesIO(archive.read(name))).convert("RGB")


def _normalised(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    lr: float = 0.01,
    seed: int = 0,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> nn.Module:
    """Train as the paper does: SGD, batches of 128, momentum 0.9; ours: flips, and a falling learning rate."""
    images, labels = split
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * lr, steps)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(images)).split(128):
            flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
            pixels = torch.where(flipped, images[batch].flip(3), images[batch])
            loss = nn.functional.cross_entropy(model(pixels), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        after_epoch(epoch)
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, split: Split, top: int = 1) -> float:
    """The share in percent whose label is not among the ``top`` most probable."""
    model.eval()
    images, labels = split
    best = torch.cat([model(batch).topk(top).indices for batch in images.split(512)])
    return 100 * (best != labels[:, None]).all(1).float().mean().item()
