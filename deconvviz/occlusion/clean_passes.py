"""The clean pass of each image, if it can be computed again in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deconvviz.capture import require_module, watch
from deconvviz.errors import DeconvvizError, TargetOutOfRange, UnsupportedModel
from deconvviz.incremental import CleanPass
from deconvviz.layers import Layer, described, find_call, locate, only_output
from deconvviz.memory import how_many_fit
from deconvviz.rules import EXACT, HIDDEN_CODE
from deconvviz.tape import Tape, one_tensor

Result = TypeVar("Result")


def clean_passes(
    function: Callable[..., Any],
    images: Tensor,
    additional: Sequence[Any] = (),
    layer: Layer | None = None,
    read: Callable[[Tensor], Tensor | None] = lambda output: None,
) -> tuple[list[CleanPass], tuple[int, ...], Tensor]:
    """Watch a pass for each of the images (N, C, *S).

    Args:
        function: the model.
        images: the images.
        additional: what else it takes.
        layer: a layer whose output is asked for too.
        read: which channels of an output (1, C, ...) are asked for, ``None`` for all.

    Returns:
        The passes, outlines of those that have no place in the memory; the values of the model's output and, if asked
        for, of the layer's; and the model's own outputs (N, ...).

    Raises:
        UnsupportedModel: only whole passes give the right numbers: it is no module; or the pass depends on what the
            image holds other than by operations (``if x.any()``), on the other images (batch norm in train mode)
            or on chance, or can't be seen. Or what the pass of one image holds has no place in the memory.
    """
    if not isinstance(function, nn.Module):
        raise UnsupportedModel(f"a {type(function).__name__} is no module, so its operations are not computed in part")
    model = require_module(function)
    if images.dim() < 3 or not images.is_floating_point():
        raise UnsupportedModel(f"inputs {tuple(images.shape)} {images.dtype} are no images (N, C, *S)")
    if any(isinstance(item, Tensor) for item in additional):
        raise UnsupportedModel("an additional argument is a tensor, which may belong to one image")
    passes: list[CleanPass] = []
    outputs: list[Tensor] = []
    course: tuple[Any, ...] = ()
    for image in images:
        tape, output = watch(model, (image[None],), additional)
        output = one_tensor(output)
        reason = _obstacle(tape, output)
        if reason:
            raise UnsupportedModel(reason)
        wanted = [value for value in tape.calls[-1].outputs if value is not None]
        if layer is not None:
            wanted.append(only_output(find_call(tape, *locate(model, layer))))
        taken = tuple(wanted), [(step.operation, step.inputs, step.outputs) for step in tape.steps]
        if course not in ((), taken):
            raise UnsupportedModel("the pass takes another course for another image")
        course = taken
        if not passes:
            size = sum(value.shape.numel() * value.dtype.itemsize for value in tape.values)
            fit = how_many_fit(size, images.device.type)
            if fit < 1:
                raise UnsupportedModel(
                    f"the pass of an image holds {size / 1e9:.1f} GB, more than half of the memory that is left"
                )
        clean = passes[0].of(tape.tensors[0]) if passes else CleanPass(tape, wanted, read(output))
        held = not passes or len(passes) + 2 <= fit  # and room for one that is computed again
        passes.append(clean if held else clean.outline())
        outputs.append(output)
    return passes, course[0], torch.cat(outputs)


def if_possible(engine: str, make: Callable[[], Result]) -> Result | None:
    """What ``make`` gives; where it fails ``None``, unless incremental inference alone was asked for.

    Raises:
        UnsupportedModel: it was, with the reason. What the model itself raises, whole passes raise again.
    """
    try:
        return make()
    except Exception as error:
        if engine != "incremental":
            return None
        if isinstance(error, DeconvvizError) and not isinstance(error, TargetOutOfRange):
            raise UnsupportedModel(f"{error}: use engine='full' or 'auto'") from error
        raise


def _obstacle(tape: Tape, output: Any) -> str | None:
    """Why a pass can't be computed again in part."""
    if not isinstance(output, Tensor):
        return f"the model gives a {type(output).__name__} that does not hold one tensor"
    if tape.calls[-1].outputs in ((), (None,)):
        return "the model gives a tensor that does not depend on the image"
    if output.dim() < 1 or len(output) != 1:
        return f"the output {tuple(output.shape)} of one image has no batch axis"
    if tape.content_read:
        return "the model looks at what tensors hold, so it may run otherwise on a covered image"
    if tape.random:
        return "the model draws random numbers"
    for step in tape.steps:
        place = described(step.module)
        if step.operation == HIDDEN_CODE:
            return f"{place} hides its operations"
        if step.autocast != tape.autocast:
            return f"{place} changes autocast"
        if step.derived:
            return f"{place} computes a mask or an index from the image"
        if step.operation == "batch_norm" and step.kind != EXACT:
            return f"{place} takes its statistics from the batch"
    return None
