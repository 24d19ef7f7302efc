"""Each bad input gives its typed error, with the value, what was expected and what to do in the message."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconvviz import Deconvnet, DeconvvizError, NeuronDeconvnet, errors
from deconvviz.errors import (
    AmbiguousLayer,
    FeatureMapOutOfRange,
    InvalidInput,
    LayerNotRun,
    NoForwardPass,
    OperationFailed,
    PositionOutOfRange,
    TargetOutOfRange,
    UnknownLayer,
    UnsupportedModel,
    UnsupportedOperation,
)

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": x, "second": x * 2}


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class Odd(nn.Module):
    """An operation that is neither linear, a rectifier nor a pool."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.auxiliary = nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def chain(middle: nn.Module) -> nn.Sequential:
    """A model whose layer "1" is the peculiar one."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 2, 3)).eval()


class Told:
    """``with told(UnknownLayer, LookupError, "nearest", ...)``: the kind, builtin kinds, and the message."""

    def __init__(self, kind: type[DeconvvizError], *expected: type[BaseException] | str) -> None:
        self.kind, self.expected = kind, expected

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        assert error is not None, f"nothing was raised, expected {self.kind.__name__}"
        if not isinstance(error, DeconvvizError):
            return False
        assert type(error) is self.kind, repr(error)
        for item in self.expected:
            if isinstance(item, str):
                assert item in str(error), f"{item!r} is not in: {error}"
            else:
                assert isinstance(error, item)
        return True


# ── the pass ─────────────────────────────────────────────────────────────────────────────────────────


def test_no_recorded_pass(net):
    with Deconvnet(net) as deconv:
        for call in (lambda: deconv.project("conv1", 0), lambda: deconv.strongest("conv1")):
            with Told(NoForwardPass, RuntimeError, "no forward pass", "model(images)", "inputs=images"):
                call()


def test_closed(net):
    deconv = Deconvnet(net)
    net(IMAGES)
    deconv.close()
    with Told(NoForwardPass, RuntimeError):
        deconv.project("conv1", 0)
    net(IMAGES)
    with Told(NoForwardPass, RuntimeError):
        deconv.project("conv1", 0)
    assert deconv.project("conv1", 0, inputs=IMAGES).shape == (2, 3, 8, 8)


def test_own_pass_is_not_a_recorded_one(net):
    with Deconvnet(net) as deconv:
        deconv.project("conv1", 0, inputs=IMAGES)
        deconv.attribute(IMAGES, 0)
        deconv.check(IMAGES)
        with Told(NoForwardPass, RuntimeError):
            deconv.project("conv1", 0)


def test_recorded_pass_that_raised(net):
    with Deconvnet(net) as deconv:
        net(IMAGES)
        with pytest.raises(RuntimeError) as raised:
            net(IMAGES[:, :2])
        assert not isinstance(raised.value, DeconvvizError), "the user's error is the user's"
        with Told(NoForwardPass, RuntimeError, "model(images)"):
            deconv.project("conv1", 0)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
def test_stale_after_an_optimiser_step(net, optimiser):
    with Deconvnet(net) as deconv:
        net(IMAGES).sum().backward()
        assert deconv.project("conv1", 0).any()
        optimiser(net.parameters(), lr=0.1).step()
        with Told(NoForwardPass, RuntimeError, "changed in place after", "model(images) again"):
            deconv.project("conv1", 0)
        net(IMAGES)
        assert deconv.project("conv1", 0).any()


def test_stale_after_loading_weights(net):
    with Deconvnet(net) as deconv:
        net(IMAGES)
        net.load_state_dict(Net().state_dict())
        with Told(NoForwardPass, RuntimeError, "weights"):
            deconv.strongest("conv1")


def test_stale_after_the_images_were_changed(net):
    images = IMAGES.clone()
    with Deconvnet(net) as deconv:
        net(images)
        images[0, 0, 0, 0] = 3
        with Told(NoForwardPass, RuntimeError, "images", "changed in place after", "model(images) again"):
            deconv.project("conv1", 0)


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────

LAYERS = {
    "misspelt": ("conv3", UnknownLayer, ("no layer 'conv3' in the Net", "'conv1'", "'conv2'")),
    "as DataParallel writes it": ("module.conv1", UnknownLayer, ("'module.conv1'", "'conv1'")),
    "too deep": ("conv1.weight", UnknownLayer, ("'conv1.weight'", "'conv1'")),
    "nothing like it": ("zzz", UnknownLayer, ("'zzz'", "'conv1'")),
    "empty part": ("conv1.", UnknownLayer, ("'conv1.'", "'conv1'")),
    "a number": (3, InvalidInput, ("layer is 3", "dotted name", "module")),
    "None": (None, InvalidInput, ("layer is None", "dotted name")),
    "images": (IMAGES, InvalidInput, ("layer is a tensor (2, 3, 8, 8); expected",)),
    "a list": (["conv1"], InvalidInput, ("['conv1']", "dotted name")),
    "never ran": ("auxiliary", LayerNotRun, ("'auxiliary'", "never called", "did you mean")),
    "ambiguous": ("relu", AmbiguousLayer, ("'relu' runs 2 times", "'relu#1'", "'relu#2'")),
    "call 99": ("relu#99", LayerNotRun, ("'relu#99'", "ran 2 time")),
    "call 2 of 1": ("conv1#2", LayerNotRun, ("'conv1#2'", "ran 1 time")),
    "call 0": ("relu#0", InvalidInput, ("'relu#0'", "counted from 1", "'relu#2'")),
    "call x": ("relu#x", InvalidInput, ("'relu#x'", "counted from 1")),
    "call -1": ("relu#-1", InvalidInput, ("'relu#-1'", "counted from 1")),
    "call 1.5": ("relu#1.5", InvalidInput, ("'relu#1.5'", "counted from 1")),
    "call left out": ("relu#", InvalidInput, ("'relu#'", "counted from 1")),
    "call twice": ("relu#1#2", InvalidInput, ("'relu#1#2'", "counted from 1")),
    "call superscript": ("relu#²", InvalidInput, ("'relu#²'", "counted from 1")),
}
PROMISED = {UnknownLayer: LookupError, LayerNotRun: LookupError, AmbiguousLayer: LookupError}


@pytest.mark.parametrize("source", ["recorded", "inputs", "strongest", "neuron"])
@pytest.mark.parametrize("case", LAYERS)
def test_layer(net, case, source):
    layer, kind, message = LAYERS[case]
    if (case, source) == ("ambiguous", "neuron"):
        return  # of several calls the last, as in captum
    with Deconvnet(net) as deconv:
        if source == "recorded":
            net(IMAGES)
        with Told(kind, PROMISED.get(kind, ValueError), *message):
            if source == "neuron":
                NeuronDeconvnet(net, layer).attribute(IMAGES, (0, 0, 0))
            elif source == "strongest":
                deconv.strongest(layer, inputs=IMAGES)
            else:
                deconv.project(layer, 0, inputs=IMAGES if source == "inputs" else None)


def test_a_container_that_is_never_called():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.later = (nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in [*self.early, *self.later]:
                x = layer(x)
            return x

    with Told(LayerNotRun, LookupError, "'early' exists", "choose a layer inside it, such as 'early.1'"):
        Deconvnet(Blocks()).project("early", 0, inputs=IMAGES)


@pytest.mark.parametrize("foreign", [nn.Conv2d(3, 4, 3), nn.ReLU()])
def test_foreign_module(net, foreign):
    message = (f"this {type(foreign).__name__} is not a module of the Net", "'conv1'")
    with Told(UnknownLayer, LookupError, *message):
        Deconvnet(net).project(foreign, 0, inputs=IMAGES)
    with Told(UnknownLayer, LookupError, *message):
        NeuronDeconvnet(net, foreign)


def test_a_chosen_call_works(net):
    first = Deconvnet(net).project("relu#1", 0, inputs=IMAGES)
    second = Deconvnet(net).project("relu#2", 0, inputs=IMAGES)
    assert first.any() and second.any() and not torch.equal(first, second)
    with Deconvnet(net) as deconv:
        net(IMAGES)
        assert torch.equal(deconv.project("relu#1", 0), first)
        assert torch.equal(deconv.project("relu#2", 0), second)
        with Told(AmbiguousLayer, LookupError, "'relu#1', 'relu#2'"):
            deconv.project(net.relu, 0)


def test_of_several_calls_a_neuron_takes_the_last(net):
    chosen = NeuronDeconvnet(net, "relu#2").attribute(IMAGES, (5, 1, 1))
    assert torch.equal(NeuronDeconvnet(net, net.relu).attribute(IMAGES, (5, 1, 1)), chosen)


@pytest.mark.parametrize("middle, count", [(Pair(), 2), (Named(), 2)])
def test_layer_with_several_tensors(middle, count):
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.middle, self.after = nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            output = self.middle(self.before(x))
            return self.after(output[0] if isinstance(output, tuple) else output["first"])

    model = Open().eval()
    message = ("layer 'middle'", f"{count} tensors", "expected one", "layer inside it")
    with Deconvnet(model) as deconv:
        model(IMAGES)
        for inputs in (None, IMAGES):
            with Told(InvalidInput, ValueError, *message):
                deconv.project("middle", 0, inputs=inputs)
            assert deconv.project("before", 0, inputs=inputs).any()
            assert deconv.project("after", 0, inputs=inputs).any()
        with Told(InvalidInput, ValueError, *message):
            deconv.strongest("middle")
    with Told(InvalidInput, ValueError, *message):
        NeuronDeconvnet(model, "middle").attribute(IMAGES, (0, 0, 0))


def test_model_with_several_outputs():
    with Told(InvalidInput, ValueError, "the model gives 2 tensors", "expected one"):
        Deconvnet(nn.Sequential(nn.Conv2d(3, 4, 3), Pair())).attribute(IMAGES, 0)


def test_layer_without_feature_maps():
    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((1, 2, 3))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Total())
    with Told(InvalidInput, ValueError, "layer '1'", "(2,)", "feature maps (N, C, ...)"):
        Deconvnet(model).project("1", 0, inputs=IMAGES)


@pytest.mark.parametrize("layer", ["1", "2", ""])
def test_layer_behind_a_detached_signal(layer):
    model = chain(Detached())
    with Deconvnet(model) as deconv:
        model(IMAGES)
        for call in (
            lambda: deconv.project(layer, 0),
            lambda: deconv.project(layer, 0, inputs=IMAGES),
            lambda: deconv.attribute(IMAGES, (0, 0, 0)),
            lambda: NeuronDeconvnet(model, layer).attribute(IMAGES, (0, 0, 0)),
        ):
            with Told(NoForwardPass, RuntimeError, "does not depend on the inputs", "numpy", ".detach()"):
                call()
        assert deconv.project("0", 0).any()


def test_model_that_leaves_pytorch_before_the_layer():
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.from_numpy(x.detach().numpy() * 2))

    for call in (
        lambda model: Deconvnet(model).project("conv", 0, inputs=IMAGES),
        lambda model: Deconvnet(model).attribute(IMAGES, (0, 0, 0)),
    ):
        with Told(UnsupportedOperation, RuntimeError, "hidden code", "Choose a layer before it"):
            call(Outside())


@pytest.mark.parametrize("on_unsupported", ["raise", "gradient"])
@pytest.mark.parametrize("layer", ["1", "2", ""])
def test_layer_that_leaves_pytorch(layer, on_unsupported):
    """It is named, and the gradient, which it has not got either, is not offered."""
    model = chain(ThroughNumpy())
    with Deconvnet(model, on_unsupported=on_unsupported) as deconv:
        for call in (
            lambda: deconv.project(layer, 0, inputs=IMAGES),
            lambda: deconv.attribute(IMAGES, (0, 0, 0)),
            lambda: NeuronDeconvnet(model, layer).attribute(IMAGES, (0, 0, 0)),
        ):
            with (
                pytest.raises(UnsupportedOperation, match="'hidden code' in layer '1'.*layer before it") as told,
            ):
                call()
            assert "gradient" not in str(told.value)
        model(IMAGES)
        with Told(NoForwardPass, RuntimeError, "numpy", "a layer before it"):
            deconv.project(layer, 0)
        assert deconv.project("0", 0).any()


# ── feature maps, positions, options ─────────────────────────────────────────────────────────────────

FMAPS = {
    "past the last": (6, FeatureMapOutOfRange, ("6", "6 feature maps", "0 to 5")),
    "before the first": (-7, FeatureMapOutOfRange, ("-7", "0 to 5")),
    "one of several": ([0, 17], FeatureMapOutOfRange, ("[0, 17]", "0 to 5")),
    "huge": (2**70, FeatureMapOutOfRange, (str(2**70), "0 to 5")),
    "empty list": ([], FeatureMapOutOfRange, ("[]", "at least one")),
    "empty slice": (slice(6, 9), FeatureMapOutOfRange, ("slice(6, 9", "0 to 5", "at least one")),
    "float": (1.0, InvalidInput, ("1.0", "an int, a sequence of ints, a slice")),
    "float in a list": ([0, 1.5], InvalidInput, ("[0, 1.5]", "an int")),
    "float tensor": (torch.tensor([1.0]), InvalidInput, ("tensor([1.])", "an int")),
    "word": ("weakest", InvalidInput, ("'weakest'", "an int", "'strongest'")),
    "digits": ("1", InvalidInput, ("'1'", "an int")),
    "bool": (True, InvalidInput, ("True", "an int, a sequence of ints")),
    "bools": ([True, False], InvalidInput, ("[True, False]", "an int, a sequence of ints")),
    "mask": (torch.ones(6, dtype=torch.bool), InvalidInput, ("tensor([True", "an int, a sequence of ints")),
    "object": (object(), InvalidInput, ("object", "an int")),
    "nested": ([[0, 1]], InvalidInput, ("[[0, 1]]", "an int")),
    "words": (["0"], InvalidInput, ("['0']", "an int")),
    "float slice": (slice(0.5, 2), InvalidInput, ("slice(0.5", "an int")),
}


@pytest.mark.parametrize("case", FMAPS)
def test_fmap(net, case):
    fmap, kind, message = FMAPS[case]
    with Told(kind, IndexError if kind is FeatureMapOutOfRange else ValueError, "fmap is", *message):
        Deconvnet(net).project("conv2", fmap, inputs=IMAGES)


@pytest.mark.parametrize("fmap", [1, -5, np.int64(1), torch.tensor(1), [1], (1,), np.array([1]), slice(1, 2)])
def test_fmap_forms_that_are_good(net, fmap):
    expected = Deconvnet(net).project("conv2", 1, inputs=IMAGES)
    assert torch.equal(Deconvnet(net).project("conv2", fmap, inputs=IMAGES).view_as(expected), expected)


POSITIONS = {
    "below": ((6, 0), PositionOutOfRange, ("(6, 0)", "6 x 6 cells", "not in pixels")),
    "right": ((0, 6), PositionOutOfRange, ("(0, 6)", "6 x 6 cells")),
    "negative": ((-7, 0), PositionOutOfRange, ("(-7, 0)", "6 x 6 cells")),
    "one image's": (torch.tensor([[0, 0], [0, 9]]), PositionOutOfRange, ("[0, 9]", "6 x 6 cells")),
    "a number": (3, InvalidInput, ("position is 3", "(y, x)", "(2, 2)")),
    "one number": ((3,), InvalidInput, ("(3,)", "(y, x)")),
    "three numbers": ((0, 1, 2), InvalidInput, ("(0, 1, 2)", "(y, x)")),
    "float": ((1.5, 2.0), InvalidInput, ("(1.5, 2.0)", "(y, x)")),
    "float tensor": (torch.ones(2, 2), InvalidInput, ("(y, x)", "(2, 2)")),
    "wrong batch": (torch.zeros(3, 2, dtype=torch.long), InvalidInput, ("(2, 2)", "one for each image")),
    "wrong rank": (torch.zeros(2, 2, 2, dtype=torch.long), InvalidInput, ("(2, 2)", "one for each image")),
    "word": ("min", InvalidInput, ("'min'", "'max'", "'all'")),
    "None": (None, InvalidInput, ("None", "'max'", "(y, x)")),
    "bools": ((True, False), InvalidInput, ("(True, False)", "(y, x)")),
    "words": (("0", "1"), InvalidInput, ("('0', '1')", "(y, x)")),
    "object": (object(), InvalidInput, ("object", "(y, x)")),
    "ragged": ([[0, 1], [2]], InvalidInput, ("[[0, 1], [2]]", "(y, x)")),
    "empty": ((), InvalidInput, ("()", "(y, x)")),
    "huge": ((2**70, 0), InvalidInput, (str(2**70), "(y, x)")),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_position(net, case):
    position, kind, message = POSITIONS[case]
    builtin = IndexError if kind is PositionOutOfRange else ValueError
    with Told(kind, builtin, "position", *message):
        Deconvnet(net).project("conv2", 0, inputs=IMAGES, position=position)


def test_position_in_a_layer_without_positions(net):
    with Told(InvalidInput, ValueError, "position is (0, 0)", "no position"):
        Deconvnet(net).project("head", 0, inputs=IMAGES, position=(0, 0))


@pytest.mark.parametrize("position", [(2, 3), [2, 3], (-4, -3), torch.tensor([2, 3]), np.array([[2, 3]] * 2)])
def test_position_forms_that_are_good(net, position):
    expected = Deconvnet(net).project("conv2", 1, inputs=IMAGES, position=(2, 3))
    found = Deconvnet(net).project("conv2", 1, inputs=IMAGES, position=position)
    assert expected.any() and torch.equal(found, expected)


@pytest.mark.parametrize("k", [0, -1, 7, 1.5, True, None, "2"])
def test_k_of_strongest(net, k):
    kind, builtin = (FeatureMapOutOfRange, IndexError) if type(k) is int else (InvalidInput, ValueError)
    with Told(kind, builtin, f"k is {k!r}", "'conv2'", "6 feature maps"):
        Deconvnet(net).strongest("conv2", k, inputs=IMAGES)


OPTIONS = {
    "overlap": (lambda net: Deconvnet(net, overlap="add"), ("overlap is 'add'", "'sum', 'overwrite'")),
    "overlap None": (lambda net: Deconvnet(net, overlap=None), ("overlap is None", "'sum', 'overwrite'")),
    "overlap list": (lambda net: Deconvnet(net, overlap=["sum"]), ("['sum']", "'sum', 'overwrite'")),
    "on_unsupported": (
        lambda net: Deconvnet(net, on_unsupported="ignore"),
        ("on_unsupported is 'ignore'", "'raise', 'gradient'"),
    ),
    "seed": (
        lambda net: Deconvnet(net).project("conv1", 0, inputs=IMAGES, seed="ones"),
        ("seed is 'ones'", "'activation', 'one'"),
    ),
    "seed number": (
        lambda net: Deconvnet(net).project("conv1", 0, inputs=IMAGES, seed=1),
        ("seed is 1", "'activation', 'one'"),
    ),
    "neuron's overlap": (
        lambda net: NeuronDeconvnet(net, "conv1", overlap="add"),
        ("overlap is 'add'", "'sum', 'overwrite'"),
    ),
    "neuron's on_unsupported": (
        lambda net: NeuronDeconvnet(net, "conv1", on_unsupported=True),
        ("on_unsupported is True", "'raise', 'gradient'"),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_option(net, case):
    call, message = OPTIONS[case]
    with Told(InvalidInput, ValueError, AssertionError, "expected one of", *message):
        call(net)


@pytest.mark.parametrize("layer", [lambda net: net.conv1, lambda net: "conv1"], ids=["module", "name"])
def test_a_layer_given_as_to_the_classes_of_captum_that_take_one(net, layer):
    with Told(InvalidInput, ValueError, "takes no layer", "give 'conv1' to project(", "NeuronDeconvnet"):
        Deconvnet(net, layer(net))


def test_a_layer_called_as_an_option_is_none():
    net = nn.ModuleDict({"sum": nn.ReLU()})
    assert Deconvnet(net, "sum").overlap == "sum"


# ── targets and neurons ──────────────────────────────────────────────────────────────────────────────

TARGETS = {
    "past the last": (5, "5"),
    "before the first": (-6, "-6"),
    "one image's": ([0, 7], "[0, 7]"),
    "a tensor's": (torch.tensor([0, 7]), "tensor([0, 7])"),
    "wrong number of them": ([0, 1, 2], "[0, 1, 2]"),
    "too deep": ((0, 0), "(0, 0)"),
    "none": (None, "None"),
    "word": ("dog", "'dog'"),
    "float": (1.5, "1.5"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_target(net, case):
    target, shown = TARGETS[case]
    with Told(TargetOutOfRange, IndexError, AssertionError, f"target {shown}", "(2, 5)"):
        Deconvnet(net).attribute(IMAGES, target)


NEURONS = {
    "past the last map": ((6, 0, 0), "(6, 0, 0)"),
    "past the last row": ((0, 6, 0), "(0, 6, 0)"),
    "too short": ((0, 0), "(0, 0)"),
    "too long": ((0, 0, 0, 0), "(0, 0, 0, 0)"),
    "int in a map": (3, "3"),
    "word": ("dog", "'dog'"),
    "none": (None, "None"),
}


@pytest.mark.parametrize("case", NEURONS)
def test_neuron_selector(net, case):
    selector, shown = NEURONS[case]
    with Told(TargetOutOfRange, IndexError, AssertionError, f"neuron_selector {shown}", "(2, 6, 6, 6)"):
        NeuronDeconvnet(net, "conv2").attribute(IMAGES, selector)


def test_error_in_the_users_selector_is_the_users(net):
    def selector(activation: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        NeuronDeconvnet(net, "conv2").attribute(IMAGES, selector)


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────

WITH_NAN, WITH_INF = IMAGES.clone(), IMAGES.clone()
WITH_NAN[1, 2, 3, :2] = torch.nan
WITH_INF[0, 0, 0, 0] = -torch.inf
INPUTS = {
    "uint8": (IMAGES.to(torch.uint8), ("torch.uint8", "floating point", "inputs.float()")),
    "int64": (IMAGES.long(), ("torch.int64", "floating point")),
    "bool": (IMAGES > 0, ("torch.bool", "floating point")),
    "complex": (IMAGES.to(torch.complex64), ("torch.complex64", "floating point")),
    "float64": (IMAGES.double(), ("torch.float64", "torch.float32", "inputs.to(torch.float32)")),
    "float16": (IMAGES.half(), ("torch.float16", "torch.float32", "inputs.to(torch.float32)")),
    "empty batch": (IMAGES[:0], ("(0, 3, 8, 8)", "N >= 1")),
    "no dimensions": (torch.tensor(1.0), ("()", "(N, ...)")),
    "one dimension": (torch.ones(3), ("(3,)", "(N, C, H, W)", "unsqueeze(0)")),
    "NaN": (WITH_NAN, ("(2, 3, 8, 8)", "2 NaN", "nan_to_num")),
    "infinite": (WITH_INF, ("1 NaN or infinite", "nan_to_num")),
    "meta device": (IMAGES.to("meta"), ("meta", "cpu", "inputs.to('cpu')")),
    "list of lists": ([[1.0, 2.0]], ("list", "tensors (N, C, H, W)")),
    "numpy": (IMAGES.numpy(), ("ndarray", "tensors (N, C, H, W)")),
    "word": ("cat.png", ("str", "tensors (N, C, H, W)")),
    "None in a tuple": ((IMAGES, None), ("NoneType", "tensors")),
    "empty tuple": ((), ("empty", "(N, C, H, W)")),
    "dict": ({"x": IMAGES}, ("dict", "tensors (N, C, H, W)")),
}
USES = {
    "project": lambda net, inputs: Deconvnet(net).project("conv1", 0, inputs=inputs),
    "strongest": lambda net, inputs: Deconvnet(net).strongest("conv1", inputs=inputs),
    "attribute": lambda net, inputs: Deconvnet(net).attribute(inputs, 0),
    "check": lambda net, inputs: Deconvnet(net).check(inputs),
    "neuron": lambda net, inputs: NeuronDeconvnet(net, "conv1").attribute(inputs, (0, 0, 0)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(net, case, use):
    inputs, message = INPUTS[case]
    with Told(InvalidInput, ValueError, AssertionError, "input", *message):
        USES[use](net, inputs)


def test_recorded_pass_of_no_images(net):
    with Deconvnet(net) as deconv:
        net(IMAGES[:0])
        with Told(InvalidInput, ValueError, AssertionError, "(0, 3, 8, 8)", "at least one image"):
            deconv.project("conv1", 0)


@pytest.mark.parametrize("fmap", [[0, 1], None, slice(2)])
def test_the_strongest_position_is_of_one_map(net, fmap):
    with Told(InvalidInput, ValueError, AssertionError, "one feature map"):
        Deconvnet(net).strongest_position("conv1", fmap, inputs=IMAGES)


REJECTED = {
    "channels": (IMAGES[:, :2], ("'conv1'", "conv2d", "(2, 2, 8, 8)", "expected", "(N, 3, H, W)")),
    "no batch axis for the head": (IMAGES[0], ("(N, 3, H, W)",)),
    "too small": (IMAGES[:, :, :1, :1], ("'conv2'", "conv2d", "(2, 4, 1, 1)", "size")),
}


@pytest.mark.parametrize("use", ["attribute", "check"])
@pytest.mark.parametrize("case", REJECTED)
def test_inputs_that_the_model_rejects(net, case, use):
    inputs, message = REJECTED[case]
    with Told(OperationFailed, ValueError, RuntimeError, AssertionError, *message):
        USES[use](net, inputs)


@pytest.mark.parametrize("use", ["attribute", "check"])
def test_one_image_of_a_model_in_train_mode_whose_batch_norm_wants_more(use):
    pooled = nn.Sequential()
    pooled.conv1, pooled.pool, pooled.bn = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)
    with Told(OperationFailed, ValueError, "'bn'", "batch_norm on (1, 4, 1, 1)", "model.eval()"):
        USES[use](pooled, IMAGES[:1])


def test_inputs_that_the_model_has_no_place_for(net):
    with Told(OperationFailed, ValueError, "forward()", "positional", "(2, 3, 8, 8) float32", "model(inputs)"):
        Deconvnet(net).attribute((IMAGES, IMAGES), 0)


@pytest.mark.parametrize("use", USES)
def test_picture_without_a_batch_axis(use):
    """PyTorch's own filters take it, so it must be refused where it would be read as three pictures."""
    normalised = nn.Sequential()
    normalised.conv1, normalised.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with Told(OperationFailed, ValueError, "the model failed", "(3, 8, 8) float32", "4D", "(N, 3, H, W)"):
        USES[use](normalised.eval(), IMAGES[0])
    filters = nn.Sequential()
    filters.conv1, filters.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
    with Told(InvalidInput, ValueError, "shape (3, 8, 8)", "a batch", "inputs.unsqueeze(0)"):
        USES[use](filters, IMAGES[0])
    with Deconvnet(filters) as deconv:
        filters(IMAGES[0])
        with Told(InvalidInput, ValueError, "shape (3, 8, 8)", "a batch", "inputs.unsqueeze(0)"):
            deconv.project("conv1", 0)


