"""Mining a data set: against brute force, from every kind of data, interrupted, shared and merged."""

from __future__ import annotations

import os
import random
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import build
from PIL import Image
from test_strongest import brute_force, same_bits, units
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from deconvviz import Deconvnet, FilterGrid
from deconvviz.errors import (
    AmbiguousLayer,
    CheckpointError,
    FeatureMapOutOfRange,
    InvalidInput,
    LayerNotRun,
    NoForwardPass,
    UnknownLayer,
    UnsupportedModel,
)
from deconvviz.mining import passes
from deconvviz.mining.archive import structure
from deconvviz.mining.data import PROBES, Images
from deconvviz.mining.found import Found, require_same


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 5, 3), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    ).eval()


def images(n=30, size=20, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fit(data, layers=("1", "4"), model=None, k=9, **options):
    return FilterGrid(model or net(), layers, k).fit(data, progress=False, **options)


def same(a, b):
    return all(same_bits(x, y) for x, y in zip(a.found.layers, b.found.layers, strict=True))


class Sized(nn.Module):
    """Treats images of one size otherwise than others, as decoders that ask for multiples of 32 do."""

    def __init__(self, otherwise):
        super().__init__()
        self.body, self.otherwise = net(), otherwise

    def forward(self, x):
        return self.body(x if x.shape[2:] == (20, 20) else self.otherwise(x))


def _refuse(x):
    raise RuntimeError(f"wrong input shape {tuple(x.shape)}")


@pytest.mark.parametrize("otherwise", [_refuse, lambda x: 2 * x, lambda x: x[:, :, 1:]])
def test_a_model_that_does_otherwise_with_a_crops_size_is_given_whole_images(otherwise):
    model, x = Sized(otherwise), images(4)
    grid, plain = fit(x, ["body.1", "body.4"], model, k=2), fit(x, k=2)
    for layer, same_layer in zip(grid, plain, strict=True):
        assert str(layer.place.field) == str(same_layer.place.field)
        for found, expected in zip(layer.maps(), same_layer.maps(), strict=True):
            for a, b in zip(found.projections, expected.projections, strict=True):
                assert torch.allclose(a, b, atol=1e-6)


# ── against brute force ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_as_a_plain_sort_of_all_activations(batch_size):
    x = images()
    layers = ["0", "1", "4", "6", "9"]  # 0 is overwritten in place by 1; 9 has no positions
    grid = fit(x, layers, batch_size=batch_size)
    model = net()
    for layer, state in zip(layers, grid.found.layers, strict=True):
        activation = torch.cat([_upto(model, int(layer), part) for part in x.split(batch_size)])
        assert units(state) == brute_force(activation, range(30), 9)
        fires = activation.reshape(30, len(state.values), -1).amax(2) > 0
        assert state.active.tolist() == fires.sum(0).tolist()


@torch.no_grad()
def _upto(model, depth, x):
    for layer in model[: depth + 1]:
        x = layer(x.clone())
    return x


def test_nan_images_ties_and_dead_maps():
    model = net()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    x = images()
    x[7, 0, 3, 3] = torch.nan
    x[20] = x[4]
    grid = fit(x, ["1"], model)
    assert grid.left_out == {7: "NaN or infinite activations"}
    assert 7 not in [image for fmap in grid["1"] for image in fmap.images]
    dead = grid["1"][2]
    assert dead.dead and dead.active == 0 and not any(p.any() for p in dead.projections)
    assert grid["1"].dead == [2]
    for fmap in grid["1"]:
        if 20 in fmap.images:  # the same picture: the lower number first
            assert fmap.images.index(20) == fmap.images.index(4) + 1


def test_k_larger_than_the_data_and_one_image():
    for n in (1, 4):
        found = fit(images(n))["4"][0]
        assert len(found.values) == len(found.patches) == n
        assert sorted(found.images) == list(range(n))


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_feature_map_is_what_the_deconvnet_says_of_each_image():
    x, model = images(), net()
    grid = fit(x, ["4"])
    with Deconvnet(model) as deconv:
        for found in grid["4"].maps([0, 5, 3]):
            for i, number in enumerate(found.images):
                (y0, y1), (x0, x1) = found.boxes[i]
                full = deconv.project("4", found.fmap, inputs=x[number : number + 1])[0]
                position = deconv.strongest_position("4", found.fmap, inputs=x[number : number + 1])[0]
                assert found.positions[i] == position
                assert torch.equal(found.patches[i], x[number, :, y0:y1, x0:x1])
                assert (found.projections[i] - full[:, y0:y1, x0:x1]).abs().max() <= 1e-5 * full.abs().max()
                full[:, y0:y1, x0:x1] = 0
                assert not full.any()
            activation = _upto(model, 4, x)[:, found.fmap]
            assert found.mean == pytest.approx(float(activation.mean()), rel=1e-5)
            assert found.active == float((activation.amax((1, 2)) > 0).float().mean())
            assert sum(found.histogram) == 30
            assert found.names[0] == f"image {found.images[0]}"


def test_a_layer_without_positions_is_projected_whole():
    x, model = images(), net()
    found = fit(x, ["9"])["9"][1]
    assert found.boxes[0] == ((0, 20), (0, 20)) and found.positions[0] == ()
    with Deconvnet(model) as deconv:
        full = deconv.project("9", 1, inputs=x[found.images[0]][None])[0]
    assert (found.projections[0] - full).abs().max() <= 1e-5 * full.abs().max() and full.any()


def test_the_picture_is_figure_2s_layout():
    found = fit(images(), ["4"])["4"][0]
    picture = found.image(cell=30)
    assert picture.shape == (90, 90 + 2 + 90, 3) and picture.dtype == np.uint8


def test_figures_of_chosen_random_and_all_maps():
    model = net()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    layer = fit(images(), ["1"], model)["1"]
    titles = lambda figure: [axes.get_title() for axes in figure.axes if axes.images]  # noqa: E731
    assert [title.split(":")[0] for title in titles(layer.figure())] == [f"map {i}" for i in range(6)]
    assert titles(layer.figure([2])) == ["map 2: dead"]
    drawn = {tuple(titles(layer.figure(random=2, seed=seed))) for seed in range(8)}
    assert len(drawn) > 1 and all(len(two) == 2 and "map 2: dead" not in two for two in drawn)
    assert titles(layer.figure(random=2, seed=1)) == titles(layer.figure(random=2, seed=1))


def test_grey_images_are_shown(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    x = images()[:, :1]
    grid = fit(x, ["1"], model, k=4)
    grid["1"].figure(mean=[0.1], std=[0.3]).draw_without_rendering()
    found = grid["1"][0]
    patches = found.image(cell=30)[:, 62:]
    darkest, brightest = patches.min(), patches.max()
    assert (darkest, brightest) == (0, 255) and (patches[..., 0] == patches[..., 2]).all()
    assert grid.explore(tmp_path, control=False).exists()


def test_filters_are_drawn_at_one_scale_or_each_at_its_own():
    model = net()
    with torch.no_grad():
        model[0].weight[1] *= 0.01
    common, own = (FilterGrid.filters(model, "0", common_scale, cell=30) for common_scale in (True, False))
    assert common.shape == own.shape == (2 * 32 - 2, 3 * 32 - 2, 3)
    second = np.s_[:30, 32:62]
    assert np.abs(common[second].astype(int) - 128).max() < 10 < np.abs(own[second].astype(int) - 128).max()
    with pytest.raises(InvalidInput, match="Conv2d"):
        FilterGrid.filters(model, "1")


def test_attribute_is_captum_shaped():
    x, model = images(12), net()
    grid = FilterGrid(model, model[4], k=3)
    pixels = grid.attribute(x, [6, 1])
    assert pixels.shape == (2, 3, 3, 20, 20)
    best = _upto(model, 4, x).amax((2, 3))
    with Deconvnet(model) as deconv:
        for f, fmap in enumerate([6, 1]):
            for rank, number in enumerate(best[:, fmap].argsort(descending=True, stable=True)[:3]):
                full = deconv.project("4", fmap, inputs=x[number : number + 1])[0]
                assert (pixels[f, rank] - full).abs().max() <= 1e-5 * full.abs().max()
    assert FilterGrid(model, ["1", "4"]).attribute(x)[1].shape == (8, 9, 3, 20, 20)
    with pytest.raises(NoForwardPass):
        grid["4"]  # attribute leaves nothing behind
    with pytest.raises(InvalidInput):
        grid.attribute(torch.full((2, 3, 20, 20), torch.nan))


def test_the_model_is_left_as_it_was_found():
    model = net().train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    state, draw = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    grid = fit(DataLoader(TensorDataset(images()), 8, shuffle=True), model=model)
    next(grid["4"].maps())
    with pytest.raises(InvalidInput):
        fit(images()[:, :2], model=model)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(draw, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_fit_that_fails_leaves_what_was_found():
    grid = fit(images())
    before = grid["4"]
    with pytest.raises(InvalidInput, match="shape"):
        grid.fit([*images(2, 24), images(1, 22)[0]], progress=False)
    assert grid["4"].place is before.place and grid["4"].strongest is before.strongest
    assert torch.equal(grid["4"][2].patches[0], before[2].patches[0])


def test_calls_of_one_layer():
    """A layer that runs twice, and one that is asked for by its name and its call."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 2, 3), relu)
    grid = fit(images(), ["0", "1#1", "0#1", "1#2"], model)
    assert grid.layers == ["0", "1#1", "1#2"]
    assert len(grid["1#1"]) == 4 and len(grid["1#2"]) == 2 and len(grid["0#1"]) == 4
    for layer in ("1", relu):
        with pytest.raises(AmbiguousLayer, match="several calls of layer '1': choose one of '1#1', '1#2'"):
            grid[layer]


def test_a_unit_that_sees_padding_alone_is_drawn_grey(tmp_path):
    """A filter of one cell with padding, whose bias wins where there is no pixel."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, padding=1), nn.ReLU()).eval()
    nn.init.constant_(model[0].weight, -1.0)
    nn.init.ones_(model[0].bias)
    grid = fit(images(12, 6).abs() + 1, "1", model)
    found = grid["1"][0]
    with pytest.raises(InvalidInput, match="cell is 33.5; expected a whole number"):
        found.image(cell=33.5)
    assert found.patches[0].numel() == 0 and (found.image(cell=12) == 128).mean() > 0.9
    grid["1"].figure([0])
    assert grid.explore(tmp_path, progress=False).exists()


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UnknownLayer):
        FilterGrid(net(), "nix")
    for layers in ([], None, 5):
        with pytest.raises(InvalidInput, match=f"layers is {re.escape(str(layers))}; expected dotted names"):
            FilterGrid(net(), layers)
    with pytest.raises(UnsupportedModel, match="model is a str"):
        FilterGrid.filters("resnet18", "0")
    for argument, wrong in {"share": 2, "autocast": "bfloat16"}.items():
        with pytest.raises(InvalidInput, match=f"{argument} is {wrong!r}; expected"):
            fit(images(), **{argument: wrong})
    with pytest.raises(InvalidInput, match="k is 0"):
        FilterGrid(net(), "1", 0)
    with pytest.raises(InvalidInput, match="others holds a int; expected grids"):
        FilterGrid(net(), "1").merge(3)
    for argument, wrong in {"batch_size": 0, "workers": -1, "limit": -3}.items():
        with pytest.raises(InvalidInput, match=f"{argument} is {wrong}; expected a whole number"):
            fit(images(), **{argument: wrong})
    with pytest.raises(NoForwardPass, match="fit"):
        FilterGrid(net(), "1")["1"]
    with pytest.raises(NoForwardPass, match="fit"):
        list(FilterGrid(net(), "1"))
    with pytest.raises(NoForwardPass, match="fit"):
        FilterGrid(net(), "1").explore(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UnknownLayer, match="'1', '4'"):
        fit(images())["0"]
    with pytest.raises(FeatureMapOutOfRange, match="0 to 7"):
        fit(images())["4"][8]
    layer = fit(images())["4"]
    for wrong in (
        lambda: layer.figure(3),
        lambda: layer[1:3],
        lambda: layer.figure([0.5]),
        lambda: layer.figure("a"),
    ):
        with pytest.raises(InvalidInput, match=r"fmaps is .*; expected numbers of maps: layer\[3\] is one"):
            wrong()
    assert layer.chosen(np.array([1, -1])) == [1, 7]
    with pytest.raises(InvalidInput, match="random is -1; expected a whole number, 1 or more"):
        layer.figure(random=-1)
    with pytest.raises(InvalidInput, match=r"share \(15, 20\) has none, give fewer shares"):
        fit(images(12), share=(15, 20))
    relu = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 5, 3), relu)
    with pytest.raises(AmbiguousLayer):
        fit(images(), "1", twice)
    assert len(fit(images(), "1#2", twice)["1#2"]) == 5
    spare = net()
    spare.add_module("never", nn.ReLU())
    spare.forward = lambda x: spare[0](x)
    with pytest.raises(LayerNotRun):
        fit(images(), "never", spare)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two classes; one is broken, one is no picture at all."""
    for i in range(12):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    broken = tmp_path / "pictures" / "a" / "04.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (tmp_path / "pictures" / "a" / "notes.txt").write_text("hello")
    return tmp_path / "pictures"


class Mapped(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], 0


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return ((x, 0) for x in self.x)


SOURCES = {
    "map-style": Mapped,
    "iterable-style": Stream,
    "tensor data set": TensorDataset,
    "list": list,
    "dicts": lambda x: [{"label": 3, "weight": torch.tensor(0.5), "pixel_values": image} for image in x],
    "loader": lambda x: DataLoader(Mapped(x), batch_size=5),
    "shuffling loader": lambda x: DataLoader(Mapped(x), batch_size=5, shuffle=True),
    "loader with workers": lambda x: DataLoader(Mapped(x), batch_size=5, num_workers=2),
    "loader of a stream": lambda x: DataLoader(Stream(x), batch_size=5),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_data_gives_the_same_bits_as_a_tensor(source):
    x = images()
    grid, expected = fit(SOURCES[source](x), batch_size=5), fit(x, batch_size=5)
    assert same(grid, expected)
    ours, theirs = grid["4"][3], expected["4"][3]
    assert all(torch.equal(a, b) for a, b in zip(ours.patches, theirs.patches, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_data_of_a_wrong_kind_is_refused_before_all_of_it_is_read(stream):
    """But not for some images that can't be read, whatever the reason."""
    asked = []

    class Numbers(Mapped):
        def __getitem__(self, i):
            asked.append(i)
            return self.x[i]

    items = list(range(250))
    data = Numbers(items)
    with pytest.raises(
        InvalidInput, match="100 images up to number 99 .* all for one reason: InvalidInput: the item is a int"
    ):
        fit(Stream(items) if stream else data)
    assert stream or max(asked) == 99
    few = [None] * 99 + [*images()[:3]]
    assert fit(Stream(few) if stream else few).found.layers[0].seen == 3


