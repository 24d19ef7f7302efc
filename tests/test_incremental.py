"""Incremental inference gives what whole passes give: operation by operation, on odd graphs, on torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from random_networks import RandomNetwork
from random_windows import at_random, geometries
from torch import nn
from torchvision.ops import StochasticDepth
from trained_like import as_if_trained, pictures, trained_like

from deconvviz.errors import UnsupportedModel
from deconvviz.incremental import Plan, alike
from deconvviz.incremental import clean as clean_module
from deconvviz.incremental import whole as whole_steps
from deconvviz.incremental.group import GROUP, Group
from deconvviz.occlusion.clean_passes import clean_passes
from deconvviz.occlusion.windows import Windows

EVERY_FAMILY = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "vgg11_bn", "wide_resnet50_2",
]  # fmt: skip
TRANSFORMERS = ("vit", "swin", "maxvit")
EVERY_CNN = [
    name for name in torchvision.models.list_models(module=torchvision.models) if not name.startswith(TRANSFORMERS)
]


def incremental(model, images, size, firsts):
    """The outputs for windows of zeros at ``firsts`` (axes, W), from the changed parts; and the plan."""
    windows = Windows.sliding(images.shape[1:], (images.shape[1], *size), (1,) * (images.dim() - 1))
    passes, (output,), _ = clean_passes(model, images)
    plan = Plan(passes[0], firsts, size)
    chosen = [np.flatnonzero((first == windows.starts[1:].T).all(1))[0] for first in firsts.T]
    patches = windows.patches(images[0], torch.zeros((), dtype=images.dtype), np.asarray(chosen))
    return plan.run(patches).whole(output), plan


def whole(model, images, size, firsts):
    """The same by a loop over covered copies."""
    outputs = []
    for first in firsts.T:
        copy = images.clone()
        box = tuple(slice(int(a), int(a) + n) for a, n in zip(first, size, strict=True))
        copy[(slice(None), slice(None), *box)] = 0
        outputs.append(model(copy))
    return torch.cat(outputs)


@torch.no_grad()
def agree(model, images, size, firsts, tolerance=1e-10):
    """Assert that both give the same, to ``tolerance`` of the outputs' scale; return the plan."""
    firsts = np.asarray(firsts, np.int64)
    expected = whole(model, images, size, firsts)
    found, plan = incremental(model, images, size, firsts)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (expected - expected[:1]).abs().max() > 0 or len(expected) == 1
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return plan


def spread(space, size, count=5, seed=0):
    """Window positions: the four corners, and some at random."""
    draw = np.random.default_rng(seed)
    most = np.asarray(space) - size
    corners = np.stack(np.meshgrid(*[[0, m] for m in most], indexing="ij")).reshape(len(space), -1)
    inside = np.stack([draw.integers(0, m + 1, count) for m in most])
    return np.unique(np.concatenate([corners, inside], axis=1), axis=1)


