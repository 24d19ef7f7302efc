"""Share work among the processes that ``torchrun`` started, and put the results together in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import InvalidInput, OtherProcessFailed

Number = TypeVar("Number", bound=np.generic)


def rank_and_count() -> tuple[int, int]:
    """This process's rank and how many there are in its group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_part(items: NDArray[Number], shard: bool) -> NDArray[Number]:
    """Every n-th of ``items`` for n processes, from this one's rank on; all of them if ``shard`` is false.

    Raises:
        InvalidInput: ``shard`` is true and ``torch.distributed`` is not initialised.
    """
    if not shard:
        return items
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidInput(
            "shard is true, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() first, under torchrun"
        )
    rank, count = rank_and_count()
    return items[rank::count]


@contextlib.contextmanager
def together(shard: bool) -> Iterator[None]:
    """Around work with :func:`gathered` in it: what fails in one process raises in all, so that none waits for ever.

    Ctrl-C is told to nobody: its process ends at once, which the others notice where they wait for it.

    Raises:
        OtherProcessFailed: with the failing process's rank and message; or a process was killed.
    """
    try:
        yield
    except OtherProcessFailed:
        raise
    except Exception as error:
        with contextlib.suppress(OtherProcessFailed):
            _tell(f"{type(error).__name__}: {error}", shard)
        raise
    _tell(None, shard)


def gathered(rows: Tensor, shard: bool) -> Tensor:
    """The sum over the processes of ``rows``, of which each process filled its own and left the others zero.

    Raises:
        OtherProcessFailed: one of them has left :func:`together` with an error.
    """
    if shard:
        _tell(None, shard)
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else rows.device
        whole = rows.to(device)
        with _waiting():
            dist.all_reduce(whole)
        return whole.to(rows.device)
    return rows


def _tell(failure: str | None, shard: bool) -> None:
    """Say to the others whether this process failed, and hear from them; all do so the same number of times."""
    if not (shard and dist.is_available() and dist.is_initialized()):
        return
    failures: list[str | None] = [None] * dist.get_world_size()
    with _waiting():
        dist.all_gather_object(failures, failure)
    told = [f"process {rank} failed: {text}" for rank, text in enumerate(failures) if text is not None]
    if told and failure is None:
        raise OtherProcessFailed("; ".join(told))


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Around what waits for all processes."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessFailed(f"another process was killed, interrupted or can't be reached: {error}") from error
