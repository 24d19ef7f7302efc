"""OcclusionSensitivity is captum's Occlusion: the same numbers, arguments and errors; and what goes wrong in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import Occlusion
from conftest import build
from hypothesis import given
from hypothesis import strategies as st
from random_windows import at_random
from torch import nn
from trained_like import pictures, trained_like

from deconvviz import Deconvnet, OcclusionSensitivity
from deconvviz.errors import InvalidInput, TargetOutOfRange, UnsupportedModel, WindowFailed
from deconvviz.occlusion.windows import Windows, circles, segments

FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0",
    "vgg11_bn",
]  # fmt: skip


def toy(n=2, channels=3, classes=5, dtype=torch.float64):
    torch.manual_seed(0)
    conv, pool = getattr(nn, f"Conv{n}d"), getattr(nn, f"AdaptiveAvgPool{n}d")
    return nn.Sequential(
        conv(channels, 6, 3, padding=1), nn.ReLU(), conv(6, 8, 3, 2, 1), nn.ReLU(), pool(2), nn.Flatten(),
        nn.Linear(8 * 2**n, classes),
    ).to(dtype).eval()  # fmt: skip


def looped(model, inputs, shape, strides, baseline, target):
    """The definition, one window and one image at a time, in double (captum rounds its result to float32)."""
    axes = [range(0, n - w + s, s) for n, w, s in zip(inputs.shape[1:], shape, strides, strict=True)]
    total, counts = torch.zeros_like(inputs), torch.zeros_like(inputs)
    clean = [model(inputs[i : i + 1])[0, target[i]] for i in range(len(inputs))]
    for starts in np.ndindex(*[len(a) for a in axes]):
        starts = [a[i] for a, i in zip(axes, starts, strict=True)]
        box = tuple(slice(a, a + w) for a, w in zip(starts, shape, strict=True))
        for i in range(len(inputs)):
            covered = inputs[i : i + 1].clone()
            covered[0][box] = baseline.expand(inputs.shape)[i][box]
            total[i][box] += clean[i] - model(covered)[0, target[i]]
            counts[i][box] += 1
    return total / counts


@st.composite
def cases(draw):
    n = draw(st.integers(1, 3))
    space = [draw(st.integers(4, 14 if n < 3 else 8)) for _ in range(n)]
    shape = (3, *space)
    window = tuple(draw(st.integers(1, extent)) for extent in shape)
    strides = tuple(
        draw(st.integers(max(1, w // 2), w)) if w < extent else draw(st.integers(1, 20))
        for w, extent in zip(window, shape, strict=True)
    )
    count = draw(st.integers(1, 3))
    return (count, *shape), window, strides


@at_random
@given(
    cases(),
    st.sampled_from(["auto", "incremental", "full"]),
    st.sampled_from(["zero", "number", "one", "each"]),
    st.sampled_from(["int", "list", "tensor", "one tensor"]),
    st.sampled_from(["auto", 1, 3, 64]),
)
@torch.no_grad()
def test_captum(case, engine, baseline, target, batch):
    shape, window, strides = case
    model, n = toy(len(shape) - 2), shape[0]
    inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    content = {
        "zero": None,
        "number": 0.5,
        "one": torch.full((1, *shape[1:]), 0.25).double(),
        "each": torch.linspace(-1, 1, inputs.numel()).view(shape).double(),
    }[baseline]
    targets = {
        "int": 3,
        "list": [i % 5 for i in range(n)],
        "tensor": torch.arange(n) % 5,
        "one tensor": torch.tensor(4),
    }
    chosen = targets[target]
    arguments = (inputs, window, strides, content, chosen)
    found = OcclusionSensitivity(model, engine=engine).attribute(*arguments, perturbations_per_eval=batch)
    captum = Occlusion(model).attribute(*arguments, perturbations_per_eval=4)
    assert found.dtype == torch.float64 and captum.dtype == torch.float32
    scale = captum.abs().max()
    assert scale > 0
    assert (found.float() - captum).abs().max() <= 1e-6 * scale
    if found.numel() < 600:
        each = torch.as_tensor(chosen).expand(n).tolist()
        fill = torch.as_tensor(0.0 if content is None else content, dtype=torch.float64)
        expected = looped(model, inputs, window, strides, fill, each)
        assert (found - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_captum_on_torchvision(name):
    """In double to 1e-12 of a loop; in float32 to 1e-5 of captum, or what captum itself loses to rounding.

    These models are deep and their weights random, so that for some rounding alone costs captum more than 1e-5.
    """
    side = 112 if name == "inception_v3" else 80
    model, images = trained_like(name), pictures(1, side)
    scores = model(images)
    target, scale = int(scores[0].abs().argmax()), scores.abs().max()
    windows = ((3, side * 3 // 8, side * 2 // 5), (3, side * 5 // 16, side * 3 // 8))  # 3 x 3, the last ones cut
    exact = looped(model, images, *windows, torch.tensor(0.1, dtype=torch.float64), [target])
    assert exact.abs().max() > 1e-4 * scale
    single, images32 = trained_like(name, torch.float32), images.float()
    captum = Occlusion(single).attribute(images32, *windows, 0.1, target=target)
    rounding = (captum - exact).abs().max()
    for engine in ("auto", "full"):
        double = OcclusionSensitivity(model, engine=engine).attribute(images, *windows, 0.1, target=target)
        assert (double - exact).abs().max() <= 1e-12 * scale
        found = OcclusionSensitivity(single, engine=engine).attribute(images32, *windows, 0.1, target=target)
        assert found.dtype == captum.dtype == torch.float32
        assert (found - captum).abs().max() <= max(1e-5 * scale, 3 * rounding)
    assert rounding <= 1e-4 * scale


class TwoInputs(nn.Module):
    def forward(self, a, b, factor=1.0, shift=None):
        out = torch.stack([a.flatten(1).sum(1) ** 2, b.flatten(1).sum(1) * a.mean((1, 2))], 1) * factor
        return out if shift is None else out + shift


@pytest.mark.parametrize("batch", ["auto", 1, 5])
def test_several_inputs_and_additional_arguments(batch):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 6, 5, generator=generator), torch.randn(3, 4, generator=generator)
    arguments = {
        "sliding_window_shapes": ((2, 3), (2,)), "strides": ((2, 1), 1), "baselines": (0.5, torch.ones(1, 4)),
        "target": [0, 1, 1],
        "additional_forward_args": (2.0, torch.randn(3, 1, generator=generator)),
    }  # fmt: skip
    captum = Occlusion(TwoInputs()).attribute(inputs, **arguments)
    found = OcclusionSensitivity(TwoInputs()).attribute(inputs, perturbations_per_eval=batch, **arguments)
    assert isinstance(found, tuple)
    for a, b in zip(captum, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flatten(1).sum(1) ** 2,
        lambda x: (x.sum() ** 2).item(),
        lambda x: x.sum() ** 2,
        lambda x: (x.sum() ** 2).view(1),
        lambda x: x.flatten(1)[:, :4] ** 2,
        lambda x: (x.flatten(1).sum(1) * 100).long(),
    ],
    ids=["one a picture", "a number", "a scalar", "one a batch", "several without target", "whole numbers"],
)
def test_outputs_of_other_forms(function):
    inputs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    captum = Occlusion(function).attribute(inputs, (2, 2), 1)
    found = OcclusionSensitivity(function).attribute(inputs, (2, 2), 1)
    assert found.shape == captum.shape and found.dtype == captum.dtype
    assert torch.allclose(found, captum, rtol=1e-5, atol=1e-5)


def test_whole_number_inputs():
    table = nn.Embedding(10, 4)
    inputs = torch.arange(12).view(2, 6) % 10
    function = lambda tokens: table(tokens).sum((1, 2))  # noqa: E731
    captum = Occlusion(function).attribute(inputs, (2,), 1)
    assert torch.allclose(OcclusionSensitivity(function).attribute(inputs, (2,), 1), captum, atol=1e-6)


def test_a_fraction_covers_whole_numbers():
    inputs = torch.arange(6).view(1, 6)
    for baseline in (0.5, torch.full((6,), 0.25)):
        arguments = inputs, (2,), 2, baseline
        expected = Occlusion(lambda x: (x.float() ** 2).sum(1)).attribute(*arguments)
        assert torch.equal(OcclusionSensitivity(lambda x: (x.float() ** 2).sum(1)).attribute(*arguments), expected)


# ── models that no batch, or no tape, does justice ───────────────────────────────────────────────────


class Applied(nn.Module):
    """A function of filtered images, as a module."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


