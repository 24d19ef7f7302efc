"""Features through training: against plain loops and hand-made cases; resumed, refused, and without a trace."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from deconvviz import Deconvnet, evolution
from deconvviz.errors import (
    CheckpointError,
    FeatureMapOutOfRange,
    InvalidInput,
    NoForwardPass,
    UnknownLayer,
    WeightsError,
)
from deconvviz.evolution import FeatureEvolution
from deconvviz.evolution.result import Evolution, Look
from deconvviz.grid.feature_map import FeatureMap
from deconvviz.plotting import save_figure
from deconvviz.plotting.evolution import Strip, evolution_strips

LAYERS, FMAPS = ["1", "5", "10"], {"1": [4, 0], "5": [1, 6, 2], "10": [3]}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 5, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    )


def images(n=24, size=20, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Training:
    """A training that can be left and taken up again: dropout-free, but its batches are random."""

    def __init__(self):
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.2, momentum=0.9)
        self.epoch = 0
        torch.manual_seed(1)

    def run(self, until, after_epoch=lambda model, epoch: None):
        labels = torch.arange(24) % 4
        while self.epoch < until:
            self.model.train()
            for batch in torch.randperm(24).split(8):
                loss = nn.functional.cross_entropy(self.model(images()[batch]), labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.epoch += 1
            after_epoch(self.model, self.epoch)
        return self

    def saved(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict())), torch.get_rng_state()

    @classmethod
    def resumed(cls, saved, epoch):
        training = cls()
        (weights, momentum), draw = saved
        training.model.load_state_dict(weights)
        training.optimizer.load_state_dict(momentum)
        training.epoch = epoch
        torch.set_rng_state(draw)
        return training


def watch(file=None, epochs=(1, 2, 4, 5), **options):
    return FeatureEvolution(LAYERS, FMAPS, images(), epochs, file=file, **options)


def same(a, b):
    """All of two results, to the bit."""
    assert (a.about, a.epochs) == (b.about, b.epochs)
    for one, other in zip(a.looks, b.looks, strict=True):
        assert one.weights == other.weights and list(one.maps) == list(other.maps)
        for layer in one.maps:
            for x, y in zip(one.maps[layer], other.maps[layer], strict=True):
                pictures = [(*f.patches, *f.projections) for f in (x, y)]
                assert all(p.numpy().tobytes() == q.numpy().tobytes() for p, q in zip(*pictures, strict=True))
                facts = [{k: v for k, v in vars(f).items() if k not in ("patches", "projections")} for f in (x, y)]
                assert repr(facts[0]) == repr(facts[1])
    return True


# ── against a plain loop ─────────────────────────────────────────────────────────────────────────────────────


def test_each_look_is_a_plain_search_and_a_deconvnet():
    states, seen = {}, watch()

    def after_epoch(model, epoch):
        seen(model, epoch)
        states[epoch] = copy.deepcopy(model.state_dict())

    Training().run(6, after_epoch)
    result, x = seen.result, images()
    assert result.epochs == (1, 2, 4, 5) and result.layers == ("1", "5", "10")
    for e, epoch in enumerate(result.epochs):
        model = net()
        model.load_state_dict(states[epoch])
        model.eval()
        for layer, fmaps in FMAPS.items():
            with torch.no_grad():
                activation = x.clone()
                for module in model[: int(layer) + 1]:
                    activation = module(activation)
            assert result.fmaps(layer) == tuple(fmaps)
            for m, fmap in enumerate(fmaps):
                found = result.history(layer, fmap)[e]
                per_image = activation.reshape(24, activation.shape[1], -1)[:, fmap].amax(1)
                number = int(per_image.argmax())
                assert found.images == (number,) and result.images(layer)[e, m] == number
                assert result.values(layer)[e, m] == pytest.approx(float(per_image[number]), rel=1e-5)
                box = (slice(None), *(slice(*edges) for edges in found.boxes[0]))
                assert torch.equal(found.patches[0], x[number][box])
                with Deconvnet(model) as deconv:
                    whole = deconv.project(layer, fmap, inputs=x[number][None])[0]
                assert (found.projections[0] - whole[box]).abs().max() <= 1e-5 * whole.abs().max()
    for layer, fmaps in FMAPS.items():
        jumps, likeness = result.jumps(layer), result.likeness(layer)
        assert jumps.shape == (4, len(fmaps)) and likeness.shape == (3, len(fmaps)) and not jumps[0].any()
        for m, fmap in enumerate(fmaps):
            history = result.history(layer, fmap)
            for e in range(1, 4):
                assert jumps[e, m] == (history[e].images != history[e - 1].images)
                if not jumps[e, m] and history[e].positions == history[e - 1].positions:
                    a, b = (history[i].projections[0].flatten() for i in (e, e - 1))
                    expected = torch.nn.functional.cosine_similarity(a, b, 0)
                    assert float(likeness[e - 1, m]) == pytest.approx(float(expected), abs=1e-5)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────


def seen_unit(fmap, number, projection, position=(4, 4), box=((3, 6), (3, 6)), value=1.0):
    """An image's unit; its patch is of no interest."""
    projection = torch.as_tensor(projection, dtype=torch.float32)
    return FeatureMap(
        layer="a", fmap=fmap, values=(value,), images=(number,), names=(f"image {number}",), positions=(position,),
        boxes=(box,), patches=(projection * 0,), projections=(projection,), mean=0.0,
        active=float(value > 0), histogram=(1,),
    )  # fmt: skip