def test_errors_that_the_model_handles_reach_it_as_they_are():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.conv(x).mean((2, 3, 4))
            except IndexError:
                return self.conv(x).mean((2, 3))

    assert Deconvnet(Careful()).attribute(IMAGES, 0).any()


@pytest.mark.parametrize("error", [KeyError("mine"), ValueError("mine"), RuntimeError("mine")])
def test_errors_of_the_models_own_are_left_alone(net, error):
    def raising(*arguments: object) -> None:
        raise error

    net.relu.register_forward_pre_hook(raising)
    with pytest.raises(type(error), match="mine") as raised:
        Deconvnet(net).attribute(IMAGES, 0)
    assert raised.value is error


@pytest.mark.parametrize("bad", [WITH_NAN, WITH_INF])
def test_recorded_pass_that_is_not_finite(net, bad):
    with Deconvnet(net) as deconv:
        assert net(bad).isfinite().all().item() is False, "the pass itself is the user's"
        with Told(InvalidInput, ValueError, "NaN or infinite", "nan_to_num"):
            deconv.project("conv1", 0)
        net(IMAGES)
        assert deconv.project("conv1", 0).isfinite().all()


def test_not_finite_additional_input_of_a_model_that_masks(net):
    with Told(InvalidInput, ValueError, "(2, 3, 8, 8)", "1 NaN or infinite"):
        Deconvnet(net).attribute((IMAGES, WITH_INF), 0)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────