HIDDEN = [swish]


def in_a_thread(x):
    """Beside the pass, where no mode of PyTorch's sees it."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(torch.sigmoid, x).result()


@pytest.mark.parametrize(
    "function",
    [lambda x: (x + HIDDEN[0](x)).mean((2, 3)), lambda x: (x * in_a_thread(x)).mean((2, 3))],
    ids=["scripted", "threaded"],
)
def test_code_that_no_tape_shows_is_noticed(function):
    torch.manual_seed(0)
    model, inputs = Applied(function).eval(), pictures(2, 16, torch.float32)
    expected = Occlusion(model).attribute(inputs, (3, 4, 4), (3, 2, 2), target=1)
    with pytest.warns(UserWarning, match="whole passes go on.*differs from a whole pass"):
        found = OcclusionSensitivity(model).attribute(inputs, (3, 4, 4), (3, 2, 2), target=1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedModel, match="differs from a whole pass"):
        OcclusionSensitivity(model, engine="incremental").attribute(inputs, (3, 4, 4), (3, 2, 2), target=1)


def test_a_form_that_fails_is_not_the_users_trouble(monkeypatch):
    def fails(*arguments):
        raise IndexError("a form of ours")

    model, inputs = toy().eval(), pictures(1, 16)
    expected = OcclusionSensitivity(model, engine="full").attribute(inputs, (3, 4, 4), (3, 2, 2), target=1)
    monkeypatch.setattr("deconvviz.incremental.group.Group.run", fails)
    with pytest.warns(UserWarning, match="whole passes go on: IndexError: a form of ours"):
        found = OcclusionSensitivity(model).attribute(inputs, (3, 4, 4), (3, 2, 2), target=1)
    assert torch.allclose(found, expected, atol=1e-12)


MIXED = {
    "over the batch": lambda x: (x.relu() - x.relu().mean(0, keepdim=True)).square().mean((2, 3)),
    "softmax of the batch": lambda x: x.softmax(0).square().mean((2, 3)),
    "images with images": lambda x: x.flatten(1) @ x.flatten(1).T,
    "standardised": lambda x: ((x - x.mean()) / x.std()).flatten(1)[:, :5].square(),
}


class Scaled(nn.Module):
    """Outputs in another unit."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("kind", ["module", "function"])