def planted(*histories, epochs=None):
    """Of each map its units by look; units see 3 x 3 pixels, those at the border of 9 x 9 fewer."""
    epochs = epochs or range(1, len(histories[0]) + 1)
    looks = [Look.of(epoch, str(epoch), {"a": [history[e] for history in histories]}) for e, epoch in enumerate(epochs)]
    about = {"layers": ["a"], "frames": {"a": [[-1, 1, 3], [-1, 1, 3]]}, "channels": 3}
    return Evolution(about, tuple(looks))


KERNEL = torch.arange(1.0, 28.0).view(3, 3, 3)
OTHER = torch.flip(KERNEL, (0, 1, 2)) * torch.tensor([1.0, -1.0, 1.0])


def test_jumps_and_settling_by_hand():
    still = [seen_unit(0, 7, KERNEL * scale) for scale in (1, 3, 2, 5, 1)]  # brightness is no change
    late = [seen_unit(1, n, k) for n, k in zip((1, 2, 2, 2, 2), (OTHER, OTHER, OTHER, KERNEL, KERNEL), strict=True)]
    also = [seen_unit(2, n, k) for n, k in zip((5, 5, 6, 6, 7), (KERNEL, OTHER, OTHER, KERNEL, KERNEL), strict=True)]
    result = planted(still, late, also, epochs=(1, 2, 5, 10, 20))
    assert result.jumps("a").int().T.tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1]]
    low = float((KERNEL * OTHER).sum() / (KERNEL.norm() * OTHER.norm()))
    expected = [[1, 1, 1, 1], [1, 1, low, 1], [low, 1, low, 1]]
    torch.testing.assert_close(result.likeness("a").T, torch.tensor(expected, dtype=torch.float64))
    assert low < 0.8
    assert result.settled("a") == 10  # at the look of epoch 10 most maps changed; at that of 20 none
    assert planted(still).settled("a") == 1
    assert planted(late[:4]).settled("a") is None  # changed at the last look: not yet
    assert planted(late[:1]).settled("a") is None  # one look says nothing
    assert result.settled("a", likeness=-1) == 1
    assert str(result).splitlines()[1].split() == ["a", "10", "33%", "33%", "0%", "33%"]


def test_a_unit_at_the_border_is_laid_over_one_inside_field_on_field():
    corner = seen_unit(0, 1, KERNEL[:, 1:, 1:], (0, 0), ((0, 2), (0, 2)))
    far = seen_unit(0, 2, KERNEL[:, :2, :], (8, 4), ((7, 9), (3, 6)))
    whole = seen_unit(0, 3, KERNEL)
    likeness = planted([corner, whole, far]).likeness("a")[:, 0].tolist()
    assert likeness == pytest.approx(
        [float(part.norm() / KERNEL.norm()) for part in (KERNEL[:, 1:, 1:], KERNEL[:, :2])]
    )


def test_dead_maps_and_maps_without_a_unit():
    dead = seen_unit(0, 0, KERNEL * 0, value=0.0)
    none = FeatureMap("a", 0, (), (), (), (), (), (), (), 0.0, 0.0, (0,))
    result = planted([dead, none, seen_unit(0, 0, KERNEL), dead])
    assert result.images("a")[:, 0].tolist() == [-1, -1, 0, -1]
    assert result.jumps("a")[:, 0].tolist() == [False, False, True, True]
    first, *others = result.likeness("a")[:, 0].tolist()
    assert math.isnan(first) and others == [0, 0]
    assert math.isnan(result.values("a")[1, 0])
    assert planted([dead, dead]).settled("a") is None
    result.figure(patches=True)


