"""captum's classes that wrap other methods take ours as they take captum's own."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from captum.attr import Deconvolution, LayerAttribution, NeuronDeconvolution, NoiseTunnel
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from deconvviz import Deconvnet, NeuronDeconvnet

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(model, images, kind) -> None:
    found = []
    for method in (Deconvnet(model), Deconvolution(model)):
        torch.manual_seed(5)
        options = {"nt_type": kind, "nt_samples": 6, "nt_samples_batch_size": 2, "stdevs": 0.1, "target": 1}
        found.append(NoiseTunnel(method).attribute(images.clone(), **options))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_noise_tunnel_over_neurons(model, images) -> None:
    found = []
    for method in (NeuronDeconvnet(model, model[3]), NeuronDeconvolution(model, model[3])):
        torch.manual_seed(5)
        found.append(NoiseTunnel(method).attribute(images.clone(), nt_samples=4, neuron_selector=(2, 1, 1)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def perturb(inputs):
    noise = 0.01 * torch.ones_like(inputs)
    return noise, inputs - noise


def test_infidelity(model, images) -> None:
    found = [
        infidelity(model, perturb, images, method.attribute(images.clone(), target=1), target=1)
        for method in (Deconvnet(model), Deconvolution(model))
    ]
    assert found[0].shape == (2,)
    torch.testing.assert_close(found[0], found[1])


def test_sensitivity_max(model, images) -> None:
    found = []
    for method in (Deconvnet(model), Deconvolution(model)):
        torch.manual_seed(5)
        found.append(sensitivity_max(method.attribute, images.clone(), target=1, n_perturb_samples=3))
    assert (found[0] > 0).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_visualize(model, images) -> None:
    pixels = Deconvnet(model).attribute(images, target=1)[0].permute(1, 2, 0).numpy()
    picture = images[0].permute(1, 2, 0).numpy()
    figure, _ = viz.visualize_image_attr(pixels, picture, sign="all", use_pyplot=False)
    assert figure.axes
    figure, _ = viz.visualize_image_attr_multiple(
        pixels, picture, ["original_image", "heat_map"], ["all", "absolute_value"], use_pyplot=False
    )
    assert len(figure.axes) >= 2


def test_interpolate(model, images) -> None:
    pixels = Deconvnet(model).attribute(images, target=1)
    assert LayerAttribution.interpolate(pixels, (32, 32)).shape == (2, 3, 32, 32)


def test_what_captum_asks_of_a_method(model) -> None:
    pairs = (
        (Deconvnet(model), Deconvolution(model)),
        (NeuronDeconvnet(model, model[3]), NeuronDeconvolution(model, model[3])),
    )
    for ours, theirs in pairs:
        assert ours.has_convergence_delta() == theirs.has_convergence_delta()
        assert ours.multiplies_by_inputs == theirs.multiplies_by_inputs
        assert ours.forward_func is model