@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
def test_images_that_depend_on_each_other(name, kind, scale):
    torch.manual_seed(0)
    mixed, inputs = Applied(MIXED[name]).double().eval(), pictures(3, 16)
    model = nn.Sequential(mixed, Scaled(scale)).double()
    function = model if kind == "module" else lambda x: model(x)
    expected = Occlusion(function).attribute(inputs, (3, 4, 4), (3, 3, 3), target=1)
    found = OcclusionSensitivity(function).attribute(inputs, (3, 4, 4), (3, 3, 3), target=1)
    assert torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_batch_statistics_are_those_of_the_images_alone():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    model, inputs = nn.Sequential(*layers).double().train(), pictures(2, 16)
    expected = Occlusion(model).attribute(inputs, (3, 4, 4), (3, 3, 3), target=1)
    found = OcclusionSensitivity(model).attribute(inputs, (3, 4, 4), (3, 3, 3), target=1)
    assert torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-6)
    maps = OcclusionSensitivity(model).maps(inputs, 4, 4, "2", targets=1, score="logit")
    covered = inputs.clone()
    covered[:, :, 4:8, 8:12] = 0
    assert torch.allclose(maps.score_cells[:, 0, 1, 2], model(covered)[:, 1], atol=1e-12)


@pytest.mark.parametrize("kind", ["memory for four", "four at a time", "a dict beside"])
def test_models_that_take_no_larger_batch(kind):
    model, inputs = toy(dtype=torch.float32), pictures(4, 16, torch.float32)

    def function(x, more=None):
        if len(x) > 4 and kind == "memory for four":
            raise RuntimeError("CUDA out of memory.")
        return model(x.view(4, 3, 16, 16)) + (0 if more is None else more["bias"])

    more = ({"bias": torch.rand(4, 1)},) if kind == "a dict beside" else None
    arguments = inputs, (3, 4, 4), (3, 4, 4), None, 1, more
    expected = Occlusion(function).attribute(*arguments)
    found = OcclusionSensitivity(function).attribute(*arguments)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(1, 3, 16, 16))])