def test_a_training_that_diverges_goes_on_without_units(tmp_path):
    model, seen = net(), FeatureEvolution("1", [0, 2], images(), (1, 2), file=tmp_path / "e.npz")
    seen(model, 1)
    nn.init.constant_(model[0].weight, math.nan)
    seen(model, 2)
    assert seen.result.epochs == (1, 2) and seen.result.values("1")[1].isnan().all()
    assert all(not found.values for found in seen.result.looks[1].maps["1"])
    assert seen.result.images("1")[1].tolist() == [-1, -1] and seen.result.settled("1") is None
    seen.figure(patches=True).draw_without_rendering()
    assert same(Evolution.load(tmp_path / "e.npz"), seen.result)
    assert "1" in str(seen.result)


# ── interrupted, resumed, refused ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(stop, tmp_path):
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    Training().run(5, watch(whole))
    first = Training().run(stop, watch(parts))
    saved = first.saved()
    torch.manual_seed(99)
    again = watch(parts)
    assert again.result.epochs == tuple(epoch for epoch in (1, 2, 4, 5) if epoch <= stop)
    Training.resumed(saved, stop).run(5, again)
    assert same(again.result, Evolution.load(whole))
    assert same(Evolution.load(parts), Evolution.load(whole))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_kept_epoch_is_not_looked_at_again_and_the_last_is_replaced(tmp_path, monkeypatch):
    file = tmp_path / "e.npz"
    training = Training().run(2, watch(file))
    again = watch(file)
    monkeypatch.setattr(evolution, "FilterGrid", None)  # a look would fail
    again(training.model, 2)
    monkeypatch.undo()
    weights = again.result.looks[-1].weights
    training.run(3)
    again(training.model, 2)  # training was resumed before epoch 2, and came out otherwise
    assert again.result.epochs == (1, 2) and again.result.looks[-1].weights != weights
    with pytest.raises(CheckpointError, match="epoch 1 was seen with other weights, and epochs up to 2"):
        again(training.model, 1)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"layers": ["1", "5"], "fmaps": {"1": [4, 0], "5": [1, 6, 2]}}, "layers"),
        ({"fmaps": {**FMAPS, "10": [2]}}, "maps"),
        ({"fmaps": None}, "maps"),
        ({"data": images(seed=1)}, "data"),
        ({"data": images(23)}, "data"),
        ({"limit": 20}, "data"),
        ({"overlap": "overwrite"}, "overlap"),
        ({"run": "seed 1"}, "run"),
    ],
)
def test_a_file_of_something_else_is_refused(other, word, tmp_path):
    file = tmp_path / "e.npz"
    watch(file)(net(), 1)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=f"is of another {word}"):
        FeatureEvolution(**{"layers": LAYERS, "fmaps": FMAPS, "data": images(), "file": file} | other)
    wider, leaky = net(), net()
    wider[10], leaky[1] = nn.Linear(5, 9), nn.LeakyReLU()
    for model in (wider, leaky):
        with pytest.raises(CheckpointError, match="is of another model"):
            watch(file)(model, 2)
    assert file.read_bytes() == before


def test_a_data_set_of_the_same_kind_and_size_is_told_apart(tmp_path):
    file = tmp_path / "e.npz"
    options = {"epochs": (1,), "file": file}
    FeatureEvolution("1", [0], TensorDataset(images()), **options)(net(), 1)
    FeatureEvolution("1", [0], TensorDataset(images()), **options)
    with pytest.raises(CheckpointError, match="is of another data: images"):
        FeatureEvolution("1", [0], TensorDataset(images(seed=1)), **options)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "a grid's"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    file = tmp_path / "e.npz"
    watch(file)(net(), 1)
    content = bytearray(file.read_bytes())
    if damage == "a grid's":
        evolution.FilterGrid(net(), LAYERS).fit(images(), progress=False).save(file)
    else:
        content[len(content) // 2] ^= 255
        file.write_bytes({"cut": content[:-200], "flipped": content, "text": b"hello"}[damage])
    with pytest.raises(CheckpointError):
        watch(file)


def test_a_look_that_cannot_be_saved_does_not_end_the_training(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    seen = watch(tmp_path / "taken" / "e.npz")
    with pytest.warns(UserWarning, match="epoch 1 was looked at, but not saved"):
        seen(net(), 1)
    assert seen.result.epochs == (1,)


# ── ways to call it ──────────────────────────────────────────────────────────────────────────────────────────


def test_training_does_not_notice():
    alone = Training().run(5)
    alone_draw = torch.rand(3)
    hooked = Training()
    calls = []
    hooked.model[3].register_forward_hook(lambda *_: calls.append(1))
    hooked.model[2].eval()

    def after_epoch(model, epoch):
        modes = [module.training for module in model.modules()]
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        draw, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in model.modules()]
        watch(epochs=(epoch,))(model, epoch)
        assert modes == [module.training for module in model.modules()]
        assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
        assert torch.equal(draw, torch.get_rng_state())
        assert hooks == [len(module._forward_hooks) for module in model.modules()]

    hooked.run(5, after_epoch)
    assert torch.equal(alone_draw, torch.rand(3)) and calls
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, hooked.model.state_dict()[name]), name


