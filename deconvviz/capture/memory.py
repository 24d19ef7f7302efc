"""Which tensors a pass has met, and which of them share memory: a write in place changes them all."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

CONSTANT, DERIVED = -1, -2
"""Marks of tensors born in the pass that carry no signal: independent of the input, or a mask, index or
detached tensor computed from it."""


class Transformed(Exception):
    """Operations run on tensors that stand for others: what they do to memory can't be followed."""


class Memory:
    """The live tensors that a pass has met, each with its mark: the number of its value, or no signal."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._at: dict[int, set[int]] = {}
        """For each address of memory, the tensors met there, some of them perhaps dead."""
        self._new: list[int] = []
        """Those whose address nobody asked for yet: most die before a write does."""
        self._constants: dict[int, list[Tensor]] = {}

    def know(self, tensor: Tensor, mark: int) -> None:
        """Remember a tensor by its mark."""
        self._marks[id(tensor)] = (weakref.ref(tensor), mark)
        self._new.append(id(tensor))

    def mark(self, tensor: Tensor) -> int | None:
        """The mark of a tensor; ``None`` if it is new."""
        known = self._marks.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def value(self, tensor: Tensor) -> int | None:
        """The number of a tracked tensor, else ``None``."""
        known = self._marks.get(id(tensor))
        return known[1] if known is not None and known[1] >= 0 and known[0]() is tensor else None

    def constant(self, tensor: Tensor) -> Tensor:
        """``tensor`` as an operation was given it: a reference, or after a write to its memory a copy."""
        held = tensor.detach()
        self._constants.setdefault(address(held), []).append(held)
        return held

    def sharing(self, target: Tensor, where: int) -> list[tuple[Tensor, Tensor | None]]:
        """The other live tensors on ``target``'s memory, ``where``; untracked ones with a copy from before a write."""
        marks, at = self._marks, self._at
        for key in self._new:
            tensor = marks[key][0]()
            if tensor is not None:
                at.setdefault(address(tensor), set()).add(key)
        self._new.clear()
        found: list[tuple[Tensor, Tensor | None]] = []
        for key in sorted(at.get(where, ())) if where and target.numel() else ():
            reference, mark = marks[key]
            tensor = reference()
            if tensor is target:
                continue
            if tensor is None or address(tensor) != where:
                at[where].discard(key)
            else:
                found.append((tensor, None if mark >= 0 else tensor.detach().clone()))
        return found

    def preserve(self, where: int) -> None:
        """Before a write to the memory ``where``: copy the constants on it."""
        for constant in self._constants.pop(where, ()):
            constant.data = constant.clone()

    def clear(self) -> None:
        """Forget all tensors."""
        self._marks.clear()
        self._at.clear()
        self._new.clear()


def address(tensor: Tensor) -> int:
    """Where a tensor's storage lies; 0 if it has none.

    Raises:
        Transformed: the tensor is one of a transform's (``torch.func``) or of a tracer's.
    """
    if tensor.layout is not torch.strided:
        return 0
    try:
        first, offset = tensor.data_ptr(), int(tensor.storage_offset())  # its storage's is slower
    except RuntimeError as error:
        raise Transformed from error
    return first - offset * tensor.element_size() if offset else first


def written_from(geometries: Any, size: int, device: torch.device) -> Tensor:
    """For each element of a second view of a memory, its place in the first, or -1 if it is not in it."""
    source = torch.full((size,), -1, device=device)
    first = source.as_strided(*geometries[0])
    first.copy_(torch.arange(first.numel(), device=device).view(first.shape))
    return source.as_strided(*geometries[1])


def write_through(geometries: Any, size: int, new: Tensor, old: Tensor) -> Tensor:
    """``old`` after ``new`` was written to the memory that both view."""
    source = written_from(geometries, size, new.device)  # not as_strided_scatter: its gradient is wrong
    return torch.where(source < 0, old, new.flatten()[source.clamp(min=0)])
