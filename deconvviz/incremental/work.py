"""What a form makes of a recorded step: how boxes of its outputs are computed from boxes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deconvviz.incremental.regions import Region
from deconvviz.tape import Slot, Step

if TYPE_CHECKING:
    from deconvviz.incremental.group import Batch, Group


@dataclass
class Work:
    """What computes a step's outputs for one batch of windows."""

    regions: Sequence[Region | None]
    """Of each output: its boxes, or ``None`` where the work gives whole values (B, ...)."""
    run: Callable[[Batch], Any]
    fresh: bool = True
    """The outputs are new tensors, so an operation may overwrite them."""
    whole: bool = False
    """The inputs are taken whole."""


Form = Callable[["Group", Step], Work | None]


def target(step: Step) -> Any:
    """What a step that works in place writes to: a slot or a constant; ``None`` of others."""
    return step.argument(step.written, "") if isinstance(step.written, int) else step.keywords.get(step.written or "")


def opened(step: Step, constants: Sequence[Tensor]) -> Step:
    """A step that takes some of its constants behind its inputs; the step itself if there are none."""
    if not constants:
        return step
    places = {id(constant): Slot(k) for k, constant in enumerate(constants, start=len(step.inputs))}

    def slots(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: slots(part) for name, part in item.items()}
        return type(item)(map(slots, item)) if type(item) in (list, tuple) else places.get(id(item), item)

    return replace(step, arguments=slots(step.arguments), keywords=slots(step.keywords))


def first_alone(step: Step) -> bool:
    """Whether one value goes in, as the first argument."""
    return len(step.inputs) == 1 and isinstance(step.argument(0, "input"), Slot)


def trailing(region: Region, n: int) -> bool:
    """Whether the spatial axes are the ``n`` behind batch and channels."""
    return region.axes == tuple(range(2, 2 + n))
