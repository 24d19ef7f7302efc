"""Occlusion: how much a model's output falls when a part of its input is covered (paper figure 7).

A window slides over the input; what is under it is replaced by a baseline, and the output's fall is put where the
window was, averaged where windows overlap. The numbers are those of ``captum.attr.Occlusion``; for a module whose
input is an image only what each window changed is computed again (``deconvviz.incremental``), which is exact.

An output that falls says that the model used what was covered, or that the patch looks like something else to it:
try a second fill (``baselines="blur"``) before believing a map.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5)).eval()
>>> OcclusionSensitivity(model).attribute(torch.rand(1, 3, 16, 16), (3, 4, 4), (3, 2, 2), target=1).shape
torch.Size([1, 3, 16, 16])
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from captum._utils.common import (
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _run_forward,
)
from captum.attr import PerturbationAttribution
from captum.attr._utils.common import _format_and_verify_sliding_window_shapes, _format_and_verify_strides
from captum.log import log_usage
from torch import Tensor, nn

from deconvviz.capture import left_as_found, require_module
from deconvviz.errors import InvalidInput, UnsupportedModel
from deconvviz.incremental import CleanPass, Outcome
from deconvviz.inputs import as_python, like, require_autocast, require_finite, whole_number
from deconvviz.layers import Layer
from deconvviz.occlusion.clean_passes import clean_passes, if_possible
from deconvviz.occlusion.fills import Fill, filled
from deconvviz.occlusion.maps import OcclusionMaps, occlusion_maps
from deconvviz.occlusion.refinement import Refine, Refinement
from deconvviz.occlusion.sweep import FullEngine, IncrementalEngine, Rows, sweep
from deconvviz.occlusion.windows import Windows, circles, segments
from deconvviz.shards import gathered, own_part, together
from deconvviz.tape import one_tensor
from deconvviz.targets import selected
from deconvviz.units import FeatureMaps, require

__all__ = ["OcclusionMaps", "OcclusionSensitivity", "Refine", "Refinement", "circles", "segments"]

ENGINES = ("auto", "incremental", "full")


class OcclusionSensitivity(PerturbationAttribution):
    """Covers parts of the input of ``forward_func``; as ``captum.attr.Occlusion``, several times as fast.

    Args:
        forward_func: any callable that gives a tensor, alone or in a dict, tuple or the like (as Hugging Face's
            models), or a number; a module that takes one image tensor and whose operations can be seen is computed
            incrementally.
        engine: ``"incremental"`` computes only what changed, ``"full"`` calls the model, ``"auto"`` takes the
            faster one: by its multiply-adds where that is plain, else by measuring.
        autocast: the dtype to compute in, e.g. ``torch.bfloat16``, or ``None``.
        shard: share the windows among the processes of ``torch.distributed``; each gets the whole result.

    Raises:
        UnsupportedModel: ``forward_func`` can't be called.
        InvalidInput: an unknown option.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        engine: str = "auto",
        autocast: torch.dtype | None = None,
        shard: bool = False,
    ) -> None:
        if not callable(forward_func):
            raise UnsupportedModel(
                f"forward_func is a {type(forward_func).__name__}; expected a module or a function of the inputs"
            )
        PerturbationAttribution.__init__(self, forward_func)
        require("engine", engine, ENGINES)
        require_autocast(autocast)
        self.engine, self.autocast, self.shard = engine, autocast, shard

    @log_usage(part_of_slo=True)
    @torch.no_grad()
    def attribute(
        self,
        inputs: Any,
        sliding_window_shapes: Any = None,
        strides: Any = None,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        perturbations_per_eval: int | str = "auto",
        show_progress: bool = False,
        *,
        masks: Tensor | tuple[Tensor, ...] | None = None,
    ) -> Any:
        """The fall of the output, where it was covered.

        Args:
            inputs: a tensor (N, ...) or a tuple of them.
            sliding_window_shapes: the window's extent on every axis but the batch's, (3, 32, 32) for all channels
                of a picture; a tuple of these for several inputs.
            strides: the step of the window on these axes, or one for all; at most the window's extent.
            baselines: what covers: a number, a tensor, ``"mean"``, ``"blur"``, ``"noise"``, a function of the
                inputs (:func:`~deconvviz.occlusion.fills.filled`), or a tuple of these.
            target: which output, in any form that captum takes.
            additional_forward_args: what else the model takes; tensors have the inputs' batch axis.
            perturbations_per_eval: windows in one call of the model; by default what measures fastest and fits into
                the memory that is left.
            show_progress: show a bar.
            masks: instead of a sliding window, parts of any shape: (W, *S) or (W, C, *S), true where it covers
                (:func:`~deconvviz.occlusion.windows.circles`, :func:`~deconvviz.occlusion.windows.segments`).

        Returns:
            A tensor of the inputs' shape, or a tuple of them; positive where the output fell, NaN where no mask
            covers. If the output is one number for a whole batch, the first axis is 1.

        Raises:
            InvalidInput: windows or strides that captum rejects (it is an ``AssertionError`` too), and others
                that make no sense; or a ``forward_func`` that gives neither one tensor of real numbers nor a number.
            TargetOutOfRange: the output has no such target.
            UnsupportedModel: ``engine="incremental"`` of what can't be computed in part.
            WindowFailed: the model raised; the message has the window's number.
            OtherProcessFailed: another process raised, or was killed.
        """
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise InvalidInput(f"inputs holds a {kind}; expected a tensor (N, ...) or a tuple of tensors")
            if tensor.dim() < 2:
                raise InvalidInput(
                    f"inputs have shape {tuple(tensor.shape)}; expected a batch (N, ...): inputs.unsqueeze(0)"
                )
            if tensor.is_floating_point():
                require_finite(tensor)
        windows = _windows(tensors, sliding_window_shapes, strides, masks)
        baselines = baselines if isinstance(baselines, tuple) else (baselines,) * len(tensors)
        if len(baselines) != len(tensors):
            raise InvalidInput(f"there are {len(baselines)} baselines for {len(tensors)} inputs")
        fills = [filled(tensor, fill) for tensor, fill in zip(tensors, baselines, strict=True)]
        additional = _format_additional_forward_args(additional_forward_args)
        if not all(len(tensor) for tensor in tensors):
            empty = tuple(tensor.new_zeros(tensor.shape, dtype=torch.float32) for tensor in tensors)
            return empty if isinstance(inputs, tuple) else empty[0]
        with together(self.shard), self._context(tensors):
            model = _Selected(self.forward_func, target, additional)
            changed, clean = self._changed(model, tensors, windows, fills)
            flat = clean.reshape(-1)
            batch = _batch_size(perturbations_per_eval)
            results = []
            for i, tensor in enumerate(tensors):
                order = own_part(windows[i].order(), self.shard)
                whole = _full_engines(model, tensors, i, windows[i], fills[i], clean)
                falls = torch.zeros(len(windows[i]), len(flat), dtype=torch.float64, device="cpu")
                for chosen, rows in sweep(
                    self.engine,
                    changed,
                    whole,
                    order,
                    {"output": flat},
                    batch,
                    tensor.device.type,
                    show_progress,
                ):
                    falls[chosen] = (flat - rows["output"]).cpu().double()
                means = torch.from_numpy(windows[i].spread(gathered(falls, self.shard).numpy()))
                results.append(means.to(tensor.device, torch.promote_types(clean.dtype, torch.float32)))
        return tuple(results) if isinstance(inputs, tuple) else results[0]

    def maps(
        self,
        inputs: Tensor,
        patch: int | tuple[int, int],
        stride: int | tuple[int, int],
        layer: Layer,
        fmap: FeatureMaps = "strongest",
        targets: Any = None,
        *,
        baseline: Fill = None,
        score: str = "probability",
        labels: int = 5,
        refine: Refine | None = None,
        perturbations_per_eval: int | str = "auto",
        show_progress: bool = False,
    ) -> OcclusionMaps:
        """The four maps of the paper's figure 7, all from one sweep of a patch over the pictures.

        Args:
            inputs: (N, C, H, W), normalised as the model was trained; the model gives scores (N, classes), or (N,).
            patch, stride: in pixels, one number or (height, width); the patch covers all channels.
            layer: whose feature map is watched, as in :meth:`Deconvnet.project`.
            fmap: a feature map, or ``"strongest"``, the one with the largest total activation in each clean image.
            targets: classes whose score is watched: one, several, or (N, T); by default the most probable one.
            baseline: what covers, as ``baselines`` of :meth:`attribute`.
            score: ``"probability"``, the softmax of the model's output, or ``"logit"``, the output itself.
            labels: how many of the most probable labels to keep at each position.
            refine: compute only some of the windows (:class:`~deconvviz.occlusion.refinement.Refine`); by default all.
            perturbations_per_eval, show_progress: as in :meth:`attribute`.

        Raises:
            InvalidInput, TargetOutOfRange, UnknownLayer, AmbiguousLayer, LayerNotRun, FeatureMapOutOfRange,
            UnsupportedOperation, WindowFailed, OtherProcessFailed: as their names say.
            UnsupportedModel: a function, as maps are a module's; or ``engine="incremental"`` as of :meth:`attribute`.
        """
        batch = _batch_size(perturbations_per_eval)
        model = require_module(self.forward_func)
        with together(self.shard), self._autocast(like(model).device):
            return occlusion_maps(
                model, inputs, patch, stride, layer, fmap, targets, fill=baseline, score=score,
                best=labels, refine=refine, engine=self.engine, batch=batch, progress=show_progress, shard=self.shard,
            )  # fmt: skip

    def _changed(
        self,
        model: _Selected,
        tensors: tuple[Tensor, ...],
        windows: Sequence[Windows],
        fills: Sequence[Tensor],
    ) -> tuple[IncrementalEngine | None, Tensor]:
        """The incremental engine, if it is wanted and possible; and the selected outputs of the clean inputs."""

        def watched() -> tuple[list[CleanPass], int, Tensor]:
            if len(tensors) > 1:
                raise UnsupportedModel(f"the model takes {len(tensors)} inputs")
            images, read = tensors[0], functools.partial(model.read, len(tensors[0]))
            passes, (output,), outputs = clean_passes(model.function, images, model.additional or (), read=read)
            alone = clean = model.select(outputs, 1)
            if len(tensors[0]) > 1:
                clean = model.clean(tensors)
                if not torch.allclose(alone, clean, 1e-2, 1e-3 * float(clean.abs().nan_to_num().max()), equal_nan=True):
                    raise UnsupportedModel("the images of a batch depend on each other")
            return passes, output, clean

        found = None if self.engine == "full" else if_possible(self.engine, watched)
        if found is None:
            return None, model.clean(tensors)
        passes, output, clean = found
        contents = [p.with_all_channels(output, p.contents[output]) for p in passes]
        reference = model.select(torch.cat(contents), 1).reshape(1, -1)

        def changes(outcomes: Iterable[Outcome], count: int) -> Rows:
            """The model's own clean outputs, and what the windows change: nothing is exactly nothing."""
            wholes = [p.with_all_channels(output, o.whole(output)) for p, o in zip(passes, outcomes, strict=True)]
            outputs = torch.stack(wholes, 1).flatten(0, 1)
            return {"output": clean.reshape(1, -1) + (model.select(outputs, count).reshape(count, -1) - reference)}

        return IncrementalEngine(passes, tensors[0], windows[0], fills[0], changes), clean

    @contextlib.contextmanager
    def _context(self, tensors: Sequence[Tensor]) -> Any:
        """The model is put back as found; autocast if asked for."""
        with contextlib.ExitStack() as stack:
            if isinstance(self.forward_func, nn.Module):
                stack.enter_context(left_as_found(self.forward_func))
            stack.enter_context(self._autocast(tensors[0].device))
            yield

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


