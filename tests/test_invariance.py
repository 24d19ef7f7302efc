"""Curves against theory: nets that shift with their input, or do not see the shift at all."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from deconvviz.errors import InvalidInput, LayerNotRun, TargetOutOfRange, UnknownLayer, UnsupportedModel
from deconvviz.features import features
from deconvviz.images import load_picture, to_input
from deconvviz.invariance import invariance, rotation, scale, translation

SIZE = 16


def roll(images: Tensor, pixels: float) -> Tensor:
    return images.roll(int(pixels), dims=2)


def periodic(stride: int = 1) -> nn.Sequential:
    """A net on a torus: its maps shift with the picture, and its sums over the map do not change."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", stride=stride),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()


def test_maps_shift_and_their_sums_do_not(images) -> None:
    model, amounts = periodic(), list(range(SIZE + 1))
    curves = invariance(model, images, ["3", model[5]], roll, amounts)
    maps = model[:4](images).detach()
    expected = torch.stack([(maps.roll(s, 2) - maps).flatten(1).norm(dim=1) for s in amounts], 1)
    torch.testing.assert_close(curves.distances["3"], expected)
    assert (expected[:, 1:SIZE] > 0.1).all()
    torch.testing.assert_close(curves.distances["5"], torch.zeros(3, SIZE + 1).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(curves.norms["3"], maps.flatten(1).norm(dim=1))
    top = model(images).softmax(1).max(1).values.detach()
    torch.testing.assert_close(curves.probability, top[:, None].expand(-1, SIZE + 1))


def test_a_stride_of_two_is_invariant_to_even_shifts_only(images) -> None:
    curves = invariance(periodic(stride=2), images, ["5"], roll, range(8))
    distance = curves.distances["5"]
    torch.testing.assert_close(distance[:, ::2], torch.zeros(3, 4).double(), atol=1e-12, rtol=0)
    assert (distance[:, 1::2] > 1e-4).all()


def test_a_wave_through_a_linear_filter_has_the_curve_of_a_chord() -> None:
    """Shifting a wave of k periods by s of H rows turns its phase by 2πks/H: the chord 2·|sin(πks/H)|·‖f‖."""
    k = 3
    wave = torch.sin(2 * math.pi * k * torch.arange(SIZE) / SIZE).double()
    image = wave.view(1, 1, SIZE, 1).expand(1, 3, SIZE, SIZE)
    model = periodic()[:1]
    nn.init.zeros_(model[0].bias)
    curves = invariance(model, image, ["0"], roll, range(SIZE))
    shifts = torch.arange(SIZE).double()
    expected = 2 * (math.pi * k * shifts / SIZE).sin().abs() * curves.norms["0"]
    torch.testing.assert_close(curves.distances["0"][0], expected)
    assert curves.probability is None


def test_transforms_move_as_they_say() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 4] = 1
    assert translation(image, 3).nonzero().tolist() == [[0, 0, 5, 4]]
    assert translation(image, -2).nonzero().tolist() == [[0, 0, 0, 4]]
    assert rotation(image, 90).round(decimals=4).nonzero().tolist() == [[0, 0, 4, 6]]  # from twelve to three o'clock
    torch.testing.assert_close(rotation(image, 30), rotate(image, -30, interpolation=InterpolationMode.BILINEAR))
    assert scale(image, 2)[0, 0, 0, 4] == 1
    for transform, still in ((translation, 0), (scale, 1), (rotation, 360)):
        torch.testing.assert_close(transform(image, still), image, atol=1e-4, rtol=0)