def test_scripted_and_traced_models(compile):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2)).eval()
    inputs = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = Occlusion(plain).attribute(inputs, (3, 4, 4), (3, 4, 4), target=1)
    found = OcclusionSensitivity(compile(plain)).attribute(inputs, (3, 4, 4), (3, 4, 4), target=1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_model_that_writes_to_what_it_is_given():
    inputs = torch.rand(1, 3, 8, 8) + 1
    before = inputs.clone()
    OcclusionSensitivity(lambda x: x.mul_(2).sum((1, 2, 3))).attribute(inputs, (3, 4, 4), (3, 4, 4))
    assert torch.equal(inputs, before)


class Logarithm(nn.Sequential):
    def forward(self, x):
        return super().forward(x).log()


@pytest.mark.parametrize("engine", ["auto", "incremental", "full"])
def test_outputs_that_are_no_numbers(engine):
    model = Logarithm(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model[0].bias.data = torch.tensor([9.0, -9.0, 9.0, 9.0])
    inputs = torch.rand(2, 3, 12, 12)
    for target in (0, 1):
        expected = Occlusion(model).attribute(inputs, (3, 4, 4), (3, 4, 4), target=target)
        found = OcclusionSensitivity(model, engine=engine).attribute(inputs, (3, 4, 4), (3, 4, 4), target=target)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan().all() == bool(target)
    assert not Deconvnet(model).check(inputs).supported


def test_no_images():
    found = OcclusionSensitivity(toy(dtype=torch.float32)).attribute(torch.rand(0, 3, 8, 8), (3, 4, 4), target=1)
    assert found.shape == (0, 3, 8, 8)


BAD = {
    "larger than the input": {"sliding_window_shapes": (3, 9, 4)},
    "too few dimensions": {"sliding_window_shapes": (4, 4)},
    "for two inputs": {"sliding_window_shapes": ((3, 4, 4), (3, 4, 4))},
    "stride leaves gaps": {"sliding_window_shapes": (3, 4, 4), "strides": (3, 5, 4)},
    "stride of two dimensions": {"sliding_window_shapes": (3, 4, 4), "strides": (4, 4)},
    "strides for two inputs": {"sliding_window_shapes": (3, 4, 4), "strides": ((3, 4, 4), (3, 4, 4))},
    "no evaluations": {"sliding_window_shapes": (3, 4, 4), "perturbations_per_eval": 0},
    "half an evaluation": {"sliding_window_shapes": (3, 4, 4), "perturbations_per_eval": 0.5},
    "a list as stride": {"sliding_window_shapes": (3, 4, 4), "strides": [3, 4, 4]},
    "an output that does not grow": {
        "sliding_window_shapes": (3, 4, 4),
        "perturbations_per_eval": 2,
        "forward": lambda x: x.sum(),
    },
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_what_captum_rejects_is_rejected(arguments):
    arguments = dict(arguments)
    model = arguments.pop("forward", toy(dtype=torch.float32))
    target = 1 if isinstance(model, nn.Module) else None
    with pytest.raises(AssertionError):
        Occlusion(model).attribute(torch.rand(2, 3, 8, 8), target=target, **arguments)
    with pytest.raises(AssertionError) as caught:
        OcclusionSensitivity(model).attribute(torch.rand(2, 3, 8, 8), target=target, **arguments)
    assert isinstance(caught.value, InvalidInput)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sliding_window_shapes": (3, 0, 4)}, "does not fit"),
        ({"sliding_window_shapes": 4}, "is 4 and strides None; expected an extent for every axis"),
        ({"sliding_window_shapes": (3, 4, 4), "strides": 0}, "leaves gaps"),
        ({}, "sliding_window_shapes is missing"),
        ({"sliding_window_shapes": (3, 4, 4), "masks": torch.ones(1, 8, 8)}, "choose one"),
        ({"masks": torch.ones(1, 7, 8)}, "masks have shape"),
        ({"masks": torch.zeros(1, 8, 8)}, "covers nothing"),
        ({"masks": torch.tensor(True)}, "masks have shape"),
        ({"masks": [[True]]}, "masks are a list"),
        ({"sliding_window_shapes": (3, 4, 4), "baselines": "grey"}, "the fill is 'grey'"),
        ({"sliding_window_shapes": (3, 4, 4), "baselines": torch.ones(5)}, "broadcastable"),
        ({"sliding_window_shapes": (3, 4, 4), "baselines": torch.nan}, "the fill holds NaN"),
        ({"sliding_window_shapes": (3, 4, 4), "baselines": (0, 0)}, "2 baselines for 1 inputs"),
    ],
)
def test_what_makes_no_sense_is_rejected(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        OcclusionSensitivity(toy(dtype=torch.float32)).attribute(torch.rand(2, 3, 8, 8), target=1, **arguments)


@pytest.mark.parametrize("engine", ["auto", "incremental", "full"])
@pytest.mark.parametrize("target", [99, [1], [1, 99], (1, 2), "cat", torch.tensor([1, 99])], ids=str)
def test_a_target_that_is_not_there(engine, target):
    with pytest.raises(TargetOutOfRange, match=r"target .* does not fit a tensor of shape \(2, "):
        occlusion = OcclusionSensitivity(toy(dtype=torch.float32), engine=engine)
        occlusion.attribute(torch.rand(2, 3, 8, 8), (3, 4, 4), target=target)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (lambda x: {"out": x, "aux": x}, "dict"),
        (lambda x: (x, x), "tuple"),
        (lambda x: {"out": []}, "dict"),
        (lambda x: x > 0, "torch.bool tensor"),
        (lambda x: x * 1j, "torch.complex64 tensor"),
    ],
)
def test_an_output_that_is_no_tensor_of_numbers(form, kind):
    model = toy(dtype=torch.float32)
    with pytest.raises(InvalidInput, match=f"forward_func gives a {kind}; expected one tensor of real numbers"):
        OcclusionSensitivity(lambda x: form(model(x))).attribute(torch.rand(2, 3, 8, 8), (3, 4, 4), target=1)


