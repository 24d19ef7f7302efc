"""Receptive fields against what really reaches a unit: NaN pixels and gradients, in any graph."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deconvviz.capture import watch
from deconvviz.geometry import Axis, receptive_field
from deconvviz.layers import find_call, locate


def field_of(model, inputs, layer):
    tape, _ = watch(model, (inputs,), layer=(*locate(model, layer),))
    call = find_call(tape, *locate(model, layer))
    return tape, call.outputs[0], receptive_field(tape, call.outputs[0])


def reached(tape, value, axis, rows, unit):
    """Whether NaN in these rows of the input (along one of its axes) reaches a unit of the value."""
    poked = tape.tensors[0].clone()
    poked.index_fill_(2 + axis, torch.tensor(rows, dtype=torch.long), math.nan)
    return bool(tape.replay(value, [poked])[(0, slice(None), *unit)].isnan().any())


def check_exact(tape, value, field, at_borders=True):
    """Nothing outside the field reaches a unit; its first and last pixels do, if the image has them.

    Not ``at_borders``: only if the image has the whole field. A unit can look at padding of a layer between.
    """
    shape = tape.values[value].shape
    for a, axis in enumerate(field.axes):
        units = {0, shape[2 + a] // 2, shape[2 + a] - 1}
        for i in units:
            unit = [n // 2 for n in shape[2:]]
            unit[a] = i
            first, end = axis.pixels(i)
            outside = [*range(first), *range(end, axis.image)]
            if outside:
                assert not reached(tape, value, a, outside, unit), f"axis {a}, unit {i}: more than {axis}"
            unclipped = axis.offset + i * axis.jump
            if not (at_borders or 0 <= unclipped <= axis.image - axis.size):
                continue
            if 0 <= unclipped < axis.image:
                assert reached(tape, value, a, [first], unit), f"axis {a}, unit {i}: less than {axis}"
            if 0 < unclipped + axis.size <= axis.image:
                assert reached(tape, value, a, [end - 1], unit), f"axis {a}, unit {i}: less than {axis}"


# ── the paper's table ────────────────────────────────────────────────────────────────────────────────────────


def zfnet() -> nn.Sequential:
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 7, 2, padding=1), nn.ReLU(), pool(), nn.LocalResponseNorm(5)),
        *(nn.Conv2d(4, 4, 5, 2), nn.ReLU(), pool(), nn.LocalResponseNorm(5)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    ).eval()


@pytest.mark.parametrize(
    ("layer", "size", "jump"),
    [("0", 7, 2), ("2", 11, 4), ("4", 27, 8), ("6", 43, 16), ("8", 75, 16), ("10", 107, 16), ("12", 139, 16)]
    + [("14", 171, 32)],
)
def test_zfnet_is_as_the_paper_says(layer, size, jump):
    tape, value, field = field_of(zfnet(), torch.randn(1, 3, 224, 224), layer)
    assert [(axis.size, axis.jump) for axis in field.axes] == [(size, jump)] * 2
    assert not field.reason
    assert str(field) == f"{size} x {size} pixels, jump {jump}"
    check_exact(tape, value, field)


# ── torchvision ──────────────────────────────────────────────────────────────────────────────────────────────

FAMILIES = {
    "alexnet": ["features.3", "features.12"],
    "vgg11": ["features.10", "features.20"],
    "squeezenet1_0": ["features.5", "features.10", "features.12"],
    "resnet18": ["layer1.0", "layer3.1", "layer4.1"],
    "resnext50_32x4d": ["layer2.3"],
    "googlenet": ["inception3a", "inception4c"],
    "inception_v3": ["Mixed_5d", "Mixed_6b"],
    "densenet121": ["features.denseblock2"],
    "mobilenet_v2": ["features.7", "features.18"],
    "mnasnet0_5": ["layers.9"],
    "shufflenet_v2_x0_5": ["stage2.3", "stage3"],
    "regnet_x_400mf": ["trunk_output.block2"],
    "convnext_tiny": ["features.1.0", "features.3"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name):
    inputs = torch.randn(1, 3, 192, 160, generator=torch.Generator().manual_seed(0))
    for layer in FAMILIES[name]:
        tape, value, field = field_of(build(name), inputs, layer)
        assert not field.reason, f"{layer}: {field}"
        check_exact(tape, value, field)


@pytest.mark.parametrize(
    ("name", "before", "after", "operation"),
    [
        ("mobilenet_v3_small", "features.1.block.0", "features.1", "adaptive_avg_pool2d in features.1.block.1."),
        ("efficientnet_b0", "features.1.0.block.0", "features.1", "adaptive_avg_pool2d in features.1.0.block.1."),
        ("regnet_y_400mf", "trunk_output.block1.block1-0.f.b", "trunk_output.block1", "adaptive_avg_pool2d in "),
        ("resnet18", "layer4", "avgpool", "adaptive_avg_pool2d in avgpool"),
        ("squeezenet1_0", "classifier.2", "classifier.3", "adaptive_avg_pool2d in classifier.3"),
        ("vgg11", "avgpool", "classifier.0", "flatten in the model"),
        ("convnext_tiny", "features.7", "avgpool", "adaptive_avg_pool2d in avgpool"),
        ("swin_t", "features.0", "features.1.0.attn", "view in "),
        ("maxvit_t", "stem", "blocks.0.layers.0", "adaptive_avg_pool2d in blocks.0.layers.0.layers.MBconv."),
        ("vit_b_16", "conv_proj", "encoder.layers.encoder_layer_0", "reshape in the model"),
    ],
)  # fmt: skip
def test_global_fields_say_so(name, before, after, operation):
    inputs = torch.randn(1, 3, 224, 224)
    _, _, local = field_of(build(name), inputs, before)
    assert not local.reason
    _, _, field = field_of(build(name), inputs, after)
    assert field.reason.startswith(operation)
    assert field.covers_image and str(field) == f"the whole image ({field.reason})"
    assert field.box((0,) * 2) == ((0, 224), (0, 224))


def test_squeeze_and_excite_does_reach_everywhere():
    tape, value, _ = field_of(build("mobilenet_v3_small"), torch.randn(1, 3, 96, 96), "features.1")
    for a in (0, 1):
        assert reached(tape, value, a, [95], (0, 0))


def test_video():
    """The field and some more on each axis: frames too."""
    tape, value, field = field_of(build("r3d_18"), torch.randn(1, 3, 20, 40, 40), "layer2.0")
    assert len(field.axes) == 3 and not field.reason
    assert [axis.size for axis in field.axes] == [17, 35, 35]
    check_exact(tape, value, field)


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_0"])
def test_gradients_stay_inside_the_box(name):
    model, layer = build(name), FAMILIES[name][-1]
    inputs = torch.randn(1, 3, 224, 224, requires_grad=True)
    tape, value, field = field_of(model, inputs.detach(), layer)
    shape, output = tape.values[value].shape, []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: output.append(out))
    model(inputs)
    handle.remove()
    for unit in ((0, 0), (shape[2] // 2, shape[3] // 2), (shape[2] - 1, 1)):
        grad = torch.autograd.grad(output[0][(0, slice(None), *unit)].sum(), inputs, retain_graph=True)[0]
        (y0, y1), (x0, x1) = field.box(unit)
        assert grad[..., y0:y1, x0:x1].abs().sum() > 0
        grad[..., y0:y1, x0:x1] = 0
        assert not grad.any()


def test_gradient_support_is_the_box_where_nothing_chooses():
    """Convolutions with positive weights and average pools: every pixel of the field has a gradient."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.Conv2d(2, 1, 3, dilation=2)).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1)
    inputs = torch.rand(1, 1, 50, 61, dtype=torch.float64, requires_grad=True)
    _, _, field = field_of(model, inputs.detach(), "2")
    output = model(inputs)
    for y in range(output.shape[2]):
        for x in range(output.shape[3]):
            grad = torch.autograd.grad(output[0, 0, y, x], inputs, retain_graph=True)[0][0, 0]
            support = tuple((int(i.min()), int(i.max()) + 1) for i in grad.nonzero().T)
            assert field.box((y, x)) == support