def test_a_loaders_choice_of_items_is_kept():
    x = images()
    chosen = [3, 25, 4, 11, 12]
    sampler = SubsetRandomSampler(chosen)
    of_batches = BatchSampler(sampler, 2, drop_last=False)
    for options in ({"batch_size": 2, "sampler": sampler}, {"batch_size": None, "sampler": sampler},
                    {"batch_sampler": of_batches}, {"batch_sampler": [[3, 25], [4, 11, 12]]}):  # fmt: skip
        grid = fit(DataLoader(Mapped(x), **options))
        assert {n for fmap in grid["4"] for n in fmap.images} == set(chosen)
        assert grid.found.layers[0].seen == 5


def test_a_transform_that_would_not_be_used_is_refused(folder):
    for data in (images(), ImageFolder(folder, ToTensor())):
        with pytest.raises(InvalidInput, match="a transform is given, but the item is a torch.float32"):
            fit(data, transform=lambda picture: 1 - ToTensor()(picture))


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_skip_and_list_broken_pictures(folder, workers):
    grid = fit(folder, transform=ToTensor(), workers=workers, batch_size=4)
    assert list(grid.left_out) == [2] and "cannot be decoded" in grid.left_out[2]
    assert grid.found.layers[0].seen == 11
    found = grid["4"][0]
    assert all(name.endswith(".png") and name[:2] in ("a/", "b/") for name in found.names)
    as_images = fit(ImageFolder(folder, ToTensor()), batch_size=4)
    assert list(as_images.left_out) == [2]
    assert same(as_images, grid)
    assert as_images["4"][0].names == found.names


