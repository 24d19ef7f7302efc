"""Equal to captum's deconvolution where it is right: each ReLU a module whose input feeds nothing else."""

import captum.attr
import pytest
import torch
from torch import nn
from trained_like import pictures, relative_error, trained_like

from deconvviz import Deconvnet, NeuronDeconvnet
from deconvviz.errors import TargetOutOfRange

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")

SIZES = {"alexnet": 96}

# early, middle and late layers, and a neuron selector for each
NEURONS = {
    "alexnet": {
        "features.1": (5, 10, 3),
        "features.8": (7, slice(0, 3), slice(1, None)),
        "classifier.4": 99,
    },
    "vgg11": {
        "features.0": (slice(3, 9), 20, 21),
        "features.10": (200, 1, 2),
        "classifier.3": (slice(0, 64, 9),),
    },
    "vgg11_bn": {
        "features.1": (0, 0, 63),
        "features.14": lambda maps: maps[:, 2].amax((1, 2)),
        "features.28": (17, 1, 0),
    },
    "resnet18": {
        "layer1.0": (3, 7, 7),
        "layer2.0.relu": (60, 2, 5),
        "layer3.0.downsample": (40, slice(None), slice(None)),
        "layer4.1.bn2": (500, 0, 1),
        "avgpool": (9, 0, 0),
    },
    "resnext50_32x4d": {
        "conv1": (2, 30, 5),
        "layer2.1": (100, 4, 4),
        "layer4.2": lambda maps: maps[:, ::100].sum((1, 2, 3)),
    },
    "squeezenet1_1": {
        "features.3.expand3x3": (8, 2, 11),
        "features.7": (70, slice(2, 4), 5),
        "classifier.1": (999, 0, 2),
    },
    "shufflenet_v2_x0_5": {"maxpool": (5, 9, 9), "stage3.2": (40, 1, 3), "conv5": (600, 1, 0)},
    "regnet_x_400mf": {"stem": (31, 16, 2), "trunk_output.block2": (12, 6, 6), "avgpool": (77, 0, 0)},
    "mnasnet0_5": {"layers.2": (3, 8, 30), "layers.9": (20, 3, 0), "classifier.1": 7},
}


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_class_of_a_released_model(name, dtype, tolerance):
    model, images = trained_like(name, dtype), pictures(2, SIZES.get(name, 64), dtype)
    expected = captum.attr.Deconvolution(model).attribute(images, [3, 7])
    assert relative_error(Deconvnet(model).attribute(images, [3, 7]), expected) <= tolerance


@pytest.mark.parametrize("name, layer", [(name, layer) for name in NEURONS for layer in NEURONS[name]])
def test_neuron_of_a_released_model(name, layer):
    model, images = trained_like(name), pictures(2, SIZES.get(name, 64))
    module, selector = model.get_submodule(layer), NEURONS[name][layer]
    expected = captum.attr.NeuronDeconvolution(model, module).attribute(images, selector)
    assert relative_error(NeuronDeconvnet(model, module).attribute(images, selector), expected) <= 1e-12


@pytest.mark.parametrize("layer, call", [("layer3.1.conv2", "layer3.1.conv2"), ("layer2.0.relu", "layer2.0.relu#2")])
def test_a_module_is_its_name_and_its_last_call(layer, call):
    model, images = trained_like("resnet18"), pictures(2, 64)
    expected, *same = (
        method(model, given).attribute(images, (60, 2, 3))
        for method, given in (
            (captum.attr.NeuronDeconvolution, model.get_submodule(layer)),
            (NeuronDeconvnet, model.get_submodule(layer)),
            (NeuronDeconvnet, layer),
            (NeuronDeconvnet, call),
        )
    )
    for pixels in same:
        assert relative_error(pixels, expected) <= 1e-12


@pytest.mark.parametrize(
    "name, layer, selector",
    [
        ("vgg11_bn", "features.2", (3, slice(0, 9), 11)),
        ("resnet18", "layer2.0.relu", (60, 2, 5)),
        ("resnet18", "layer4.0", lambda maps: maps[:, 7, 0, 1]),
        ("resnet18", "fc", 100),
        ("squeezenet1_1", "features.6.expand3x3", (8, 2, 3)),
        ("mnasnet0_5", "layers.9", (10, 4, slice(None))),
    ],
)
def test_neuron_in_the_input_of_a_layer(name, layer, selector):
    model, images = trained_like(name), pictures(2, 64)
    module = model.get_submodule(layer)
    expected, pixels = (
        method(model, module).attribute(images, selector, attribute_to_neuron_input=True)
        for method in (captum.attr.NeuronDeconvolution, NeuronDeconvnet)
    )
    assert relative_error(pixels, expected) <= 1e-12


def toy(*head):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Conv2d(6, 5, 3), *head).double()


