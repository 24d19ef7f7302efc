"""A step on whole values: as it was recorded on a batch, where it takes axis 0 for the batch's; else one by one.

Which of the conditions here an operation has to meet for a batch stands in its row of
:data:`~deconvviz.incremental.forms.FORMS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap

from deconvviz.incremental.work import first_alone, opened, target
from deconvviz.rules.linear import each, filter_arguments
from deconvviz.tape import Step, flatten

if TYPE_CHECKING:
    from deconvviz.incremental.clean import CleanPass
    from deconvviz.incremental.group import Batch

Shapes = Sequence[Sequence[int]]
"""Those of a step's inputs, then of its outputs."""
TakesBatch = Callable[[Step, Shapes], bool]
"""Whether a recorded step can be called on a batch of values of these shapes, whose axis 0 is 1."""


def whole(clean: CleanPass, step: Step, takes_batch: TakesBatch, in_place: bool) -> Callable[[Batch], Any]:
    """What computes a step on whole values; ``in_place`` as it was recorded, else in new memory."""
    shapes = clean.shapes(step)
    lacking = [not shape or shape[0] != 1 for shape in shapes]
    ahead = all(lacking) and takes_batch in OF_TRAILING_AXES  # the windows' axis stands before what is there
    shapes = [(1, *shape) for shape in shapes] if ahead else shapes
    if (any(lacking) and not ahead) or not takes_batch(step, shapes):
        return _one_by_one(step, lacking)
    padding, rank = _kernel_padding(step), len(shapes[0])
    constants = [c for c in flatten([step.arguments, step.keywords]) if takes_batch is joined or c is target(step)]
    step = opened(step, constants)

    def run(batch: Batch) -> Any:
        tensors = [batch.whole(value) for value in step.inputs]
        own = len(tensors[0]), *[-1] * (rank - 1)  # of each window
        tensors += [constant.expand(own) for constant in constants]
        if padding is not None:
            return batch.clean.kernel(step)(*tensors, *padding)
        return step.overwrite(*tensors) if in_place else step.rerun(*tensors)

    return run


def _one_by_one(step: Step, lacking: Sequence[bool]) -> Callable[[Batch], Any]:
    """For each window by itself, in one call where ``vmap`` can; ``lacking`` says which values have no batch's axis."""

    def run(batch: Batch) -> Any:
        tensors = [batch.whole(value) for value in step.inputs]
        single = [t if lack else t.unsqueeze(1) for t, lack in zip(tensors, lacking, strict=False)]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # it loops, as is done below
                outputs = vmap(lambda *each: tuple(flatten(step.rerun(*each))))(*single)
        except (RuntimeError, ValueError, NotImplementedError):  # what vmap cannot follow
            each = [flatten(step.rerun(*one)) for one in zip(*single, strict=True)]
            outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return [o if lack else o.squeeze(1) for o, lack in zip(outputs, lacking[len(single) :], strict=False)]

    return run


def _kernel_padding(step: Step) -> list[list[int]] | None:
    """What :meth:`CleanPass.kernel`'s takes beside its input, for a step that it computes; ``None`` for others."""
    if not first_alone(step) or step.operation not in ("linear", "conv2d"):
        return None
    if step.operation == "linear":
        return []
    _, _, _, padding, _, _ = filter_arguments(*step.arguments, **step.keywords)
    return None if isinstance(padding, str) else [each(padding, 2)]


# ── what takes a batch ───────────────────────────────────────────────────────────────────────────────────────────────


def never(step: Step, shapes: Shapes) -> bool:
    """It is not known to."""
    return False


def of_rank(step: Step, shapes: Shapes) -> bool:
    """An operation with a number of spatial axes in its name, with a batch's and a channels' axis before them."""
    return first_alone(step) and len(shapes[0]) == step.spatial + 2


def of_any_rank(step: Step, shapes: Shapes) -> bool:
    """What treats every row of axis 0 alike."""
    return first_alone(step) and len(shapes[0]) > 1


def of_rows(step: Step, shapes: Shapes) -> bool:
    """What works along the last axis, and treats all others alike."""
    return of_any_rank(step, shapes)


def undrawn(step: Step, shapes: Shapes) -> bool:
    """A dropout that drops nothing."""
    return of_any_rank(step, shapes) and step.kept is None


def each_cell(step: Step, shapes: Shapes) -> bool:
    """Cell by cell of values of one rank, with constants that are the same in every row."""
    rank = len(shapes[0])
    constants = flatten([step.arguments, step.keywords])
    return all(len(shape) == rank for shape in shapes) and all(
        c.dim() < rank or (c.dim() == rank and c.shape[0] == 1) for c in constants
    )


def attention(step: Step, shapes: Shapes) -> bool:
    """Of queries, keys and values that all depend on the image."""
    operands = [step.argument(i, name) for i, name in enumerate(("query", "key", "value"))]
    return len(shapes[0]) > 2 and not any(isinstance(item, Tensor) for item in operands) and each_cell(step, shapes)


def joined(step: Step, shapes: Shapes) -> bool:
    """A concatenation along another axis, with constants of one row."""
    shapes = [*shapes, *[tuple(constant.shape) for constant in flatten([step.arguments, step.keywords])]]
    rank = len(shapes[0])
    return step.argument(1, "dim", 0) % rank > 0 and all(len(shape) == rank and shape[0] == 1 for shape in shapes)


def along_another(step: Step, shapes: Shapes) -> bool:
    """What works along an axis that is named, and not the batch's."""
    dim = step.argument(1, "dim", None)
    return first_alone(step) and dim is not None and dim % len(shapes[0]) > 0


def of_last_axes(step: Step, shapes: Shapes) -> bool:
    """A norm over the last axes, not all of them."""
    return first_alone(step) and len(step.argument(1, "normalized_shape")) < len(shapes[0])


def flattened(step: Step, shapes: Shapes) -> bool:
    """Axes joined, the batch's not among them."""
    return first_alone(step) and int(step.argument(1, "start_dim", 0)) % len(shapes[0]) > 0


OF_TRAILING_AXES = (of_rank, of_rows, of_last_axes, each_cell, attention)
"""Those of operations that count their axes from the last one, so more may stand before them."""