def test_over_saved_checkpoints_is_the_callback_to_the_bit(tmp_path):
    seen, checkpoints = watch(), {}

    def after_epoch(model, epoch):
        seen(model, epoch)
        state = copy.deepcopy(model.state_dict())
        if epoch in (2, 4):
            checkpoints[epoch] = tmp_path / f"{epoch}.pth"
            torch.save({"state_dict": state} if epoch == 4 else state, checkpoints[epoch])
        elif epoch != 3:
            checkpoints[epoch] = state

    Training().run(5, after_epoch)
    model = net(seed=5)
    before = copy.deepcopy(model.state_dict())
    assert same(watch(epochs=(64,)).over(model, dict(reversed(checkpoints.items()))), seen.result)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError):
        watch().over(nn.Sequential(nn.Linear(2, 2)), {2: checkpoints[2]})
    with pytest.raises(WeightsError, match="state dict of epoch 1 does not fit the Sequential; unexpected"):
        watch().over(nn.Sequential(nn.Linear(2, 2)), {1: checkpoints[1]})
    with pytest.raises(WeightsError, match="state dict of epoch 1 holds no state dict"):
        watch().over(net(), {1: {"epoch": 1}})
    wrapped = {"state_dict": {f"module.{name}": tensor for name, tensor in checkpoints[1].items()}}
    assert watch().over(model, {1: wrapped}).looks[0].weights == seen.result.looks[0].weights
    for wrong in ({}, [checkpoints[1]], {1: None}, {"1": checkpoints[1]}):
        with pytest.raises(InvalidInput, match="checkpoints"):
            watch().over(net(), wrong)


def test_as_a_callback_of_lightning():
    class Callback:  # as Lightning's: every hook is there
        def on_train_epoch_end(self, trainer, module): ...
        def setup(self, trainer, module, stage): ...

    class Watch(FeatureEvolution, Callback):
        pass

    seen = Watch("1", [0], images(), (1, 3))
    for epoch in range(3):
        seen.setup(None, None, "fit")
        seen.on_train_epoch_end(type("Trainer", (), {"current_epoch": epoch}), net(epoch))
    assert seen.result.epochs == (1, 3)


def test_of_several_processes_the_first_looks(monkeypatch):
    seen = watch()
    monkeypatch.setattr(evolution, "rank_and_count", lambda: (1, 2))
    seen(net(), 1)
    with pytest.raises(NoForwardPass):
        _ = seen.result


def test_all_maps_of_one_layer():
    seen = FeatureEvolution("5", None, images(), (0,))
    seen(net(), 0)
    assert seen.result.fmaps("5") == tuple(range(8))


