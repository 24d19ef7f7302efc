"""Whether an error means that memory ran out, on any device."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; the accelerator's caches are emptied then."""
    text = str(error).lower()
    phrases = ("out of memory", "allocate memory", "not enough memory")
    full = isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)
    for accelerator in (torch.cuda, torch.mps) if full else ():
        if accelerator.device_count():
            accelerator.empty_cache()
    return full
