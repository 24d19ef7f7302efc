"""The pass itself: batch by batch through the model, up to the last of the layers."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deconvviz.capture.reading import LayerCall, reading
from deconvviz.errors import CheckpointError, InvalidInput
from deconvviz.memory import out_of_memory
from deconvviz.mining.archive import checksum
from deconvviz.mining.data import Batch
from deconvviz.mining.found import Found
from deconvviz.mining.strongest import Strongest


class Miner:
    """Takes batches of images; :attr:`states` are the layers' strongest units so far.

    Args:
        states: of each layer.
        like: a tensor of the model's dtype and device.
        autocast: the dtype to compute in, or ``None``.
        channels_last: the layout of the images, which many models are faster in.
    """

    def __init__(
        self, states: Sequence[Strongest], like: Tensor, autocast: torch.dtype | None, channels_last: bool
    ) -> None:
        self.states = tuple(states)
        self._like, self._autocast = like, autocast
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        self._numbers = torch.empty(0, dtype=torch.int64, device="cpu")
        self._new: dict[int, Strongest] = {}
        self.run: Any = None

    def use(self, i: int, output: Tensor) -> None:
        """Take from a layer's output (N, C, *S) what is needed, at once."""
        state = self.states[i]
        if output.dim() < 2 or len(output) != len(self._numbers) or output.shape[1] != len(state.values):
            raise InvalidInput(
                f"a layer gives shape {tuple(output.shape)} for {len(self._numbers)} images; expected "
                f"({len(self._numbers)}, {len(state.values)} feature maps, ...)"
            )
        self._new[i] = state.updated(output, self._numbers)

    def take(self, numbers: Tensor, images: Tensor) -> None:
        """One batch; where the memory does not suffice, its halves."""
        try:
            images_there = images.to(self._like.device, self._like.dtype, memory_format=self._layout)
            self._numbers = numbers.to(self._like.device)
            self._new = {}
            kind = self._like.device.type
            with torch.no_grad(), torch.autocast(kind, self._autocast, enabled=self._autocast is not None):
                self.run(images_there)
            self.states = tuple(self._new[i] for i in range(len(self.states)))
        except (RuntimeError, MemoryError) as error:
            if len(numbers) == 1 or not out_of_memory(error):
                raise
        else:
            return
        half = len(numbers) // 2  # outside the handler: the error's frames hold what they computed
        self.take(numbers[:half], images[:half])
        self.take(numbers[half:], images[half:])

    def checksums(self, numbers: Tensor, images: Tensor) -> dict[int, int]:
        """Of those images just taken that have a unit: few, after the first."""
        there = numbers.to(self._like.device)
        kept = torch.stack([torch.isin(there, state.images) for state in self.states]).any(0).tolist()
        return {n: checksum(images[i]) for i, n in enumerate(numbers.tolist()) if kept[i]}


@contextlib.contextmanager
def mining(
    model: nn.Module,
    layers: Sequence[LayerCall],
    states: Sequence[Strongest],
    like: Tensor,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Iterator[Miner]:
    """A :class:`Miner` of these layers; afterwards no hook is left on the model."""
    miner = Miner(states, like, autocast, channels_last)
    with reading(model, layers, miner.use) as miner.run:
        yield miner


def mine(
    miner: Miner,
    batches: Iterable[Batch],
    found: Found,
    path: Path | None,
    every: float,
    tell: Callable[[int], object],
) -> Found:
    """All batches through the miner, on top of what is ``found``.

    Args:
        path: of a checkpoint, written before the first batch, each ``every`` seconds, and when the pass is broken
            off; or ``None``.
        tell: called with the number of images of each batch.

    Raises:
        CheckpointError: it can't be written at the start. Later, that is a warning: hours of work go on, and there
            may be space later.
    """
    if path is not None:
        found.save(path)
    saved = time.monotonic()
    try:
        for batch in batches:
            checksums: dict[int, int] = {}
            if batch.images is not None:
                miner.take(batch.numbers, batch.images)
                checksums = miner.checksums(batch.numbers, batch.images)
            found = found.taking(miner.states, batch.taken, dict(batch.broken), checksums)
            tell(batch.taken)
            if path is not None and time.monotonic() - saved > every:
                _try_to_save(found, path)
                saved = time.monotonic()
    except BaseException:  # Ctrl-C too
        if path is not None:
            _try_to_save(found, path)
        raise
    return found


def _try_to_save(found: Found, path: Path) -> None:
    try:
        found.save(path)
    except CheckpointError as error:
        warnings.warn(f"no checkpoint this time: {error}", stacklevel=4)