SPATIAL = toy()  # (N, 5, 3, 3)
CLASSES = toy(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (N, 5)
NUMBER = toy(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(5, 1), nn.Flatten(0))  # (N,)
IMAGES = pictures(2, 16)


@pytest.mark.parametrize(
    "model, target",
    [
        (SPATIAL, (4, 0, 2)),
        (SPATIAL, [(4, 0, 2), (1, 2, 2)]),
        (CLASSES, 3),
        (CLASSES, -1),
        (CLASSES, (3,)),
        (CLASSES, torch.tensor(3)),
        (CLASSES, torch.tensor([3])),
        (CLASSES, torch.tensor([3, 0])),
        (CLASSES, [3, 0]),
        (CLASSES, [(3,), (0,)]),
        (NUMBER, None),
    ],
)
def test_forms_of_a_target(model, target):
    expected = captum.attr.Deconvolution(model).attribute(IMAGES, target)
    assert relative_error(Deconvnet(model).attribute(IMAGES, target), expected) <= 1e-12


@pytest.mark.parametrize(
    "selector",
    [
        (7, 0, 13),
        (-1, -1, 2),
        (slice(None), 0),
        (slice(1, None, 3), slice(4), -1),
        [2, 3, 4],
        lambda maps: maps[:, 0, 3, 3],
        lambda maps: (maps * maps).mean((1, 2, 3)),
        lambda maps: maps[:, 0].sum(),
    ],
)
def test_forms_of_a_neuron_selector(selector):
    expected, pixels = (
        method(CLASSES, CLASSES[1]).attribute(IMAGES, selector)
        for method in (captum.attr.NeuronDeconvolution, NeuronDeconvnet)
    )
    assert relative_error(pixels, expected) <= 1e-12


@pytest.mark.parametrize(
    "model, target",
    [
        (CLASSES, 5),
        (CLASSES, -6),
        (CLASSES, torch.tensor(5)),
        (CLASSES, torch.tensor([0, 5])),
        (CLASSES, torch.tensor([0, 1, 2])),
        (CLASSES, [0, 5]),
        (CLASSES, [0]),
        (CLASSES, [0.5, 1.5]),
        (CLASSES, torch.tensor([0.0, 1.0])),
        (CLASSES, (1, 2)),
        (CLASSES, "dog"),
        (CLASSES, 1.5),
        (CLASSES, None),
        (SPATIAL, 3),
        (SPATIAL, (3, 1)),
        (SPATIAL, (0, 0, 3)),
        (SPATIAL, [(0, 0, 0)]),
        (SPATIAL, [(0, 0, 0), (0, 3, 0)]),
        (SPATIAL, [1, 2]),
    ],
)
def test_a_target_that_is_not_there(model, target):
    with pytest.raises(TargetOutOfRange, match="target.*shape") as error:
        Deconvnet(model).attribute(IMAGES, target)
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize(
    "selector",
    [8, (8, 0, 0), (0, 0, 14), (0, 0), (0, 0, 0, 0), (0, "x", 0), 1.5, None, lambda maps: maps[:, 0, 0]],
)
def test_a_neuron_that_is_not_there(selector):
    with pytest.raises(TargetOutOfRange, match="neuron_selector.*shape") as error:
        NeuronDeconvnet(CLASSES, "1").attribute(IMAGES, selector)
    assert isinstance(error.value, AssertionError)


class TwoPictures(nn.Module):
    """Compares two pictures, the second one scaled, by a metric that is chosen by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 5, padding=1)
        self.relu, self.relu_both, self.pool = nn.ReLU(inplace=True), nn.ReLU(), nn.MaxPool2d(2)
        self.both, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, left, right, scale, reduction="mean"):
        x = self.pool(self.relu(self.left(left))) + scale * self.pool(self.right(right))
        x = self.relu_both(self.both(x)).flatten(2)
        return self.fc(x.mean(2) if reduction == "mean" else x.sum(2))


TWO_PICTURES = TwoPictures().double()


INPUTS = pictures(2, 16), pictures(2, 16, seed=1)


@pytest.mark.parametrize(
    "ours, captums, selector",
    [
        (Deconvnet(TWO_PICTURES), captum.attr.Deconvolution(TWO_PICTURES), 1),
        (
            NeuronDeconvnet(TWO_PICTURES, TWO_PICTURES.both),
            captum.attr.NeuronDeconvolution(TWO_PICTURES, TWO_PICTURES.both),
            (2, 3, 4),
        ),
    ],
    ids=["class", "neuron"],
)
@pytest.mark.parametrize("additional", [2.0, (torch.tensor(0.5).double(),), (3.0, "sum")])
def test_several_inputs_and_additional_arguments(ours, captums, selector, additional):
    pixels, expected = (
        method.attribute(INPUTS, selector, additional_forward_args=additional) for method in (ours, captums)
    )
    assert isinstance(pixels, tuple)
    for one_input, one_expected in zip(pixels, expected, strict=True):
        assert relative_error(one_input, one_expected) <= 1e-12


def test_a_tuple_of_one_input_gives_a_tuple():
    (pixels,) = Deconvnet(CLASSES).attribute((IMAGES,), 2)
    assert torch.equal(pixels, Deconvnet(CLASSES).attribute(IMAGES, 2))