def image(*space, channels=4, seed=0):
    return torch.randn(1, channels, *space, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def around(layer, channels=4, n=2):
    """The layer between two filters, in eval mode and in double."""
    conv = getattr(nn, f"Conv{n}d")
    torch.manual_seed(0)
    return nn.Sequential(conv(channels, channels, 3), layer, conv(channels, 2, 1)).double().eval()


class Calls(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@st.composite
def convolutions(draw):
    """A geometry with room, and a patch within it."""
    geometry = draw(geometries(lambda kernel: kernel))
    size = tuple(n + draw(st.integers(3, 12)) for n in geometry.size)
    patch = tuple(draw(st.integers(1, n + 2)) for n in size)  # up to the whole image, which is 2 larger
    return geometry, size, patch


@at_random
@given(convolutions(), st.sampled_from([1, 2, 4]), st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
def test_convolution(case, groups, mode):
    geometry, size, patch = case
    n = len(size)
    if mode != "zeros" and any(p >= s for p, s in zip(geometry.padding, size, strict=True)):
        mode = "zeros"
    layer = getattr(nn, f"Conv{n}d")(4, 4, groups=groups, padding_mode=mode, **geometry.options)
    space = tuple(s + 2 for s in size)
    agree(around(layer, n=n), image(*space), patch, spread(space, patch))


@at_random
@given(convolutions(), st.booleans(), st.sampled_from(["max", "avg"]), st.booleans())
def test_pools(case, ceil_mode, kind, count_include_pad):
    geometry, size, patch = case
    n, options = len(size), dict(geometry.options)
    options["padding"] = tuple(min(p, k // 2) for p, k in zip(options["padding"], options["kernel_size"], strict=True))
    if kind == "avg":
        del options["dilation"]
        options["count_include_pad"] = count_include_pad
    layer = getattr(nn, f"{kind.capitalize()}Pool{n}d")(ceil_mode=ceil_mode, **options)
    space = tuple(s + 2 for s in size)
    agree(around(layer, n=n), image(*space), patch, spread(space, patch))


@at_random
@given(convolutions(), st.booleans(), st.booleans(), st.sampled_from([1, 4]))
def test_average_pool_before_a_filter_of_one_cell(case, count_include_pad, bias, outward):
    """The pool goes behind the filter where that leaves it fewer channels."""
    geometry, size, patch = case
    n = len(size)
    kernel, stride = geometry.options["kernel_size"], geometry.options["stride"]
    padding = tuple(min(p, k // 2) for p, k in zip(geometry.options["padding"], kernel, strict=True))
    pool = getattr(nn, f"AvgPool{n}d")(kernel, stride, padding, count_include_pad=count_include_pad)
    convolution = getattr(nn, f"Conv{n}d")
    torch.manual_seed(0)
    layers = convolution(4, 4, 3), pool, convolution(4, outward, 1, bias=bias), nn.Tanh(), nn.Flatten()
    space = tuple(s + 2 for s in size)
    plan = agree(nn.Sequential(*layers).double().eval(), image(*space), patch, spread(space, patch))
    order = [step.operation[:4] for step in plan._clean.steps][:3]
    assert order == (["conv", "conv", "avg_"] if outward < 4 else ["conv", "avg_", "conv"])


class Joined(nn.Module):
    """Branches of two reaches, joined, and a layer; ``mixed`` rounds one branch to single precision."""

    def __init__(self, after, n, mixed=False):
        super().__init__()
        torch.manual_seed(0)
        convolution = getattr(nn, f"Conv{n}d")
        self.near, self.far, self.after = convolution(4, 2, 1), convolution(4, 3, 3, padding=1), after
        self.mixed = mixed
        self.double()

    def forward(self, x):
        far = self.far(x).relu()
        return self.after(torch.cat([self.near(x), far.float() if self.mixed else far, x], 1)).tanh().flatten(1)


@at_random
@given(convolutions(), st.booleans())
def test_max_pool_behind_a_concatenation(case, mixed):
    """The pool goes before it where that leaves fewer cells to join."""
    geometry, size, patch = case
    options, n = dict(geometry.options), len(size)
    options["padding"] = tuple(min(p, k // 2) for p, k in zip(options["padding"], options["kernel_size"], strict=True))
    pool = getattr(nn, f"MaxPool{n}d")(**options)
    plan = agree(Joined(pool, n, mixed), image(*size), np.minimum(patch, size), spread(size, np.minimum(patch, size)))
    joined, pooled = (
        next(i for i, step in enumerate(plan._clean.steps) if step.operation.startswith(name))
        for name in ("cat", "max")
    )
    assert (pooled < joined) == (max(options["stride"]) > 1 and not mixed)


@at_random
@given(convolutions(), st.booleans(), st.sampled_from([1, 2, 3]), st.booleans())
def test_filter_of_one_cell_behind_a_concatenation(case, bias, outward, mixed):
    """Each part is filtered by itself where the parts' outputs hold less in all: two channels of three parts."""
    _, size, patch = case
    n = len(size)
    one = getattr(nn, f"Conv{n}d")(9, outward, 1, bias=bias)
    plan = agree(Joined(one, n, mixed), image(*size), np.minimum(patch, size), spread(size, np.minimum(patch, size)))
    assert ("cat" in [step.operation for step in plan._clean.steps]) == (outward == 3 or mixed)


@at_random
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(4, 11)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_enlarged(axes, linear, by_size, data):
    """By a whole factor on each axis, at the borders too."""
    factors, space = zip(*axes, strict=True)
    n = len(space)
    patch = tuple(data.draw(st.integers(1, extent)) for extent in space)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[n] if linear else "nearest"
    size = [(extent - 2) * k for extent, k in zip(space, factors, strict=True)]
    how = {"size": size} if by_size else {"scale_factor": tuple(map(float, factors))}
    layer = Calls(lambda x: F.interpolate(x, mode=mode, **how))
    plan = agree(around(layer, n=n), image(*space), patch, spread(space, patch))
    assert plan.groups[0].regions[plan._clean.steps[1].outputs[0]] is not None or plan.groups[0].whole_from < 2


@at_random
@given(st.lists(st.tuples(st.integers(4, 12), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=3), st.data())
def test_slices_of_cells(axes, data):
    """From any cell, to any, in any steps, on each axis; and windows that none of the cells are in."""
    space = [extent + 2 for extent, _, _ in axes]
    cuts = [slice(min(a, n - 1), data.draw(st.integers(min(a, n - 1) + 1, n + 2)), every) for n, a, every in axes]
    patch = tuple(data.draw(st.integers(1, extent)) for extent in space)
    model, images = around(Calls(lambda x: x[(..., *cuts)]), n=len(axes)), image(*space)
    firsts = spread(space, patch)
    with torch.no_grad():
        expected, (found, _) = whole(model, images, patch, firsts), incremental(model, images, patch, firsts)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@at_random
@given(
    st.lists(st.tuples(st.integers(5, 12), st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=3),
    st.sampled_from(["constant", "reflect", "replicate"]),
    st.data(),
)
def test_padding(axes, mode, data):
    """With a constant and with the value's own cells; negative widths cut cells off."""
    least = -1 if mode == "constant" else 0
    widths = [max(width, least) for _, *pair in reversed(axes) for width in pair]
    space = [extent + 2 for extent, _, _ in axes]
    patch = tuple(data.draw(st.integers(1, extent)) for extent in space)
    model = around(Calls(lambda x: F.pad(x, widths, mode)), n=len(axes))
    firsts = spread(space, patch)
    plan = agree(model, image(*space), patch, firsts)
    assert None not in Group(plan._clean, firsts, patch, dense_from=np.inf).regions.values()


def layer_norm(x, dim=1):
    x = x - x.mean(dim, keepdim=True)
    return x / torch.sqrt(x.pow(2).mean(dim, keepdim=True) + 1e-6)


BY_HAND = {
    "layer norm": layer_norm,
    "layer norm, channels last": lambda x: layer_norm(x.permute(0, 2, 3, 1), -1).permute(0, 3, 1, 2),
    "root mean square": lambda x: x * torch.rsqrt(x.square().mean(dim=1)[:, None] + 1e-6),
    "length": lambda x: x / x.norm(dim=1, keepdim=True),
    "length, inverse": lambda x: x * (1 / torch.linalg.vector_norm(x, 2, (1,))).unsqueeze(1),
    "length of channels last": lambda x: x.movedim(1, 3).div(torch.norm(x, 2, 1)[..., None]).movedim(3, 1),
    "spread": lambda x: x * (x.std(1, keepdim=True) + x.var(dim=1, keepdim=True)).reciprocal(),
    "share": lambda x: x.exp() / x.exp().sum(1, keepdim=True) + x.amax(1, keepdim=True),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_norms_over_the_channels_written_by_hand_are_computed_in_part(name):
    norm = BY_HAND[name]
    plan = agree(around(Calls(norm)), image(22, 25), (3, 2), spread((22, 25), (3, 2), 7))
    assert None not in plan.groups[0].regions.values()


class ShortcutWithoutWeights(nn.Module):
    """The CIFAR ResNets': every second cell, and zeros for the new channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, 2, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        return F.relu(self.second(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0))


def test_a_shortcut_without_weights_is_computed_in_part():
    torch.manual_seed(0)
    plan = agree(ShortcutWithoutWeights().double(), image(22, 25), (3, 2), spread((22, 25), (3, 2), 7))
    assert None not in plan.groups[0].regions.values()


@pytest.mark.parametrize("how", [{"align_corners": True}, {"antialias": True}, {"scale_factor": 2.1}], ids=str)
def test_other_interpolations_are_computed_whole(how):
    layer = Calls(lambda x: F.interpolate(x, **{"scale_factor": 2, "mode": "bilinear", **how}))
    agree(around(layer), image(9, 9), (2, 3), spread((9, 9), (2, 3)))


class BesideSkip(nn.Module):
    """What a layer gives is needed again after the next one, which may not overwrite it."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        x = self.first(x)
        return self.second(x) + x


class WrittenWhole(nn.Module):
    """What follows a sum along an axis is whole, and is written to: once while others need it, once seen by a view."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 4, 3), nn.Conv2d(8, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.first(x).cumsum(2)
        y = self.norm(x)
        rows = y.flatten(2)
        z = F.relu(y, inplace=True)
        z = torch.cat([z, F.relu_(self.norm(x) - 1)], 1)
        skip = z + 0
        z += 1
        return self.last(F.relu_(skip) + z).mean((2, 3)) + rows.sum((1, 2), keepdim=True)[..., 0]


@pytest.mark.parametrize("cached", [1, 10**9], ids=["few at a time", "all at once"])
def test_whole_values_in_place_and_a_few_at_a_time(monkeypatch, cached):
    monkeypatch.setattr("deconvviz.incremental.plan.CACHED", cached)
    monkeypatch.setattr("deconvviz.incremental.plan.FEWEST", 2)
    plan = agree(WrittenWhole().double().eval(), image(9, 9), (2, 3), spread((9, 9), (2, 3), 7))
    assert plan.groups[0].whole_from < len(plan._clean.steps) - 5


def channel_shuffle(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def in_place_through_a_view(x):
    x[:, :2].relu_()
    return x


def in_place_beside_an_alias(x):
    y = x.clone()
    x.relu_()
    return x - y


class Heads(nn.Module):
    """Attention of two heads among the cells, as a transformer's block has it."""

    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def forward(self, x):
        cells = x.flatten(2).mT
        return x + self.heads(cells, cells, cells, need_weights=False)[0].mT.view_as(x)


LAYERS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(inplace=True),
    "prelu": nn.PReLU(4, init=0.3),
    "sigmoid": nn.Sigmoid(),
    "dropout": nn.Dropout(),
    "batch norm": nn.BatchNorm2d(4),
    "batch norm after a pool": nn.Sequential(nn.MaxPool2d(2, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
    "batch norm beside a skip": BesideSkip(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(4)),
    "cells picked beside a skip": BesideSkip(nn.Tanh(), nn.Sequential(nn.MaxPool2d(1), nn.ReLU(inplace=True))),
    "cat of rows": Calls(lambda x: torch.cat([x.unflatten(1, (2, 2)), F.max_pool2d(x, 3, 1, 1).unflatten(1, (2, 2))], 2)
                         .flatten(1, 2)[:, :4]),
    "group norm": nn.GroupNorm(2, 4),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "local response": nn.LocalResponseNorm(3),
    "layer norm, channels last": Calls(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)),
    "layer norm over the map": Calls(lambda x: F.layer_norm(x, x.shape[1:])),
    "linear, channels last": Calls(lambda x: F.linear(x.movedim(1, 3), torch.eye(4).double()).movedim(3, 1)),
    "transposed axes": Calls(lambda x: F.max_pool2d(x.transpose(2, 3), 2).transpose(2, 3)),
    "flipped": Calls(lambda x: x.flip(3)),
    "shuffle": Calls(channel_shuffle),
    "chunk and cat": Calls(lambda x: torch.cat([x.chunk(2, 1)[1].relu(), x.chunk(2, 1)[0]], 1)),
    "cat of strides": Calls(lambda x: torch.cat([F.max_pool2d(x[:, :2], 2), F.avg_pool2d(x[:, 2:], 4, 2, 1)], 1)),
    "cat of reaches": Calls(lambda x: torch.cat([x[:, :1], x[:, 1:2].relu(), F.max_pool2d(x[:, 1:3], 5, 1, 2),
                                                 x[:, 2:3], F.avg_pool2d(x[:, :1], 3, 1, 1)], 1)[:, 1:5]),
    "cat of types": Calls(lambda x: torch.cat([F.max_pool2d(x.float(), 3, 1, 1), x[:, :2]], 1)[:, 2:]),
    "cat along rows": Calls(lambda x: torch.cat([x, x.relu()], 2)),
    "channels by number": Calls(lambda x: torch.cat([x[:, i].unsqueeze(1) * (i + 1) for i in range(4)], 1)),
    "squeezed where nothing is to squeeze": Calls(lambda x: F.max_pool2d(x, 3, 2).squeeze(2).squeeze(3)),
    "a row that is taken out and back": Calls(lambda x: F.max_pool2d(x, (24, 1)).squeeze(2).unsqueeze(2)),
    "cat along numpy's axis": Calls(lambda x: torch.cat([x, x.relu()], axis=3)),
    "largest along numpy's axis": Calls(lambda x: x - x.amax(axis=(2, 3), keepdim=True)),
    "filters from the image": Calls(lambda x: F.conv2d(x, x.mean((0, 2, 3)).sigmoid().expand(4, 4)[..., None, None])),
    "skip": Calls(lambda x: x + F.max_pool2d(x, 3, 1, 1)),
    "skip in place": Calls(lambda x: F.avg_pool2d(x, 5, 1, 2).add_(x)),
    "product": Calls(lambda x: x * x.sigmoid()),
    "gate": Calls(lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid()),
    "spread of everything": Calls(lambda x: x / x.std(False)),
    "length of rows": Calls(lambda x: x / x.norm(2, 3, keepdim=True)),
    "mean of all but the batch": Calls(lambda x: x - x.mean((1, 2, 3), keepdim=True)),
    "subtracted mean": Calls(lambda x: x - x.mean((2, 3), keepdim=True)),
    "a map as constant": Calls(lambda x: x * torch.linspace(0, 1, x.shape[3]).double()),
    "a map added": Calls(lambda x: x + torch.linspace(-1, 1, x[0].numel()).double().view_as(x)),
    "columns added": Calls(lambda x: torch.linspace(-1, 1, x.shape[2]).double()[:, None] + x),
    "a larger map": Calls(lambda x: F.avg_pool2d(x, x.shape[2:]) * torch.eye(*x.shape[2:]).double()),
    "a mask": Calls(lambda x: torch.where(torch.eye(*x.shape[2:]) > 0, 0.5, F.max_pool2d(x, 3, 1, 1))),
    "added to zeros in place": Calls(lambda x: torch.zeros_like(x).add_(x).add_(F.max_pool2d(x, 3, 1, 1))),
    "subtracted from a map in place": Calls(
        lambda x: torch.linspace(-1, 1, x[0].numel()).double().view_as(x).sub_(x.relu(), alpha=2)),
    "coordinates beside": Calls(lambda x: torch.cat([x[:, :2], torch.eye(*x.shape[2:]).double()[None, None],
                                                     F.max_pool2d(x[:, :1], 3, 1, 1)], 1)),
    "a channel's constant and a map, channels last": Calls(
        lambda x: (x.movedim(1, 3) * torch.linspace(0.5, 1, 4).double()
                   + torch.eye(*x.shape[2:]).double()[..., None]).movedim(3, 1)),
    "a channel's constant": Calls(lambda x: x * torch.linspace(0.5, 1, 4).double().view(4, 1, 1)),
    "padded": Calls(lambda x: F.pad(x, (1, 2, 3, 0), value=0.5)),
    "padded channels and cells": Calls(lambda x: F.pad(x, (2, 0, 0, 1, 1, 2), value=0.5)[:, 2:6]),
    "padded batch": Calls(lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[1:]),
    "every second cell": Calls(lambda x: x[:, :, ::2, 1::2]),
    "every second cell of some channels": Calls(lambda x: torch.cat([x[:, 1:3, 1::2]] * 2, 1)),
    "a part of the cells": Calls(lambda x: x[..., 3:-2, 1:9]),
    "padded channels": Calls(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:5]),
    "reflected": Calls(lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect")),
    "replicated": Calls(lambda x: F.pad(x, (0, 4, 1, 2), mode="replicate")),
    "wrapped": Calls(lambda x: F.pad(x, (1, 2, 3, 0), mode="circular")),
    "reflected, channels last": Calls(
        lambda x: F.pad(x.movedim(1, 3), (1, 2, 3, 0), mode="reflect")[..., :4].movedim(3, 1)),
    "enlarged": Calls(lambda x: F.interpolate(x, scale_factor=3)),
    "enlarged bilinear": Calls(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "same padding": nn.Conv2d(4, 4, (4, 3), padding="same"),
    "transposed convolution": nn.ConvTranspose2d(4, 4, 3, 2, 1),
    "adaptive, divisor": nn.AdaptiveAvgPool2d((6, 11)),
    "adaptive, odd": nn.AdaptiveAvgPool2d((5, 7)),
    "adaptive max": nn.AdaptiveMaxPool2d((5, 7)),
    "in place through a view": Calls(in_place_through_a_view),
    "in place beside an alias": Calls(in_place_beside_an_alias),
    "softmax over channels": nn.Softmax(1),
    "matrix product": Calls(lambda x: x @ x.transpose(2, 3)),
    "log sigmoid": nn.LogSigmoid(),
    "attention": Calls(lambda x: F.scaled_dot_product_attention(
        *[x.flatten(2).mT] * 3, attn_mask=torch.eye(x[0, 0].numel()).double()).mT.view_as(x)),
    "attention of one query": Calls(lambda x: x + F.scaled_dot_product_attention(
        torch.ones(1, 1, 4).double(), x.flatten(2).mT, x.flatten(2).mT).mT.unsqueeze(3)),
    "attention of heads": Heads(),
    "cumsum": Calls(lambda x: x.cumsum(2)),
    "roll": Calls(lambda x: x.roll(3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(1, 1), (5, 4), (20, 9)], ids=str)
def test_layer(name, size):
    torch.manual_seed(0)
    model = around(LAYERS[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    space = (26, 24)
    agree(model, image(*space), size, spread(space, size, 7))


def in_windows(x, function):
    """Of the cells of a map's quarters, (4, cells, channels)."""
    n, c, h, w = x.shape
    rows = x.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).reshape(4 * n, -1, c)
    rows = function(rows).view(n, 2, 2, h // 2, w // 2, c)
    return rows.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def heads(x, bias=None):
    """Attention of two heads within each row of (N, L, C), and a bias for each head."""
    parts = [part.unflatten(2, (2, -1)).transpose(1, 2) for part in (x, x * 2, x + 1)]
    return F.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2).flatten(2)


norm = nn.BatchNorm1d(4).double().eval()
norm.running_mean.copy_(torch.arange(4)), norm.running_var.copy_(torch.arange(1, 5))
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()


def tiles(x, function):
    """Of a map's quarters as pictures of their own, (4 N, C, H/2, W/2)."""
    parts = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return function(parts).unflatten(0, (len(x), -1)).mean(1)


WITHOUT_A_BATCH = {
    "attention": lambda x: in_windows(x, heads),
    "attention with a bias": lambda x: in_windows(
        x, lambda rows: heads(rows, torch.eye(64).double().expand(2, 64, 64) / 3)),
    "batch norm of rows": lambda x: norm(x.flatten(2).mT.flatten(0, 1)).unflatten(0, (len(x), -1)).mT.view_as(x),
    "layer norm and linear": lambda x: in_windows(
        x, lambda rows: F.linear(F.layer_norm(rows, (4,)), torch.eye(4).double())),
    "a filter": lambda x: tiles(x, lambda parts: F.conv2d(parts, WEIGHT, padding=1)),
    "a filter and a pool": lambda x: tiles(x, lambda parts: F.max_pool2d(F.conv2d(parts, WEIGHT), 3, 1, 1)),
    "a gate": lambda x: in_windows(x, lambda rows: rows * rows.sigmoid() + torch.linspace(0, 1, 64).double()[:, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_A_BATCH)
def test_windows_share_a_call_where_the_batch_is_folded_into_other_axes(name, monkeypatch):
    """What counts its axes from the last one takes theirs before all."""
    singly, one_by_one = [], whole_steps._one_by_one
    monkeypatch.setattr(whole_steps, "_one_by_one", lambda step, *rest: singly.append(step) or one_by_one(step, *rest))
    agree(around(Calls(WITHOUT_A_BATCH[name])), image(18, 18), (5, 4), spread((18, 18), (5, 4), 7))
    shared = {"scaled_dot_product_attention", "addcmul", "layer_norm", "linear", "sigmoid", "mul", "add"}
    assert not shared.intersection(step.operation for step in singly)


BATCHES = {
    "by numbers": lambda x: x[torch.arange(len(x))],
    "by a slice": lambda x: x[:1] * 2,
    "narrowed": lambda x: x.narrow(0, 0, 1),
    "index_select": lambda x: x.index_select(0, torch.arange(1)),
    "in pieces": lambda x: torch.cat([x[i : i + 4].relu() for i in range(0, len(x), 4)]),
    "split": lambda x: torch.cat([part.relu() for part in x.split(1)]),
    "one by one": lambda x: torch.stack([one.relu() for one in x]),
    "the first": lambda x: x[0].relu()[None],
    "an axis before": lambda x: x[None].relu()[0],
    "an axis put before": lambda x: x.unsqueeze(0).relu().squeeze(0),
    "its norm": lambda x: F.layer_norm(x, x.shape),
    "a constant beside": lambda x: torch.cat([x, torch.zeros_like(x)], 1)[:, 2:6],
    "a token before": lambda x: (
        torch.cat([x.new_ones(len(x), 1, 4), x.flatten(2).mT], 1).tanh()[:, 1:].mT.unflatten(2, x.shape[2:])
    ),
    "rows one by one": lambda x: torch.stack([row.relu() for row in x.unbind(2)], 2),
    "filters of its own": lambda x: F.conv2d(x.view(1, -1, *x.shape[2:]), x.mean((2, 3)).view(-1, 1, 1, 1), groups=4),
    "a matrix of its own": lambda x: F.linear(x, x.mean((1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_what_a_model_does_to_its_batch_axis(name):
    agree(around(Calls(BATCHES[name])), image(20, 18), (5, 4), spread((20, 18), (5, 4), 7))


def test_attention_of_heads_goes_window_by_window_without_a_warning(recwarn):
    agree(around(Heads()), image(12, 12), (5, 4), spread((12, 12), (5, 4), 7))
    assert not recwarn.list


def test_attention_takes_all_windows_at_once(recwarn):
    """PyTorch's own kernel for the CPU cannot be vectorised over another axis: it warns, and loops."""
    layer = Calls(lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3).mT.view_as(x))
    agree(around(layer), image(12, 12), (5, 4), spread((12, 12), (5, 4), 7))
    assert not recwarn.list


def test_sums_do_not_overflow_in_half_precision():
    """Large maps of large values: their sums are beyond 65504."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(model[0].bias, 30.0)
    images, firsts = image(96, 96).half(), np.asarray([[0, 40], [0, 30]])
    passes, (output, maps), _ = clean_passes(model.half(), images, layer="1")
    outcome = Plan(passes[0], firsts, (32, 32)).run(images[0, :, :32, :32].expand(2, -1, -1, -1) * 0)
    expected = whole(model.double(), images.double(), (32, 32), firsts)
    assert (outcome.whole(output).double() - expected).abs().max() < 0.05
    total = whole(model[:2], images.double(), (32, 32), firsts)[:, 1].sum((1, 2))
    assert (outcome.total(maps, 1).double() / total - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", [
    "a map added", "columns added", "a mask", "added to zeros in place", "subtracted from a map in place",
    "coordinates beside",
])  # fmt: skip
def test_constants_that_differ_from_cell_to_cell_are_read_in_boxes_and_shared_by_whole_values(name, monkeypatch):
    singly, one_by_one = [], whole_steps._one_by_one
    monkeypatch.setattr(whole_steps, "_one_by_one", lambda step, *rest: singly.append(step) or one_by_one(step, *rest))
    plan = agree(around(LAYERS[name]), image(26, 24), (2, 3), spread((26, 24), (2, 3)))
    assert None not in plan.groups[0].regions.values()
    plan = agree(around(LAYERS[name]), image(26, 24), (23, 22), spread((26, 24), (23, 22)))
    assert plan.groups[0].whole_from == 0 and {step.operation for step in singly} <= {"getitem"}


def test_a_channels_constant_is_read_in_no_boxes():
    for name in ("a channel's constant", "a channel's constant and a map, channels last"):
        (clean,), _, _ = clean_passes(around(LAYERS[name]), image(26, 24))
        Plan(clean, np.asarray([[3], [4]]), (2, 3))
        read = [key for key in clean._values if len(key) == 2]
        assert len(read) == name.count("map")


def test_pictures_that_become_sequences():
    """Text recognisers pool a line to one row and go on along it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.MaxPool2d((10, 2)),
        Calls(lambda x: x.squeeze(2)),
        nn.Conv1d(6, 3, 3),
        nn.Flatten(),
    )
    plan = agree(model.double(), image(12, 40), (4, 5), spread((12, 40), (4, 5), 7))
    assert plan.cost < plan.whole_cost / 3


@pytest.mark.parametrize("head", ["flatten", "mean", "mean keepdim", "pool", "max", "last rows"])
def test_head(head):
    heads = {
        "flatten": lambda x: x.flatten(1)[:, ::7],
        "mean": lambda x: x.mean([2, 3]),
        "mean keepdim": lambda x: x.mean((-1, -2), keepdim=True).flatten(1),
        "pool": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(1, -1) if len(x) == 1 else None,
        "max": lambda x: x.amax((2, 3)),
        "last rows": lambda x: x[:, :, -1].sum(2),
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(True), nn.MaxPool2d(2), Calls(heads[head])).double().eval()
    agree(model, image(20, 24), (4, 5), spread((20, 24), (4, 5), 7))


FEWER_CHANNELS = {
    "linear": ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 9)], True),
    "linear without a bias": ([Calls(lambda x: x.mean((2, 3))), nn.Linear(6, 9, bias=False), nn.Sigmoid()], True),
    "filter": ([nn.Conv2d(6, 9, 3), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten()], True),
    "filter of places": ([nn.Conv2d(6, 9, 3, padding=1, bias=False), nn.MaxPool2d(2)], True),
    "filter and a mean": ([nn.Conv2d(6, 9, 1), nn.GELU(), Calls(lambda x: x.mean([-1, -2]))], True),
    "softmax": ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 9), nn.Softmax(1)], False),
    "groups": ([nn.Conv2d(6, 9, 1, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()], False),
    "mean of the channels": (
        [nn.Conv2d(6, 8, 1), Calls(lambda x: x.mean(1, keepdim=True).expand(-1, 9, -1, -1))],
        False,
    ),
    "channels with places": ([nn.MaxPool2d(4), nn.Conv2d(6, 3, 1), nn.Flatten()], False),
    "rows for channels": ([Calls(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(6, 5), Calls(lambda x: x[:, :9])], False),
    "rows for a pool": (
        [Calls(lambda x: x.flatten(2)), nn.Conv1d(6, 16, 1), Calls(lambda x: F.avg_pool2d(x, (2, 3)))],
        False,
    ),
    "used twice": ([nn.Conv2d(6, 9, 1), Calls(lambda x: x + x.amax((1, 2, 3), keepdim=True))], False),
    "taken twice": ([nn.Conv2d(6, 9, 1), Calls(lambda x: x.relu().mean((2, 3)) * x.sum())], False),
    "no filter": ([Calls(lambda x: torch.cat([x, x[:, :3]], 1).relu())], False),
}


@pytest.mark.parametrize("head", FEWER_CHANNELS)
@torch.no_grad()
def test_only_the_channels_that_are_read_are_computed(head):
    """By the last filter or product, where what follows keeps the channels apart."""
    layers, fewer = FEWER_CHANNELS[head]
    torch.manual_seed(0)
    model, images, size = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), *layers).double().eval(), image(12, 11), (4, 5)
    firsts, channels = spread((12, 11), size), torch.tensor([1, 7])
    (clean,), (output,), outputs = clean_passes(model, images, read=lambda output: channels)
    assert clean.contents[output].shape[1] == (2 if fewer else outputs.shape[1])
    windows = Windows.sliding(images.shape[1:], (4, *size), (1, 1, 1))
    chosen = np.asarray([np.flatnonzero((first == windows.starts[1:].T).all(1))[0] for first in firsts.T])
    found = Plan(clean, firsts, size).run(windows.patches(images[0], torch.zeros((), dtype=images.dtype), chosen))
    found, expected = clean.with_all_channels(output, found.whole(output)), whole(model, images, size, firsts)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[:, channels], expected[:, channels], rtol=1e-10, atol=1e-10)
    assert not fewer or not found[:, [0, 2, 3, 4, 5, 6, 8]].any()


def test_only_what_changed_is_computed():
    """On a plain chain the boxes are Krypton's: worked out by hand."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 5, padding=2)).double()
    firsts = np.asarray([[0, 13, 28], [0, 14, 28]])
    plan = agree(model, image(32, 32), (4, 4), firsts)
    boxes = [(region.size, region.firsts.tolist()) for region in plan.groups[0].regions.values()]
    assert boxes == [
        ((4, 4), firsts.tolist()),
        ((6, 6), [[0, 12, 26], [0, 13, 26]]),  # first - 1, within the map
        ((3, 4), [[0, 6, 13], [0, 6, 12]]),  # rows 12..17 are in pairs 6..8, columns 13..18 in pairs 6..9
        ((7, 8), [[0, 4, 9], [0, 4, 8]]),  # two more on each side
    ]
    assert plan.groups[0].whole_cost == 4 * 32 * 32 * 36 + 4 * 16 * 16 * 100
    assert plan.groups[0].cost == 4 * 6 * 6 * 36 + 4 * 7 * 8 * 100


@torch.no_grad()
@pytest.mark.parametrize("first", [0, *[pytest.param(n, marks=pytest.mark.slow) for n in range(200, 3000, 400)]])
def test_random_networks(first):
    for seed in range(first, first + (400 if first else 200)):
        network = RandomNetwork(seed)
        images = network.numbers(1, *network.shape)
        size = [network.draw.randint(1, n) for n in network.shape[1:]]
        firsts = spread(network.shape[1:], size)
        expected, (found, _) = whole(network, images, size, firsts), incremental(network, images, size, firsts)
        assert (found - expected).abs().max() <= 1e-10 * max(1e-3, expected.abs().max()), (seed, network.names)


class SharedModules(nn.Module):
    """One filter and one ReLU, used three times, two branches of different strides."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.relu(self.conv(x))
        b = self.relu(self.conv(F.max_pool2d(x, 2)))
        return self.conv(a[:, :, ::2, ::2] + b)


def test_shared_modules_and_branches():
    torch.manual_seed(0)
    agree(SharedModules().double(), image(20, 24), (4, 5), spread((20, 24), (4, 5), 7))


@pytest.mark.parametrize("spatial", [1, 3])
def test_sequences_and_volumes(spatial):
    conv, pool = getattr(nn, f"Conv{spatial}d"), getattr(nn, f"MaxPool{spatial}d")
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 4, 3, padding=1), nn.ReLU(), pool(2), conv(4, 3, 3), nn.Flatten()).double()
    space = (40,) if spatial == 1 else (12, 14, 16)
    size = (5,) if spatial == 1 else (3, 4, 5)
    plan = agree(model, image(*space), size, spread(space, size))
    assert plan.cost < plan.whole_cost / 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EVERY_FAMILY else pytest.mark.slow) for n in EVERY_CNN]
)
def test_torchvision(name):
    """Every classification CNN as if trained: patches in a corner, at the border and inside. In double: so built,
    EfficientNet-B5 loses 5% of its outputs' scale to single precision's rounding in plain inference itself."""
    side = 128 if name == "inception_v3" else 96
    firsts = np.asarray([[0, 40, side - 17, 33], [0, 0, side - 17, 61]])
    if name in EVERY_FAMILY:
        model = trained_like(name)
    else:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).double()
        model = as_if_trained(model, pictures(2, side))
    agree(model, pictures(1, side), (17, 17), firsts)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x0_5"])
def test_single_precision(name):
    model = trained_like(name, torch.float32)
    agree(model, pictures(1, 96, torch.float32), (17, 17), [[0, 40, 79], [0, 0, 79]], tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_CNN)
def test_single_precision_as_built(name):
    """Every classification CNN as torchvision builds it: between the sums of two orders there is only rounding."""
    side = 128 if name == "inception_v3" else 96
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    firsts = np.asarray([[0, 40, side - 17, 33], [0, 0, side - 17, 61]])
    agree(model, pictures(1, side, torch.float32), (17, 17), firsts, tolerance=1e-5)


class Looks(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * 2 if x[0, 0, 0, 0] > 0 else x.mean((2, 3))


class Masks(nn.Module):
    def forward(self, x):
        return (x * (x > 0.5)).mean((2, 3))


class ThroughNumpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Looks(), "looks at what tensors hold"),
        (Masks(), "computes a mask"),
        (ThroughNumpy(), "looks at what tensors hold|hides its operations"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Flatten()).train(), "statistics from the batch"),
        (nn.Sequential(nn.Dropout(), nn.Flatten()).train(), "draws random numbers"),
        (Calls(lambda x: (x + torch.randn_like(x)).mean((2, 3))), "draws random numbers"),
        (nn.Sequential(StochasticDepth(0.5, "row"), nn.Flatten()).train(), "draws random numbers"),
        (Calls(lambda x: (x, x)), "gives a tuple"),
        (Calls(lambda x: x.mean()), "no batch axis"),
        (Calls(lambda x: torch.ones(1, 4)), "does not depend on the image"),
        (lambda x: x, "is no module"),
    ],
)
def test_what_cannot_be_computed_in_part_is_refused(model, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        clean_passes(model.double() if isinstance(model, nn.Module) else model, image(8, 8))


def test_windows_that_change_as_much_are_computed_together():
    """Their boxes are smaller than those of windows in the order of the picture, and no group is too large."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 5, 2, 2),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 5, padding=2),
        nn.Conv2d(4, 2, 3, padding=1),
    ).double()
    images, size = image(64, 64), (7, 9)
    firsts = np.stack([axis.ravel() for axis in np.mgrid[0:57:6, 0:55:6]])
    (clean,), (output,), _ = clean_passes(model, images)
    labels = alike(clean, firsts, size)
    order = np.argsort(labels, kind="stable")
    plan = Plan(clean, firsts[:, order], size, labels[order])
    single = [Plan(clean, first[:, None], size).cost for first in firsts.T]
    assert sum(single) <= plan.cost < 1.1 * sum(single) < Plan(clean, firsts, size).cost
    assert 1 < len(plan.groups) < len(single) / 3 and np.bincount(labels).max() <= GROUP["cpu"]
    costs = [group.cost for group in plan.groups]
    assert costs == sorted(costs)
    found = plan.run(torch.zeros(len(order), 4, *size, dtype=torch.float64)).whole(output)
    assert (found - whole(model, images, size, firsts[:, order])).abs().max() < 1e-12


# ── several images ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_passes_of_several_images_share_what_is_made_ready(monkeypatch):
    """Prepared weights take several times a model's memory: once, not once an image."""
    made = []
    for name in ("filtering", "product"):
        make = getattr(clean_module, name)
        monkeypatch.setattr(clean_module, name, lambda *a, make=make: made.append(make) or make(*a))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(3, 3, 8, 8).double()
    windows = Windows.sliding((3, 8, 8), (3, 3, 3), (3, 2, 2))
    passes, (output,), _ = clean_passes(model.double(), images)
    for clean, image in zip(passes, images, strict=True):
        patches = windows.patches(image, torch.zeros(()), np.arange(len(windows)))
        found = Plan(clean, windows.firsts, windows.size).run(patches).whole(output)
        covered = windows.cover(image[None], torch.zeros(()), np.arange(len(windows)))
        torch.testing.assert_close(found, model(covered))
    assert len(made) == 2


class Alternating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (x.relu() if self.calls % 2 else x.neg()).mean((2, 3))


def test_passes_that_take_different_courses_are_refused():
    with pytest.raises(UnsupportedModel, match="another course for another image"):
        clean_passes(Alternating(), torch.randn(2, 3, 8, 8).double())
    assert len(clean_passes(Alternating(), torch.randn(1, 3, 8, 8).double())[0]) == 1
