"""Planted faults are found, each by its own flag and nothing else; a clean net and a real one raise no false alarm."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import build
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor, nn
from trained_like import as_if_trained, pictures

from deconvviz.cli import main
from deconvviz.diagnostics import clip_filter_rms, diagnose
from deconvviz.diagnostics.result import FLAGS, Diagnosis
from deconvviz.diagnostics.spectrum import Spectrum
from deconvviz.errors import InvalidInput, UnknownLayer, UnsupportedModel
from deconvviz.images import load_picture, to_input
from deconvviz.plotting.filters import COLOURS


def wave(frequency: float, angle: float, size: int) -> Tensor:
    """A Gabor patch (size, size): a wave of ``frequency`` cycles a pixel under a bell."""
    axis = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    return torch.exp(-(x**2 + y**2) / (2 * (size / 4) ** 2)) * torch.sin(2 * math.pi * frequency * along + 0.5)


def clean(stride: int = 1, size: int = 7) -> nn.Sequential:
    """Waves of several colours, lengths and angles; then a random layer: nothing to complain of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, size, stride), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
    colours = torch.randn(12, 3, 1, 1)
    waves = [wave(0.12 + 0.06 * (i % 2), math.pi * i / 6, size) for i in range(12)]
    with torch.no_grad():
        model[0].weight.copy_(colours * torch.stack(waves)[:, None])
        model[0].bias.zero_()
    return model


def checkerboard(size: int) -> Tensor:
    axis = torch.arange(size)
    return (-1.0) ** (axis[:, None] + axis)


def flags(diagnosis: Diagnosis) -> dict[tuple[str, int], tuple[str, ...]]:
    return {(layer.layer, f.number): f.flags for layer in diagnosis.layers for f in layer.filters if f.flags}


@pytest.fixture
def images() -> Tensor:
    return pictures(20, 48, torch.float32)


@pytest.mark.parametrize("with_data", [False, True])
def test_a_clean_net_has_no_flag_and_no_advice(images, with_data) -> None:
    for stride in (1, 2):
        diagnosis = diagnose(clean(stride), images if with_data else None)
        assert flags(diagnosis) == {} and diagnosis.healthy
        assert diagnosis.images == (20 if with_data else 0)


@pytest.mark.parametrize("with_data", [False, True])
def test_planted_filters_are_flagged_exactly(images, with_data) -> None:
    model = clean()
    with torch.no_grad():
        model[0].weight[1] = 1e-4 * torch.randn(3, 7, 7)
        model[0].bias[1] = -0.1
        model[0].weight[3] = torch.tensor([1.0, 0.5, -0.8])[:, None, None]
        model[0].weight[5] = 0.7 * checkerboard(7)
        model[0].weight[8] = 3 * model[0].weight[2]
        model[2].weight[4] *= 0
        model[2].bias[4] = 0
    expected = {
        ("0", 1): ("dead",),
        ("0", 2): ("duplicate",),
        ("0", 3): ("grey",),
        ("0", 5): ("high-frequency",),
        ("0", 8): ("duplicate",),
        ("2", 4): ("dead",),
    }
    diagnosis = diagnose(model, images if with_data else None)
    assert flags(diagnosis) == expected
    first = diagnosis["0"]
    assert (first.filters[2].twin, first.filters[8].twin) == (8, 2)
    assert first.filters[2].cosine == pytest.approx(1)
    assert first.filters[3].grey == pytest.approx(1)
    assert any("1 of 12 filters (3): only an average" in advice for advice in first.advice)
    assert not diagnosis.healthy and "2 of 12 filters (2, 8): another does the same" in str(diagnosis)


def test_what_data_alone_can_show(images) -> None:
    model = clean()
    with torch.no_grad():
        model[0].bias[2], model[0].bias[7] = -1000, 1000
    assert flags(diagnose(model)) == {}
    diagnosis = diagnose(model, images)
    assert {k: v for k, v in flags(diagnosis).items() if k[0] == "0"} == {
        ("0", 2): ("dead",),
        ("0", 7): ("saturated",),
    }
    assert "silent on the 20 images given" in diagnosis["0"].advice[0]
    by_hand = (model[:2](images) > 0).float().mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor([f.fires for f in diagnosis["0"].filters]), by_hand)


def test_batch_norm_counts_and_a_linear_output_cannot_be_dead(images) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = as_if_trained(model, images)
    with torch.no_grad():
        model[1].bias[3] = -100
        model[4].bias[:] = -100
    diagnosis = diagnose(model, images)
    assert flags(diagnosis) == {("0", 3): ("dead",)}
    assert all(f.fires is None for f in diagnosis["3"].filters)


