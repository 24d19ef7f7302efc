"""Share work among the processes that ``torchrun`` started, and put the results together in all of them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from deconvviz.errors import InvalidInput

Number = TypeVar("Number", bound=np.generic)


def own_share(items: NDArray[Number], shard: bool) -> NDArray[Number]:
    """Every world-size-th of ``items``, from this process's rank on; all of them if ``shard`` is false.

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
    return items[dist.get_rank() :: dist.get_world_size()]


def gathered(rows: Tensor, shard: bool) -> Tensor:
    """The sum over the processes of ``rows``, of which each process filled its own and left the others zero."""
    if shard:
        device = (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else rows.device
        )
        whole = rows.to(device)
        dist.all_reduce(whole)
        return whole.to(rows.device)
    return rows
