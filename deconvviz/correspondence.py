"""Does a network treat the same part alike in different pictures? (the paper's correspondence analysis, table 1)

Occlude the same part in N images, say each dog's left eye. With x_i a layer's features of image i and x̃_i those of
the occluded one, ε_i = x_i - x̃_i says what the part does there. If the network knows the part, it changes the same
features in the same direction in every image:

    Δ = mean over pairs i < j of the share of features whose sign(ε_i) differs from sign(ε_j)

so Δ is 0 where the part is treated alike and larger where it is not; boxes of the same sizes at random places are the
control. The paper sums over pairs; its printed values are shares of one pair and feature, as these are.

Caveat: signs are -1, 0 or 1, and features that neither occlusion moves agree at 0. So Δ is small for a layer whose
units see little of the picture, for a small box, and for one on a plain background, as random ones often are. Beside Δ
stands therefore the same share among the features that either of both moves, which none of these changes.

>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
>>> boxes = {"eye": [(4, 8, 4, 8), (2, 6, 6, 10)]}
>>> table = correspondence(model, torch.randn(2, 3, 16, 16), boxes, ["3"])
>>> [row.part for row in table.rows]
['eye', 'random']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from deconvviz.capture import evaluating, require_module
from deconvviz.errors import InvalidInput
from deconvviz.features import features, layer_names
from deconvviz.inputs import input_pictures, whole_number
from deconvviz.layers import Layer
from deconvviz.occlusion.fills import Fill, filled

RANDOM = "random"


@dataclass(frozen=True)
class Consistency:
    """One part at one layer."""

    part: str
    layer: str
    pairs: Tensor
    """The share of features whose signs differ (P,), 0..1, for each pair of images, draw after draw."""
    moved: Tensor
    """The share of features that the occlusion of either image moves (P,), 0..1."""

    @property
    def mean(self) -> float:
        """Δ, 0..1: lower is more alike."""
        return self.pairs.mean().item()

    @property
    def std(self) -> float:
        """Over the pairs; 0 for a single one."""
        return self.pairs.std(correction=0).item()

    @property
    def mean_among_moved(self) -> float:
        """Δ among the features that are moved, 0..1; 0 where none is."""
        return (self.pairs / self.moved.clamp(min=1e-12)).mean().item()


@dataclass(frozen=True)
class Correspondence:
    """Every part, then the random control, at every layer; prints as the paper's table, with Δ among the moved."""

    rows: tuple[Consistency, ...]

    def __getitem__(self, place: tuple[str, str]) -> Consistency:
        for row in self.rows:
            if (row.part, row.layer) == place:
                return row
        choices = ", ".join(repr((row.part, row.layer)) for row in self.rows)
        raise InvalidInput(f"no row {place!r}; expected (part, layer), one of {choices}")

    def __str__(self) -> str:
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        parts = list(dict.fromkeys(row.part for row in self.rows))
        width = max(len("occluded"), *map(len, parts))
        lines = [f"{'occluded':<{width}}  " + "  ".join(f"{layer:>23}" for layer in layers)]
        for part in parts:
            rows = [self[part, layer] for layer in layers]
            cells = (f"{row.mean:.3f} ± {row.std:.3f} ({row.mean_among_moved:.3f})" for row in rows)
            lines.append(f"{part:<{width}}  " + "  ".join(f"{cell:>23}" for cell in cells))
        return "\n".join(lines)


