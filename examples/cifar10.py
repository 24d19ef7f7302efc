"""What the training examples share: CIFAR-10 as tensors, the paper's training, accuracy.

The data is a folder or a .zip with ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``; without one, ``cifar10_jpeg.zip`` in
the folder that the environment variable ``DECONVVIZ_DATA`` names, or else torchvision's download. Images are
(N, 3, 32, 32) in -1..1.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from checkpoint import Checkpoint, network
from PIL import Image
from torch import Tensor, nn

from deconvviz.errors import InvalidInput
from deconvviz.mining.archive import hash_of

Split = tuple[Tensor, Tensor]


def load(data: Path | None) -> tuple[Split, Split]:
    """The training and the test split, each as (images, labels).

    Raises:
        InvalidInput: there is no such file or folder, or it does not hold the two splits with the same classes.
    """
    folder = os.environ.get("DECONVVIZ_DATA")
    if data is None and folder:
        data = Path(folder, "cifar10_jpeg.zip")
    if data is None:
        sets = [torchvision.datasets.CIFAR10("cifar10", train, download=True) for train in (True, False)]
        return tuple((_normalised(s.data), torch.tensor(s.targets)) for s in sets)
    (training, classes), (test, others) = _split(data, "train"), _split(data, "test")
    if classes != others:
        raise InvalidInput(f"{data} has test classes {others}; expected those of training, {classes}")
    return training, test


def _split(data: Path, name: str) -> tuple[Split, list[str]]:
    """The split and the names of its classes."""
    found = [(label, _pixels(file, f"{data}, {path}")) for label, path, file in _files(data, name)]
    if not found:
        raise InvalidInput(f"{data} has no {name}/CLASS/*.jpg")
    classes = sorted({label for label, _ in found})
    labels = torch.tensor([classes.index(label) for label, _ in found])
    return (_normalised(np.stack([pixels for _, pixels in found])), labels), classes


def _files(data: Path, split: str) -> Iterator[tuple[str, str, Path | io.BytesIO]]:
    """Of each picture the class, the path, and the file itself."""
    if data.is_dir():
        for path in sorted(data.glob(f"{split}/*/*.jpg")):
            yield path.parent.name, str(path.relative_to(data)), path
    elif zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            for name in sorted(archive.namelist()):
                *_, folder, label, file = ["", "", *Path(name).parts]
                if file.endswith(".jpg") and folder == split:
                    yield label, name, io.BytesIO(archive.read(name))
    else:
        raise InvalidInput(f"{data} is no folder and no .zip; expected train|test/CLASS/*.jpg in one of these")


def _pixels(file: Path | io.BytesIO, name: str) -> np.ndarray:
    """(32, 32, 3)."""
    try:
        pixels = np.asarray(Image.open(file).convert("RGB"))
    except OSError as error:
        raise InvalidInput(f"{name} is no picture ({error}): download the data again") from error
    if pixels.shape != (32, 32, 3):
        height, width = pixels.shape[:2]
        raise InvalidInput(f"{name} has {width} x {height} pixels; expected 32 x 32: resize the pictures")
    return pixels


def _normalised(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    lr: float = 0.01,
    seed: int = 0,
    after_epoch: Callable[[int], object] = lambda epoch: None,
    file: Path | None = None,
) -> nn.Module:
    """Train as the paper does: SGD, batches of 128, momentum 0.9; ours: flips, and a falling learning rate.

    Args:
        model: trained in place, and returned in eval mode.
        split: images (N, C, H, W) and labels (N,).
        epochs, lr, seed: settings.
        after_epoch: called with the epoch, from 1.
        file: where the state is kept after each epoch; if it exists, training goes on from there.

    Raises:
        CheckpointError: the file is damaged, or of another network, data or settings.
    """
    images, labels = split
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * lr, steps)
    checkpoint, done = None, 0
    if file is not None:
        about = network(model) | {"data": hash_of(images, labels)}
        checkpoint = Checkpoint(file, about | {"epochs": epochs, "learning rate": lr, "seed": seed})
        if (kept := checkpoint.load()) is not None:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            schedule.load_state_dict(kept["schedule"])
            torch.set_rng_state(kept["random"])
            done = kept["epoch"]
    for epoch in range(done + 1, epochs + 1):
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
        if checkpoint is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            random = torch.get_rng_state()
            checkpoint.save(state | {"schedule": schedule.state_dict(), "random": random})
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, split: Split, top: int = 1) -> float:
    """The share in percent whose label is not among the ``top`` most probable."""
    model.eval()
    images, labels = split
    best = torch.cat([model(batch).topk(top).indices for batch in images.split(512)])
    return 100 * (best != labels[:, None]).all(1).float().mean().item()
