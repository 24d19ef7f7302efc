"""What users do around and inside their models: other devices, autocast, transforms, hooks, random numbers."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from dense_jacobian import Applied
from torch import nn

from deconvviz import Deconvnet, FilterGrid, NeuronDeconvnet, OcclusionSensitivity
from deconvviz.comparison import compare
from deconvviz.correspondence import correspondence
from deconvviz.diagnostics import diagnose
from deconvviz.errors import NoForwardPass, UnsupportedModel
from deconvviz.evidence import evidence
from deconvviz.incremental import CleanPass
from deconvviz.invariance import invariance

torch.set_num_threads(1)

IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 5, 3, padding=1),
    )
    return nn.Sequential(*layers, *more).eval()


def classifier() -> nn.Sequential:
    return network(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_projection_leaves_nothing_for_the_garbage_collector():
    model, images = network(), IMAGES.clone()
    gc.collect()
    gc.disable()
    try:
        with Deconvnet(model) as deconv:
            model(images)
            for position in ("max", "all"):
                deconv.project("4", None, position=position)
        alive = weakref.ref(images)
        del images, deconv
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
@pytest.mark.parametrize("how", ["attribute", "maps"])
def test_a_sweep_leaves_nothing_for_the_garbage_collector(name, how):
    """The clean pass, which holds the image's feature maps and prepared weights, goes with its last reference."""
    model, images = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 64, 64)
    sensitivity = OcclusionSensitivity(model, engine="incremental")
    gc.collect()
    gc.disable()
    try:
        if how == "attribute":
            sensitivity.attribute(images, (3, 16, 16), (3, 16, 16), target=1)
        else:
            sensitivity.maps(images, 16, 16, "features.2")
        assert not any(isinstance(item, CleanPass) for item in gc.get_objects())
    finally:
        gc.enable()


# ── beside other code ────────────────────────────────────────────────────────────────────────────────────


def test_two_deconvnets_record_one_pass():
    model = network()
    with Deconvnet(model) as one, Deconvnet(model) as other:
        model(IMAGES)
        expected = Deconvnet(model).project("4", [0, 3], inputs=IMAGES)
        assert torch.equal(one.project("4", [0, 3]), expected)
        assert torch.equal(other.project("4", [0, 3]), expected)


def test_a_pool_that_also_gives_its_indices():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
            self.pool = nn.MaxPool2d(2, return_indices=True)

        def forward(self, x):
            return self.last(self.pool(self.first(x))[0])

    model = Encoder()
    found = Deconvnet(model).project("last", 0, inputs=IMAGES)
    model.pool = Indexed(nn.MaxPool2d(2))
    assert torch.equal(found, Deconvnet(model).project("last", 0, inputs=IMAGES))