class Packed(torch.nn.Module):
    """A model whose one tensor comes in a nest."""

    def __init__(self, model, pack):
        super().__init__()
        self.model, self.pack = model, pack

    def forward(self, x):
        return self.pack(self.model(x))


@pytest.mark.parametrize("engine", ["incremental", "full"])
@pytest.mark.parametrize("pack", [lambda x: {"loss": None, "logits": x}, lambda x: (x,), lambda x: [[x], None]])
def test_a_model_may_give_its_one_tensor_in_a_nest(pack, engine):
    model, images = toy(), torch.rand(2, 3, 9, 9, dtype=torch.float64)
    packed = OcclusionSensitivity(Packed(model, pack), engine=engine)
    expected = OcclusionSensitivity(model, engine=engine)
    arguments = (images, (3, 4, 4), (3, 2, 2))
    assert torch.equal(packed.attribute(*arguments, target=1), expected.attribute(*arguments, target=1))


def test_options_and_inputs_are_checked():
    with pytest.raises(InvalidInput, match="inputs holds a list; expected a tensor"):
        OcclusionSensitivity(toy()).attribute([torch.rand(1, 3, 8, 8)], (3, 4, 4), target=1)
    with pytest.raises(InvalidInput, match=r"inputs have shape \(8,\); expected a batch"):
        OcclusionSensitivity(torch.nn.Linear(8, 3)).attribute(torch.rand(8), (3,), target=1)
    with pytest.raises(InvalidInput, match="engine is 'fast'"):
        OcclusionSensitivity(toy(), engine="fast")
    with pytest.raises(InvalidInput, match="autocast is 'bfloat16'; expected a dtype"):
        OcclusionSensitivity(toy(), autocast="bfloat16")
    with pytest.raises(UnsupportedModel, match="is a str"):
        OcclusionSensitivity("resnet18")
    with pytest.raises(InvalidInput, match="2 NaN or infinite"):
        bad = torch.rand(1, 3, 8, 8).double()
        bad[0, 0, 0, 0], bad[0, 1, 2, 2] = torch.nan, torch.inf
        OcclusionSensitivity(toy()).attribute(bad, (3, 4, 4), target=1)
    with pytest.raises(UnsupportedModel, match="is no module.*engine='full'"):
        OcclusionSensitivity(lambda x: x.sum((1, 2, 3)), engine="incremental").attribute(
            torch.rand(1, 3, 8, 8), (3, 4, 4)
        )


