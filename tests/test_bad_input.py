"""A bad input gives its own error: the value, what was expected, and the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deconvviz import Deconvnet, DeconvvizError, NeuronDeconvnet, errors


class Reused(nn.Module):
    """A ReLU that runs twice, a layer that never runs, and one that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.relu, self.idle, self.pair = nn.ReLU(), nn.Conv2d(3, 3, 1), Pair()

    def forward(self, x):
        first, _ = self.pair(self.relu(self.conv2(self.relu(self.conv1(x)))))
        return first.mean((2, 3))


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Reused().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


LAYERS = [
    ("conv3", errors.UnknownLayer, "did you mean 'conv"),
    ("conv1.deeper", errors.UnknownLayer, "no layer"),
    (nn.ReLU(), errors.UnknownLayer, "not a module of the Reused"),
    (7, errors.InvalidInput, "a dotted name, a module or a call"),
    ("idle", errors.LayerNotRun, "never called"),
    ("relu", errors.AmbiguousLayer, "'relu#1', 'relu#2'"),
    ("relu#3", errors.LayerNotRun, "ran 2 time"),
    ("relu#0", errors.InvalidInput, "counted from 1"),
    ("relu#x", errors.InvalidInput, "counted from 1"),
    ("pair", errors.InvalidInput, "2 tensors"),
]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "own pass"])
@pytest.mark.parametrize(("layer", "error", "message"), LAYERS, ids=[str(row[0])[:12] for row in LAYERS])
def test_layer(model, images, layer, error, message, recorded) -> None:
    with Deconvnet(model) as deconv:
        model(images)
        with pytest.raises(error, match=message) as caught:
            deconv.project(layer, 0, inputs=None if recorded else images)
    assert isinstance(caught.value, DeconvvizError)


def test_a_call_can_be_chosen(model, images) -> None:
    deconv = Deconvnet(model)
    first, second = (deconv.project(f"relu#{k}", 0, inputs=images) for k in (1, 2))
    assert first.shape == second.shape and not torch.equal(first, second)


OPTIONS = [
    (
        {"fmap": 5},
        errors.FeatureMapOutOfRange,
        "fmap is 5, but the layer has 5 feature maps: expected 0 to 4",
    ),
    ({"fmap": -6}, errors.FeatureMapOutOfRange, "expected 0 to 4"),
    ({"fmap": [0, 9]}, errors.FeatureMapOutOfRange, "expected 0 to 4"),
    ({"fmap": []}, errors.FeatureMapOutOfRange, "at least one"),
    ({"fmap": slice(9, 12)}, errors.FeatureMapOutOfRange, "at least one"),
    ({"fmap": 1.5}, errors.InvalidInput, "expected an int"),
    ({"fmap": "weakest"}, errors.InvalidInput, "'strongest'"),
    ({"fmap": 0, "position": (8, 0)}, errors.PositionOutOfRange, "8 x 8 cells"),
    ({"fmap": 0, "position": (1, 2, 3)}, errors.InvalidInput, r"\(y, x\) in map cells"),
    ({"fmap": 0, "position": (0.5, 1.0)}, errors.InvalidInput, "in map cells"),
    ({"fmap": 0, "position": torch.zeros(3, 2, dtype=torch.long)}, errors.InvalidInput, r"tensor \(2, 2\)"),
    ({"fmap": 0, "position": "min"}, errors.InvalidInput, "'max', 'all'"),
    ({"fmap": 0, "seed": "two"}, errors.InvalidInput, "'activation', 'one'"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[str(row[0])[:40] for row in OPTIONS])
def test_units(model, images, options, error, message) -> None:
    with pytest.raises(error, match=message):
        Deconvnet(model).project("conv2", inputs=images, **options)


BATCHES = [
    (lambda x: x.long(), errors.InvalidInput, "inputs.float"),
    (lambda x: x.double(), errors.InvalidInput, "torch.float64.*torch.float32"),
    (lambda x: x[:0], errors.InvalidInput, "N >= 1"),
    (lambda x: x * float("nan"), errors.InvalidInput, "864 NaN or infinite"),
    (lambda x: x.where(x < 2, float("inf")), errors.InvalidInput, "NaN or infinite"),
    (lambda x: x.numpy(), errors.InvalidInput, "ndarray"),
    (lambda x: (), errors.InvalidInput, "empty"),
    (lambda x: x.to("meta"), errors.InvalidInput, r"inputs.to\('cpu'\)"),
    (lambda x: x[:, :2], errors.OperationFailed, "'conv1' failed at conv2d.*usually"),
]


@pytest.mark.parametrize(("change", "error", "message"), BATCHES, ids=range(len(BATCHES)))
@pytest.mark.parametrize("method", ["project", "attribute", "check"])
def test_inputs(model, images, change, error, message, method) -> None:
    deconv = Deconvnet(model)
    call = {"project": lambda x: deconv.project("conv2", 0, inputs=x), "attribute": deconv.attribute,
            "check": deconv.check}[method]  # fmt: skip
    with pytest.raises(error, match=message):
        call(change(images))


def test_no_pass_is_recorded(model, images) -> None:
    deconv = Deconvnet(model)
    with pytest.raises(errors.NoForwardPass, match="call model"):
        deconv.project("conv2", 0)
    model(images)
    deconv.close()
    with pytest.raises(errors.NoForwardPass, match="call model"):
        deconv.project("conv2", 0)


@pytest.mark.parametrize("what", ["weights", "images"])
def test_a_stale_pass(model, images, what) -> None:
    deconv = Deconvnet(model)
    model(images)
    with torch.no_grad():
        (model.conv1.weight if what == "weights" else images).mul_(2)
    with pytest.raises(errors.NoForwardPass, match="changed in place"):
        deconv.project("conv2", 0)


def test_nan_in_a_recorded_pass(model, images) -> None:
    deconv = Deconvnet(model)
    assert model(images * float("nan")).isnan().all()
    with pytest.raises(errors.InvalidInput, match="NaN"):
        deconv.project("conv2", 0)


@pytest.mark.parametrize("target", [5, -9, (1, 2), [0, 1, 2], None])
def test_target(model, images, target) -> None:
    with pytest.raises(errors.TargetOutOfRange) as caught:
        Deconvnet(model).attribute(images, target=target)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, IndexError)


