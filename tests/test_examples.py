"""Every example runs whole, on little data: their arguments, what they print and write, and that they go on."""

from __future__ import annotations

import importlib
import io
import json
import runpy
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deconvviz.errors import InvalidInput
from deconvviz.models import small_zfnet

EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = {"ant": (200, 30, 30), "bee": (220, 200, 40), "cow": (40, 60, 200)}
TINY_ZFNET = ["--model", "deconvviz.models:small_zfnet", "--size", "32"]
MEAN_COLOURS = ["--model", "nets:mean_colours", "--size", "32"]


@pytest.fixture(autouse=True)
def example_folder(monkeypatch) -> None:
    """The examples can be imported, and so can a network that sees the mean colours of a picture's quarters."""
    nets = types.ModuleType("nets")
    nets.mean_colours = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))
    monkeypatch.setitem(sys.modules, "nets", nets)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


def load(name: str):
    return importlib.import_module(name)


def run(name: str, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def picture(label: str, seed: int, size: tuple[int, int] = (40, 32), grey: bool = False) -> Image.Image:
    """A picture in its class's colour under noise; a grey one is of mode L, as some of Caltech's are."""
    noise = np.random.default_rng(seed).normal(0, 40, (size[1], size[0], 3))
    pixels = np.clip(noise + COLOURS[label], 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0]) if grey else Image.fromarray(pixels)


def folders(root: Path, count: int, name: str = "image_{:04}.jpg", prefix: bool = False) -> None:
    """One folder a class; every third picture is grey."""
    for number, label in enumerate(COLOURS, 1):
        folder = root / (f"{number:03}.{label}" if prefix else label)
        folder.mkdir(parents=True)
        for i in range(1, count + 1):
            file = name.format(i) if not prefix else f"{number:03}_{i:04}.jpg"
            picture(label, 100 * number + i, grey=i % 3 == 0).save(folder / file)


@pytest.fixture
def cifar_zip(tmp_path) -> Path:
    path = tmp_path / "cifar.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part, count in (("train", 40), ("test", 12)):
            for number, label in enumerate(COLOURS):
                for i in range(count):
                    buffer = io.BytesIO()
                    picture(label, 1000 * number + i + (part == "test") * 500, (32, 32)).save(buffer, "JPEG")
                    archive.writestr(f"{part}/{label}/{i:04}.jpg", buffer.getvalue())
    return path


def test_cifar10_of_a_zip_or_a_folder(cifar_zip, tmp_path) -> None:
    cifar10 = load("cifar10")
    (images, labels), (test, _) = cifar10.load(cifar_zip)
    assert images.shape == (120, 3, 32, 32) and test.shape == (36, 3, 32, 32)
    assert labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    zipfile.ZipFile(cifar_zip).extractall(tmp_path / "folder")
    (again, _), _ = cifar10.load(tmp_path / "folder")
    assert torch.equal(images, again)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="has no train/CLASS"):
        cifar10.load(tmp_path / "empty")