# ── fills and shapes ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", ["incremental", "full"])
@pytest.mark.parametrize("fill", ["mean", "blur", "noise", "function"])
def test_fills(fill, engine):
    inputs = pictures(2, 16) + 1
    given = (lambda x: x.flip(3)) if fill == "function" else fill
    content = {
        "mean": inputs.mean((2, 3), keepdim=True),
        "function": inputs.flip(3),
        "noise": inputs.mean((2, 3), keepdim=True)
        + inputs.std((2, 3), keepdim=True)
        * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).double(),
    }.get(fill)
    if fill == "blur":
        ndimage = pytest.importorskip("scipy.ndimage")
        content = torch.from_numpy(ndimage.gaussian_filter(inputs.numpy(), (0, 0, 2, 2), mode="nearest", truncate=3))
    expected = Occlusion(toy()).attribute(inputs, (3, 5, 5), 3, content, target=2)
    found = OcclusionSensitivity(toy(), engine=engine).attribute(inputs, (3, 5, 5), 3, given, target=2)
    assert (found.float() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("engine", ["auto", "incremental", "full"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_masks_against_a_loop(engine, per_channel):
    inputs, model = pictures(2, 20), toy()
    masks = circles((20, 20), 4, 6)
    assert masks.shape == (9, 20, 20)
    if per_channel:
        masks = masks[:, None].expand(-1, 3, -1, -1).clone()
        masks[:, 1] = False
    found = OcclusionSensitivity(model, engine=engine).attribute(inputs, masks=masks, baselines=0.7, target=1)
    total, counts = torch.zeros_like(inputs), torch.zeros_like(inputs)
    with torch.no_grad():
        for mask in masks:
            fall = model(inputs)[:, 1] - model(torch.where(mask, 0.7, inputs))[:, 1]
            total += fall.view(2, 1, 1, 1) * mask
            counts += mask
    expected = (total / counts).nan_to_num()
    assert torch.allclose(found.nan_to_num(), expected, atol=1e-12)
    assert (found.isnan() == (counts.expand_as(found) == 0)).all()


def test_masks_of_features():
    """Inputs without spatial axes, (N, C); NumPy's arrays are masks too."""
    inputs = torch.randn(2, 5)
    found = OcclusionSensitivity(lambda x: (x**2).sum(1)).attribute(inputs, masks=np.eye(5, dtype=bool))
    assert torch.allclose(found, inputs**2, atol=1e-6)


def test_shapes_of_masks():
    disc = circles((9, 9), 2, 9)
    assert disc.sum() == 13 and disc[0, 4, 2:7].all() and disc[0, 2, 4] and not disc[0, 2, 3]
    labels = np.asarray([[3, 3, 7], [0, 0, 7]])[::-1]
    assert segments(labels).tolist() == [(labels == label).tolist() for label in (0, 3, 7)]
    with pytest.raises(InvalidInput, match="whole numbers"):
        segments(torch.rand(3, 3))
    with pytest.raises(InvalidInput, match="radius is 0"):
        circles((9, 9), 0, 1)


def test_windows_are_numbered_as_captum_does():
    windows = Windows.sliding((3, 7, 5), (2, 4, 2), (1, 2, 2))
    masks = torch.stack([torch.zeros(3, 7, 5).bool() for _ in range(len(windows))])
    for w in range(len(windows)):
        masks[w][windows.box(w)] = True
    occlusion = Occlusion(lambda x: x.sum())
    for w in range(len(windows)):
        mask = occlusion._occlusion_mask(torch.zeros(1, 3, 7, 5), w, torch.ones(2, 4, 2), (1, 2, 2), (2, 3, 3), False)
        assert (mask[0].bool()[:3, :7, :5] == masks[w]).all()
    assert sorted(windows.order().tolist()) == list(range(len(windows)))


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


class FailsAt(nn.Module):
    """Raises when pixel (4, 1) is covered: at one window alone of a grid of them."""

    def __init__(self, error):
        super().__init__()
        self.error, self.conv = error, nn.Conv2d(3, 2, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if (x[:, 0, 8, 4] == 0).any():
            raise self.error
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("batch", ["auto", 1, 7])
def test_an_error_names_the_window(batch):
    model = FailsAt(ValueError("too dark"))
    inputs = torch.rand(1, 3, 16, 16) + 0.1
    with pytest.raises(WindowFailed, match="window 6: ValueError: too dark"):  # row 2, column 1 of rows of 4...
        OcclusionSensitivity(model).attribute(inputs, (3, 4, 4), (3, 4, 4), target=0, perturbations_per_eval=batch)
    assert not model._forward_hooks and not model.conv._forward_hooks


def test_ctrl_c_goes_through_and_nothing_is_left():
    model, inputs = FailsAt(KeyboardInterrupt()), torch.rand(1, 3, 16, 16) + 0.1
    before = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        OcclusionSensitivity(model).attribute(inputs, (3, 4, 4), (3, 4, 4), target=0)
    assert not model._forward_hooks and not model.conv._forward_hooks
    assert torch.equal(before, torch.random.get_rng_state())


class Little(nn.Module):
    """As much memory as ``most`` copies take."""

    def __init__(self, most):
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return (x.flatten(1).sum(1) ** 2).unsqueeze(1)


@pytest.mark.parametrize("batch", ["auto", 32])
def test_out_of_memory_halves_the_batch(batch):
    model, inputs = Little(5), torch.rand(1, 3, 16, 16)
    engine = OcclusionSensitivity(model, engine="full")
    found = engine.attribute(inputs, (3, 4, 4), (3, 2, 2), target=0, perturbations_per_eval=batch)
    expected = Occlusion(Little(5)).attribute(inputs, (3, 4, 4), (3, 2, 2), target=0)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert max(model.sizes) > 5
    assert sum(size > 5 for size in model.sizes) <= 3


def test_out_of_memory_with_one_window_is_an_error():
    with pytest.raises(WindowFailed, match="can't allocate memory"):
        model = Little(0)
        model.forward = lambda x: Little.forward(model, x) if (x == 0).any() else x.new_ones(len(x), 1)
        OcclusionSensitivity(model, engine="full").attribute(torch.rand(1, 3, 16, 16) + 0.1, (3, 4, 4), (3, 4, 4))


def test_a_model_in_train_mode_is_left_as_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.LazyLinear(3))
    inputs = torch.rand(2, 3, 10, 10)
    model(inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    OcclusionSensitivity(model).attribute(inputs, (3, 4, 4), (3, 3, 3), target=1)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_layout_and_the_weights_stay():
    model = build("resnet18")
    layouts = [p.stride() for p in model.parameters()]
    contents = [p.clone() for p in model.parameters()]
    inputs = torch.rand(1, 3, 64, 64)
    OcclusionSensitivity(model).attribute(inputs, (3, 20, 20), (3, 15, 15), target=1)
    assert [p.stride() for p in model.parameters()] == layouts and inputs.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(contents, model.parameters(), strict=True))


class Views(nn.Module):
    """A view of its filter's output: what channels_last does not allow."""

    def __init__(self, view):
        super().__init__()
        torch.manual_seed(0)
        self.view, self.conv, self.head = view, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 10 * 12, 5)
        self.double().eval()

    def forward(self, images):
        return self.head(self.view(self.conv(images).relu()))


@pytest.mark.parametrize("engine", ["auto", "incremental", "full"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, 8 * 10 * 12),
        lambda x: x.view(size=(len(x), -1)),
        lambda x: (x.view(len(x), 8, 120) - 1).relu().view(len(x), 960),
        lambda x: x.view_as(torch.empty(len(x), 960)),
        lambda x: x.view(x.dtype).view(len(x), -1),
    ],
)
def test_views_that_need_the_models_own_layout(view, engine, recwarn):
    model, images = Views(view), torch.randn(2, 3, 10, 12, dtype=torch.float64)
    arguments = (images, (3, 4, 4), (3, 1, 1))
    found = OcclusionSensitivity(model, engine=engine).attribute(*arguments, target=1)
    torch.testing.assert_close(found.float(), Occlusion(model).attribute(*arguments, target=1), rtol=1e-5, atol=1e-6)
    maps = OcclusionSensitivity(model, engine=engine).maps(images, 4, 1, layer="conv", targets=1, score="logit")
    torch.testing.assert_close(maps.clean_scores[:, 0], model(images)[:, 1].detach())
    assert not recwarn


def test_progress_counts_windows(capsys):
    OcclusionSensitivity(toy()).attribute(pictures(1, 16), (3, 4, 4), (3, 4, 4), target=0, show_progress=True)
    assert "16/16" in capsys.readouterr().err


def test_autocast():
    inputs = pictures(1, 32, torch.float32)
    exact = OcclusionSensitivity(toy(dtype=torch.float32)).attribute(inputs, (3, 8, 8), (3, 8, 8), target=0)
    for engine in ("incremental", "full"):
        rough = OcclusionSensitivity(toy(dtype=torch.float32), engine=engine, autocast=torch.bfloat16)
        found = rough.attribute(inputs, (3, 8, 8), (3, 8, 8), target=0).float()
        assert F.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.9
        assert not torch.equal(found, exact)


def test_a_planted_rectangle_is_found():
    """The class is the brightness of one rectangle, seen through filters that average."""
    box = torch.zeros(1, 1, 48, 48)
    box[..., 20:32, 8:20] = 1

    class Reads(nn.Module):
        def forward(self, x):
            return (F.avg_pool2d(x, 3, 1, 1) * box).sum((1, 2, 3)).unsqueeze(1)

    found = OcclusionSensitivity(Reads()).attribute(torch.ones(1, 3, 48, 48), (3, 6, 6), (3, 3, 3), target=0)[0, 0]
    strong = found > 0.5 * found.max()
    assert strong[22:30, 10:18].all() and not strong[:17].any() and not strong[35:].any()
    assert not strong[:, 23:].any() and found[:14].abs().max() == 0
