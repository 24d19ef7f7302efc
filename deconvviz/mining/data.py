"""Images by number, from whatever holds them: a folder, a data set, a loader, tensors.

Each image has one number for good, its place in the data set (of a stream: its turn), whatever the batch size,
the workers or the share of a process, and must be the same each time it is asked for: random crops, flips or
colours are refused where they are seen. A picture that cannot be read is reported with its number and the reason,
and never ends the pass.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from deconvviz.capture.as_found import random_state_kept
from deconvviz.errors import InvalidInput
from deconvviz.inputs import whole_number
from deconvviz.mining.archive import hash_of, without_addresses
from deconvviz.mining.folder import PictureFolder, glimpse
from deconvviz.models.zoo import Transform

PROBES = 8
"""How many images of a data set are read to tell it from others."""
ALIKE = 100
"""After so many images in a row that could not be read, all for one reason, no others are tried."""


@dataclass(frozen=True)
class Batch:
    """Images that go through the model together; of a stream's end only what could not be read."""

    numbers: Tensor
    """(N,) int64."""
    images: Tensor | None
    """(N, C, *S), or ``None`` if none could be read."""
    broken: tuple[tuple[int, str], ...]
    """Number and reason of each image that could not be read."""

    @property
    def taken(self) -> int:
        """How many of the sequence's images went into it."""
        return len(self.numbers) + len(self.broken)


