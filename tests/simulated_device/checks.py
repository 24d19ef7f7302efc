"""Everything on a device that is not the CPU, beside the same on the CPU; run by ``test_simulated_device.py``.

In a process of its own, since a backend stays registered, and with the library's path in ``SIMULATED_DEVICE``.
"""

from __future__ import annotations

import copy
import os
import types

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deconvviz import Deconvnet, FilterGrid, NeuronDeconvnet, OcclusionSensitivity
from deconvviz.comparison import compare
from deconvviz.correspondence import correspondence
from deconvviz.diagnostics import diagnose
from deconvviz.evidence import evidence
from deconvviz.evolution import FeatureEvolution
from deconvviz.features import features
from deconvviz.invariance import invariance
from deconvviz.occlusion import Refine, circles
from deconvviz.plotting import comparison_panel


def register() -> None:
    """Make ``"simulated"`` a device of PyTorch's."""
    torch.ops.load_library(os.environ["SIMULATED_DEVICE"])
    torch.utils.rename_privateuse1_backend("simulated")
    module = types.ModuleType("simulated")
    module.synchronize = module.set_rng_state = module.manual_seed_all = lambda *_: None
    module.is_available, module._is_in_bad_fork = lambda: True, lambda: False
    module.current_device, module.device_count = lambda: 0, lambda: 1
    module.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("simulated", module)


register()
torch.manual_seed(0)
SMALL = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
)  # fmt: skip
MODELS = {
    "small": (SMALL.eval(), "5"),
    "resnet18": (torchvision.models.resnet18(weights=None).eval(), "layer2"),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small(weights=None).eval(), "features.4"),
}
IMAGES = torch.randn(6, 3, 48, 48)


@pytest.fixture(params=MODELS)
def pair(request):
    """A model on the CPU, the same on the device, and a layer."""
    model, layer = MODELS[request.param]
    return model, copy.deepcopy(model).to("simulated"), layer


def there(x):
    return x.to("simulated")


def same(found, expected, tolerance=1e-5):
    assert found.device.type == "simulated"
    assert (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_device_is_one():
    with pytest.raises(RuntimeError, match="device"):
        there(IMAGES) + IMAGES
    with pytest.raises(RuntimeError, match="device"):
        nn.Conv2d(3, 4, 3)(there(IMAGES))
    if "SIMULATED_WITHOUT_DOUBLE" in os.environ:
        with pytest.raises(TypeError, match="float64"):
            there(IMAGES).double()


def test_projections(pair):
    cpu, model, layer = pair
    for arguments in ({"fmap": [0, 3]}, {"fmap": "strongest"}, {"fmap": 1, "position": (1, 2)},
                      {"fmap": 1, "position": "all", "seed": "one"}):  # fmt: skip
        with Deconvnet(model) as ours, Deconvnet(cpu) as expected:
            model(there(IMAGES))
            cpu(IMAGES)
            same(ours.project(layer, **arguments), expected.project(layer, **arguments))
            assert ours.strongest_position(layer, 0) == expected.strongest_position(layer, 0)
            assert ours.strongest(layer, 2).tolist() == expected.strongest(layer, 2).tolist()
    fmaps, positions = torch.tensor([0, 3]), torch.tensor([[0, 1]] * len(IMAGES))
    Deconvnet(model).project(layer, there(fmaps), inputs=there(IMAGES), position=there(positions))
    targets = torch.arange(len(IMAGES)) % 5
    same(Deconvnet(model).attribute(there(IMAGES), there(targets)), Deconvnet(cpu).attribute(IMAGES, targets))
    neurons = [NeuronDeconvnet(m, layer).attribute(x, (2, 1, 1)) for m, x in ((model, there(IMAGES)), (cpu, IMAGES))]
    same(*neurons)
    Deconvnet(model).check(there(IMAGES))
    assert features(model, there(IMAGES), [layer])[0].device.type == "simulated"


@pytest.mark.parametrize("engine", ["full", "incremental", "auto"])
def test_occlusion(pair, engine, recwarn):
    cpu, model, layer = pair
    images, window = IMAGES[:2], ((3, 16, 16), (3, 8, 8))
    expected = OcclusionSensitivity(cpu, engine="full").attribute(images, *window, target=1)
    same(OcclusionSensitivity(model, engine=engine).attribute(there(images), *window, target=1), expected, 1e-3)
    for fill in ("mean", "blur", "noise", 0.5, there(IMAGES[:1])):
        OcclusionSensitivity(model, engine=engine).attribute(there(images), *window, target=1, baselines=fill)
    discs = circles((48, 48), 16, 16)
    OcclusionSensitivity(model, engine=engine).attribute(there(images), masks=discs, target=there(torch.tensor([1, 2])))
    OcclusionSensitivity(model, engine=engine, autocast=torch.bfloat16).attribute(there(images), *window, target=1)
    for refine in (None, Refine()):
        options = {"targets": [0, 3], "refine": refine}
        found = OcclusionSensitivity(model, engine=engine).maps(there(images), 16, 8, layer, **options)
        of_cpu = OcclusionSensitivity(cpu, engine="full").maps(images, 16, 8, layer, **options)
        if refine is None:
            same(found.score_cells, of_cpu.score_cells, 1e-4)
            same(found.activation_pixels, of_cpu.activation_pixels, 1e-4)
        found.figure()
    assert not [w for w in recwarn if "incremental" in str(w.message)]


def test_grids(pair, tmp_path):
    cpu, model, layer = pair
    grid, expected = (FilterGrid(m, layer, k=3).fit(IMAGES, progress=False) for m in (model, cpu))
    layer = grid.layers[0]
    assert grid[layer][2].images == expected[layer][2].images
    assert torch.allclose(grid[layer][2].projections[0], expected[layer][2].projections[0], atol=1e-6)
    grid[layer].figure([0, 1])
    if len(grid[layer]) < 10:
        grid.explore(tmp_path / "maps")
    grid.save(tmp_path / "grid.npz")
    assert FilterGrid.load(tmp_path / "grid.npz", model, IMAGES)[layer][0].values == grid[layer][0].values
    first, second = (FilterGrid(model, layer, k=3).fit(there(IMAGES), share=(i, 2), progress=False) for i in (0, 1))
    assert first.merge(second)[layer][0].images == grid[layer][0].images
    FilterGrid(model, layer, k=3).attribute(there(IMAGES), [1])


def test_diagnosis_invariance_and_the_rest(tmp_path):
    model, images = copy.deepcopy(SMALL).to("simulated"), there(IMAGES)
    diagnose(model, DataLoader(TensorDataset(IMAGES), 4)).figure()
    assert str(diagnose(model, images)) == str(diagnose(SMALL, IMAGES))
    invariance(model, images, ["2", "5"], targets=[1] * len(IMAGES)).figure()
    boxes = {"eye": torch.tensor([[2, 10, 2, 10]] * len(IMAGES))}
    correspondence(model, images, boxes, ["2", "5"])
    evidence(model, images[:1], "5").figure()
    comparison_panel([compare(model, images[:1], "5", 2)])
    watched = FeatureEvolution(["2", "5"], None, IMAGES, epochs=(1, 2), file=tmp_path / "watched.npz")
    for epoch in (1, 2):
        watched(model, epoch)
    watched.result.figure()