def test_a_bias_without_weights_is_dead_and_not_saturated(images) -> None:
    model = clean()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 1
    diagnosis = diagnose(model, images)
    assert diagnosis["0"].filters[2].flags == ("dead",) and diagnosis["0"].filters[2].fires == 1
    (advice,) = diagnosis["0"].advice
    assert "1 of 12 filters (2): no weights to speak of" in advice and "next layer's bias" in advice


@pytest.mark.parametrize("layer", [nn.Hardtanh(), nn.Threshold(0.5, 0)], ids=["clamped at -1", "cut at 0.5"])
def test_a_clamp_that_is_no_rectifier_says_nothing_of_where_a_filter_fires(images, layer) -> None:
    model = nn.Sequential(clean()[0], layer)
    assert all(filter.fires is None for filter in diagnose(model, images)["0"].filters)


def test_the_data_is_seen_in_eval_mode(images) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    expected = [f.fires for f in diagnose(model, images)["1"].filters]
    assert [f.fires for f in diagnose(model.train(), images)["1"].filters] == expected and model[2].training


def test_batches_of_a_loader_count_as_one_tensor(images) -> None:
    model = clean()
    loader = [(batch, torch.zeros(len(batch))) for batch in images.split(7)]
    assert [f.fires for f in diagnose(model, loader)["2"].filters] == [
        f.fires for f in diagnose(model, images)["2"].filters
    ]


def test_depthwise_twins_see_different_maps() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[2].weight[1] = model[2].weight[3]  # in different groups
        model[2].weight[5] = model[2].weight[4]
    assert flags(diagnose(model)) == {("2", 4): ("duplicate",), ("2", 5): ("duplicate",)}


def test_alexnets_first_layer_and_the_papers_remedy() -> None:
    """Extremes of frequency, little between, stride 4: what the paper saw; and what it did about it."""
    torch.manual_seed(0)
    coarse = nn.Sequential(nn.Conv2d(3, 12, 11, 4), nn.ReLU())
    with torch.no_grad():
        for i in range(12):
            frequency = 0.01 if i % 2 else 0.42
            coarse[0].weight[i] = wave(frequency, i, 11) * torch.randn(3, 1, 1)
    layer = diagnose(coarse)["0"]
    assert layer.folded > 0.5
    assert any("stride 4 after a 11x11 kernel folds" in a and "try 7x7, stride 2" in a for a in layer.advice)
    assert any("the middle, hold" in advice for advice in layer.advice)
    assert diagnose(clean(2))["0"].advice == ()


def test_energies_are_those_of_the_discrete_fourier_transform() -> None:
    weights = torch.randn(5, 3, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    energy = weights.square().sum((1, 2, 3))
    found = Spectrum((7, 5))
    bands = torch.stack([found.share(weights, *band) for band in ((0, 1 / 6), (1 / 6, 1 / 3), (1 / 3, 1))])
    torch.testing.assert_close(bands.sum(0), torch.ones(5).double())
    torch.testing.assert_close(found.carried(weights, (1, 1)), energy)
    power = torch.fft.fft2(weights, s=(1024, 1024)).abs().square().sum(1) / 1024**2
    axis = torch.fft.fftfreq(1024)
    size = (axis[:, None] ** 2 + axis**2).sqrt()
    low = (power * (size < 1 / 6)).sum((1, 2)) / energy
    torch.testing.assert_close(found.share(weights, 0, 1 / 6), low, atol=5e-3, rtol=0)
    kept = (axis.abs()[:, None] < 0.25) & (axis.abs() < 0.125)
    torch.testing.assert_close(
        found.carried(weights, (2, 4)) / energy, (power * kept).sum((1, 2)) / energy, atol=5e-3, rtol=0
    )


def test_a_kernel_of_one_pixel_folds_all_that_its_stride_cannot_carry() -> None:
    """It is white: a stride s carries 1/s² of the square of frequencies, and a stride of 1 all of any kernel."""
    white = nn.Conv2d(1, 1, 1, stride=2)
    assert diagnose(nn.Sequential(white))["0"].folded == pytest.approx(0.75)
    assert diagnose(nn.Sequential(nn.Conv2d(1, 1, 1, stride=4)))["0"].folded == pytest.approx(1 - 1 / 16)
    assert diagnose(nn.Sequential(nn.Conv2d(3, 8, 5)))["0"].folded == pytest.approx(0)


def test_a_layer_without_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))
    nn.init.zeros_(model[0].weight)
    layer = diagnose(model)["0"]
    assert layer.flagged("dead") == [0, 1, 2, 3] and layer.folded is None
    assert len(layer.figure().axes[0].images) == 4


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_any_torchvision_model_is_left_as_found(name) -> None:
    model = copy.deepcopy(build(name)).train()
    before = copy.deepcopy(model.state_dict())
    diagnosis = diagnose(model, pictures(2, 64, torch.float32))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [layer.layer for layer in diagnosis.layers] == convolutions
    assert any(f.fires is not None for layer in diagnosis.layers for f in layer.filters)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_the_figure_frames_flagged_filters() -> None:
    model = clean()
    with torch.no_grad():
        model[0].weight[3] = 1
        model[0].weight[6] = 0
    figure = diagnose(model).figure()
    (axes,) = figure.axes
    assert len(axes.images) == 12
    assert [text.get_text() for text in axes.texts] == ["3", "6"]
    assert [to_hex(patch.get_edgecolor()) for patch in axes.patches] == [to_hex(COLOURS[f]) for f in ("grey", "dead")]
    for patch, number in zip(axes.patches, (3, 6), strict=True):
        left, right, bottom, top = axes.images[number].get_extent()
        assert patch.get_bbox().extents.tolist() == pytest.approx([left, top, right, bottom])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dead: 1", "grey: 1"]
    assert tuple(COLOURS) == FLAGS
    figure.draw_without_rendering()
    assert diagnose(model).figure("2").get_suptitle() == "2: 16 kernels"