@pytest.mark.parametrize("selector", [(9, 0, 0), (0, 20, 0), (0, 1, 2, 3)])
def test_neuron(model, images, selector) -> None:
    with pytest.raises(errors.TargetOutOfRange, match="neuron_selector"):
        NeuronDeconvnet(model, "conv2").attribute(images, selector)


def test_models(model, images) -> None:
    for wrong in (lambda x: x, None, "resnet18"):
        with pytest.raises(errors.UnsupportedModel, match="expected a torch.nn.Module"):
            Deconvnet(wrong)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    scripted, traced = torch.jit.script(plain), torch.jit.trace(plain, images)
    for wrong in (scripted, traced, nn.Sequential(nn.Identity(), scripted)):
        with pytest.raises(errors.UnsupportedModel, match="scripted"):
            Deconvnet(wrong)
    with pytest.raises(errors.UnsupportedModel, match="compiled"):
        Deconvnet(torch.compile(plain))


@pytest.mark.parametrize("options", [{"overlap": "max"}, {"on_unsupported": "ignore"}])
def test_settings(model, options) -> None:
    with pytest.raises(errors.InvalidInput, match="expected one of"):
        Deconvnet(model, **options)


@pytest.mark.parametrize("k", [0, 6])
def test_strongest(model, images, k) -> None:
    with pytest.raises(errors.FeatureMapOutOfRange, match="5 feature maps"):
        Deconvnet(model).strongest("conv2", k, inputs=images)


class Hidden(nn.Module):
    """Leaves PyTorch on the way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = x.detach() if self.how == "detach" else torch.from_numpy(x.detach().numpy() * 2)
        return self.conv(x)


@pytest.mark.parametrize("how", ["detach", "numpy"])
def test_a_signal_that_cannot_be_followed(images, how) -> None:
    with pytest.raises(errors.NoForwardPass, match="does not depend on the inputs"):
        Deconvnet(Hidden(how)).project("conv", 0, inputs=images)


class Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bend, self.head = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.head(self.bend(self.conv(x)))


def test_unsupported_operation(images) -> None:
    model = Curved()
    with pytest.raises(errors.UnsupportedOperation, match="'tanh' in layer 'bend'.*on_unsupported"):
        Deconvnet(model).project("head", 0, inputs=images)
    assert Deconvnet(model).project("conv", 0, inputs=images).any()  # before it, all is well
    assert Deconvnet(model, on_unsupported="gradient").project("head", 0, inputs=images).any()
    assert not Deconvnet(model).check(images).supported


def test_every_kind_is_rooted() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 10 and all(issubclass(kind, DeconvvizError) for kind in kinds)