def test_a_data_sets_files_are_listed_once():
    class Folder(Mapped):
        asked = 0

        @property
        def samples(self):
            self.asked += 1
            return [(f"pictures/{i}.png", 0) for i in range(len(self))]

    data = Folder(images())
    grid = fit(data)
    assert grid["4"][0].names[0] == f"pictures/{grid['4'][0].images[0]}.png"
    assert data.asked == 1


def test_data_that_is_not_usable(folder):
    with pytest.raises(InvalidInput, match="not a folder"):
        fit(str(folder / "a" / "00.png"))
    for batch_size in (1, 2):
        with pytest.raises(InvalidInput, match=r"image 1 has shape \(3, 22, 20\); expected \(3, 20, 20\)"):
            fit([torch.randn(3, 20, 20), torch.randn(3, 22, 20)], batch_size=batch_size)
    with pytest.raises(InvalidInput, match="torch.uint8"):
        fit((images() * 9).to(torch.uint8))
    with pytest.raises(InvalidInput, match=r"dict {'a': torch.float32, 'b': torch.float32, 'c': int}, with 2 images"):
        fit([{"a": x, "b": x, "c": 1} for x in images()])
    with pytest.raises(InvalidInput, match="only once"):
        fit(x for x in images())
    with pytest.raises(InvalidInput, match="expected a folder"):
        fit(7)
    with pytest.raises(InvalidInput, match="empty"):
        fit([])
    with pytest.raises(InvalidInput, match="NaN"):
        fit(images() * torch.nan)
    (folder / "none").mkdir()
    with pytest.raises(InvalidInput, match="holds no picture"):
        fit(folder / "none")