# ── graphs ───────────────────────────────────────────────────────────────────────────────────────────────────


class Net(nn.Module):
    """A model that is one function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def same(channels=3, **options):
    return nn.Conv2d(channels, channels, 3, padding="same", **options)


LOCAL = {
    "residual": lambda net, x: x + net.conv(x),
    "concatenation": lambda net, x: torch.cat([x, net.conv(net.conv(x)), F.max_pool2d(x, 5, 1, 2)], 1),
    "dilated": lambda net, x: net.wide(x),
    "ceil mode": lambda net, x: F.max_pool2d(net.conv(x), 3, 2, ceil_mode=True),
    "dilated pool": lambda net, x: F.max_pool2d(x, 3, 1, dilation=4),
    "padding beside the filter": lambda net, x: net.conv(F.pad(x, (3, 1, 0, 2))),
    "reflection": lambda net, x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "reflection again and again": lambda net, x: F.pad(F.pad(net.conv(x), [9] * 4, "reflect"), [20] * 4, "reflect"),
    "reflection of a small map": lambda net, x: F.pad(F.max_pool2d(x, 9), [3] * 4, mode="reflect"),
    "strided shortcut": lambda net, x: F.avg_pool2d(net.conv(x), 2) + F.max_pool2d(x, 2),
    "channels last": lambda net, x: net.norm(net.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "transposed twice": lambda net, x: net.conv(x.transpose(2, 3)).transpose(-1, -2),
    "channel shuffle": lambda net, x: net.conv(x).view(1, 3, 1, 40, 36).transpose(1, 2).reshape(1, 3, 40, 36),
    "chunks of channels": lambda net, x: torch.cat(net.conv(x).chunk(3, 1)[::-1], 1),
    "a channel taken out": lambda net, x: torch.stack([net.conv(x)[:, 0], x[:, 2]], 1),
    "a cropped edge": lambda net, x: net.conv(x)[..., 2:, 1:-1],
    "every second pixel": lambda net, x: F.pad(net.conv(net.conv(x)[:, :, ::2, 1::2]), (0, 0, 0, 0, 1, 1)),
    "pixels to channels": lambda net, x: torch.cat([x[..., ::2, ::2], net.conv(x)[..., 1::2, 1::2]], 1),
    "pixels to channels, unshuffled": lambda net, x: F.pixel_unshuffle(net.conv(x), 2),
    "a mean over channels": lambda net, x: net.conv(x).mean(1, keepdim=True),
    "channels by their length": lambda net, x: net.conv(x) / net.conv(x).norm(2, 1, keepdim=True).clamp(min=1e-6),
    "channels by their length, inverse": lambda net, x: net.conv(x) * (1 / torch.linalg.vector_norm(x, dim=1)[:, None]),
    "root mean square of channels": lambda net, x: net.conv(x) * torch.rsqrt(x.square().mean(1, keepdim=True) + 0.1),
    "spread of channels": lambda net, x: net.conv(x) * torch.reciprocal(x.std(1, keepdim=True) + x.var(1)[:, None]),
    "a softmax over channels": lambda net, x: net.conv(x).softmax(1),
    "an adaptive pool that pools nothing": lambda net, x: F.adaptive_avg_pool2d(net.conv(x), (40, 36)),
    "a matrix over channels": lambda net, x: net.matrix(net.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}  # fmt: skip
PADDED_TWICE = {
    "reflection beside filters": lambda net, x: net.conv(F.pad(net.conv(x)[..., ::2], (5, 1, 0, 4), "reflect")),
    "the nearest cells around": lambda net, x: net.wide(F.pad(F.max_pool2d(x, 2), (2, 3, 1, 1), mode="replicate")),
}  # fmt: skip
GLOBAL = {
    "a mean over rows": (lambda net, x: net.conv(x) - x.mean(2, keepdim=True), "mean"),
    "a softmax over columns": (lambda net, x: net.conv(x).softmax(-1), "softmax"),
    "instance norm": (lambda net, x: F.instance_norm(x), "instance_norm"),
    "batch statistics": (lambda net, x: F.batch_norm(x, None, None, training=True), "batch_norm"),
    "rows side by side": (lambda net, x: torch.cat([x, x], 2), "cat"),
    "rows side by side, by numpy's axis": (lambda net, x: torch.cat([x, x], axis=2), "cat"),
    "filters from the image": (
        lambda net, x: F.conv2d(x, net.conv(x).mean((0, 2, 3)).expand(3, 3)[..., None, None]),
        "conv2d",
    ),
    "wrapped around": (lambda net, x: F.pad(x, (1, 1, 1, 1), mode="circular"), "pad"),
    "more pixels than the image's": (lambda net, x: F.interpolate(x, scale_factor=2), "interpolate"),
    "corners that align": (
        lambda net, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=True),
        "interpolate",
    ),
    "a factor of one and a half": (lambda net, x: F.interpolate(F.max_pool2d(x, 4), scale_factor=1.5), "interpolate"),
    "spread of everything": (lambda net, x: net.conv(x) / x.std(False), "std"),
    "length of columns": (lambda net, x: net.conv(x) / x.norm(2, 3, keepdim=True), "norm"),
    "a mask from the input": (lambda net, x: x * (x > x.mean()), "a mask in mul"),
    "a flipped picture": (lambda net, x: x.flip(3), "flip"),
    "two scales": (lambda net, x: F.max_pool2d(x, 3, 2, 1)[..., :18] + x[..., :20, :18], "add"),
}


def network(function):
    torch.manual_seed(0)
    layers = {"conv": same(), "wide": same(dilation=3), "norm": nn.LayerNorm(3), "matrix": nn.Linear(3, 3)}
    return Net(function, **layers).eval()


@pytest.mark.parametrize("name", LOCAL)
def test_local_graphs(name):
    tape, value, field = field_of(network(LOCAL[name]), torch.randn(1, 3, 40, 36), "")
    assert not field.reason
    check_exact(tape, value, field)


@pytest.mark.parametrize("name", PADDED_TWICE)
def test_padding_of_padding_is_seen_as_if_it_held_something(name):
    tape, value, field = field_of(network(PADDED_TWICE[name]), torch.randn(1, 3, 40, 36), "")
    assert not field.reason
    check_exact(tape, value, field, at_borders=False)


@pytest.mark.parametrize("name", GLOBAL)
def test_global_graphs(name):
    function, operation = GLOBAL[name]
    _, _, field = field_of(network(function), torch.randn(1, 3, 40, 36), "")
    assert field.reason.startswith(operation)


def test_one_dimension():
    model = nn.Sequential(nn.Conv1d(2, 3, 5, 2, 2), nn.ReLU(), nn.MaxPool1d(3, 2), nn.Conv1d(3, 3, 3, padding=2))
    tape, value, field = field_of(model, torch.randn(1, 2, 101), "3")
    check_exact(tape, value, field)


def test_a_learned_map_forbids_crops():
    model = Net(lambda net, x: net.conv(x) + net.map, conv=same())
    model.map = nn.Parameter(torch.randn(1, 3, 40, 36))
    _, _, field = field_of(model, torch.randn(1, 3, 40, 36), "")
    assert [axis.size for axis in field.axes] == [3, 3] and field.covers_image


def test_values_of_another_input_are_not_seen():
    class Two(nn.Module):
        def forward(self, x, y):
            return F.max_pool2d(x, 2)

    tape, _ = watch(Two(), (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 9, 9)))
    value = find_call(tape, "", None).outputs[0]
    assert receptive_field(tape, value, 0).box((1, 1)) == ((2, 4), (2, 4))
    assert "does not come from" in receptive_field(tape, value, 1).reason


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_random_chains(data):
    """Windows of any kernel, stride, padding and dilation, one after the other."""
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    layers, channels, size = [], 1, number(70, 90)
    image = torch.randn(1, 1, size)
    for _ in range(number(1, 4)):
        kernel, stride, dilation = number(1, 4), number(1, 3), number(1, 2)
        filters = data.draw(st.booleans())
        padding = number(0, 2 if filters else kernel // 2)
        size = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        assume(size > 0)
        if filters:
            layers.append(nn.Conv1d(channels, 1, kernel, stride, padding, dilation))
        else:
            ceil_mode = data.draw(st.booleans())
            layers.append(nn.MaxPool1d(kernel, stride, padding, dilation, ceil_mode=ceil_mode))
    tape, value, field = field_of(nn.Sequential(*layers), image, "")
    check_exact(tape, value, field, at_borders=False)


ENLARGED = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest, three times": lambda x: F.interpolate(x, scale_factor=(3, 3), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "bilinear, three times": lambda x: F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False),
    "bicubic": lambda x: F.interpolate(x, scale_factor=4, mode="bicubic"),
    "transposed filter": lambda x: F.conv_transpose2d(x, torch.ones(3, 3, 4, 4), stride=2, padding=1),
    "transposed filter, with gaps": lambda x: F.conv_transpose2d(x, torch.ones(3, 3, 2, 3), None, 3, 0, 1, 1, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(torch.cat([x, x, x, x], 1), 2),
}


@pytest.mark.parametrize("name", ENLARGED)
def test_nothing_outside_the_field_reaches_an_enlarged_map(name):
    """Its field is that of all phases of the factor: some units see less, but not all."""
    net = network(lambda net, x: net.conv(ENLARGED[name](F.avg_pool2d(net.conv(x), 12))))
    tape, value, field = field_of(net, torch.randn(1, 3, 48, 60), "")
    assert not field.reason
    shape, phases = tape.values[value].shape, 12 // field.axes[0].jump
    for a, axis in enumerate(field.axes):
        seen: list[int] = []
        for i in range(shape[2 + a]):
            unit = [n // 2 for n in shape[2:]]
            unit[a] = i
            (first, end), unclipped = axis.pixels(i), axis.offset + i * axis.jump
            outside = [*range(first), *range(end, axis.image)]
            assert not outside or not reached(tape, value, a, outside, unit)
            if 0 <= unclipped <= axis.image - axis.size:
                seen += [reached(tape, value, a, [first], unit), reached(tape, value, a, [end - 1], unit)]
        assert len(seen) < 2 * phases or any(seen[::2]) and any(seen[1::2]), f"axis {a}: always less than {axis}"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 8, 16]), st.integers(-40, 5), st.integers(20, 130),
       st.sampled_from([1, 4, 6, 16]))  # fmt: skip
def test_crops_hold_the_field_and_its_padding(size, jump, offset, image, coarsest):
    axis = Axis(image, size, jump, offset, coarsest=coarsest)
    units = (image - offset - 1) // jump + 1
    for i in range(units):
        start, end = axis.crop_start(i), axis.crop_start(i) + axis.crop_size
        first, last = axis.pixels(i)
        assert 0 <= start <= first and last <= end <= image or first == last
        assert start % jump == start % coarsest == 0
        unclipped = offset + i * jump
        assert unclipped >= 0 or start == 0  # the padding is the image's own
        assert unclipped + size <= image or end == image
