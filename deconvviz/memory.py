"""How much memory is left, and whether an error means that it ran out.

Where there are more promises than memory, as on Linux, no error comes: the process is killed. So it is asked for before
much is taken.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

SHARE = 0.5
"""Of the memory that is left, what may be filled: libraries hold copies while they work."""
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of both versions, where a container's limit and its use stand, and which part of that is copies of files."""


def how_many_fit(each: float, device: str) -> float:
    """How often ``each``, in bytes, fits into what is left of a device's memory, with room; infinite if unknown."""
    return SHARE * memory_left(device) / max(each, 1.0)


def memory_left(device: str, root: Path = Path("/")) -> float:
    """Bytes that can still be had on a type of device; infinite if unknown. Linux keeps its files under ``root``.

    A CPU's are shared by the processes that ``torchrun`` started on the machine.
    """
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    if device != "cpu":
        return math.inf
    left, groups = 1024 * _number(root / "proc/meminfo", math.inf, "MemAvailable:"), root / "sys/fs/cgroup"
    for limit, use, statistics, files in CONTROL_GROUPS:
        used = _number(groups / use, 0) - _number(groups / statistics, 0, files)
        left = min(left, _number(groups / limit, math.inf) - used)
    return max(left, 0.0) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _number(file: Path, otherwise: float, name: str = "") -> float:
    """The number behind a name in a file, or that it begins with; or another if there is none."""
    try:
        words = file.read_text().split()
        return float(words[words.index(name) + 1 if name else 0])
    except (OSError, ValueError, IndexError):
        return otherwise


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; the accelerator's caches are emptied then."""
    text = str(error).lower()
    phrases = ("out of memory", "allocate memory", "not enough memory")
    full = isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)
    for accelerator in (torch.cuda, torch.mps) if full else ():
        if accelerator.device_count():
            accelerator.empty_cache()
    return full