def test_training_learns_and_is_seeded(cifar_zip) -> None:
    cifar10 = load("cifar10")
    training, test = cifar10.load(cifar_zip)
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        epochs: list[int] = []
        model = cifar10.train(small_zfnet(3), training, epochs=8, seed=1, after_epoch=epochs.append)
        assert epochs == [1, 2, 3, 4, 5, 6, 7, 8]
        states.append(model.state_dict())
    assert cifar10.error(model, test) < 15
    assert cifar10.error(model, test, top=3) == 0
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_ablate_layers(cifar_zip, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "a.json"
    arguments = ["--data", cifar_zip, "--epochs", 1, "--out", out]
    run("ablate_layers.py", monkeypatch, *arguments, "--variants", "base")
    first = json.loads(out.read_text())
    run("ablate_layers.py", monkeypatch, *arguments, "--variants", "base", "without conv 3,4, fc 6,7")
    results = json.loads(out.read_text())
    assert list(results) == ["base | seed 0 | 1 epochs", "without conv 3,4, fc 6,7 | seed 0 | 1 epochs"]
    assert results["base | seed 0 | 1 epochs"] == first["base | seed 0 | 1 epochs"]  # not trained again
    assert capsys.readouterr().out.count("base | seed 0") == 2


def test_fix_the_first_layer(cifar_zip, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "first"
    arguments = ["--data", cifar_zip, "--epochs", 1, "--out", out]
    run("fix_the_first_layer.py", monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "before, seed 0: error" in printed and "after, seed 0: error" in printed
    assert "stride 4 after a 7x7 kernel folds" in printed
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{n}_seed0_1epochs.{s}" for n in ("after", "before") for s in ("png", "pth")]
    run("fix_the_first_layer.py", monkeypatch, *arguments)
    assert capsys.readouterr().out == printed


def test_average_precision_by_hand() -> None:
    transfer = load("transfer")
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    present = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    # precision at the hits: 1/2, 2/4, 3/5; from each hit on the best is 3/5
    assert transfer.average_precision(scores, present) == pytest.approx(3 / 5)
    assert transfer.average_precision(scores, torch.tensor([1.0, 0, 1, 0, 0])) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0]])
    scores = torch.tensor([[3.0, 0, 0], [2, 9, 1], [1, 0, 0]])
    assert transfer.quality(scores, labels) == pytest.approx(
        100 * ((1 + 2 / 3) / 2 + 1) / 2
    )  # no class 1 here


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet", "mobilenet_v3_small"])
def test_a_new_head_for_any_model(name) -> None:
    transfer = load("transfer")
    model = transfer.load_model(name).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    head = transfer.new_head(model, 7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert any(head is module for module in model.modules())
    changed = [key for key, value in model.state_dict().items() if before[key].shape != value.shape]
    assert len(changed) == 2


@pytest.mark.parametrize("dataset", ["caltech101", "caltech256", "folder"])
def test_transfer_with_grey_pictures(dataset, tmp_path, capsys) -> None:
    transfer = load("transfer")
    root = tmp_path / "data"
    if dataset == "caltech101":
        folders(root / "caltech101" / "101_ObjectCategories", 12)
        (root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    elif dataset == "caltech256":
        folders(root / "caltech256" / "256_ObjectCategories", 12, prefix=True)
    else:
        folders(root, 12)
    out = tmp_path / "out" / "t.json"
    arguments = ["--dataset", dataset, "--data", str(root), *MEAN_COLOURS, "--scratch", "--lr", "0.1"]
    transfer.main([*arguments, "--per-class", "4", "8", "--epochs", "20", "--batch", "8", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [len(history) for history in results.values()] == [20, 20]
    assert all(0 <= quality <= 100 for history in results.values() for epoch in history for quality in epoch)
    assert max(test for _, test in list(results.values())[1]) > 60  # three colours: it learned
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "4 a class" in lines[0] and "epoch" in lines[0]
    assert [path.name for path in out.parent.iterdir()] == ["t.json"]


def test_transfer_on_voc(tmp_path, capsys) -> None:
    transfer = load("transfer")
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    things = {"ant": ["cat"], "bee": ["dog", "person", "dog"], "cow": ["cow", "person"]}
    for part, count in (("train", 18), ("val", 9)):
        names = []
        for i in range(count):
            label = list(things)[i % 3]
            names.append(f"2012_{part}_{i:04}")
            picture(label, i + 1000 * (part == "val")).save(root / "JPEGImages" / f"{names[-1]}.jpg")
            objects = "".join(f"<object><name>{thing}</name></object>" for thing in things[label])
            (root / "Annotations" / f"{names[-1]}.xml").write_text(f"<annotation>{objects}</annotation>")
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names))
    data, test = load("pictures").load("voc2012", tmp_path, 32)
    assert (len(data), len(test)) == (18, 9)
    positive = [data.classes[k] for k in data[1][1].nonzero().flatten()]
    assert positive == ["dog", "person"] and data[1][0].shape == (3, 32, 32)
    out = tmp_path / "t.json"
    transfer.main(
        ["--dataset", "voc2012", "--data", str(tmp_path), *MEAN_COLOURS, "--scratch", "--lr", "0.1"]
        + ["--epochs", "15", "--batch", "6", "--out", str(out)]
    )
    (history,) = json.loads(out.read_text()).values()
    assert max(test for _, test in history) > 60 and len(history) == 15
    assert "voc2012" in capsys.readouterr().out


def test_an_interrupted_transfer_goes_on(tmp_path, monkeypatch) -> None:
    """Killed after two of four epochs, it ends as if it had not been."""
    transfer = load("transfer")
    folders(tmp_path / "data", 8)
    base = ["--dataset", "folder", "--data", str(tmp_path / "data"), *TINY_ZFNET, "--scratch", "--lr", "0.01"]
    base += ["--per-class", "5", "--epochs", "4", "--batch", "4"]
    transfer.main([*base, "--out", str(tmp_path / "whole" / "t.json")])
    passes, real = [], transfer.run

    def interrupted(*arguments, **options):
        passes.append(1)
        if len(passes) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(transfer, "run", interrupted)
    out = tmp_path / "twice" / "t.json"
    with pytest.raises(KeyboardInterrupt):
        transfer.main([*base, "--out", str(out)])
    assert len(list(out.parent.glob("*.pth"))) == 1
    monkeypatch.setattr(transfer, "run", real)
    transfer.main([*base, "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole" / "t.json").read_text())


def test_transfer_refuses(tmp_path) -> None:
    transfer = load("transfer")
    folders(tmp_path / "data", 4)
    base = [
        "--dataset",
        "folder",
        "--data",
        str(tmp_path / "data"),
        *TINY_ZFNET,
        "--out",
        str(tmp_path / "t.json"),
    ]
    with pytest.raises(InvalidInput, match="expected --weights or --scratch, and not both"):
        transfer.main(base)
    with pytest.raises(
        InvalidInput, match="class 'ant' has 4 pictures; expected more than 9: lower --per-class"
    ):
        transfer.main([*base, "--scratch", "--per-class", "9"])


def test_frozen_trains_the_head_alone(tmp_path, monkeypatch) -> None:
    transfer = load("transfer")
    folders(tmp_path / "data", 6)
    weights = tmp_path / "w.pth"
    torch.manual_seed(0)
    torch.save(small_zfnet().state_dict(), weights)
    trained = []
    monkeypatch.setattr(
        transfer, "new_head", lambda m, k, real=transfer.new_head: (trained.append(m), real(m, k))[1]
    )
    transfer.main(
        [
            "--dataset",
            "folder",
            "--data",
            str(tmp_path / "data"),
            *TINY_ZFNET,
            "--weights",
            str(weights),
            "--frozen",
        ]
        + ["--per-class", "4", "--epochs", "1", "--out", str(tmp_path / "t.json")]
    )
    saved = torch.load(weights, weights_only=True)
    state = trained[0].state_dict()
    assert all(torch.equal(state[key], saved[key]) for key in saved if not key.startswith("fc8"))
    assert state["fc8.weight"].shape == (3, 256)


def test_features_by_depth(tmp_path, capsys) -> None:
    folders(tmp_path / "data", 12)
    out = tmp_path / "d.json"
    load("features_by_depth").main(
        ["--data", str(tmp_path / "data"), *TINY_ZFNET, "--layers", "relu1", "fc8", "--per-class", "8"]
        + ["--out", str(out)]
    )
    results = json.loads(out.read_text())
    assert list(results) == ["relu1", "fc8", "seconds"] and results["relu1"] > 60  # colours are seen at once
    assert "relu1: " in capsys.readouterr().out


def test_the_svm_finds_the_widest_margin() -> None:
    """Two points at distance 2 in one dimension: the squared hinge has its minimum in closed form."""
    svm = load("features_by_depth").linear_svm(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 2, c=3.0)
    # for each class: minimise w²/2 + c·(1 - w)², so w = 2c / (1 + 2c), b = 0
    torch.testing.assert_close(svm.weight.detach(), torch.tensor([[-6 / 7], [6 / 7]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(svm.bias.detach(), torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("model", "off"), [("googlenet", True), ("resnet18", False)])
def test_compare_with_captum(model, off, tmp_path, capsys) -> None:
    path, out = tmp_path / "a.png", tmp_path / "b.png"
    picture("bee", 0, (260, 256)).save(path)
    layer = ["inception3a"] if off else ["layer2", "--unit", "5", "7", "7"]
    load("compare_with_captum").main([str(path), "--model", model, "--out", str(out), "--layer", *layer])
    printed = capsys.readouterr().out
    assert ("captum's deconvolution is 0% off the deconvnet" in printed) is not off
    assert ("0% off the plain gradient" in printed) is off
    assert len(np.unique(np.asarray(Image.open(out)))) > 50


def test_watch_training(cifar_zip, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "watched"
    arguments = ["--epochs", 2, "--looks", 1, 2, "--maps", 2, "--out", out]
    run("watch_training.py", monkeypatch, *arguments, "--data", cifar_zip)
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == ["epoch 1", "epoch 2"] and "relu5" in printed and "% test" in printed
    assert sorted(path.name for path in out.iterdir()) == ["evolution_seed0.npz", "evolution_seed0.png"]
    assert len(np.unique(np.asarray(Image.open(out / "evolution_seed0.png").convert("L")))) > 50
    kept = (out / "evolution_seed0.npz").read_bytes()
    cifar_zip.rename(tmp_path / "cifar10_jpeg.zip")
    monkeypatch.setenv("DECONVVIZ_DATA", str(tmp_path))
    run("watch_training.py", monkeypatch, *arguments)  # the same training: nothing is looked at again
    assert capsys.readouterr().out == printed and (out / "evolution_seed0.npz").read_bytes() == kept


def test_occlusion_figure7(tmp_path, capsys) -> None:
    for label in ("ant", "bee"):
        picture(label, 0, (120, 100)).save(tmp_path / f"{label}.png")
    load("occlusion_figure7").main(
        [str(tmp_path / "ant.png"), str(tmp_path / "bee.png"), "--layer", "features.7"]
        + ["--patch", "64", "--stride", "80", "--out", str(tmp_path / "out")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ant", "bee"] and "falls to" in lines[0]
    for label in ("ant", "bee"):
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{label}.png").convert("L"))
        assert len(np.unique(pixels)) > 50


def test_top9_of_a_layer(tmp_path, capsys) -> None:
    folders(tmp_path / "data", 5)
    out = tmp_path / "top9.png"
    load("top9_of_a_layer").main(
        [str(tmp_path / "data"), "--layer", "features.4", "--random", "3", "--out", str(out)]
    )
    assert capsys.readouterr().out.startswith("features.4: 128 maps, ")
    assert len(np.unique(np.asarray(Image.open(out).convert("L")))) > 50