def test_a_limit():
    assert fit(images(), limit=7).found.layers[0].seen == 7
    assert fit(Stream(images()), limit=7).found.layers[0].seen == 7


def test_the_batch_is_halved_when_memory_runs_out(monkeypatch):
    x, real, sizes = images(), passes.Miner.use, []

    def scarce(self, i, output):
        sizes.append(len(output))
        if len(output) > 4 and i == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, i, output)

    monkeypatch.setattr(passes.Miner, "use", scarce)
    grid = fit(x, batch_size=16)
    assert max(sizes) == 16
    monkeypatch.undo()
    for a, b in zip(grid.found.layers, fit(x).found.layers, strict=True):
        assert torch.equal(a.images, b.images) and a.seen == b.seen == 30


def test_autocast_and_channels_last():
    x, expected = images(), fit(images())
    layout = fit(x, channels_last=True)
    assert torch.allclose(layout.found.layers[1].values, expected.found.layers[1].values, atol=1e-5)
    half = fit(x, autocast=torch.bfloat16)
    assert torch.allclose(half.found.layers[1].values, expected.found.layers[1].values, atol=0.05)
    assert len(half["4"][0].projections) == 9


def test_batch_size_changes_values_by_rounding_only():
    x = images(40, 32)
    one, many = (fit(x, ["features.3"], build("squeezenet1_0"), batch_size=b) for b in (3, 40))
    (a,), (b,) = one.found.layers, many.found.layers
    assert torch.allclose(a.values, b.values, rtol=1e-5, atol=1e-6)
    moved = a.images != b.images
    assert (a.values - b.values)[moved].abs().max() <= 1e-6 if moved.any() else True