def test_the_table_stays_in_line_for_long_names():
    name = "features_of_the_second_block"
    model = nn.Sequential(OrderedDict([(name, nn.Conv2d(3, 2, 3)), ("r", nn.ReLU())]))
    seen = FeatureEvolution([name, "r"], None, images(), (0,))
    seen(model, 0)
    head, *rows = str(seen.result).splitlines()
    assert [row.index("not yet") for row in rows] == [head.index("settled")] * 2


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(InvalidInput, match="expected names such as"):
        FeatureEvolution([net()[1]], [0], images())
    with pytest.raises(InvalidInput, match="layers is"):
        FeatureEvolution([], [0], images())
    for wrong in ([], "strongest", [0, 0], [0.5], [True], 3):
        with pytest.raises(InvalidInput, match="fmaps is"):
            FeatureEvolution("1", wrong, images())
    with pytest.raises(InvalidInput, match="one entry for each"):
        FeatureEvolution(["1", "5"], {"1": [0]}, images())
    for wrong in (5, None):
        with pytest.raises(InvalidInput, match="layers is"):
            FeatureEvolution(wrong, [0], images())
    with pytest.raises(InvalidInput, match="expected a path, or None, and a text"):
        watch(file=5)
    with pytest.raises(InvalidInput, match="expected a path, or None, and a text"):
        watch(run={"seed": 0})
    with pytest.raises(InvalidInput, match="epoch is '1'"):
        watch()(net(), "1")
    for wrong in ((), (1.5,), (-1,), (True,), 5):
        with pytest.raises(InvalidInput, match="epochs is"):
            watch(epochs=wrong)
    with pytest.raises(InvalidInput, match="overlap"):
        watch(overlap="nix")
    with pytest.raises(InvalidInput):
        watch(on_unsupported="nix")
    with pytest.raises(NoForwardPass, match="call it after one of the epochs"):
        watch().figure()
    sizes = [torch.randn(3, 20, 20), torch.randn(3, 24, 20)]
    with pytest.raises(InvalidInput, match="image 1 has shape"):
        FeatureEvolution("1", [0], sizes, batch_size=1)(net(), 1)
    with pytest.raises(UnknownLayer):
        FeatureEvolution("nix", [0], images())(net(), 1)
    with pytest.raises(FeatureMapOutOfRange):
        FeatureEvolution("1", [6], images())(net(), 1)
    seen = watch()
    seen(net(), 1)
    with pytest.raises(FeatureMapOutOfRange, match="map 3 of layer '1' was not looked at"):
        seen.result.history("1", 3)
    with pytest.raises(UnknownLayer, match="was not looked at"):
        seen.result.jumps("7")
    with pytest.raises(InvalidInput, match="maps is 0"):
        seen.figure(maps=0)


def test_whole_numbers_may_be_numpys_or_tensors():
    seen = FeatureEvolution("1", torch.tensor([2, 0]), images(), epochs=np.arange(1, 3))
    model = net()
    for epoch in np.arange(1, 4):
        seen(model, epoch)
    assert seen.result.epochs == (1, 2) and seen.result.fmaps("1") == (2, 0)
    assert {type(epoch) for epoch in seen.result.epochs} == {int}
    state = {epoch: net(epoch).state_dict() for epoch in (1, 2)}
    assert FeatureEvolution("1", [0], images()).over(model, {np.int64(e): s for e, s in state.items()}).epochs == (1, 2)


@pytest.mark.parametrize("axes", [1, 3])
def test_the_figure_of_what_is_no_picture(axes):
    convolution = nn.Conv1d if axes == 1 else nn.Conv3d
    seen = FeatureEvolution("0", None, torch.randn(4, 2, *[6] * axes), epochs=[1, 2])
    seen(nn.Sequential(convolution(2, 3, 3)), 1)
    with pytest.raises(InvalidInput, match=rf"have {axes} spatial axes.*history\(layer, fmap\)"):
        seen.figure()


# ── figure 4 ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("patches", [False, True])
def test_the_figure_frames_the_jumps(patches, tmp_path):
    seen = watch()
    Training().run(5, seen)
    figure = seen.figure(maps=2, patches=patches)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title().split(":")[0] for axes in drawn] == LAYERS
    for axes, (layer, fmaps) in zip(drawn, FMAPS.items(), strict=True):
        rows = len(fmaps[:2]) * (2 if patches else 1)
        assert len(axes.images) == 4 * rows
        assert len(axes.patches) == int(seen.result.jumps(layer)[:, :2].sum())
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "5"]
        names = [label.get_text() for label in axes.get_yticklabels() if label.get_text()]
        assert names == [str(fmap) for fmap in fmaps[:2]]
    save_figure(figure, tmp_path / "f.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "f.png").convert("L")))) > 50


def test_patches_of_grey_images_are_drawn():
    torch.manual_seed(0)
    seen = FeatureEvolution("1", [0, 1], images(8, 28)[:, :1], (1,))
    seen(nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.ReLU()), 1)
    shown = [picture.get_array() for picture in seen.figure(patches=True).axes[0].images]
    assert all((picture[..., 0] == picture[..., 1]).all() and picture.std() > 20 for picture in shown)


@pytest.mark.parametrize(("layers", "epochs"), [(1, 1), (2, 2), (3, 8)])
def test_no_text_of_the_figure_is_cut(layers, epochs):
    grey = np.full((8, 8, 3), 128, np.uint8)
    title = "features.denseblock4.norm2: settled at epoch 12"
    strip = Strip(title, [[grey] * epochs] * 2, ["511", "0"], [[True] * epochs] * 2)
    figure = evolution_strips([strip] * layers, range(epochs))
    figure.draw_without_rendering()
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    for box in [*titles, figure.get_tightbbox().transformed(figure.dpi_scale_trans)]:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert all(left.x1 < right.x0 for left, right in zip(titles, titles[1:], strict=False))
