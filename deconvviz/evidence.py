"""Which feature maps carry a class: the strongest ones? (the paper's figure 7, and what it left open)

Figure 7 found the strongest map of layer 5 following a text or a face while the class followed a wheel or a dog. So
for an image and a class, three numbers for every feature map a_c of a layer, usually the last convolutional one:

    activation  Σ a_c                            how strong the map is (the paper's measure)
    effect      s(a) - s(a with a_c = 0)         how far the class's score s falls when the map is ablated
    weight      Σ ∂s/∂a_c                        how far s rises, to first order, if the map rises by one everywhere

Where the rest of the network is an average and a linear layer, effect = weight x mean(a_c) exactly: a strong map of no
weight is no evidence.

Caveat: one map is ablated at a time; what several carry together, or what another would take over, is not seen.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
>>> found = evidence(model, torch.randn(1, 3, 16, 16), "1", target=4)
>>> found.effect.shape, 1 <= found.rank_of_strongest <= 8
(torch.Size([8]), True)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from deconvviz.capture import evaluating, require_module, watch
from deconvviz.errors import InvalidInput, TargetOutOfRange
from deconvviz.inputs import input_image, integer
from deconvviz.layers import Layer, described, find_call, layer_name, locate, only_output
from deconvviz.plotting.curves import evidence_scatter
from deconvviz.precision import at_least_float32
from deconvviz.tape import Tape, one_tensor
from deconvviz.units import totals

BATCH = 8
"""How many ablations run at once."""


@dataclass(frozen=True)
class Evidence:
    """What each of a layer's C feature maps does for one class in one image."""

    layer: str
    target: int
    score: float
    """The class's score, usually a logit."""
    activation: Tensor
    """(C,): the map's total."""
    effect: Tensor
    """(C,), in the score's unit: positive if the map speaks for the class, negative if against it."""
    weight: Tensor
    """(C,), in the score's unit for one unit of activation everywhere."""

    @property
    def strongest(self) -> int:
        """The map of the largest total activation."""
        return int(self.activation.argmax())

    @property
    def rank_of_strongest(self) -> int:
        """1 if no map has a larger effect than the strongest one, 2 if one has, ..., up to C."""
        return 1 + int((self.effect > self.effect[self.strongest]).sum())

    @property
    def share_of_strongest(self) -> float:
        """The strongest map's effect as a share of all that speaks for the class; negative if it speaks against."""
        return float(self.effect[self.strongest] / self.effect.clamp(min=0).sum().clamp(min=1e-12))

    def figure(self) -> Figure:
        """Each map's effect over its activation, the strongest one marked."""
        return evidence_scatter(self)


def evidence(model: nn.Module, image: Tensor, layer: Layer, target: int | None = None) -> Evidence:
    """Ablate a layer's feature maps one by one, and see what each does to a class's score.

    Only what follows the layer is computed again for each map.

    Args:
        model: a classifier with scores (N, K), before a softmax; it is run in eval mode and left as it was found.
        image: (1, C, H, W), as the model takes it.
        layer: a dotted name, a module or a call, whose output is feature maps (N, C, ...).
        target: the class; by default the image's most probable one.

    Raises:
        InvalidInput: not one image, or not a classifier.
        TargetOutOfRange: there is no such class.
        UnknownLayer, AmbiguousLayer, LayerNotRun: as their names say.
    """
    model = require_module(model)
    image = input_image(image, model)
    name, number = locate(model, layer)
    with evaluating(model):  # a tape replays passes of its own batch size: each row is to lack another map
        tape, outputs = watch(model, [image.expand(BATCH, *image.shape[1:])])
    scores = one_tensor(outputs)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise InvalidInput("the model does not put out one tensor of scores (N, K); expected a classifier")
    classes = scores.shape[1]
    try:
        chosen = integer(scores[0].argmax() if target is None else target)
    except TypeError:
        chosen = -1
    if not 0 <= chosen < classes:
        raise TargetOutOfRange(f"target is {target!r}; expected a class from 0 to {classes - 1}")
    place, output = only_output(find_call(tape, name, number)), only_output(tape.calls[-1])
    maps = tape.replay(place)
    if maps.dim() < 2 or len(maps) != BATCH:
        raise InvalidInput(f"{described(name)} gives shape {tuple(maps.shape)}; expected feature maps (N, C, ...)")
    score = _scores(tape, place, output, maps)[0, chosen]
    effect = score - _ablated(tape, place, output, maps, chosen)
    weight = _weight(tape, place, output, maps, chosen)
    return Evidence(layer_name(model, layer), chosen, float(score), totals(maps[:1])[0], effect, weight)


def _scores(tape: Tape, place: int, output: int, maps: Tensor, gradient: bool = False) -> Tensor:
    """The scores (N, K) that the pass would have given had the layer put out ``maps``."""
    scores = tape.replay_all([output], given={place: maps}, gradient=gradient)[output]
    return scores.to(at_least_float32(scores))


def _ablated(tape: Tape, place: int, output: int, maps: Tensor, target: int) -> Tensor:
    """The target's score (C,) without each map."""
    found = []
    for first in range(0, maps.shape[1], BATCH):
        without = maps.clone()
        chosen = range(first, min(first + BATCH, maps.shape[1]))
        for row, fmap in enumerate(chosen):
            without[row, fmap] = 0
        found.append(_scores(tape, place, output, without)[: len(chosen), target])
    return torch.cat(found)


def _weight(tape: Tape, place: int, output: int, maps: Tensor, target: int) -> Tensor:
    """The gradient of the target's score, summed over each map (C,)."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = maps.detach().clone().requires_grad_()
        score = _scores(tape, place, output, leaf, gradient=True)[0, target]
        (gradient,) = torch.autograd.grad(score, leaf)
    return totals(gradient[:1])[0]
