"""Every torchvision CNN, as released: each operation has a rule, and projections are autograd's.

The default run takes one model of each family, ``make test-all`` all of them.
"""

import copy
import functools
import importlib.util
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from autograd_deconvnet import GATES, NORMS, OTHER_RECTIFIERS, POOLS, AutogradDeconvnet
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d
from trained_like import as_if_trained, relative_error

from deconvviz import Deconvnet
from deconvviz.errors import InvalidInput
from deconvviz.tape import flatten

SCRIPT = Path(__file__).parents[1] / "docs" / "make_torchvision_table.py"
SPECIFICATION = importlib.util.spec_from_file_location("make_torchvision_table", SCRIPT)
table = sys.modules["make_torchvision_table"] = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(table)

REPRESENTATIVES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf",
    "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11_bn", "wide_resnet50_2",
    "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large", "r2plus1d_18", "r3d_18",
]  # fmt: skip
NAMES = [name for module in table.SECTIONS.values() for name in table.models(module)]
DETECTORS = table.models(torchvision.models.detection)
MAPS = [0, 1]
TOLERANCE = 5e-5


@dataclass
class Case:
    """A model as if trained, and a picture (or clip) for it."""

    name: str
    model: nn.Module
    images: Tensor

    @functools.cached_property
    def reference(self):
        return AutogradDeconvnet(self.model, self.images)

    @property
    def layers(self):
        """The first, middle and last convolution that ran."""
        names = list(self.reference.activations)
        return names[0], names[len(names) // 2], names[-1]


def make(name, shape=None, **options):
    """A seeded model as if trained, without gradients for its parameters, and an input."""
    shape = shape or table.input_shape(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = table.build(name, **options)
        calibration, images = torch.randn(2, *shape[1:]), torch.randn(shape)
    return Case(name, as_if_trained(model, calibration).requires_grad_(False), images)


def parameters(names):
    return [pytest.param(n, marks=() if n in REPRESENTATIVES else pytest.mark.slow) for n in names]


@pytest.fixture(scope="module", params=parameters(NAMES))
def case(request):
    return make(request.param)


def test_check_counts_every_operation(case):
    calls, report = case.reference.calls, Deconvnet(case.model).check(case.images)
    layer_scales = sum(name.endswith("layer_scale") for name, _ in case.model.named_parameters())
    assert report.counts == {
        "exact": sum(calls[name] for name in ("relu", *POOLS)),
        "generalised": sum(calls[name] for name in (*OTHER_RECTIFIERS, *NORMS)) + layer_scales,
        "constant gate": 2 * sum(calls[name] for name in GATES),
        "gradient": 0,
        "unsupported": 0,
    }


def test_projections_of_a_recorded_pass_are_those_of_autograd(case):
    with torch.no_grad():
        plain = flatten(case.model(case.images))
        with Deconvnet(case.model) as deconv:
            case.model(case.images.flip(-1))
            deconv.project(case.layers[0], MAPS)  # forgotten at the next pass
            output = flatten(case.model(case.images))
            projections = {layer: deconv.project(layer, MAPS) for layer in case.layers}
            own_pass = deconv.project(case.layers[-1], MAPS, inputs=case.images)
    assert all(torch.equal(a, b) for a, b in zip(output, plain, strict=True))
    for layer, pixels in projections.items():
        assert pixels.isfinite().all() and pixels.flatten(2).any(-1).all()
        assert relative_error(pixels, case.reference.project(layer, MAPS)) < TOLERANCE
    assert torch.equal(own_pass, pixels)


def test_attributions_are_those_of_autograd(case):
    outputs = flatten(case.reference.output)
    if case.name in DETECTORS:
        assert len(outputs) > 1
        with pytest.raises(InvalidInput, match="choose a layer inside it"):
            Deconvnet(case.model).attribute(case.images, target=1)
        return
    target = (1, *(size // 3 for size in outputs[0].shape[2:]))
    attributions = Deconvnet(case.model).attribute(case.images, target=target)
    assert relative_error(attributions, case.reference.attribute(outputs[0], target)) < TOLERANCE


def test_model_is_left_as_found(case):
    before = state(case.model)
    with Deconvnet(case.model) as deconv:
        deconv.check(case.images)
        deconv.project(case.layers[1], MAPS, inputs=case.images)
    assert state(case.model) == before


def state(model):
    """Modes and hooks of each module; identity, version and gradient of each parameter and buffer."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [(m.training, [list(getattr(m, hook)) for hook in hooks]) for m in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = [(n, id(t), t.data_ptr(), t._version, t.requires_grad, t.grad) for n, t in tensors.items()]
    return modules, found, torch.get_rng_state().tolist()


def rows():
    """The rows of the page, by model."""
    lines = [line for line in table.PAGE.read_text().splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


VERSION = torchvision.__version__.partition("+")[0]
made_with_this_torchvision = pytest.mark.skipif(
    f"torchvision {VERSION} " not in table.PAGE.read_text(),
    reason=f"{table.PAGE.name} was made with another torchvision than {VERSION}",
)


@made_with_this_torchvision
def test_page_lists_every_cnn():
    assert list(rows()) == NAMES


@made_with_this_torchvision
def test_page_is_true(case):
    assert rows()[case.name] == table.row(case.name, case.model)


@pytest.mark.parametrize(
    ("name", "operation", "count"),
    [
        ("densenet121", "relu", 121),
        ("efficientnet_b0", "sigmoid", 16),
        ("googlenet", "relu", 57),
        ("inception_v3", "relu", 94),
        ("mobilenet_v2", "hardtanh", 35),
        ("resnet50", "relu", 49),
        ("squeezenet1_1", "relu", 26),
        ("vgg11", "max_pool2d", 5),
    ],
)
def test_operations_counted_by_hand(name, operation, count):
    report = Deconvnet(table.build(name)).check(torch.zeros(table.input_shape(name)))
    assert Counter(o.operation for o in report.operations)[operation] == count


TRAIN_MODE = [
    ("alexnet", (2, 3, 64, 64), {}),
    ("convnext_tiny", (2, 3, 64, 64), {}),
    ("efficientnet_b0", (2, 3, 64, 64), {}),
    ("googlenet", (2, 3, 64, 64), {"aux_logits": True, "transform_input": True}),
    ("mobilenet_v3_small", (2, 3, 64, 64), {}),
    ("regnet_y_400mf", (2, 3, 64, 64), {}),
    ("fcn_resnet50", (2, 3, 64, 64), {"aux_loss": True}),
    pytest.param("deeplabv3_resnet50", (2, 3, 64, 64), {"aux_loss": True}, marks=pytest.mark.slow),
    pytest.param("efficientnet_v2_s", (2, 3, 64, 64), {}, marks=pytest.mark.slow),
    pytest.param("inception_v3", (2, 3, 299, 299), {"aux_logits": True}, marks=pytest.mark.slow),
    pytest.param("r3d_18", (2, 3, 4, 32, 32), {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "shape", "options"), TRAIN_MODE)
def test_train_mode(name, shape, options):
    """Batch statistics, dropout, stochastic depth and auxiliary heads, in the user's pass and in ours."""
    case = make(name, shape, **options)
    model, images = case.model.train(), case.images
    untouched = copy.deepcopy(model)
    case.reference = seeded(AutogradDeconvnet, copy.deepcopy(model), images)
    plain = seeded(untouched, images)
    with Deconvnet(model) as deconv:
        output = seeded(model, images)
        projections = {layer: deconv.project(layer, MAPS) for layer in (*case.layers, *auxiliary(case))}
        if isinstance(output, Tensor):
            attributions = seeded(deconv.attribute, images, 1)
            expected = case.reference.attribute(case.reference.output, [1])
            assert relative_error(attributions, expected) < TOLERANCE
        else:
            with pytest.raises(InvalidInput, match="choose a layer inside it"):
                deconv.attribute(images, 1)
    for layer, pixels in projections.items():
        assert relative_error(pixels, case.reference.project(layer, MAPS)) < TOLERANCE
    assert type(output) is type(plain)
    left, as_without = [*flatten(output), *model.buffers()], [*flatten(plain), *untouched.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(left, as_without, strict=True))


def auxiliary(case):
    """The first convolution of each auxiliary head."""
    names = [name for name in case.reference.activations if name.lower().startswith("aux")]
    return {name.partition(".")[0]: name for name in reversed(names)}.values()


def seeded(function, *arguments):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return function(*arguments)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_input_transformed_inside_the_model(name):
    plain, case = make(name), make(name, transform_input=True)
    layer = case.layers[0]
    pixels = Deconvnet(case.model).project(layer, MAPS, inputs=case.images)
    assert relative_error(pixels, case.reference.project(layer, MAPS)) < TOLERANCE
    assert relative_error(pixels, plain.reference.project(layer, MAPS)) > 0.1


def test_densenet_that_recomputes_to_save_memory():
    plain = make("densenet121")
    model = table.build("densenet121", memory_efficient=True)
    model.load_state_dict(plain.model.state_dict())
    images = plain.images.clone().requires_grad_()
    with Deconvnet(model) as deconv:
        model(images)[:, 3].sum().backward()
        projections = {layer: deconv.project(layer, MAPS) for layer in plain.layers}
    for layer, pixels in projections.items():
        assert relative_error(pixels, plain.reference.project(layer, MAPS)) < TOLERANCE
    gradient = images.grad.clone()
    images.grad = None
    model(images)[:, 3].sum().backward()
    assert torch.equal(images.grad, gradient)


def test_s3d_on_a_clip_too_small_for_its_head():
    model = make("s3d").model.features
    images = torch.randn(1, 3, 9, 48, 48)
    case = Case("s3d.features", model, images)
    for layer in case.layers:
        pixels = Deconvnet(model).project(layer, MAPS, inputs=images)
        assert relative_error(pixels, case.reference.project(layer, MAPS)) < TOLERANCE


class Level(nn.Module):
    """One level of a detector's feature pyramid."""

    def __init__(self, backbone, level):
        super().__init__()
        self.backbone, self.level = backbone, level

    def forward(self, images):
        return self.backbone(images)[self.level]


@pytest.mark.parametrize("level", ["0", "2", "pool"])
def test_pyramid_on_frozen_batch_norm(level):
    """As detectors are built around trained weights: batch norm as products and sums of buffers."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.uniform_(0.5, 1.5)
    model, images = Level(backbone, level).requires_grad_(False), torch.randn(1, 3, 64, 64)
    reference = AutogradDeconvnet(model, images)
    target = (1, 0, 0)
    attributions = Deconvnet(model).attribute(images, target)
    assert relative_error(attributions, reference.attribute(reference.output, target)) < TOLERANCE


class OfABatch(nn.Module):
    """A detector as a module of a batch (N, C, H, W) instead of a list of pictures (C, H, W)."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return self.detector(list(images))


def test_whole_detector():
    """A layer in a whole detector, which resizes its pictures: one map, and several."""
    torch.manual_seed(0)
    model = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    model, images = model.eval().requires_grad_(False), torch.rand(1, 3, 48, 60)
    as_if_trained(model, list(torch.rand(4, 3, 48, 60)))
    reference, layer = AutogradDeconvnet(OfABatch(model), images), "backbone.features.0.5.block.1.0"
    (expected,) = reference.project(f"detector.{layer}", MAPS)
    plain = model(list(images))
    with Deconvnet(model) as deconv:
        assert all(torch.equal(found, plain[0][key]) for key, found in model(list(images))[0].items())
        assert relative_error(deconv.project(layer, 1), expected[1]) < TOLERANCE
        assert relative_error(deconv.project(layer, MAPS), expected) < TOLERANCE
