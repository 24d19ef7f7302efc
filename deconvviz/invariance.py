"""How features move when the picture does: translation, scale, rotation (the paper's figure 5).

For images x, a transform T of growing amount t and a layer's feature vector f, the curve is the Euclidean distance

    d(t) = ‖f(T_t x) - f(x)‖

and beside it the probability of the true class. A layer is invariant where the curve stays at zero; the paper finds
layer 1 thrown off by the smallest change, and the top layer nearly linear in translation and scale, but in rotation
only of symmetric things.

Caveats: what a transform moves in from outside the picture is zero, the mean colour of normalised images; it adds to
the distance. Distances of layers differ in scale: compare shapes, or divide by :attr:`InvarianceCurves.norms`.

>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
>>> curves = invariance(model, torch.randn(2, 3, 16, 16), ["1"], "rotation", amounts=[0, 90, 180])
>>> curves.distances["1"].shape, curves.probability.shape
(torch.Size([2, 3]), torch.Size([2, 3]))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from deconvviz.capture import evaluating, require_module
from deconvviz.errors import InvalidInput, TargetOutOfRange
from deconvviz.features import features, layer_names
from deconvviz.inputs import input_images, input_pictures
from deconvviz.layers import Layer
from deconvviz.plotting.curves import invariance_curves
from deconvviz.precision import at_least_float32
from deconvviz.units import require

Transform = Callable[[Tensor, float], Tensor]


def translation(images: Tensor, pixels: float) -> Tensor:
    """Images (N, C, ..., H, W) shifted down by ``pixels``, up if negative."""
    return _moved(images, shift=pixels)


def scale(images: Tensor, factor: float) -> Tensor:
    """Images magnified about their centre."""
    return _moved(images, factor=factor)


def rotation(images: Tensor, degrees: float) -> Tensor:
    """Images turned clockwise about their centre."""
    return _moved(images, angle=degrees)


def _moved(images: Tensor, angle: float = 0.0, shift: float = 0.0, factor: float = 1.0) -> Tensor:
    exact = images.to(at_least_float32(images))  # places between pixels have too few bits in half precision
    planes = exact.flatten(1, -3)  # of clips each frame is moved alike
    moved = affine(planes, angle, [0.0, shift], factor, [0.0, 0.0], InterpolationMode.BILINEAR)
    return moved.view_as(images).to(images.dtype)


class _Sweep(NamedTuple):
    transform: Transform
    unit: str
    amounts: Callable[[int], list[float]]
    """The paper's range, for images of a height in pixels."""


SWEEPS = {
    "translation": _Sweep(translation, "pixels down", lambda height: _steps(-60 * height / 224, 60 * height / 224, 25)),
    "scale": _Sweep(scale, "factor", lambda height: _steps(1, 1.8, 17)),
    "rotation": _Sweep(rotation, "degrees clockwise", lambda height: _steps(0, 360, 25)),
}


def _steps(first: float, last: float, count: int) -> list[float]:
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu").tolist()


@dataclass(frozen=True)
class InvarianceCurves:
    """One sweep of A amounts over N images."""

    transform: str
    unit: str
    """Of the amounts."""
    amounts: tuple[float, ...]
    distances: Mapping[str, Tensor]
    """For each layer (N, A), in the unit of its features; all numbers are float32, or float64 as the model's."""
    norms: Mapping[str, Tensor]
    """For each layer ‖f(x)‖ (N,)."""
    probability: Tensor | None
    """Of each image's target (N, A), 0..1; ``None`` if the model has no scores (N, K) to take a softmax of."""

    def figure(self, labels: Sequence[str] | None = None) -> Figure:
        """One plot a layer and one of the probability, a line for each image, named by ``labels``."""
        return invariance_curves(self, labels)