# ── saved, resumed, merged ───────────────────────────────────────────────────────────────────────────────────


class Dying(Mapped):
    """Raises what no pass survives, once, at an item."""

    def __init__(self, x, at):
        super().__init__(x)
        self.at = at

    def __getitem__(self, i):
        if i == self.at:
            self.at = -1
            raise KeyboardInterrupt
        return super().__getitem__(i)


@pytest.mark.parametrize("at", [1, 13, 28])
def test_an_interrupted_pass_goes_on_to_the_same_bits(tmp_path, at):
    data, path = Dying(images(), at), tmp_path / "grid.npz"
    options = {"checkpoint": path, "every": 1e9, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        fit(data, **options)
    assert Found.load(path).shares == ((0, 1, at // 4 * 4),)  # saved when it was broken off
    seen = []
    data.__class__ = type(
        "Counting", (Dying,), {"__getitem__": lambda self, i: (seen.append(i), Dying.__getitem__(self, i))[1]}
    )
    data.__class__.__name__ = "Dying"
    grid = fit(data, **options)
    assert same(grid, fit(images(), batch_size=4))
    assert 0 in seen and (at < 4 or 1 not in seen)  # 0 tells the shape; the rest is not done again
    again = fit(data, **options)
    assert same(again, grid)


REFUSED = {
    "model": lambda path: fit(images(), model=net(1), checkpoint=path),
    "layers": lambda path: fit(images(), ["1"], checkpoint=path),
    "k": lambda path: fit(images(), k=4, checkpoint=path),
    "data": lambda path: fit(images(seed=1), checkpoint=path),
    "precision": lambda path: fit(images(), autocast=torch.bfloat16, checkpoint=path),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_of_something_else_is_refused_with_the_reason(tmp_path, what):
    path = tmp_path / "grid.npz"
    fit(images(), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=what):
        REFUSED[what](path)
    assert path.read_bytes() == before


def other_layers(**settings):
    model = net()
    model[4] = nn.LeakyReLU() if not settings else model[4]
    for name, value in settings.items():
        model[3] = nn.Conv2d(6, 8, 3, **{name: value})
    model.load_state_dict(net().state_dict())
    return model.eval()


@pytest.mark.parametrize("model", [other_layers(), other_layers(padding_mode="reflect")])
def test_the_same_weights_in_other_layers_are_another_model(tmp_path, model):
    path = tmp_path / "grid.npz"
    fit(images(), checkpoint=path)
    with pytest.raises(CheckpointError, match="is of another model"):
        fit(images(), model=model, checkpoint=path)
    with pytest.raises(CheckpointError, match="is of another model"):
        FilterGrid.load(path, model)


def test_a_dropout_rate_that_changes_in_training_is_no_other_model():
    assert structure(nn.Sequential(nn.Dropout(0.1))) == structure(nn.Sequential(nn.Dropout(0.5)))
    assert structure(nn.Sequential(nn.ReLU())) != structure(nn.Sequential(nn.ReLU6()))


def test_a_data_set_of_the_same_kind_and_size_with_other_images_is_refused(tmp_path):
    path, a = tmp_path / "grid.npz", images()
    fit(TensorDataset(a), checkpoint=path)
    last = a.clone()
    last[-1] += 1
    for other in (TensorDataset(images(seed=1)), TensorDataset(last)):
        with pytest.raises(CheckpointError, match="is of another data: images .*random crops"):
            fit(other, checkpoint=path)
        with pytest.raises(CheckpointError, match="is of another data: images"):
            FilterGrid.load(path, net(), other)


def test_another_function_as_transform_is_refused(folder, tmp_path):
    path = tmp_path / "grid.npz"
    fit(folder, transform=lambda picture: ToTensor()(picture), checkpoint=path)
    with pytest.raises(CheckpointError, match="is of another data: images"):
        fit(folder, transform=lambda picture: 1 - ToTensor()(picture), checkpoint=path)


def test_a_file_with_other_content_of_the_same_size_is_refused(folder, tmp_path):
    path = tmp_path / "grid.npz"
    fit(folder, transform=ToTensor(), checkpoint=path)
    file = folder / "b" / "05.png"  # none of the images that are looked at
    content, times = bytearray(file.read_bytes()), file.stat()
    content[200] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CheckpointError, match="is of another data: items"):
        fit(folder, transform=ToTensor(), checkpoint=path)


def test_telling_data_sets_apart_reads_few_images_and_is_the_same_in_a_copy(folder, tmp_path):
    class Counting(Mapped):
        asked = 0

        def __getitem__(self, i):
            self.asked += 1
            torch.rand(1)  # without effect
            return super().__getitem__(i)

    data = Counting(images(500))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Images(data).describe()
    assert torch.equal(torch.rand(3), expected)
    assert data.asked <= 2 + PROBES
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    assert Images(folder, ToTensor()).describe() == Images(copied, ToTensor()).describe()


class Augmented(Mapped):
    """Noise is added anew each time an image of number ``after`` or more is asked for."""

    def __init__(self, x, after=0):
        super().__init__(x)
        self.after = after

    def __getitem__(self, i):
        return (self.x[i] + torch.randn(self.x[i].shape) if i >= self.after else self.x[i]), 0


def test_data_that_is_augmented_at_random_is_refused_at_once():
    with pytest.raises(InvalidInput, match="without random crops"):
        fit(Augmented(images()))


def test_an_image_that_is_not_the_one_that_was_mined_is_refused():
    grid = fit(Augmented(images(), after=5))
    with pytest.raises(InvalidInput, match="image [0-9]+ is not the image that was mined.*leave out random crops"):
        grid["4"][2]


def test_a_checksum_is_kept_of_the_images_that_have_a_unit_only(tmp_path):
    x = images(300, 12)
    parts = [fit(x, ["1"], k=1, share=(i, 2), batch_size=4) for i in (0, 1)]
    grid = parts[0].merge(parts[1])
    used = {n for fmap in grid["1"] for n in fmap.images}
    assert set(grid.found.checksums) == used and all(len(part.found.checksums) <= 12 for part in parts)
    grid.save(tmp_path / "grid.npz")
    assert FilterGrid.load(tmp_path / "grid.npz", net(), x).found.checksums == grid.found.checksums
    x[max(used)] = x[max(used)].flip(-1)
    with pytest.raises(InvalidInput, match=f"image {max(used)} is not the image that was mined"):
        list(grid["1"].maps())


def test_the_message_says_what_differs():
    first, second = {"a": {"b": "x" * 100 + "here", "c": 1}}, {"a": {"b": "x" * 100 + "there", "c": 1}}
    with pytest.raises(CheckpointError, match=r"another a: b \.{3}x{20}here; expected \.{3}x{20}there\."):
        require_same(first, second, "it")


def test_a_checkpoint_of_another_share_is_refused(tmp_path):
    path = tmp_path / "grid.npz"
    fit(images(), checkpoint=path, share=(0, 2))
    (tmp_path / "grid.0of2.npz").rename(path)
    with pytest.raises(CheckpointError, match=r"other shares \(\(0, 2, 15\),\); expected \(0, 1\)"):
        fit(images(), checkpoint=path)


def test_folders_are_told_apart_by_their_files(folder, tmp_path):
    path = tmp_path / "grid.npz"
    fit(folder, transform=ToTensor(), checkpoint=path)
    (folder / "a" / "02.png").rename(folder / "a" / "03.png")
    with pytest.raises(CheckpointError, match="data"):
        fit(folder, transform=ToTensor(), checkpoint=path)


def test_save_and_load(tmp_path):
    x, path = images(), tmp_path / "grid.npz"
    grid = fit(x)
    grid.save(path)
    loaded = FilterGrid.load(path, net(), x)
    assert same(loaded, grid) and loaded.layers == ["1", "4"]
    assert torch.equal(loaded["4"][2].projections[0], grid["4"][2].projections[0])
    with pytest.raises(NoForwardPass, match="without its data"):
        FilterGrid.load(path, net())["4"][2]
    with pytest.raises(CheckpointError, match="model"):
        FilterGrid.load(path, net(3))
    with pytest.raises(CheckpointError, match="data"):
        FilterGrid.load(path, net(), images(seed=4))


def full(*arguments):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_found_before_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full)
    data = Dying(images(), 1)
    with pytest.raises(CheckpointError, match="No space"):
        fit(data, checkpoint=tmp_path / "grid.npz")
    assert data.at == 1 and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_warns_during_the_pass_and_leaves_what_was_found_at_its_end(tmp_path, monkeypatch):
    class Filling(Mapped):
        def __getitem__(self, i):
            if i == 1:
                monkeypatch.setattr("os.fsync", full)
            return super().__getitem__(i)

    grid = FilterGrid(net(), ["1", "4"])
    options = {"checkpoint": tmp_path / "grid.npz", "every": 0, "batch_size": 10, "progress": False}
    with warnings.catch_warnings(record=True) as caught, pytest.raises(CheckpointError, match="No space"):
        warnings.simplefilter("always")
        grid.fit(Filling(images()), **options)
    assert sum("no checkpoint this time" in str(w.message) for w in caught) == 3
    assert same(grid, fit(images(), batch_size=10)) and len(grid["4"][0].projections) == 9
    monkeypatch.undo()
    grid.save(tmp_path / "elsewhere.npz")


@pytest.mark.parametrize("n", [2, 3, 7])
def test_shares_merge_to_the_same_bits_in_any_order_and_grouping(n):
    x = images()
    x[5] = torch.nan
    parts = [fit(x, share=(i, n), batch_size=4) for i in range(n)]
    whole, inorder = fit(x, batch_size=4), parts[0].merge(*parts[1:])
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(parts)
        middle = rng.randint(1, n - 1)
        assert same(parts[0].merge(*parts[1:]), inorder)
        assert same(parts[0].merge(*parts[1:middle]).merge(parts[middle].merge(*parts[middle + 1 :])), inorder)
    assert inorder.left_out == whole.left_out == {5: "NaN or infinite activations"}
    for a, b in zip(inorder.found.layers, whole.found.layers, strict=True):
        assert torch.allclose(a.values, b.values, rtol=1e-6) and torch.equal(a.active, b.active)
    with pytest.raises(CheckpointError, match="share images"):
        inorder.merge(parts[0])
    with pytest.raises(CheckpointError, match="model"):
        parts[0].merge(fit(x, model=net(2), share=(1, n)))


def test_shares_that_interleave_are_told_from_those_that_meet():
    x = images()
    fit(x, share=(0, 2)).merge(fit(x, share=(1, 4)), fit(x, share=(3, 4)))
    with pytest.raises(CheckpointError, match="share images"):
        fit(x, share=(0, 2)).merge(fit(x, share=(0, 3)))
    with pytest.raises(InvalidInput, match="share"):
        fit(x, share=(2, 2))