def test_the_papers_ranges_are_the_default(images) -> None:
    model = periodic()
    shift = invariance(model, images, ["1"])
    assert (shift.amounts[0], shift.amounts[-1], shift.unit) == (
        -60 * SIZE / 224,
        60 * SIZE / 224,
        "pixels down",
    )
    assert shift.distances["1"][:, len(shift.amounts) // 2].abs().max() < 1e-6  # no shift
    larger = invariance(model, images, ["1"], "scale")
    assert (larger.amounts[0], larger.amounts[-1]) == (1, pytest.approx(1.8))
    turned = invariance(model, images, ["1"], "rotation")
    assert turned.amounts[-1] == 360 and turned.distances["1"][:, -1].max() < 0.02 * turned.norms["1"].max()


def test_a_transform_may_work_in_place(images) -> None:
    before = images.clone()
    curves = invariance(nn.Conv2d(3, 4, 3).to(images), images, "", lambda x, amount: x.add_(amount), [0, 1, 2])
    assert torch.equal(images, before) and curves.distances[""][:, 0].max() == 0


def test_targets_choose_the_probability(images) -> None:
    model = periodic()
    curves = invariance(model, images, ["0"], roll, [0], targets=[4, 0, 2])
    expected = model(images).softmax(1)[torch.arange(3), [4, 0, 2]].detach()
    torch.testing.assert_close(curves.probability[:, 0], expected)
    labels = torch.tensor([4, 0, 2], dtype=torch.uint8)  # as image data sets keep them
    assert torch.equal(invariance(model, images, ["0"], roll, [0], targets=labels).probability, curves.probability)


def test_calls_of_a_reused_module_and_the_model_as_found(images) -> None:
    model = build("resnet18").double()
    layers = ["layer1.0.relu#1", "layer1.0.relu#2", "fc"]
    curves = invariance(model, images.repeat(1, 1, 4, 4), layers, "rotation", [10])
    assert list(curves.distances) == layers
    assert not torch.equal(curves.distances[layers[0]], curves.distances[layers[1]])
    first, logits = features(model, images, ["conv1", ""])
    assert torch.equal(first, model.conv1(images)) and torch.equal(logits, model(images))
    assert not any(module._forward_hooks for module in model.modules())
    model.float()


def test_the_figure(images) -> None:
    curves = invariance(periodic(), images, ["1", "5"], roll, range(4))
    figure = curves.figure(["lawn mower", "shih-tzu", "$x_{$"])
    assert [axes.get_title() for axes in figure.axes] == [
        "1: distance",
        "5: distance",
        "probability of the class",
    ]
    figure.draw_without_rendering()
    for axes, values in zip(figure.axes, [*curves.distances.values(), curves.probability], strict=True):
        assert [line.get_ydata().tolist() for line in axes.lines] == values.tolist()
        assert axes.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lawn mower", "shih-tzu", "$x_{$"]
    with pytest.raises(InvalidInput, match="labels has 1 entries, expected 3"):
        curves.figure(["one"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"transform": "shear"},
            InvalidInput,
            "transform is 'shear'; expected one of 'translation', 'scale'",
        ),
        ({"transform": roll}, InvalidInput, "amounts is None"),
        (
            {"transform": lambda images, amount: images[:, :, 2:], "amounts": [1]},
            InvalidInput,
            r"at amount 1 layer '3' gives shape \(3, 8, 14, 16\), at first \(3, 8, 16, 16\)",
        ),
        ({"amounts": []}, InvalidInput, r"amounts is \[\]"),
        ({"layers": ["head"]}, UnknownLayer, "no layer 'head'"),
        ({"layers": ["3#2"]}, LayerNotRun, "ran 1 time"),
        ({"targets": [1, 2]}, TargetOutOfRange, "expected one class for each of the 3 images, from 0 to 4"),
        ({"targets": [1, 2, 5]}, TargetOutOfRange, "from 0 to 4"),
        ({"targets": "cat"}, TargetOutOfRange, "targets is 'cat'"),
        ({"targets": [True, False, True]}, TargetOutOfRange, "targets is"),
        ({"amounts": 5}, InvalidInput, "amounts is 5"),
        ({"amounts": ["far"]}, InvalidInput, r"amounts is \['far'\]"),
        ({"transform": "scale", "amounts": [1, 0]}, InvalidInput, "amount 0 was refused by the transform"),
        ({"transform": 5}, InvalidInput, "transform is 5; expected one of"),
        (
            {"layers": []},
            InvalidInput,
            r"layers is \[\]; expected dotted names, modules or calls, one or more",
        ),
        ({"layers": None}, InvalidInput, "layers is None"),
        ({"model": "resnet18"}, UnsupportedModel, "model is a str"),
    ],
)
def test_refusals(images, options, error, message) -> None:
    with pytest.raises(error, match=message):
        invariance(**({"model": periodic(), "images": images, "layers": ["3"]} | options))


def test_one_layer_can_stand_alone(images) -> None:
    model = periodic()
    for layer in ("5", model[5]):
        assert list(invariance(model, images, layer, roll, [1]).distances) == ["5"]


def test_the_top_of_a_real_network_is_steadier_than_its_start(squeezenet, data) -> None:
    """The paper's figure 5: a few pixels change layer 1 as much as it will ever change; the top only later."""
    paths = sorted((data / "imagenet_sample").iterdir())
    photographs = torch.stack([to_input(load_picture(paths[i])) for i in (259, 409, 817)])
    curves = invariance(squeezenet, photographs, ["features.1", "classifier.3"], "translation", [8, 60])
    early, late = (curves.distances[layer][:, 0] / curves.distances[layer][:, 1] for layer in curves.distances)
    assert (early > late).all() and late.mean() < 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_but_for_its_rounding(dtype) -> None:
    """Pixels are moved in float32, and norms beyond what float16 holds are finite and drawn."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for move, amount in ((rotation, 15), (translation, 5), (scale, 1.2)):
        torch.testing.assert_close(move(images, amount), move(images.float(), amount).to(dtype))
    model = nn.Conv2d(3, 16, 3)
    nn.init.constant_(model.weight, 100)
    half = invariance(model.to(dtype), images, "", "rotation", [0, 15])
    full = invariance(model.float(), images.float(), "", "rotation", [0, 15])
    torch.testing.assert_close(half.distances[""], full.distances[""], rtol=0.02, atol=1)
    torch.testing.assert_close(half.norms[""], full.norms[""], rtol=0.02, atol=1)
    assert half.norms[""].min() > 65504
    half.figure().draw_without_rendering()


def test_frames_of_a_clip_move_alike_and_a_signal_needs_a_function() -> None:
    clip = torch.rand(2, 3, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([rotation(frame, 30) for frame in clip.unbind(2)], 2)
    torch.testing.assert_close(rotation(clip, 30), frames)
    assert invariance(nn.Conv3d(3, 4, 3), clip, "", "rotation", [0, 30]).distances[""].shape == (2, 2)
    signal, model = torch.randn(3, 2, 40), nn.Conv1d(2, 4, 3)
    with pytest.raises(InvalidInput, match=r"images have shape \(3, 2, 40\); expected \(N, C, H, W\)"):
        invariance(model, signal, "", "translation")
    assert invariance(model, signal, "", roll, [0, 5]).distances[""].shape == (3, 2)


def test_a_model_in_train_mode_is_judged_in_eval_mode(images) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout()).double()
    expected = invariance(model.eval(), images, ["3"], "rotation", [90])
    found = invariance(model.train(), images, ["3"], "rotation", [90])
    assert torch.equal(found.distances["3"], expected.distances["3"]) and all(m.training for m in model.modules())


def test_a_single_amount_is_seen_in_the_figure(images) -> None:
    figure = invariance(periodic(), images, ["1"], "rotation", [90]).figure()
    assert all(line.get_marker() == "o" for axes in figure.axes for line in axes.lines)
