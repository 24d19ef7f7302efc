"""What a pass over (a share of) a data set has found; it is saved, resumed and merged."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deconvviz.errors import CheckpointError
from deconvviz.mining.archive import load_archive, save_archive
from deconvviz.mining.strongest import Strongest

Share = tuple[int, int, int]
"""(first, step, count): the images at places first, first + step, ... of the data set's order; of them, how many."""


@dataclass(frozen=True, eq=False)
class Found:
    """The strongest units of several layers, and of which model and data they are."""

    about: Mapping[str, Any]
    """What must agree for two of them to be parts of one: ``model`` and ``data`` (fingerprints), ``layers``,
    ``k``, ``image`` (shape), ``maps`` (their sizes) and ``precision``."""
    layers: tuple[Strongest, ...]
    shares: tuple[Share, ...]
    """What of the data it has seen."""
    broken: Mapping[int, str]
    """Number of each image that could not be read, and why."""
    checksums: Mapping[int, int]
    """Of each image that has a unit, and of some that had one, by number."""

    def taking(
        self,
        layers: tuple[Strongest, ...],
        taken: int,
        broken: Mapping[int, str],
        checksums: Mapping[int, int],
    ) -> Found:
        """With ``taken`` more images of its share, which left the layers in these states."""
        (first, step, count) = self.shares[0]
        more = replace(
            self,
            layers=layers,
            shares=((first, step, count + taken),),
            broken={**self.broken, **broken},
            checksums={**self.checksums, **checksums},
        )
        return more._pruned() if len(more.checksums) > 2 * sum(s.images.numel() for s in layers) else more

    def _pruned(self) -> Found:
        """Without the checksums of images that have no unit any more."""
        used = {number for layer in self.layers for number in layer.images.unique().tolist()}
        return replace(self, checksums={n: crc for n, crc in sorted(self.checksums.items()) if n in used})

    def merged(self, other: Found) -> Found:
        """Of two shares of one data set: that of both, to the same bits in any order.

        Raises:
            CheckpointError: they differ in model, layers or data, or share an image.
        """
        other.require(self.about, "this part")
        if common := [(a, b) for a in self.shares for b in other.shares if _overlap(a, b)]:
            raise CheckpointError(
                f"the parts share images: both hold some of every {common[0][0][1]}th from {common[0][0][0]}; "
                "merge each part once"
            )
        return Found(
            self.about,
            tuple(a.merged(b) for a, b in zip(self.layers, other.layers, strict=True)),
            tuple(sorted(self.shares + other.shares)),
            dict(sorted({**self.broken, **other.broken}.items())),
            {**self.checksums, **other.checksums},
        )._pruned()

    def to(self, device: torch.device | str) -> Found:
        """The same on another device."""
        return replace(self, layers=tuple(layer.to(device) for layer in self.layers))

    def require(self, about: Mapping[str, Any], what: str) -> None:
        """Raise :class:`CheckpointError` unless it is about the same as what is asked for."""
        require_same(self.about, about, what)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, all of it or nothing; raises :class:`CheckpointError` if it can't."""
        header = {
            "about": self.about,
            "shares": self.shares,
            "broken": sorted(self.broken.items()),
            "checksums": list(self._pruned().checksums.items()),
        }
        arrays = {f"{i}.{name}": array for i, layer in enumerate(self.layers) for name, array in layer.arrays().items()}
        save_archive(path, header, arrays)

    @classmethod
    def resumed(
        cls,
        path: Path,
        about: Mapping[str, Any],
        share: tuple[int, int],
        device: torch.device | str,
    ) -> Found:
        """A checkpoint, if it is of what is asked for; raises :class:`CheckpointError` if not."""
        found = cls.load(path, device)
        found.require(about, f"the checkpoint {path}")
        if len(found.shares) != 1 or found.shares[0][:2] != share:
            raise CheckpointError(
                f"the checkpoint {path} is of other shares {found.shares}; expected {share}: give another file"
            )
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Found:
        """Read a file of :meth:`save`; raises :class:`CheckpointError` if it is damaged."""
        header, arrays = load_archive(path)
        try:
            states: list[dict[str, Any]] = [{} for _ in header["about"]["layers"]]
            for name, array in arrays.items():
                i, _, field = name.partition(".")
                states[int(i)][field] = array
            layers = tuple(Strongest.from_arrays(state, device) for state in states)
            shares = tuple((int(a), int(b), int(c)) for a, b, c in header["shares"])
            broken = {int(n): str(why) for n, why in header["broken"]}
            return cls(header["about"], layers, shares, broken, {int(n): int(c) for n, c in header["checksums"]})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a file of FilterGrid: delete it to start afresh") from error


def _overlap(a: Share, b: Share) -> bool:
    """Whether two arithmetic progressions have a member in common."""
    ranges = [range(first, first + step * count, step) for first, step, count in (a, b)]
    if not all(ranges) or (ranges[1].start - ranges[0].start) % math.gcd(a[1], b[1]):
        return False
    low, high = max(r.start for r in ranges), min(r[-1] for r in ranges)
    start = low + (ranges[0].start - low) % a[1]
    return any(place in ranges[1] for place in range(start, min(high, start + a[1] * b[1]) + 1, a[1]))


def require_same(given: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise :class:`CheckpointError` unless ``given`` has all that is ``expected``."""
    for name, item in expected.items():
        if (other := given.get(name)) != item:
            part = ""
            while isinstance(item, Mapping) and isinstance(other, Mapping):
                part = next(str(key) for key in {**item, **other} if item.get(key) != other.get(key))
                item, other = item.get(part), other.get(part)
            raise CheckpointError(
                f"{what} is of another {name}: {part + ' ' * bool(part)}{_differing(other, item)}; "
                f"expected {_differing(item, other)}. Give what it was made with, or another file to start afresh"
                f"{' (random crops or flips give other images each time)' if name == 'data' else ''}"
            )


def _differing(item: Any, other: Any) -> str:
    """What an item says, from a little before where it differs from the other."""
    text = str(item)
    start = max(0, len(os.path.commonprefix([text, str(other)])) - 20) if len(text) > 90 else 0
    return f"{'...' * (start > 0)}{text[start : start + 90]}{'...' * (len(text) > start + 90)}"
