"""Choose units of a layer, and make the seeds that a projection starts from.

A *unit* is (feature map, position) in an image's activation (C, *S). A seed is that activation with every
other unit set to zero (paper section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from deconvviz.boxes import Boxed
from deconvviz.errors import FeatureMapOutOfRange, InvalidInput, PositionOutOfRange
from deconvviz.inputs import integer
from deconvviz.precision import at_least_float32

FeatureMaps = int | Sequence[int] | slice | Literal["strongest"] | None
Position = Literal["max", "all"] | tuple[int, ...] | Tensor


def require(name: str, given: Any, choices: Sequence[str]) -> None:
    """Raise :class:`InvalidInput` unless an option is one of its choices."""
    if given not in choices:
        raise InvalidInput(f"{name} is {given!r}; expected one of {', '.join(map(repr, choices))}")


def strongest(activation: Tensor, k: int) -> Tensor:
    """The ``k`` maps (N, k) of the largest total activation in each image, largest first."""
    return totals(activation).topk(k, dim=1).indices


def totals(activation: Tensor) -> Tensor:
    """Each feature map's total activation (N, C), in float32 at least."""
    return activation[:, :, None].flatten(2).sum(-1, dtype=at_least_float32(activation))


def feature_maps(activation: Tensor, fmap: FeatureMaps) -> tuple[bool, Tensor]:
    """Whether one map was asked for, and the maps (N, M) of each image."""
    images, count = activation.shape[:2]
    if isinstance(fmap, str) and fmap == "strongest":
        return True, strongest(activation, 1)
    single = isinstance(fmap, int) or getattr(fmap, "ndim", None) == 0
    try:
        if fmap is None or isinstance(fmap, slice):
            chosen = list(range(count))[fmap or slice(None)]
        else:
            chosen = [integer(m) for m in cast(Any, (fmap,) if single else fmap)]
    except (TypeError, ValueError):
        raise InvalidInput(
            f"fmap is {fmap!r}; expected an int, a sequence of ints, a slice, 'strongest' or None"
        ) from None
    wrong = [m for m in chosen if not -count <= m < count]
    if wrong or not chosen:
        raise FeatureMapOutOfRange(
            f"fmap is {fmap!r}, but the layer has {count} feature maps: expected 0 to {count - 1}"
            + ("" if chosen else ", at least one")
        )
    maps = torch.tensor([m % count for m in chosen], device=activation.device)
    return single, maps.expand(images, -1)


def seeds(activation: Tensor, maps: Tensor, position: Position, seed: str) -> Callable[[slice], Tensor | Boxed]:
    """A function that makes the seeds (M, N, C, *S) of a slice of the M maps; of single units, in boxes of one cell."""
    images, _, *space = activation.shape
    cells = activation.flatten(2) if space else activation.unsqueeze(-1)
    chosen = cells.gather(1, maps.unsqueeze(-1).expand(-1, -1, cells.shape[-1]))
    flat = None
    if not isinstance(position, str):
        flat = _flat_positions(position, images, space).to(maps.device)  # (N, 1, 1)
    elif position == "max":
        flat = chosen.argmax(2, keepdim=True)  # (N, M, 1)
    else:
        require("position", position, ("max", "all"))
    if flat is not None:
        chosen = chosen.gather(2, flat.expand(-1, maps.shape[1], 1))
    content = (chosen if seed == "activation" else torch.ones_like(chosen)).movedim(1, 0).unsqueeze(2)

    def make(part: slice) -> Tensor | Boxed:
        index, source = maps[:, part].T[..., None, None], content[part]  # (M, N, 1, 1), (M, N, 1, cells)
        out = activation.new_zeros((*source.shape[:2], *cells.shape[1:2], source.shape[-1]))
        out.scatter_(2, index.expand(source.shape), source)
        if flat is None or not space:
            return out.view(len(out), *activation.shape)
        firsts = torch.stack(torch.unravel_index(flat.squeeze(2).T.cpu(), tuple(space)))
        firsts = firsts if firsts.shape[1] == 1 else firsts[:, part]
        return Boxed(out.view(*out.shape[:3], *[1] * len(space)), firsts, tuple(space))

    return make


def _flat_positions(position: Any, images: int, space: Sequence[int]) -> Tensor:
    """Positions (len(space),) or (N, len(space)) to flat ones (N, 1, 1)."""
    try:
        given = torch.as_tensor(position, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        given = torch.tensor(torch.nan, device="cpu")
    expected = f"({', '.join('zyx'[-len(space) :]) if 0 < len(space) <= 3 else 'no position'})"
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not whole or given.shape not in ((len(space),), (images, len(space))) or not space:
        raise InvalidInput(
            f"position is {position!r}; expected 'max', 'all', {expected} in map cells, or a tensor "
            f"({images}, {len(space)}) with one for each image"
        )
    given = given.cpu().long().expand(images, -1)
    size = torch.tensor(space, device="cpu")
    if ((given < -size) | (given >= size)).any():
        raise PositionOutOfRange(
            f"position {position!r} is outside a map of {' x '.join(map(str, space))} cells; "
            "positions count from 0, in cells of the map, not in pixels"
        )
    strides = torch.tensor([math.prod(space[i + 1 :]) for i in range(len(space))], device="cpu")
    return ((given % size) * strides).sum(-1).view(-1, 1, 1)