def correspondence(
    model: nn.Module,
    images: Tensor,
    boxes: Mapping[str, Any],
    layers: Layer | Sequence[Layer],
    fill: Fill = 0.0,
    draws: int = 10,
    seed: int = 0,
) -> Correspondence:
    """Compare what occluding the same part does in different images, and what random boxes do.

    Args:
        model: any module; it is run in eval mode and left as it was found.
        images: (N, C, H, W) with N >= 2, as the model takes them; of clips (N, C, T, H, W) a box hides all frames.
        boxes: for each part's name one box an image, (N, 4): y0, y1, x0, x1 in pixels, ends excluded.
        layers: dotted names, modules or calls, one or several.
        fill: what a box is filled with, see :func:`~deconvviz.occlusion.fills.filled`; 0 is the mean colour of
            normalised images.
        draws: how often random boxes are drawn, one an image, of the sizes of each part in turn.
        seed: of the draws.

    Raises:
        InvalidInput: fewer than two images, no parts, boxes that are not (N, 4) or not inside the images, or another
            argument that makes no sense.
        UnknownLayer, AmbiguousLayer, LayerNotRun: as their names say.
    """
    model = require_module(model)
    images = input_pictures(images, model)
    draws, seed = whole_number("draws", draws), whole_number("seed", seed, 0)
    if not isinstance(boxes, Mapping):
        raise InvalidInput(f"boxes is a {type(boxes).__name__}; expected a mapping from parts to boxes")
    parts = {name: _checked(name, box, images) for name, box in boxes.items()}
    if len(images) < 2 or not parts or RANDOM in parts:
        raise InvalidInput(
            f"{len(images)} images and parts {list(parts)}; expected two images or more, and one part or more, none "
            f"of them called {RANDOM!r}"
        )
    names, cover = layer_names(model, layers), filled(images, fill).expand_as(images)
    drawn = _random_boxes(list(parts.values()), images, draws, seed)
    rows = []
    with evaluating(model):
        clean = features(model, images, names)
        for part, occlusions in [*((name, [box]) for name, box in parts.items()), (RANDOM, drawn)]:
            differing: list[list[Tensor]] = [[] for _ in names]
            for occlusion in occlusions:
                occluded = features(model, _occluded(images, occlusion, cover), names)
                for found, x, hidden in zip(differing, clean, occluded, strict=True):
                    found.append(_compared((x - hidden).flatten(1).sign().cpu()))
            rows += [
                Consistency(part, name, *torch.cat(found, 1)) for name, found in zip(names, differing, strict=True)
            ]
    return Correspondence(tuple(rows))


def _compared(signs: Tensor) -> Tensor:
    """For each pair of rows of (N, D): the shares of signs that differ, and of those not both zero (2, P)."""
    shares = [
        torch.stack([(a != b).double().mean(), ((a != 0) | (b != 0)).double().mean()])
        for a, b in combinations(signs, 2)
    ]
    return torch.stack(shares, 1)


def _occluded(images: Tensor, boxes: Tensor, cover: Tensor) -> Tensor:
    hidden = images.clone()
    for image, filling, (y0, y1, x0, x1) in zip(hidden, cover, boxes.tolist(), strict=True):
        image[..., y0:y1, x0:x1] = filling[..., y0:y1, x0:x1]
    return hidden


def _random_boxes(parts: Sequence[Tensor], images: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """Boxes (N, 4) of the sizes of each part in turn, anywhere inside the images."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor(images.shape[-2:], device="cpu")
    for draw in range(draws):
        boxes = parts[draw % len(parts)]
        size = torch.stack([boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]], 1)
        start = (torch.rand(len(boxes), 2, generator=generator, device="cpu") * (room - size + 1)).long()
        yield torch.stack([start, start + size], 2).flatten(1)


def _checked(name: str, box: Any, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    expected = f"expected ({len(images)}, 4): y0 < y1 <= {height} and x0 < x1 <= {width} in whole pixels for each image"
    try:
        boxes = torch.as_tensor(box, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"the boxes of {name!r} are {box!r}; {expected}") from None
    if boxes.shape != (len(images), 4) or boxes.is_floating_point():
        raise InvalidInput(f"the boxes of {name!r} are {boxes.dtype} of shape {tuple(boxes.shape)}; {expected}")
    y0, y1, x0, x1 = boxes.T
    wrong = (y0 < 0) | (y0 >= y1) | (y1 > height) | (x0 < 0) | (x0 >= x1) | (x1 > width)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise InvalidInput(f"the box of {name!r} in image {first} is {boxes[first].tolist()}; {expected}")
    return boxes