class Images:
    """Any source of images as batches in a fixed order, and single images by number.

    Args:
        data: the path of a folder of pictures; a tensor (N, C, *S); a map- or iterable-style data set, whose
            items are images, tuples that start with one, or dicts that hold one (Hugging Face's); or a
            ``DataLoader``, whose data set, batch size, workers and choice of items (not their order) are taken.
        transform: from a PIL picture to a tensor, where the source gives pictures; by default
            :class:`~deconvviz.models.zoo.Transform`. Nothing else is transformed: for tensors give none.
        limit: take only so many.

    Raises:
        InvalidInput: not one of these, or empty.
    """

    def __init__(
        self, data: Any, transform: Callable[[Image.Image], Tensor] | None = None, limit: int | None = None
    ) -> None:
        limit = None if limit is None else whole_number("limit", limit)
        loader = data if isinstance(data, DataLoader) else None
        self.batch_size: int = (loader.batch_size if loader is not None else None) or 32
        self.workers: int = loader.num_workers if loader is not None else 0
        source = data.dataset if isinstance(data, DataLoader) else data
        if isinstance(source, (str, Path)):
            if not Path(source).is_dir():
                raise InvalidInput(f"{source} is not a folder: give one that holds pictures")
            source = PictureFolder(Path(source), transform)
        self.streams = isinstance(source, IterableDataset) or not hasattr(source, "__getitem__")
        if self.streams and not isinstance(source, Iterable):
            raise InvalidInput(
                f"data is a {type(source).__name__}; expected a folder, a tensor (N, C, H, W), a data set or a "
                "DataLoader"
            )
        if self.streams and iter(source) is source:
            raise InvalidInput(
                f"data is a {type(source).__name__}, which can be read only once; expected what can be iterated "
                "again, as pictures are read twice: give an IterableDataset, or a list"
            )
        self.source, self.limit = source, limit
        self.transform = transform or Transform()
        self._for_pictures = transform is not None and not isinstance(source, PictureFolder)
        self.order: Sequence[int] = () if self.streams else _chosen(data, source)[:limit]
        if not self.streams and not self.order:
            raise InvalidInput("data is empty; expected one image or more")

    def sample(self) -> Tensor:
        """The first image that can be read; raises :class:`InvalidInput` if there is none."""
        reason, alike = "it is empty", 0
        turns = self._stream() if self.streams else map(self.read, self.order)
        for number, item in itertools.islice(turns, self.limit):
            if isinstance(item, Tensor):
                return item
            alike = alike + 1 if item == reason else 1
            reason = item
            if alike == ALIKE:
                raise InvalidInput(
                    f"{ALIKE} images up to number {number} could not be read, all for one reason: {item}"
                )
        raise InvalidInput(f"no image of the data could be read: {reason}")

    def describe(self) -> dict[str, Any]:
        """What the data is, as far as can be told at a glance: kind, size, files, transform and some images.

        Raises:
            InvalidInput: no image can be read, or the first is another one each time.
        """
        source = self.source
        if isinstance(source, Tensor):
            facts: Any = [list(source.shape), str(source.dtype), hash_of(_sampled(source))]
        else:
            facts = [type(source).__name__, len(source) if isinstance(source, Sized) else None]
        names = "\n".join(f"{self.name(i)} {glimpse(path)}" for i, path in enumerate(self.files or ()))
        transform = getattr(source, "transform", None) or self.transform
        with random_state_kept(torch.device("cpu")):  # what a data set draws is not for the caller to miss
            probe = self._probe()
        chosen = "" if self.order == range(len(self.order)) else ",".join(map(str, self.order))
        return {
            "kind": facts,
            "limit": self.limit,
            "transform": without_addresses(repr(transform)),
            "items": hash_of(names + chosen),
            "images": probe,
        }

    def _probe(self) -> str:
        """A hash of some images as the model sees them, the first and the last among them; of a stream the first."""
        first = hash_of(self.sample())
        if first != hash_of(self.sample()):
            raise InvalidInput(
                "the data gives another first image each time it is asked; expected the same, as pictures are read "
                "twice: give it a transform without random crops, flips or colours, as for validation"
            )
        last = len(self.order) - 1
        numbers = sorted({self.order[i * last // (PROBES - 1)] for i in range(PROBES)} if self.order else ())
        return hash_of(first, *(item for _, item in map(self.read, numbers) if isinstance(item, Tensor)))

    @functools.cached_property
    def files(self) -> Sequence[Path] | None:
        """The pictures' files, if the source says (as a folder and torchvision's ``ImageFolder`` do)."""
        if isinstance(self.source, PictureFolder):
            return self.source.files
        samples = getattr(self.source, "samples", None)
        if isinstance(samples, list) and samples and isinstance(samples[0], tuple):
            return [Path(sample[0]) for sample in samples]
        return None

    def name(self, number: int) -> str:
        """The file's path under its folder, or the number."""
        files = self.files
        if files is None or not 0 <= number < len(files):
            return f"image {number}"
        root = getattr(self.source, "root", None)
        path = files[number]
        return str(path.relative_to(root)) if root and path.is_relative_to(root) else str(path)

    def batches(
        self,
        shape: torch.Size,
        batch_size: int,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
        start: int = 0,
    ) -> Iterator[Batch]:
        """A share of the images, every ``share[1]``-th from ``share[0]``, from its ``start``-th on.

        Raises:
            InvalidInput: one has another shape than (C, *S).
        """
        collate = functools.partial(self._collate, shape)
        rank, world = share
        if self.streams:
            turns = itertools.islice(self._stream(), rank, self.limit, world)
            yield from map(collate, _in_batches(itertools.islice(turns, start, None), batch_size))
            return
        items = _Guarded(self, self.order[rank::world][start:])
        yield from DataLoader(items, batch_size, num_workers=workers, collate_fn=collate)

    def images(self, numbers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Images by number, in ascending order; a stream is read again, once.

        Raises:
            InvalidInput: one can't be read again.
        """
        wanted = sorted(set(numbers))
        turns: Iterator[tuple[int, Tensor | str]] = map(self.read, wanted)
        if self.streams:
            turns = self._stream()
        for number in wanted:
            found = next((item for turn, item in turns if turn == number), "the data has become shorter")
            if isinstance(found, str):
                raise InvalidInput(f"{self.name(number)} cannot be read again: {found}")
            yield number, found

    def read(self, number: int) -> tuple[int, Tensor | str]:
        """An image, or why it cannot be read."""
        try:
            return number, self._tensor(self.source[number])
        except Exception as error:  # whatever a data set raises on a broken picture
            return number, f"{type(error).__name__}: {error}"

    def _stream(self) -> Iterator[tuple[int, Tensor | str]]:
        turns = iter(self.source)
        for number in itertools.count():
            try:
                item: Any = self._tensor(next(turns))
            except StopIteration:
                return
            except Exception as error:
                if inspect.isgenerator(turns) and turns.gi_frame is None:
                    raise InvalidInput(
                        f"the data stream ended at item {number} with {type(error).__name__}: {error}; a generator "
                        "can't go on after that: catch it inside, or give a map-style data set"
                    ) from error
                item = f"{type(error).__name__}: {error}"
            yield number, item

    def _collate(self, shape: torch.Size, items: Sequence[tuple[int, Tensor | str]]) -> Batch:
        good = [(number, item) for number, item in items if isinstance(item, Tensor)]
        broken = tuple((number, item) for number, item in items if isinstance(item, str))
        for number, image in good:
            if image.shape != shape:  # positions and receptive fields are those of one shape
                raise InvalidInput(
                    f"{self.name(number)} has shape {tuple(image.shape)}; expected {tuple(shape)}, as the first image: "
                    "give a transform that makes them one size"
                )
        images = torch.stack([image for _, image in good]) if good else None
        return Batch(torch.tensor([number for number, _ in good], dtype=torch.int64, device="cpu"), images, broken)

    def _tensor(self, item: Any) -> Tensor:
        """The image of a data set's item."""
        image = item
        if isinstance(item, Mapping):
            image = _only_image(item)
        elif isinstance(item, (tuple, list)):
            image = item[0]
        if isinstance(image, Image.Image):
            image = self.transform(image)
        elif self._for_pictures:
            raise InvalidInput(
                f"a transform is given, but the item is a {_kind(image)}; expected a PIL picture: give the transform "
                "to the data set, or none"
            )
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise InvalidInput(
                f"the item is a {_kind(image)}; expected a floating-point tensor (C, H, W), a picture, a tuple that "
                "starts with one, or a dict that holds one: give the data set a transform"
            )
        return image


class _Guarded(Dataset[Any]):
    """The images of some numbers, for a loader's workers."""

    def __init__(self, images: Images, numbers: Sequence[int]) -> None:
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        return self.images.read(self.numbers[i])


def _only_image(item: Mapping[Any, Any]) -> Any:
    """The one picture, or floating-point tensor (C, *S), among a dict's values."""
    images = [value for value in item.values() if isinstance(value, Image.Image) or _is_image(value)]
    if len(images) != 1:
        kinds = ", ".join(f"{key!r}: {_kind(value)}" for key, value in item.items())
        raise InvalidInput(
            f"the item is a dict {{{kinds}}}, with {len(images)} images; expected one picture or floating-point tensor "
            "(C, H, W) in it: give the data set a transform"
        )
    return images[0]


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _sampled(images: Tensor) -> Tensor:
    """Some thousand values of each image (N, ...): to tell data sets apart at a fraction of a pass's time."""
    values = images.flatten(1) if images.dim() > 1 else images[:, None]
    return values[:, :: max(1, values.shape[1] // 4096)]


def _chosen(data: Any, source: Any) -> Sequence[int]:
    """The numbers of the items that are taken, in order: all, or those that a loader's samplers give."""
    if not isinstance(data, DataLoader):
        return range(len(source))
    sampler: Any = data.sampler
    if data.batch_size is None and data.batch_sampler is not None:  # its own; the other is a default then
        sampler = itertools.chain.from_iterable(data.batch_sampler)
    all_in_turn = isinstance(sampler, SequentialSampler)
    if all_in_turn or (isinstance(sampler, RandomSampler) and sampler.num_samples == len(source)):
        return range(len(source))
    with random_state_kept(torch.device("cpu")):
        return sorted({int(number) for number in sampler})


def _in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
