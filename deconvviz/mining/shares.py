"""Which part of the data a process takes, and how the parts come together, through ``torch.distributed``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed

from deconvviz.errors import InvalidInput
from deconvviz.inputs import integer
from deconvviz.mining.found import Found
from deconvviz.shards import rank_and_count


def own_share(share: Sequence[int] | None) -> tuple[int, int]:
    """(i, n): every n-th image from the i-th. Of a process group by rank, unless ``share`` is given."""
    if share is not None:
        try:
            rank, world = map(integer, share)
        except (TypeError, ValueError):
            rank, world = 0, 0
        if not 0 <= rank < world:
            raise InvalidInput(f"share is {share!r}; expected (i, n) with 0 <= i < n")
        return rank, world
    return rank_and_count()


def of_share(path: Path, rank: int, world: int) -> Path:
    """Each share's own checkpoint: ``grid.npz``, of several ``grid.0of2.npz``."""
    return path if world == 1 else path.with_name(f"{path.stem}.{rank}of{world}{path.suffix}")


def joined(found: Found, device: torch.device) -> Found:
    """The whole of what the processes of the group found, the same bits in each."""
    parts: list[Found] = [found] * distributed.get_world_size()
    distributed.all_gather_object(parts, found.to("cpu"))
    return functools.reduce(Found.merged, parts).to(device)
