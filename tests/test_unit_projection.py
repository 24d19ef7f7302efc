"""Cropped projections against full-size ones, at the centre, the edges and the corners."""

from __future__ import annotations

import pytest
import torch
from conftest import build
from torch import nn
from torch.nn import functional as F

from deconvviz import Deconvnet
from deconvviz.capture import watch
from deconvviz.geometry import receptive_field
from deconvviz.grid import unit_projection
from deconvviz.grid.unit_projection import Unit, crop_of, project_units
from deconvviz.layers import find_call

LAYERS = {
    "squeezenet1_0": ["features.2", "features.5", "features.10"],
    "vgg16": ["features.4", "features.15", "features.22"],
    "alexnet": ["features.4", "features.9"],
    "resnet18": ["layer1", "layer2", "layer3"],
    "googlenet": ["conv3", "inception3b", "inception4a"],
    "densenet121": ["features.denseblock1"],
    "convnext_tiny": ["features.1"],
    "mobilenet_v2": ["features.5"],
}


def images(n=3, size=(224, 192), seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def place(model, layer, x):
    tape, output = watch(model, (x[:1],), layer=(layer, 1))
    return receptive_field(tape, find_call(tape, layer, 1).outputs[0]), output


def firing_units(output, x):
    """The strongest map at the centre, each edge's middle and each corner of the layer."""
    height, width = output.shape[2:]
    places = [(y, x) for y in (0, height // 2, height - 1) for x in (0, width // 2, width - 1)]
    return [
        Unit(x[0], int(output[(0, slice(None), *p)].argmax()), p) for p in [*places, (1, 1), (height - 2, width // 3)]
    ]


def whole(field, unit, pixels):
    full = torch.zeros_like(unit.image)
    full[crop_of(field, unit.position)] = pixels
    return full


@pytest.mark.parametrize("name", LAYERS)
def test_the_crop_gives_the_full_size_projection(name):
    model, x = build(name), images(1)
    with Deconvnet(model) as deconv, torch.no_grad():
        model(x)
        for layer in LAYERS[name]:
            field, output = place(model, layer, x)
            units = firing_units(output, x)
            seen = 0
            for unit, pixels in zip(units, project_units(model, (layer, 1), field, units), strict=True):
                expected = deconv.project(layer, unit.fmap, position=unit.position)[0]
                largest = expected.abs().max()
                assert (whole(field, unit, pixels) - expected).abs().max() <= 1e-5 * largest
                seen += bool(largest > 0)
            assert seen >= len(units) - 2  # there is something to compare


@pytest.mark.parametrize("size", [(64, 64), (61, 50)])
def test_a_shortcut_of_every_second_pixel_is_cropped(size):
    """CIFAR's ResNets subsample the identity."""

    class Block(nn.Sequential):
        def forward(self, x):
            return F.relu(super().forward(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))

    torch.manual_seed(0)
    blocks = [Block(nn.Conv2d(n, n + 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(n + 4, n + 4, 3, padding=1)) for n in (4, 8)]
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *blocks).eval(), images(1, size)
    field, output = place(model, "2", x)
    assert str(field) == "21 x 21 pixels, jump 4"
    units = firing_units(output, x)
    with Deconvnet(model) as deconv:
        for unit, pixels in zip(units, project_units(model, ("2", 1), field, units), strict=True):
            expected = deconv.project("2", unit.fmap, inputs=x, position=unit.position)[0]
            assert (whole(field, unit, pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


DECODERS = {
    "nearest": lambda n: nn.Upsample(scale_factor=2),
    "bilinear": lambda n: nn.Upsample(scale_factor=2, mode="bilinear"),
    "transposed filter": lambda n: nn.ConvTranspose2d(n, n, 2, 2),
    "wide transposed filter": lambda n: nn.ConvTranspose2d(n, n, 4, 2, 1),
    "pixel shuffle": lambda n: nn.Sequential(nn.Conv2d(n, 4 * n, 1), nn.PixelShuffle(2)),
}


class UNet(nn.Module):
    def __init__(self, enlarge):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.up, self.last = enlarge(8), nn.Conv2d(14, 8, 3, padding=1)

    def forward(self, x):
        skip = F.relu(self.first(x))
        coarse = F.relu(self.down(F.max_pool2d(skip, 2)))
        return F.relu(self.last(torch.cat([skip, self.up(coarse)], 1)))


@pytest.mark.parametrize("size", [(64, 64), (62, 50)])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_units_are_cropped(name, size):
    model, x = UNet(DECODERS[name]).eval(), images(1, size)
    field, output = place(model, "last", x)
    assert all(axis.crop_size < 32 and axis.jump == 1 for axis in field.axes)
    units = firing_units(output, x)
    with Deconvnet(model) as deconv:
        for unit, pixels in zip(units, project_units(model, ("last", 1), field, units), strict=True):
            expected = deconv.project("last", unit.fmap, inputs=x, position=unit.position)[0]
            assert (whole(field, unit, pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_small_fields_are_really_cropped_and_large_ones_are_not():
    x, sizes = images(1, (224, 224)), {}
    for layer in ("features.2", "features.10", "features.12"):
        field, _ = place(build("squeezenet1_0"), layer, x)
        sizes[layer] = [axis.crop_size for axis in field.axes]
    assert sizes == {"features.2": [12, 12], "features.10": [112, 112], "features.12": [160, 160]}
    field, _ = place(build("alexnet"), "features.12", x)
    assert [axis.crop_size for axis in field.axes] == [224, 224] and field.covers_image


def test_where_the_field_is_the_image_it_is_projected_whole():
    model, x = build("mobilenet_v3_small"), images(1, (64, 64))
    field, output = place(model, "features.4", x)
    assert field.covers_image and field.reason
    unit = Unit(x[0], int(output[0, :, 2, 1].argmax()), (2, 1))
    (pixels,) = project_units(model, ("features.4", 1), field, [unit])
    with Deconvnet(model) as deconv:
        assert (pixels - deconv.project("features.4", unit.fmap, inputs=x, position=(2, 1))[0]).abs().max() < 1e-6


def test_the_budget_changes_nothing():
    model, x = build("resnet18"), images()
    field, output = place(model, "layer1", x)
    units = firing_units(output, x)
    small, large = (project_units(model, ("layer1", 1), field, units, budget=b) for b in (1, 2**30))
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(small, large, strict=True))


def test_units_of_one_large_crop_share_its_forward_pass(monkeypatch):
    model, x, sizes = build("alexnet"), images(2, (224, 224)), []
    field, output = place(model, "features.12", x)
    assert field.covers_image
    units = [Unit(x[i % 2], unit.fmap, unit.position) for i, unit in enumerate(firing_units(output, x))]
    real = unit_projection.watch
    monkeypatch.setattr(unit_projection, "watch", lambda m, t, *rest: sizes.append(len(t[0])) or real(m, t, *rest))
    found = project_units(model, ("features.12", 1), field, units, budget=2**30)
    assert sizes == [1, 1]

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(unit_projection._Run, "of_one_image", full)  # then one by one
    again = project_units(model, ("features.12", 1), field, units)
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(again, found, strict=True))
    with Deconvnet(model) as deconv:
        for unit, pixels in zip(units, found, strict=True):
            expected = deconv.project("features.12", unit.fmap, inputs=unit.image[None], position=unit.position)[0]
            assert (pixels - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_out_of_memory_halves_the_batch(monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images()
    field, output = place(model, "1", x)
    units = firing_units(output, x)
    expected, sizes, real = project_units(model, ("1", 1), field, units), [], unit_projection._Run.of_crops

    def scarce(run, units):
        sizes.append(len(units))
        if len(units) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(run, units)

    monkeypatch.setattr(unit_projection._Run, "of_crops", scarce)
    found = project_units(model, ("1", 1), field, units, budget=10**7)
    assert max(sizes) > 3 and all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))

    def hopeless(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(unit_projection._Run, "of_crops", hopeless)
    with pytest.raises(torch.OutOfMemoryError):
        project_units(model, ("1", 1), field, units)