class _Selected:
    """A function with its additional arguments and the target of its output, for any number of copies of the inputs."""

    def __init__(self, function: Callable[..., Any], target: Any, additional: tuple[Any, ...] | None) -> None:
        self.function, self.target, self.additional = function, as_python(target), additional

    def clean(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The selected outputs of the inputs as they are; a model may write to what it is given."""
        return self.run(tuple(tensor.clone() for tensor in inputs), 1)

    def run(self, inputs: tuple[Tensor, ...], count: int) -> Tensor:
        """The selected outputs of ``count`` copies of the inputs."""
        additional = self.additional
        if additional is not None and count > 1:
            additional = _expand_additional_forward_args(additional, count)
        output = _run_forward(self.function, inputs, None, additional)
        output = one_tensor(as_python(output) if isinstance(output, np.number) else output)
        if isinstance(output, (int, float)):
            output = torch.tensor(output, device="cpu")
        if not isinstance(output, Tensor) or output.is_complex() or output.dtype == torch.bool:
            what = f"{output.dtype} tensor" if isinstance(output, Tensor) else type(output).__name__
            raise InvalidInput(
                f"forward_func gives a {what}; expected one tensor of real numbers or a number: wrap it in a module "
                "that gives one"
            )
        return self.select(output, count)

    def read(self, count: int, output: Tensor) -> Tensor | None:
        """Which channels of outputs like one (1, C, ...) the target is in, for ``count`` images; ``None`` for all."""
        if output.dim() < 2:
            return None
        numbers = torch.arange(output.shape[1], device=output.device).view(1, -1, *[1] * (output.dim() - 2))
        channels = self.select(numbers.expand(count, *output.shape[1:]).float(), 1).unique().long()
        return channels if len(channels) < output.shape[1] else None

    def select(self, outputs: Tensor, count: int) -> Tensor:
        """The target's numbers in raw outputs of ``count`` copies."""
        return selected(outputs, self.target if count == 1 else _expand_target(self.target, count))


def _full_engines(
    model: _Selected, tensors: tuple[Tensor, ...], i: int, windows: Windows, fill: Tensor, clean: Tensor
) -> list[FullEngine]:
    """The engines that call the function on copies of the inputs, the ``i``-th covered: in each layout of pictures."""

    def run(inputs: tuple[Tensor, ...], count: int) -> Rows:
        outputs = model.run(inputs, count)
        if outputs.numel() != count * clean.numel():
            raise InvalidInput(
                f"the output is {tuple(clean.shape)} for the inputs and {tuple(outputs.shape)} for {count} copies of "
                "them, so it does not grow with the batch: perturbations_per_eval can be 1 or 'auto'"
            )
        return {"output": outputs.reshape(count, -1)}

    pictures = tensors[i].dim() == 4 and isinstance(model.function, nn.Module)
    return [FullEngine(run, tensors, i, windows, fill, layout) for layout in ((False, True) if pictures else (False,))]


def _windows(tensors: tuple[Tensor, ...], shapes: Any, strides: Any, masks: Any) -> list[Windows]:
    """The windows over each input, checked as captum does."""
    if masks is not None:
        if shapes is not None or strides is not None:
            raise InvalidInput("both masks and sliding_window_shapes or strides are given: choose one")
        stacks = masks if isinstance(masks, tuple) else (masks,)
        if len(stacks) != len(tensors):
            raise InvalidInput(f"there are {len(stacks)} stacks of masks for {len(tensors)} inputs")
        return [Windows.covering(t.shape[1:], stack) for t, stack in zip(tensors, stacks, strict=True)]
    if shapes is None:
        raise InvalidInput("sliding_window_shapes is missing: give (3, 32, 32) for a picture, or masks")
    try:
        steps = _format_and_verify_strides(as_python(strides), tensors)
        extents = _format_and_verify_sliding_window_shapes(as_python(shapes), tensors)
    except AssertionError as error:
        raise InvalidInput(str(error)) from error
    except (TypeError, IndexError) as error:
        raise InvalidInput(
            f"sliding_window_shapes is {shapes!r} and strides {strides!r}; expected an extent for every axis but the "
            "batch's, such as (3, 32, 32) for pictures (N, 3, H, W), and steps alike or one for all"
        ) from error
    windows = []
    for tensor, extent, stride in zip(tensors, extents, steps, strict=True):
        shape = tuple(tensor.shape[1:])
        step = (stride,) * len(shape) if isinstance(stride, int) else stride
        for n, window, s in zip(shape, extent, step, strict=True):
            if not 1 <= window <= n:
                raise InvalidInput(
                    f"the window {tuple(extent)} does not fit an input {shape}: expected 1 to its extent"
                )
            if s < 1 or (window < n and s > window):
                raise InvalidInput(
                    f"the stride {tuple(step)} for windows {tuple(extent)} leaves gaps: expected 1 to their extent"
                )
        windows.append(Windows.sliding(shape, extent, step))
    return windows


def _batch_size(asked: Any) -> int | None:
    """Windows in a batch as asked for; ``None`` for ``"auto"``."""
    if isinstance(asked, str):
        require("perturbations_per_eval", asked, ("auto",))
        return None
    return whole_number("perturbations_per_eval", asked)
