"""One unit seen by the deconvnet, by captum's methods, and by the deconvnet of a randomised model.

With signal g and forward input x of a ReLU: saliency passes g·1[x>0], the deconvnet g·1[g>0], guided
backprop both. The last column is a sanity check (Adebayo et al. 2018): what looks the same when every weight
has been shuffled was restored by the switches and the architecture, not learned (Nie et al. 2018).

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
>>> comparison = compare(model, torch.randn(1, 3, 16, 16), "3", 2)
>>> comparison.label, comparison.saliency.shape
('3 map 2', torch.Size([3, 16, 16]))
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import NeuronGradient, NeuronGuidedBackprop
from torch import Tensor, nn

from deconvviz.capture import left_as_found, require_module, watch
from deconvviz.deconvnet import Deconvnet
from deconvviz.errors import InvalidInput
from deconvviz.inputs import input_image, integer
from deconvviz.layers import Layer, described, layer_name, locate


@dataclass(frozen=True)
class Comparison:
    """One unit's pictures, each (C, H, W) at the image's size, signed and unscaled."""

    label: str
    image: Tensor
    """The input as the model takes it."""
    position: tuple[int, ...]
    """Where in the map the unit is, in map cells."""
    deconvnet: Tensor
    saliency: Tensor
    """captum's neuron gradient, absolute."""
    guided_backprop: Tensor
    """captum's."""
    randomized: Tensor
    """The deconvnet of the same unit in the model with shuffled weights."""


def compare(
    model: nn.Module,
    image: Tensor,
    layer: Layer,
    fmap: int,
    shuffled: nn.Module | None = None,
    on_unsupported: str = "raise",
) -> Comparison:
    """The unit of ``fmap`` at its strongest position in ``image`` (1, C, H, W), by every method.

    Args:
        model: any module; captum's guided backprop is right where its ReLUs are modules.
        image: one image, as the model takes it.
        layer: as for :meth:`Deconvnet.project`.
        fmap: the feature map.
        shuffled: :func:`shuffled_weights` of the model, if at hand already.
        on_unsupported: as for :class:`Deconvnet`.

    Raises:
        InvalidInput: more than one image, a layer that takes parts of it as several, or a call of the layer that is
            not its last, which alone captum can show; else as :meth:`Deconvnet.project`.
    """
    model = require_module(model)
    image = input_image(image, model)
    name, number = locate(model, layer)
    module = model.get_submodule(name)
    deconv = Deconvnet(model, on_unsupported=on_unsupported)
    deconv.close()
    try:
        fmap = integer(fmap)
    except TypeError:
        raise InvalidInput(f"fmap is {fmap!r}; expected the number of one feature map") from None
    position, *others = deconv.strongest_position(layer, fmap, inputs=image)
    if others:
        raise InvalidInput(
            f"{described(name)} gives {1 + len(others)} rows of feature maps for one image; expected one"
        )
    place: Any = position or "max"
    tape, _ = watch(model, (image,))
    if number not in (None, last := tape.counts()[name]):
        raise InvalidInput(f"layer {layer!r} is not the last call, '{name}#{last}', which alone captum can show")
    with Deconvnet(shuffled or shuffled_weights(model), on_unsupported=on_unsupported) as random:
        given = layer_name(model, layer)
        randomized = random.project(given, fmap, inputs=image, position=place, seed="one")
    neuron = (fmap, *position)
    with left_as_found(model), warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore", UserWarning)  # captum announces its hooks
        saliency = NeuronGradient(model, module).attribute(image.detach().clone(), neuron).abs()
        guided = NeuronGuidedBackprop(model, module).attribute(image.detach().clone(), neuron)
    return Comparison(
        label=f"{given} map {fmap}",
        image=image[0],
        position=position,
        deconvnet=deconv.project(layer, fmap, inputs=image, position=place, seed="one")[0],
        saliency=saliency[0].detach(),
        guided_backprop=guided[0].detach(),
        randomized=randomized[0],
    )


def shuffled_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of ``model`` with the entries of every parameter shuffled: same values, nothing learned."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            order = torch.randperm(parameter.numel(), generator=generator, device="cpu").to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled
