"""The paper's networks: every map's shape, every parameter by hand, and each ablation of table 3."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deconvviz import Deconvnet
from deconvviz.errors import InvalidInput
from deconvviz.models import alexnet_2012, small_alexnet, small_zfnet, zfnet

ZFNET = {
    "conv1": (96, 110, 110),
    "pool1": (96, 55, 55),
    "norm1": (96, 55, 55),
    "conv2": (256, 26, 26),
    "pool2": (256, 13, 13),
    "norm2": (256, 13, 13),
    "conv3": (384, 13, 13),
    "conv4": (384, 13, 13),
    "conv5": (256, 13, 13),
    "pool5": (256, 6, 6),
    "flatten": (9216,),
    "fc6": (4096,),
    "fc7": (4096,),
    "fc8": (1000,),
}
ALEXNET = ZFNET | {
    "conv1": (96, 55, 55),
    "norm1": (96, 55, 55),
    "pool1": (96, 27, 27),
    "conv2": (256, 27, 27),
    "norm2": (256, 27, 27),
}
FIELDS = {  # the paper's receptive field and jump, in pixels
    "conv1": (7, 2),
    "pool1": (11, 4),
    "conv2": (27, 8),
    "pool2": (43, 16),
    "conv3": (75, 16),
    "conv4": (107, 16),
    "conv5": (139, 16),
    "pool5": (171, 32),
}


@pytest.fixture(scope="module")
def paper_net() -> nn.Sequential:
    torch.manual_seed(0)
    return zfnet().eval()


def shapes(model: nn.Sequential, size: int) -> dict[str, tuple[int, ...]]:
    """Each layer's output, run one by one."""
    x, found = torch.zeros(1, 3, size, size), {}
    with torch.no_grad():
        for name, layer in model.named_children():
            x = layer(x)
            found[name] = tuple(x.shape[1:])
    return found


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_zfnet_layer_by_layer(paper_net) -> None:
    found = shapes(paper_net, 224)
    assert [name for name in found if name[:4] not in ("relu", "drop")] == list(ZFNET)
    assert {name: found[name] for name in ZFNET} == ZFNET
    assert parameters(paper_net) == sum(
        (
            7 * 7 * 3 * 96 + 96,
            5 * 5 * 96 * 256 + 256,
            3 * 3 * 256 * 384 + 384,
            3 * 3 * 384 * 384 + 384,
            3 * 3 * 384 * 256 + 256,
            9216 * 4096 + 4096,
            4096 * 4096 + 4096,
            4096 * 1000 + 1000,
        )
    )


def test_alexnet_layer_by_layer() -> None:
    model = alexnet_2012().eval()
    found = shapes(model, 224)
    assert {name: found[name] for name in ALEXNET} == ALEXNET
    order = [name for name in found if name[:4] not in ("relu", "drop")]
    assert order[:6] == ["conv1", "norm1", "pool1", "conv2", "norm2", "pool2"]
    assert parameters(model) == 60_965_224  # as published: 60 million
    dense = parameters(alexnet_2012(groups=1)) - parameters(model)
    assert dense == 25 * 48 * 256 + 9 * 192 * 384 + 9 * 192 * 256