def compiled_in_place() -> nn.Module:
    model = chain(nn.ReLU())
    model[1].compile(backend="eager")
    return model


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, IMAGES)


@torch.jit.script
def halved(x):
    return x / 2


class CallsScripted(nn.Module):
    def forward(self, x):
        return halved(x)


class Holds(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.held(x)


MODELS = {
    "function": (lambda: F.relu, ("model is a ", "torch.nn.Module", "wrap a function")),
    "lambda": (lambda: lambda x: x, ("model is a function", "wrap a function")),
    "name": (lambda: "resnet18", ("model is a str", "torch.nn.Module")),
    "None": (lambda: None, ("model is a NoneType", "torch.nn.Module")),
    "class": (lambda: Net, ("model is a type", "torch.nn.Module")),
    "state dict": (lambda: Net().state_dict(), ("OrderedDict", "torch.nn.Module")),
    "scripted": (lambda: scripted(chain(nn.ReLU())), ("the model is scripted", "before torch.jit.script")),
    "traced": (lambda: traced(chain(nn.ReLU())), ("the model is scripted", "torch.jit.trace")),
    "scripted layer": (lambda: chain(scripted(nn.ReLU())), ("layer '1' is scripted", "torch.jit.script")),
    "compiled": (lambda: torch.compile(chain(nn.ReLU())), ("the model is compiled", "_orig_mod")),
    "compiled layer": (lambda: chain(torch.compile(nn.ReLU())), ("layer '1' is compiled", "_orig_mod")),
    "compiled in place": (compiled_in_place, ("layer '1' is compiled", "copy.deepcopy(model)")),
    "scripted function": (
        lambda: chain(CallsScripted()),
        ("calls the scripted function 'halved'", "before torch.jit.script"),
    ),
    "scripted function held": (
        lambda: chain(Holds(halved)),
        ("layer '1' calls the scripted function 'held'",),
    ),
    "scripted, in DataParallel": (
        lambda: nn.DataParallel(chain(scripted(nn.ReLU()))),
        ("layer '1' is scripted",),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(case):
    make, message = MODELS[case]
    model = make()
    with Told(UnsupportedModel, TypeError, AssertionError, *message):
        Deconvnet(model)
    with Told(UnsupportedModel, TypeError, AssertionError, *message):
        NeuronDeconvnet(model, "0")


def test_remedies_for_a_compiled_model_work():
    import copy

    model = chain(nn.ReLU())
    assert Deconvnet(torch.compile(model)._orig_mod).project("2", 0, inputs=IMAGES).any()
    assert Deconvnet(copy.deepcopy(compiled_in_place())).project("2", 0, inputs=IMAGES).any()


# ── operations ───────────────────────────────────────────────────────────────────────────────────────


def test_unsupported_operation():
    model = chain(Odd())
    message = ("no rule for 'sin'", "layer '1'", "a layer before it", 'on_unsupported="gradient"')
    with Deconvnet(model) as deconv:
        model(IMAGES)
        for call in (
            lambda: deconv.project("2", 0),
            lambda: deconv.project("2", 0, inputs=IMAGES),
            lambda: deconv.attribute(IMAGES, (0, 0, 0)),
            lambda: NeuronDeconvnet(model, "2").attribute(IMAGES, (0, 0, 0)),
        ):
            with Told(UnsupportedOperation, RuntimeError, *message):
                call()
        assert deconv.project("0", 0).any(), "a layer before it works"
        assert not deconv.check(IMAGES).supported
    lenient = Deconvnet(model, on_unsupported="gradient")
    assert lenient.project("2", 0, inputs=IMAGES).any()


def test_unsupported_operation_names_the_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.odd(x).flatten(1)[:, :4])

    with Told(UnsupportedOperation, RuntimeError, "layer 'odd#2'"):
        Deconvnet(Twice()).attribute(IMAGES, 0)


# ── the errors themselves ────────────────────────────────────────────────────────────────────────────


def test_every_error_is_a_deconvviz_error_and_a_builtin_one():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not DeconvvizError]
    assert len(kinds) >= 11
    for kind in kinds:
        assert issubclass(kind, DeconvvizError) and kind.__doc__
        assert any(base.__module__ == "builtins" and base is not Exception for base in kind.__mro__[1:-3])
