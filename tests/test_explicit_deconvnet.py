"""Projections equal a deconvnet written out layer by layer, on networks without branches."""

import functools

import pytest
import torch
from explicit_deconvnet import ExplicitDeconvnet
from torch import nn
from trained_like import pictures, relative_error, trained_like

from deconvviz import Deconvnet

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = {"vgg11": 64, "vgg11_bn": 64, "alexnet": 96, "zfnet_like": 95}
CORNERS = torch.tensor([[0, 1], [1, 0]])

# network, layer, fmap, position, seed
CASES = [
    ("vgg11", "features.0", [0, 63], (63, 0), "one"),
    ("vgg11", "features.2", 5, "max", "activation"),
    ("vgg11", "features.7", [3, 100, 42], "max", "activation"),
    ("vgg11", "features.8", slice(250, None, 2), (7, 9), "activation"),
    ("vgg11", "features.10", "strongest", "all", "activation"),
    ("vgg11", "features.13", slice(8), torch.tensor([[0, 7], [5, 2]]), "one"),
    ("vgg11", "features.20", -1, "all", "one"),
    ("vgg11", "avgpool", [1, 2], (6, 0), "activation"),
    ("vgg11", "classifier.1", "strongest", "max", "activation"),
    ("vgg11", "classifier.6", [7, 999], "max", "one"),
    ("vgg11_bn", "features.1", [0, 1, 2], "max", "activation"),
    ("vgg11_bn", "features.5", "strongest", (3, 4), "one"),
    ("vgg11_bn", "features.13", 200, "all", "activation"),
    ("vgg11_bn", "features.16", slice(3), CORNERS, "activation"),
    ("vgg11_bn", "features.28", [5, 6], "max", "activation"),
    ("vgg11_bn", "classifier.3", 17, "all", "activation"),
    ("alexnet", "features.0", None, "max", "activation"),
    ("alexnet", "features.2", slice(0, 64, 9), (10, 10), "one"),
    ("alexnet", "features.5", [191, 0], CORNERS, "activation"),
    ("alexnet", "features.10", "strongest", "max", "activation"),
    ("alexnet", "features.12", 33, "all", "activation"),
    ("alexnet", "avgpool", 7, (2, 5), "one"),
    ("alexnet", "classifier.6", [0, 500], "max", "activation"),
    ("zfnet_like", "2", None, "max", "activation"),
    ("zfnet_like", "3", 4, "all", "activation"),
    ("zfnet_like", "7", slice(None, None, -3), CORNERS, "one"),
    ("zfnet_like", "12", [5, -1], (1, 0), "activation"),
    ("zfnet_like", "14", "strongest", "max", "one"),
    ("zfnet_like", "17", None, "max", "activation"),
]


def zfnet_like():
    """Overlapping 3/2 pools, padded and in ceil mode, contrast normalisation, odd sizes, groups, dilation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 7, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        nn.LocalResponseNorm(3, alpha=1.0),
        nn.Conv2d(12, 16, 5, stride=2, groups=4), nn.ReLU(inplace=True), nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(16, 24, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(3, 1),
        nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 6),
    ).eval()  # fmt: skip


def prepared(network, dtype):
    """The model and its pictures."""
    model = zfnet_like().to(dtype) if network == "zfnet_like" else trained_like(network, dtype)
    return model, pictures(2, SIZES[network], dtype)


@functools.lru_cache(maxsize=1)
def explicit(network, dtype, unpooling="sum"):
    return ExplicitDeconvnet(*prepared(network, dtype), unpooling)


@functools.lru_cache(maxsize=1)
def recorded_pass(network, dtype):
    """A deconvnet that recorded one pass, for all cases to project from."""
    model, images = prepared(network, dtype)
    deconv = Deconvnet(model)
    model(images)
    return deconv


def chosen(activation, fmap):
    """The maps of each image that ``fmap`` asks for."""
    every = range(activation.shape[1])
    if fmap == "strongest":
        return [[max(every, key=lambda m: image[m].sum())] for image in activation]
    if fmap is None or isinstance(fmap, slice):
        maps = every[fmap or slice(None)]
    else:
        maps = [every[m] for m in ([fmap] if isinstance(fmap, int) else fmap)]
    return [list(maps) for _ in activation]


@pytest.mark.parametrize("network, layer, fmap, position, seed", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_projection_is_the_explicit_one(network, layer, fmap, position, seed, dtype):
    model, images = prepared(network, dtype)
    maps = chosen(explicit(network, dtype).activation(layer), fmap)
    expected = explicit(network, dtype).project(layer, maps, position, seed)
    expected = expected[:, 0] if fmap == "strongest" or isinstance(fmap, int) else expected
    recorded = recorded_pass(network, dtype).project(layer, fmap, position=position, seed=seed)
    own_pass = Deconvnet(model).project(layer, fmap, inputs=images, position=position, seed=seed)
    assert relative_error(recorded, expected) <= TOLERANCE[dtype]
    assert relative_error(own_pass, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("layer", ["features.5", "features.10", "features.20", "classifier.6"])
def test_windows_apart_are_unpooled_as_by_pytorch(layer):
    model, images = prepared("vgg11_bn", torch.float64)
    reference = explicit("vgg11_bn", torch.float64, "MaxUnpool2d")
    expected = reference.project(layer, [[3, 11]] * 2, "all", "activation")
    for overlap in ("sum", "overwrite"):
        pixels = Deconvnet(model, overlap=overlap).project(layer, [3, 11], inputs=images, position="all")
        assert relative_error(pixels, expected) <= 1e-12


@pytest.mark.parametrize("unpooling", ["overwrite", "MaxUnpool2d"])
@pytest.mark.parametrize(
    "network, layer", [("alexnet", "features.5"), ("alexnet", "classifier.6"), ("zfnet_like", "12")]
)
def test_of_overlapping_windows_the_last_wins_or_all_sum(network, layer, unpooling):
    model, images = prepared(network, torch.float64)
    reference = explicit(network, torch.float64, unpooling)
    expected = reference.project(layer, [[3, 4]] * 2, "all", "activation")
    overwritten, summed = (
        Deconvnet(model, overlap=overlap).project(layer, [3, 4], inputs=images, position="all")
        for overlap in ("overwrite", "sum")
    )
    assert relative_error(overwritten, expected) <= 1e-12
    assert relative_error(summed, expected) > 0.1