@pytest.mark.parametrize("layer", FIELDS)
def test_receptive_fields(paper_net, layer) -> None:
    """The pixels that a linear copy of the net sends to two neighbouring cells of a layer."""
    chain = nn.Sequential()
    for name, module in paper_net.named_children():
        if isinstance(module, nn.Conv2d):
            one = nn.Conv2d(1, 1, module.kernel_size, module.stride, module.padding, bias=False)
            nn.init.ones_(one.weight)
            chain.append(one)
        elif isinstance(module, nn.MaxPool2d):
            chain.append(nn.AvgPool2d(3, 2, ceil_mode=True))
        if name == layer:
            break
    boxes = []
    for cell in (6, 7):  # far from the borders
        x = torch.zeros(1, 1, 600, 600, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(chain.double()(x)[0, 0, cell, cell], x)
        rows = gradient[0, 0].any(1).nonzero()
        boxes.append((int(rows[0]), int(rows[-1]) + 1))
    (start, end), (following, _) = boxes
    assert start > 0 and (end - start, following - start) == FIELDS[layer]


def test_contrast_normalisation_is_the_formula_of_2012(paper_net) -> None:
    a = torch.randn(1, 96, 1, 1, generator=torch.Generator().manual_seed(0)) * 50
    c = 40
    expected = a[0, c] / (2 + 1e-4 * (a[0, c - 2 : c + 3] ** 2).sum()) ** 0.75
    torch.testing.assert_close(paper_net.norm1(a)[0, c], expected)


@pytest.mark.parametrize(
    ("without", "fc6_in"),
    [
        (("conv3", "conv4"), 9216),
        (("conv3", "conv4", "conv5"), 9216),
        (("fc7",), 9216),
        (("fc6", "fc7"), None),
        (("conv3", "conv4", "fc6", "fc7"), None),
        ("fc6", None),
    ],
)
def test_ablations_of_table_3(without, fc6_in) -> None:
    with torch.device("meta"):
        model = zfnet(10, without=without)
    left = dict(model.named_children())
    gone = {without} if isinstance(without, str) else set(without)
    for name in ("conv3", "conv4", "conv5", "fc6", "fc7"):
        assert (name in left) is (name not in gone)
        assert (f"relu{name[-1]}" in left) is (name not in gone)
    assert {"conv1", "conv2", "pool5", "fc8"} <= set(left)
    assert fc6_in is None or left["fc6"].in_features == fc6_in
    assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 10)


def test_sizes_of_table_3() -> None:
    with torch.device("meta"):
        model = zfnet(10, fc=8192, conv345=(512, 1024, 512))
    assert [model.conv3.out_channels, model.conv4.out_channels, model.conv5.out_channels] == [512, 1024, 512]
    assert (model.fc6.in_features, model.fc6.out_features, model.fc7.out_features) == (512 * 36, 8192, 8192)


@pytest.mark.parametrize("build", [small_zfnet, small_alexnet])
@pytest.mark.parametrize("size", [32, 64])
def test_small_ones_have_the_same_shapes_from_conv3_on(build, size) -> None:
    found = shapes(build(7, size).eval(), size)
    expected = {
        "conv3": (96, 4, 4),
        "conv4": (96, 4, 4),
        "conv5": (64, 4, 4),
        "pool5": (64, 2, 2),
        "fc8": (7,),
    }
    assert {name: found[name] for name in expected} == expected
    ablated = build(7, size, without=("conv3", "conv4", "fc6", "fc7"))
    assert shapes(ablated.eval(), size)["fc8"] == (7,)


def test_the_first_layer_is_all_that_differs() -> None:
    first, second = small_alexnet(size=64), small_zfnet(size=64)
    assert (first.conv1.kernel_size, first.conv1.stride) == ((11, 11), (4, 4))
    assert (second.conv1.kernel_size, second.conv1.stride) == ((7, 7), (2, 2))
    rest = [{k: v.shape for k, v in m.state_dict().items() if "conv1" not in k} for m in (first, second)]
    assert rest[0] == rest[1]


def test_every_operation_has_a_rule() -> None:
    model = small_zfnet().eval()
    assert Deconvnet(model).check(torch.randn(1, 3, 32, 32)).supported


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": ("conv1",)}, "without names 'conv1'; expected some of conv3, conv4, conv5, fc6, fc7"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"fc": 2.5}, "fc is 2.5"),
        ({"conv345": (384, 384)}, "conv345 is"),
        ({"conv345": 384}, "conv345 is 384"),
        ({"without": 3}, "without names 3"),
        ({"conv345": (384, -1, 256)}, "maps of conv4 is -1"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        zfnet(**options)


def test_other_refusals() -> None:
    with pytest.raises(InvalidInput, match="size is 48; expected 32 or 64"):
        small_zfnet(size=48)
    with pytest.raises(InvalidInput, match="groups of conv2 is 0; expected a whole number from 1"):
        alexnet_2012(groups=0)
    with pytest.raises(InvalidInput, match="groups is 5; expected a divisor of conv2's 96 and 256"):
        alexnet_2012(groups=5)
