"""SqueezeNet with real ImageNet weights, on real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deconvviz import Deconvnet
from deconvviz.comparison import compare, shuffled_weights
from deconvviz.images import load_picture, to_input

# By hand, for squeezenet1_0: (receptive field, jump, offset of cell 0's first pixel). Its convolutions: 7x7/2
# without padding, fire modules whose widest branch is 3x3/1 with padding 1, and 3x3/2 pools without padding.
FIELDS = {"features.2": (11, 4, 0), "features.5": (35, 4, -12), "features.8": (91, 8, -36)}


@pytest.fixture(scope="module")
def photographs(data: Path) -> torch.Tensor:
    paths = sorted((data / "imagenet_sample").iterdir())
    return torch.stack([to_input(load_picture(paths[i])) for i in (259, 281, 409, 817)])


@pytest.mark.parametrize("layer", FIELDS)
@torch.no_grad()
def test_a_projection_lives_in_its_receptive_field(squeezenet, photographs, layer) -> None:
    size, jump, start = FIELDS[layer]
    deconv = Deconvnet(squeezenet)
    for image in photographs.split(1):
        for fmap in deconv.strongest(layer, 4, inputs=image)[0].tolist():
            ((y, x),) = deconv.strongest_position(layer, fmap, inputs=image)
            pixels = deconv.project(layer, fmap, inputs=image)[0]
            inside = torch.zeros_like(pixels, dtype=torch.bool)
            top, left = start + y * jump, start + x * jump
            inside[:, max(0, top) : top + size, max(0, left) : left + size] = True
            assert not pixels[~inside].any()
            assert (pixels[inside] != 0).float().mean() > 0.2


def test_the_network_knows_the_photographs(squeezenet, photographs) -> None:
    with torch.no_grad():
        top = squeezenet(photographs).topk(5).indices.tolist()
    assert sum(label in five for label, five in zip((259, 281, 409, 817), top, strict=True)) >= 3


def test_shuffled_weights_give_another_picture(squeezenet, photographs) -> None:
    comparison = compare(squeezenet, photographs[:1], "features.10", 20, shuffled_weights(squeezenet))
    unit, random = comparison.deconvnet.flatten().numpy(), comparison.randomized.flatten().numpy()
    assert unit.any() and random.any()
    assert abs(np.corrcoef(unit, random)[0, 1]) < 0.5
