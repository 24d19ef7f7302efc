"""Figure 7 of the paper: what four quantities do while a grey patch moves over a picture, from one sweep."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from deconvviz.capture import left_as_found, require_module, watch
from deconvviz.capture.reading import reading
from deconvviz.deconvnet import Deconvnet
from deconvviz.errors import InvalidInput, TargetOutOfRange
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD
from deconvviz.incremental import CleanPass, Outcome
from deconvviz.inputs import input_images, integer, whole_number
from deconvviz.layers import Layer, find_call, layer_name, locate
from deconvviz.occlusion.clean_passes import clean_passes, if_possible
from deconvviz.occlusion.fills import Fill, filled
from deconvviz.occlusion.refinement import Refine, Refinement, refined
from deconvviz.occlusion.sweep import FullEngine, IncrementalEngine, Rows, sweep
from deconvviz.occlusion.windows import Windows
from deconvviz.plotting.occlusion import figure7
from deconvviz.shards import gathered, own_part
from deconvviz.units import FeatureMaps, feature_maps, require, totals

SCORES = ("probability", "logit")


@dataclass(frozen=True)
class OcclusionMaps:
    """The four maps of figure 7. One *cell* (y, x) is one position of the patch; N images, T targets.

    Tensors are where the images are, but the boxes on the CPU.
    """

    images: Tensor
    """(N, C, H, W), as given."""
    boxes: Tensor
    """(Y, X, 4) in pixels: y0, y1, x0, x1 of the patch, ends excluded."""
    fill: Tensor
    """What covered, broadcastable to the images."""
    layer: str
    fmaps: Tensor
    """(N,): the feature map that is watched in each image."""
    activation_cells: Tensor
    """(b), (N, Y, X): the feature map's total activation with the patch there."""
    clean_activation: Tensor
    """(N,): without a patch."""
    projection: Tensor
    """(c), (N, C, H, W): the feature map's strongest unit in the clean image, back to the pixels."""
    targets: Tensor
    """(N, T)."""
    score: str
    """``"probability"``: the softmax of the model's output; ``"logit"``: the output itself."""
    score_cells: Tensor
    """(d), (N, T, Y, X): each target's score with the patch there."""
    clean_scores: Tensor
    """(N, T): without a patch."""
    label_cells: Tensor
    """(e), (N, k, Y, X): the labels with the highest scores with the patch there, best first."""
    label_scores: Tensor
    """(N, k, Y, X): theirs."""
    refinements: Sequence[Refinement] = ()
    """Of a refined sweep, one for each image; none if every window was computed."""

    @property
    def activation_pixels(self) -> Tensor:
        """(b) in pixels, (N, H, W): the mean over the patches that covered the pixel."""
        return self.in_pixels(self.activation_cells)

    @property
    def score_pixels(self) -> Tensor:
        """(d) in pixels, (N, T, H, W): the mean over the patches that covered the pixel."""
        return self.in_pixels(self.score_cells)

    def in_pixels(self, cells: Tensor) -> Tensor:
        """A map in cells (..., Y, X) as one in pixels (..., H, W): the mean over the patches that cover each pixel,
        NaN where none does."""
        boxes = self.boxes.flatten(0, 1).tolist()
        flat = cells.flatten(0, -3).flatten(-2) if cells.dim() > 2 else cells.reshape(1, -1)
        space = self.images.shape[2:]
        total, counts = flat.new_zeros(len(flat), *space), flat.new_zeros(space)
        for number, (y0, y1, x0, x1) in enumerate(boxes):
            total[:, y0:y1, x0:x1] += flat[:, number].view(-1, 1, 1)
            counts[y0:y1, x0:x1] += 1
        return (total / counts).view(*cells.shape[:-2], *space)

    def figure(
        self,
        image: int = 0,
        labels: Sequence[str] | None = None,
        others: Sequence[Tensor] = (),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> Figure:
        """Draw one image's row of figure 7: the patch, (b), (c), (d) and (e).

        Args:
            image: which of the N.
            labels: the classes' names, by number.
            others: projections (C, H, W) of the same feature map from other images, shown beside (c).
            mean, std: those that the images were normalised with.

        Raises:
            InvalidInput: no such image.
        """
        return figure7(self, image, labels, others, mean, std)


def occlusion_maps(
    model: Any,
    images: Tensor,
    patch: int | tuple[int, int],
    stride: int | tuple[int, int],
    layer: Layer,
    fmap: FeatureMaps = "strongest",
    targets: Any = None,
    *,
    fill: Fill = None,
    score: str = "probability",
    best: int = 5,
    refine: Refine | None = None,
    engine: str = "auto",
    batch: int | None = None,
    progress: bool = False,
    shard: bool = False,
) -> OcclusionMaps:
    """See :meth:`deconvviz.OcclusionSensitivity.maps`."""
    model = require_module(model)
    require("score", score, SCORES)
    best = whole_number("labels", best)
    images = input_images(images, model)
    if refine is not None and not isinstance(refine, Refine):
        raise InvalidInput(
            f"refine is {refine!r}; expected a deconvviz.occlusion.Refine, or None to compute every window"
        )
    if images.dim() != 4:
        raise InvalidInput(f"images have shape {tuple(images.shape)}; expected (N, C, H, W)")
    windows, grid = _grid(images, patch, stride)
    content = filled(images, fill)
    with left_as_found(model), torch.no_grad():
        found = _Maps(model, images, layer, fmap, targets, score, best, shard)
        with Deconvnet(model) as deconv:
            projections = [deconv.project(layer, int(m), inputs=images[n : n + 1]) for n, m in enumerate(found.fmaps)]
        refinements: list[Refinement] = []
        if refine is None:
            rows = found.sweep(images, windows, content, engine, batch, progress)
        else:
            rows, refinements = _refined(found, images, windows, grid, content, engine, batch, progress, refine)
    cells = {name: values.movedim(0, -1).unflatten(-1, grid).to(images.device) for name, values in rows.items()}
    boxes = [[edge for side in windows.box(w)[1:] for edge in (side.start, side.stop)] for w in range(len(windows))]
    return OcclusionMaps(
        images=images,
        boxes=torch.tensor(boxes, device="cpu").view(*grid, 4),
        fill=content,
        layer=layer_name(model, layer),
        fmaps=found.fmaps,
        activation_cells=cells["activation"],
        clean_activation=found.clean["activation"],
        projection=torch.cat(projections),
        targets=found.targets,
        score=score,
        score_cells=cells["scores"],
        clean_scores=found.clean["scores"],
        label_cells=cells["labels"],
        label_scores=cells["label_scores"],
        refinements=tuple(refinements),
    )


def _grid(images: Tensor, patch: Any, stride: Any) -> tuple[Windows, tuple[int, int]]:
    """Windows over whole pictures, row by row; and how many rows and columns."""
    channels, *space = images.shape[1:]
    sides = []
    for name, given in (("patch", patch), ("stride", stride)):
        pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
        try:
            pair = tuple(map(integer, pair))
        except TypeError:
            pair = ()
        if len(pair) != 2 or min(pair) < 1:
            raise InvalidInput(f"{name} is {given!r}; expected pixels, one number or (height, width), from 1 on")
        sides.append(pair)
    extent, steps = sides
    if any(w > n for w, n in zip(extent, space, strict=True)):
        raise InvalidInput(f"patch {extent} does not fit images of {space[0]} x {space[1]} pixels")
    starts = [np.arange(0, min(n, n - w + s), s, dtype=np.int64) for n, w, s in zip(space, extent, steps, strict=True)]
    y, x = np.meshgrid(*starts, indexing="ij")
    firsts = np.stack([np.zeros(y.size, np.int64), y.ravel(), x.ravel()])
    return Windows(tuple(images.shape[1:]), firsts, (channels, *extent)), (len(starts[0]), len(starts[1]))


class _Maps:
    """What is watched while the patch moves, and its value in the clean images."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        layer: Layer,
        fmap: Any,
        targets: Any,
        score: str,
        best: int,
        shard: bool,
    ) -> None:
        self.model, self.layer, self.score, self.shard = model, layer, score, shard
        tape, _ = watch(model, (images[:1],))
        call = find_call(tape, *locate(model, layer))
        self.call = (call.name, call.number)
        self._untried = True
        self._passes: tuple[list[CleanPass], tuple[int, ...], Tensor] | None = None
        activation, outputs = self._pass(images)
        if activation.dim() < 2 or outputs.dim() not in (1, 2) or not len(activation) == len(outputs) == len(images):
            raise InvalidInput(
                f"the layer gives {tuple(activation.shape)} and the model {tuple(outputs.shape)} for {len(images)} "
                "image(s); expected feature maps (N, C, ...) and scores (N, classes) or (N,): wrap a model of other "
                "outputs in a module that makes such scores of them"
            )
        outputs = _of_classes(outputs)
        single, maps = feature_maps(activation, fmap)
        if not single:
            raise InvalidInput(f"fmap is {fmap!r}; expected one feature map or 'strongest'")
        self.fmaps = maps[:, 0]
        if score == "probability" and outputs.shape[1] == 1:
            raise InvalidInput("the model gives one number an image, whose softmax is always 1: use score='logit'")
        self.best = min(best, outputs.shape[1])
        self.targets = _targets(targets, outputs)
        self.clean = {name: rows[0] for name, rows in self._rows(activation, outputs, 1).items()}
        self.magnitude = self._rows(activation.abs(), outputs, 1)["activation"][0]

    def sweep(
        self, images: Tensor, windows: Windows, fill: Tensor, engine: str, batch: int | None, progress: bool,
        only: NDArray[np.int64] | None = None,
    ) -> Rows:  # fmt: skip
        """The results of every window, or of those of the numbers ``only``."""
        changed = None if engine == "full" else self._changed(images, windows, fill, engine)

        def run(inputs: tuple[Tensor, ...], count: int) -> Rows:
            return self._rows(*self._pass(inputs[0]), count)

        whole = [FullEngine(run, (images,), 0, windows, fill, layout) for layout in (False, True)]
        order = windows.order()
        if only is not None:
            order = order[np.isin(order, only)]
        numbers, parts = [np.zeros(0, np.int64)], []
        own = own_part(order, self.shard)
        compared = {name: self.clean[name] for name in ("activation", "scores")}
        device, scales = images.device.type, {"activation": self.magnitude}
        for chosen, rows in sweep(engine, changed, whole, own, compared, batch, device, progress, scales):
            numbers.append(chosen)
            parts.append({name: values.cpu() for name, values in rows.items()})
        places = torch.from_numpy(np.searchsorted(np.sort(order), np.concatenate(numbers)))
        results = {}
        for name, clean in self.clean.items():
            everything = torch.zeros(len(order), *clean.shape, dtype=clean.dtype, device="cpu")
            if parts:
                everything[places] = torch.cat([part[name] for part in parts])
            results[name] = gathered(everything, self.shard)
        return results

    def only(self, n: int) -> _Maps:
        """The same for one of the images."""
        one = copy.copy(self)
        one._untried = True
        one.fmaps, one.targets = self.fmaps[n : n + 1], self.targets[n : n + 1]
        one.magnitude = self.magnitude[n : n + 1]
        one.clean = {name: values[n : n + 1] for name, values in self.clean.items()}
        return one

    def _changed(self, images: Tensor, windows: Windows, fill: Tensor, engine: str) -> IncrementalEngine | None:
        if self._untried:  # one refined sweep is several
            place, self._untried = f"{self.call[0]}#{self.call[1]}", False
            self._passes = if_possible(engine, lambda: clean_passes(self.model, images, (), place))
        if self._passes is None:
            return None
        passes, (output, value), _ = self._passes

        def finish(outcomes: Iterable[Outcome], count: int) -> Rows:
            found = [(o.whole(output), o.total(value, int(m))) for o, m in zip(outcomes, self.fmaps, strict=True)]
            outputs, activations = (torch.stack(tensors, 1) for tensors in zip(*found, strict=True))
            return self._scores(activations, outputs.flatten(0, 1), count)

        return IncrementalEngine(passes, images, windows, fill, finish)

    def _pass(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's activation, and the model's output."""
        found: dict[int, Tensor] = {}
        calls = list(dict.fromkeys([self.call, ("", 1)]))  # one, where the layer is the model itself
        with reading(self.model, calls, lambda i, t: found.update({i: t.clone()})) as run:
            run(images)
        return found[0], found[len(calls) - 1]

    def _rows(self, activation: Tensor, outputs: Tensor, count: int) -> Rows:
        """Results of ``count`` copies of the images."""
        chosen = activation.unflatten(0, (count, -1))[:, torch.arange(len(self.fmaps), device="cpu"), self.fmaps]
        return self._scores(totals(chosen), outputs, count)

    def _scores(self, activations: Tensor, outputs: Tensor, count: int) -> Rows:
        outputs = _of_classes(outputs)
        scores = (outputs.softmax(1) if self.score == "probability" else outputs).unflatten(0, (count, -1))
        best = scores.topk(self.best, dim=2)
        targets = self.targets.expand(count, -1, -1)
        return {
            "activation": activations,
            "scores": scores.gather(2, targets),
            "labels": best.indices,
            "label_scores": best.values,
        }


def _of_classes(outputs: Tensor) -> Tensor:
    """(N, classes) of a model that may give one number an image, (N,)."""
    return outputs.unsqueeze(1) if outputs.dim() == 1 else outputs


def _targets(given: Any, outputs: Tensor) -> Tensor:
    """(N, T): the classes asked for, by default each image's most probable one."""
    if given is None:
        return outputs.argmax(1, keepdim=True)
    try:
        targets = torch.as_tensor(given, device="cpu")
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError
        targets = targets.to(outputs.device).long()
        targets = targets.view(-1).expand(len(outputs), -1) if targets.dim() < 2 else targets.expand(len(outputs), -1)
    except (RuntimeError, TypeError, ValueError):
        raise InvalidInput(
            f"targets are {given!r}; expected a class, several for all images, or a tensor ({len(outputs)}, T)"
        ) from None
    if targets.numel() == 0 or int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[1]:
        raise TargetOutOfRange(f"targets are {given!r}, but the model has classes 0 to {outputs.shape[1] - 1}")
    return targets


def _refined(
    found: _Maps, images: Tensor, windows: Windows, grid: tuple[int, int], fill: Tensor, engine: str,
    batch: int | None, progress: bool, refine: Refine,
) -> tuple[Rows, list[Refinement]]:  # fmt: skip
    """Each image by itself, as each changes elsewhere."""
    parts, refinements = [], []
    content = fill.expand(images.shape)
    for n in range(len(images)):
        one, image, fills = found.only(n), images[n : n + 1], content[n : n + 1]

        def evaluate(only: NDArray[np.int64], one: _Maps = one, image: Tensor = image, fills: Tensor = fills) -> Rows:
            return one.sweep(image, windows, fills, engine, batch, progress, only)

        rows, refinement = refined(evaluate, grid, lambda rows: rows["scores"][:, 0, 0], refine)
        parts.append(rows)
        refinements.append(refinement)
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}, refinements