class Indexed(nn.Module):
    """What a pool gives, as the first of a pair."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x), None


@pytest.mark.parametrize(
    "transform",
    [
        lambda model: torch.func.grad(lambda x: model(x).sum())(IMAGES),
        lambda model: torch.func.vmap(lambda x: model(x[None]))(IMAGES),
        lambda model: torch.func.jvp(model, (IMAGES,), (IMAGES,)),
        lambda model: torch.export.export(model, (IMAGES,)),
    ],
    ids=["grad", "vmap", "jvp", "export"],
)
def test_a_transformed_pass_is_the_users_own(transform):
    model = network()
    with Deconvnet(model) as deconv:
        transform(model)
        with pytest.raises(NoForwardPass, match="under torch.func"):
            deconv.project("4", 0)
        model(IMAGES)
        assert torch.equal(deconv.project("4", 0), Deconvnet(model).project("4", 0, inputs=IMAGES))


def test_a_transform_inside_a_forward():
    def each(x):
        return x + torch.func.vmap(lambda one: F.conv2d(one[None], torch.ones(5, 5, 1, 1))[0])(x)

    model = network(Applied(each))
    with Deconvnet(model) as deconv:
        assert torch.equal(model(IMAGES), each(model[:5](IMAGES)))
        with pytest.raises(NoForwardPass):
            deconv.project("4", 0)
        with pytest.raises(UnsupportedModel, match="'5' uses torch.func"):
            deconv.check(IMAGES)
        assert deconv.project("4#1", 0, inputs=IMAGES).any(), "up to there all is well"


def test_an_own_pass_in_a_hook_is_no_part_of_the_recorded_one():
    model, inside = network(), []

    def projects(*_):
        if not inside:
            inside.append(None)
            inside.append(deconv.project("4", 1, inputs=IMAGES))

    with Deconvnet(model) as deconv:
        hook = model[3].register_forward_hook(projects)
        model(IMAGES)
        hook.remove()
        assert torch.equal(deconv.project("4", 1), inside[1])


def test_a_model_that_calls_itself():
    class Mirrors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = classifier()

        def forward(self, x, mirror=True):
            return self.features(x) + self(x.flip(3), False) if mirror else self.features(x)

    model = Mirrors().eval()
    found = Deconvnet(model).attribute(IMAGES, 1)
    features = Deconvnet(model.features)
    assert torch.allclose(
        found, features.attribute(IMAGES, 1) + features.attribute(IMAGES.flip(3), 1).flip(3), atol=1e-6
    )


# ── inside a model ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("outer", [None, torch.bfloat16])
def test_autocast_that_a_forward_changes(outer):
    def forward(x):
        x = x.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=outer is None):
            return F.conv2d(x, torch.ones(4, 5, 1, 1) / 3)

    model = network(Applied(forward), Applied(lambda x: x.float()))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer is not None), Deconvnet(model) as deconv:
        activation = model[:6](IMAGES)
        model(IMAGES)
        assert torch.equal(deconv._layer("5", None)[2], activation)
        recorded, own = deconv.project("5", 2), deconv.project("5", 2, inputs=IMAGES)
    assert torch.equal(recorded, own) and recorded.any()


@pytest.mark.parametrize("on_unsupported", ["raise", "gradient"])
def test_complex_numbers_are_no_constants(on_unsupported):
    def mixes(x):
        return x + torch.fft.irfft2(torch.fft.rfft2(x) * (2 + 1j), s=x.shape[-2:])

    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), Applied(mixes)).double(), IMAGES.double()
    deconv = Deconvnet(model, on_unsupported=on_unsupported)
    report = deconv.check(images)
    assert report.supported == (on_unsupported == "gradient")
    assert {"fft_rfft2", "fft_irfft2"} <= {row.operation for row in report.operations}
    if on_unsupported == "gradient":
        found = deconv.project("1", 2, inputs=images, position=(4, 5), seed="one")
        leaf = images.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf)[:, 2, 4, 5].sum(), leaf)
        assert torch.allclose(found, expected, atol=1e-12)


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


HELPERS = {"scripted": swish, "plain": lambda x: x * torch.sigmoid(x)}


@pytest.mark.parametrize("helper", HELPERS)
def test_check_finds_code_that_no_operation_shows(helper):
    model = network(Applied(lambda x: x + HELPERS[helper](x)))
    report = Deconvnet(model).check(IMAGES)
    assert report.supported == (helper == "plain")
    assert ("somewhere" in str(report)) == (helper == "scripted")


class HandWritten(nn.Module):
    """Hardswish as MobileNetV3 was written before PyTorch had it."""

    def forward(self, x):
        return x * F.relu6(x + 3, inplace=True) / 6


def test_a_network_with_rectifiers_written_by_hand_is_projected_as_with_layers():
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(weights=None).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = Deconvnet(model).project("features.9", [1, 5], inputs=images)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardswish):
                setattr(module, name, HandWritten())
    report = Deconvnet(model).check(images)
    found = Deconvnet(model).project("features.9", [1, 5], inputs=images)
    assert report.supported and "hardswish" not in str(report)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() > 0


def test_legal_arguments_of_other_types():
    numbers = nn.MaxPool2d(np.int64(2), np.int64(2)), nn.Conv2d(5, 4, 3, stride=np.int64(2))
    norms = (
        Applied(lambda x: torch.layer_norm(x, x.shape[2:], None, None, 1e-5, False)),
        Applied(lambda x: torch.group_norm(x, 2, None, None, 1e-5, False)),
    )
    model = network(*numbers, *norms)
    plain = network(nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, stride=2), nn.LayerNorm((2, 2)), nn.GroupNorm(2, 4))
    plain.load_state_dict(model.state_dict(), strict=False)
    with Deconvnet(model) as deconv:
        model(IMAGES)
        expected = Deconvnet(plain).project("8", 1, inputs=IMAGES)
        assert torch.allclose(deconv.project("8", 1), expected, atol=1e-6) and expected.any()


WHOLE = np.int64
WHOLE_NUMBERS = {
    "target": lambda m, x, n: Deconvnet(m).attribute(x, target=n(1)),
    "targets of images": lambda m, x, n: Deconvnet(m).attribute(x, target=np.array([1, 2]) if n is WHOLE else [1, 2]),
    "neuron": lambda m, x, n: NeuronDeconvnet(m, "0").attribute(x, (n(1), n(2), 3)),
    "window": lambda m, x, n: _covered(m, x, (n(3), n(4), n(4)), (n(3), n(4), n(2)), target=n(1)),
    "windows a call": lambda m, x, n: _covered(m, x, (3, 4, 4), (3, 4, 4), target=1, perturbations_per_eval=n(2)),
    "maps": lambda m, x, n: (
        OcclusionSensitivity(m)
        .maps(x, n(4), n(4), "0", n(1), n(2), labels=n(3), perturbations_per_eval=n(2))
        .label_scores
    ),
    "a grid": lambda m, x, n: (
        FilterGrid(m, "0", n(2))
        .fit(x, batch_size=n(1), workers=n(0), limit=n(2), progress=False)["0"][n(1)]
        .projections[1]
    ),
}


def _covered(model, x, *arguments, **options):
    return OcclusionSensitivity(model).attribute(x, *arguments, **options)


@pytest.mark.parametrize("case", WHOLE_NUMBERS)
def test_whole_numbers_may_be_numpys(case):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), torch.randn(2, 3, 8, 8)
    numpys, plain = (WHOLE_NUMBERS[case](model.eval(), x, kind) for kind in (WHOLE, int))
    assert torch.allclose(numpys, plain, atol=1e-6)


def test_the_model_itself_has_a_name_in_titles():
    torch.manual_seed(0)
    filters, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
    filters.weight.data[1] = 0
    scores = nn.Sequential(filters, nn.AdaptiveMaxPool2d(1), nn.Flatten()).eval()
    diagnosis = diagnose(filters)
    assert diagnosis.figure()._suptitle.get_text() == "the model: 4 kernels"
    assert all(line.startswith("the model") for line in str(diagnosis).splitlines()[1:])
    assert FilterGrid(filters, "").fit(x, progress=False)[""].figure()._suptitle.get_text().startswith("the model: 3")
    figure = OcclusionSensitivity(scores).maps(x, 4, 4, "").figure()
    assert any("\nthe model, clean" in axes.get_title() for axes in figure.axes)


def test_a_function_may_give_a_number_of_numpy():
    x, window = torch.rand(1, 3, 8, 8), (3, 4, 4)
    found = _covered(lambda x: np.float32(x[:, 0].sum().item()), x, window, window)
    assert torch.allclose(found, _covered(lambda x: x[:, 0].sum().item(), x, window, window), atol=1e-4)


def test_a_grid_of_numpys_numbers_is_saved(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    FilterGrid(model, "0", np.int64(2)).fit(x, limit=np.int32(2), progress=False).save(tmp_path / "grid.npz")
    assert FilterGrid.load(tmp_path / "grid.npz", model).k == 2


def test_random_numbers_of_python_and_numpy_go_on_as_without_us():
    model = network(Applied(lambda x: x * random.random() + np.random.rand()))
    before = random.getstate(), np.random.get_state()
    Deconvnet(model).check(IMAGES)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))


@pytest.mark.parametrize("change", ["running mean", "mask"])
def test_buffers_that_change_after_a_pass(change):
    model = network(Applied(lambda x: x))
    model[5].register_buffer("mask", torch.ones(5, 1, 1))
    model[5].function = lambda x: x * model[5].mask
    with Deconvnet(model) as deconv:
        model(IMAGES)
        assert deconv.project("5", 0).any()
        (model[1].running_mean if change == "running mean" else model[5].mask).add_(3)
        with pytest.raises(NoForwardPass, match="changed in place"):
            deconv.project("5", 0)


def test_a_number_beside_the_images_is_a_constant_of_the_pass():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x, temperature):
            return self.body(x * temperature).relu()

    model, temperature = Tempered(), torch.tensor(0.5)
    with Deconvnet(model) as deconv:
        model(IMAGES, temperature)
        found = deconv.project("body", 1)
        assert torch.equal(found, 0.5 * Deconvnet(model.body).project("4", 1, inputs=IMAGES * 0.5))
        temperature.fill_(2)
        with pytest.raises(NoForwardPass, match="changed"):
            deconv.project("body", 1)


def test_several_inputs_in_a_list():
    model = Applied(lambda x, y: (x * 2 + y).flatten(1))
    inputs = [IMAGES, IMAGES + 1]
    for found in (
        Deconvnet(model).attribute(inputs, 1),
        Deconvnet(model).project("", 1, inputs=inputs),
        NeuronDeconvnet(model, "").attribute(inputs, 1),
    ):
        assert isinstance(found, tuple) and [tensor.shape for tensor in found] == [IMAGES.shape] * 2


# ── another default device ───────────────────────────────────────────────────────────────────────────────

USES = {
    "project": lambda model: Deconvnet(model).project("4", [0, 1], inputs=IMAGES),
    "project all positions": lambda model: Deconvnet(model).project("4", None, inputs=IMAGES, position="all"),
    "project a position": lambda model: Deconvnet(model).project("4", 0, inputs=IMAGES, position=(1, 2)),
    "strongest position": lambda model: Deconvnet(model).strongest_position("4", 0, inputs=IMAGES),
    "attribute": lambda model: Deconvnet(model).attribute(IMAGES, 1),
    "neuron": lambda model: NeuronDeconvnet(model, "4").attribute(IMAGES, (0, 1, 2)),
    "occlusion": lambda model: OcclusionSensitivity(model).attribute(IMAGES, (3, 8, 8), (3, 5, 5), "blur", 1),
    "occlusion, full": lambda model: OcclusionSensitivity(model, engine="full").attribute(
        IMAGES, (3, 8, 8), (3, 5, 5), "noise", 1
    ),
    "maps": lambda model: OcclusionSensitivity(model).maps(IMAGES, 8, 8, "4").score_pixels,
    "compare": lambda model: compare(model, IMAGES[:1], "4", 1).deconvnet,
    "invariance": lambda model: invariance(model, IMAGES, ["4"], "translation", [0, 2]).distances["4"],
    "correspondence": lambda model: correspondence(
        model, IMAGES, {"eye": torch.tensor([[2, 9, 2, 9]] * 2, device="cpu")}, ["4"]
    ),
    "evidence": lambda model: evidence(model, IMAGES[:1], "4").effect,
    "diagnose": lambda model: diagnose(model, IMAGES),
}


@pytest.mark.parametrize("name", USES)
def test_another_default_device(name):
    """As after ``torch.set_default_device("cuda")``: what makes a tensor says where."""
    model = classifier()
    expected = USES[name](model)
    with torch.device("meta"):
        found = USES[name](model)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert str(found) == str(expected)


def test_lazy_layers_are_initialised_by_the_users_pass_alone():
    model, images = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    with Deconvnet(model) as deconv:
        for ours in (
            lambda: deconv.project("0", 1, inputs=images),
            lambda: deconv.attribute(images, (1, 2, 2)),
            lambda: OcclusionSensitivity(model).attribute(images, (3, 4, 4), target=(1, 2, 2)),
            lambda: FilterGrid(model, "0").fit(images, progress=False),
            lambda: diagnose(model),
            lambda: diagnose(model, images),
        ):
            with pytest.raises(UnsupportedModel, match="lazy layers"):
                ours()
        torch.manual_seed(0)
        output = model(images)
        pixels = deconv.project("0", 1)
    fresh = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()).eval()
    torch.manual_seed(0)
    assert torch.equal(fresh(images), output)
    assert torch.equal(Deconvnet(fresh).project("0", 1, inputs=images), pixels)