def test_clipping_scales_only_filters_beyond_the_limit() -> None:
    model = clean()
    before = model[0].weight.detach().clone()
    rms = before.square().mean((1, 2, 3)).sqrt()
    over = int((rms > 0.3).sum())
    assert 0 < over < 12
    others = sum(int((m.weight.square().mean((1, 2, 3)).sqrt() > 0.3).sum()) for m in (model[2],))
    assert clip_filter_rms(model, 0.3) == over + others
    after = model[0].weight
    torch.testing.assert_close(after.square().mean((1, 2, 3)).sqrt(), rms.clamp(max=0.3))
    torch.testing.assert_close(nn.functional.cosine_similarity(after.flatten(1), before.flatten(1)), torch.ones(12))
    assert torch.equal(after[rms <= 0.3], before[rms <= 0.3])
    assert after.requires_grad and clip_filter_rms(model, 0.3 * (1 + 1e-6)) == 0


def test_refusals(images) -> None:
    with pytest.raises(InvalidInput, match="no nn.Conv2d"):
        diagnose(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InvalidInput, match="data has no images"):
        diagnose(clean(), iter(()))
    with pytest.raises(InvalidInput, match="data is a int; expected images"):
        diagnose(clean(), 5)
    with pytest.raises(InvalidInput, match="inputs holds a str"):
        diagnose(clean(), ["cat.jpg"])
    with pytest.raises(UnknownLayer, match="no convolution 'fc' was diagnosed; expected one of '0', '2'"):
        diagnose(clean())["fc"]
    broken = clean()
    broken[2].weight.data[3, 0, 1, 1] = math.nan
    with pytest.raises(InvalidInput, match="layer '2' has NaN or infinite weights: its training diverged"):
        diagnose(broken)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    assert diagnose(normed).layers[0].layer == "0"
    with pytest.raises(InvalidInput, match="the filters of layer '0' are computed from other parameters"):
        clip_filter_rms(normed)
    with pytest.raises(UnsupportedModel):
        clip_filter_rms("resnet18")
    for limit in (0, -1, math.nan, "0.1"):
        with pytest.raises(InvalidInput, match="limit is"):
            clip_filter_rms(clean(), limit)


def test_real_squeezenet(squeezenet, data) -> None:
    paths = sorted((data / "imagenet_sample").iterdir())[::50]
    diagnosis = diagnose(squeezenet, [to_input(load_picture(path))[None] for path in paths])
    assert diagnosis.images == 20
    by_weights = diagnose(squeezenet)
    weightless = [i for i, w in enumerate(squeezenet.features[9].expand1x1.weight) if not w.any()]
    assert by_weights["features.9.expand1x1"].flagged("dead") == weightless and weightless
    assert not any(f.flags for f in by_weights["features.0"].filters) and by_weights["features.0"].folded < 0.5


def test_random_weights_of_resnet_are_no_fault() -> None:
    """Untrained kernels are white: they fold at any stride, and nothing else is said of them."""
    diagnosis = diagnose(torchvision.models.resnet18(weights=None))
    assert flags(diagnosis) == {}
    assert all("folds" in advice for layer in diagnosis.layers for advice in layer.advice)


def test_the_command_line(tmp_path, capsys) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "kernels.png"
    command = ["filters", str(tmp_path / "a.png"), "--model", "squeezenet1_1", "--size", "64"]
    assert main([*command, "--layer", "features.3.expand3x3", "--out", str(out)]) == 0
    printed, warned = capsys.readouterr()
    assert printed.startswith("layer ") and f"wrote {out}" in printed and "the weights are random" in warned
    assert len(np.unique(np.asarray(Image.open(out)))) > 50
    assert main([*command, "--layer", "fc", "--out", str(out)]) == 2
    assert "no convolution 'fc' was diagnosed" in capsys.readouterr().err