def invariance(
    model: nn.Module,
    images: Tensor,
    layers: Layer | Sequence[Layer],
    transform: str | Transform = "translation",
    amounts: Sequence[float] | None = None,
    targets: Sequence[int] | Tensor | None = None,
) -> InvarianceCurves:
    """Follow the features of images under a transform.

    Args:
        model: a classifier that puts out logits (N, K), or any module; it is run in eval mode and left as it
            was found.
        images: (N, C, H, W), as the model takes them, or clips (N, C, T, H, W); signals (N, C, L) need a function.
        layers: dotted names, modules or calls, one or several.
        transform: ``"translation"`` (pixels, down), ``"scale"`` (a factor) or ``"rotation"`` (degrees), or a function
            of images and an amount.
        amounts: of the transform; by default the paper's ranges, translation in proportion to the height.
        targets: each image's true class; by default the most probable one of the untransformed image.

    Raises:
        InvalidInput: an unknown transform, amounts that it does not take or none for a function, or images that the
            model does not take.
        TargetOutOfRange: not one class for each image.
        UnknownLayer, AmbiguousLayer, LayerNotRun: as their names say.
    """
    model = require_module(model)
    images = input_images(images, model)
    if callable(transform):
        move, unit = transform, "amount"
    else:
        require("transform", transform, tuple(SWEEPS))
        images = input_pictures(images, model)
        move, unit, default = SWEEPS[transform]
        amounts = default(images.shape[-2]) if amounts is None else amounts
    steps = _numbers(amounts)
    names = layer_names(model, layers)
    with evaluating(model):
        *clean, scores = features(model, images, [*names, ""])
        classes = _classes(scores, targets)
        distances, probabilities = [], []
        for amount in steps:
            *moved, scores = features(model, _transformed(move, images, amount), [*names, ""])
            for name, m, c in zip(names, moved, clean, strict=True):
                if m.shape != c.shape:
                    raise InvalidInput(
                        f"at amount {amount:g} layer {name!r} gives shape {tuple(m.shape)}, at first {tuple(c.shape)}: "
                        "expected a transform that keeps the images' number and size"
                    )
            distances.append([_norm(m - c) for m, c in zip(moved, clean, strict=True)])
            if classes is not None:
                probabilities.append(scores.softmax(1, at_least_float32(scores)).gather(1, classes[:, None])[:, 0])
    return InvarianceCurves(
        transform if isinstance(transform, str) else getattr(transform, "__name__", "transform"),
        unit,
        tuple(steps),
        {name: torch.stack(d, 1) for name, d in zip(names, zip(*distances, strict=True), strict=True)},
        {name: _norm(c) for name, c in zip(names, clean, strict=True)},
        torch.stack(probabilities, 1) if probabilities else None,
    )


def _norm(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features.flatten(1), dim=1, dtype=at_least_float32(features))


def _numbers(amounts: Any) -> list[float]:
    try:
        numbers = [float(amount) for amount in amounts]
    except (TypeError, ValueError):
        numbers = []
    if not numbers:
        raise InvalidInput(
            f"amounts is {amounts!r}; expected the numbers that the transform is called with, one or more"
        )
    return numbers


def _transformed(move: Transform, images: Tensor, amount: float) -> Tensor:
    try:
        return move(images.clone(), amount)  # it may work in place
    except ValueError as error:
        raise InvalidInput(f"amount {amount:g} was refused by the transform: {error}") from error


def _classes(scores: Tensor, targets: Sequence[int] | Tensor | None) -> Tensor | None:
    """One class an image, or ``None`` if there are no scores and none was asked for."""
    if targets is None:
        return scores.argmax(1) if scores.dim() == 2 else None
    if scores.dim() != 2:
        raise InvalidInput(f"the model gives shape {tuple(scores.shape)}, no scores (N, K): leave targets out")
    count = scores.shape[1]
    try:
        classes = torch.as_tensor(targets, device=scores.device)
    except (TypeError, ValueError, RuntimeError):
        classes = scores.new_empty(0)
    if (
        classes.shape != scores.shape[:1]
        or classes.is_floating_point()
        or classes.dtype == torch.bool
        or not ((classes >= 0) & (classes < count)).all()
    ):
        raise TargetOutOfRange(
            f"targets is {targets!r}, for scores of shape {tuple(scores.shape)}; expected one class for each of the "
            f"{len(scores)} images, from 0 to {count - 1}"
        )
    return classes.long()
