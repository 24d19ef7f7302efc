"""What chosen layers put out in one pass of the model, which is left as it was found.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
>>> [f.shape for f in features(model, torch.randn(2, 3, 6, 6), ["1", ""])]
[torch.Size([2, 8, 4, 4]), torch.Size([2, 128])]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deconvviz.capture import require_module, watch
from deconvviz.inputs import input_tensors
from deconvviz.layers import Layer, find_call, layer_name, locate, one_or_several, only_output


def features(model: nn.Module, inputs: Any, layers: Sequence[Layer]) -> list[Tensor]:
    """The outputs (N, ...) of layers, each a dotted name, a module or a call; ``""`` is the model itself.

    Raises:
        UnknownLayer, AmbiguousLayer, LayerNotRun, NoForwardPass, InvalidInput: as their names say.
    """
    model = require_module(model)
    places = [locate(model, layer) for layer in layers]
    tape, _ = watch(model, input_tensors(inputs, model))
    values = [only_output(find_call(tape, *place)) for place in places]
    found = tape.replay_all(values)
    return [found[value] for value in values]


def layer_names(model: nn.Module, layers: Layer | Sequence[Layer]) -> list[str]:
    """The dotted names or calls of layers, each given by one or as a module; one layer can stand alone.

    Raises:
        UnknownLayer, InvalidInput: as their names say.
    """
    return [layer_name(model, layer) for layer in one_or_several(layers)]
