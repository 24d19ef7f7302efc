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

from deconvviz.errors import CheckpointError, InvalidInput, WeightsError
from deconvviz.evolution import FeatureEvolution
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


def on_folder(tmp_path: Path) -> list[str]:
    """A transfer of a tiny network to the folders in ``data``."""
    return ["--dataset", "folder", "--data", str(tmp_path / "data"), *TINY_ZFNET]


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


def test_cifar10_of_a_zip_or_a_folder(cifar_zip, tmp_path, monkeypatch) -> None:
    cifar10 = load("cifar10")
    (images, labels), (test, _) = cifar10.load(cifar_zip)
    assert images.shape == (120, 3, 32, 32) and test.shape == (36, 3, 32, 32)
    assert labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    zipfile.ZipFile(cifar_zip).extractall(tmp_path / "folder")
    (again, _), _ = cifar10.load(tmp_path / "folder")
    assert torch.equal(images, again)
    (tmp_path / "cifar.zip").rename(tmp_path / "cifar10_jpeg.zip")
    monkeypatch.setenv("DECONVVIZ_DATA", str(tmp_path))
    (again, _), _ = cifar10.load(None)
    assert torch.equal(images, again)


def test_cifar10_refuses(cifar_zip, tmp_path) -> None:
    cifar10 = load("cifar10")
    empty, folder = tmp_path / "empty", tmp_path / "folder"
    empty.mkdir()
    zipfile.ZipFile(cifar_zip).extractall(folder)
    with pytest.raises(InvalidInput, match="has no train/CLASS"):
        cifar10.load(empty)
    for path in (tmp_path / "nothing.zip", folder / "train" / "ant" / "0000.jpg"):
        with pytest.raises(InvalidInput, match="is no folder and no .zip; expected"):
            cifar10.load(path)
    (folder / "test" / "ant").rename(folder / "test" / "cat")
    with pytest.raises(InvalidInput, match=r"test classes \['bee', 'cat', 'cow'\]; expected those of training"):
        cifar10.load(folder)
    picture("ant", 0, (40, 32)).save(folder / "train" / "ant" / "0001.jpg")
    with pytest.raises(InvalidInput, match="0001.jpg has 40 x 32 pixels; expected 32 x 32"):
        cifar10.load(folder)
    (folder / "train" / "ant" / "0000.jpg").write_text("hello")
    with pytest.raises(InvalidInput, match="0000.jpg is no picture"):
        cifar10.load(folder)


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


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_training_ends_as_if_it_had_not_been(stop, cifar_zip, tmp_path) -> None:
    """To the bit, with dropout, and with the calls after the epochs that were left."""
    cifar10 = load("cifar10")
    training, _ = cifar10.load(cifar_zip)

    def train(file, after_epoch=lambda epoch: None):
        torch.manual_seed(5)
        return cifar10.train(small_zfnet(3), training, 4, seed=1, after_epoch=after_epoch, file=file)

    def interrupt(epoch):
        if epoch == stop + 1:
            raise KeyboardInterrupt

    file, epochs = tmp_path / "parts.pth", []
    whole = train(None).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(file, interrupt)
    torch.manual_seed(77)
    parts = train(file, epochs.append)
    assert epochs == list(range(stop + 1, 5)) and not parts.training
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.state_dict().items())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in train(file).state_dict().items())
    assert [path.name for path in tmp_path.glob("*pth*")] == ["parts.pth"]


@pytest.mark.parametrize("other", ["network", "start", "data", "epochs", "learning rate", "seed"])
def test_a_checkpoint_of_another_training_is_refused(other, cifar_zip, tmp_path) -> None:
    cifar10 = load("cifar10")
    (images, labels), _ = cifar10.load(cifar_zip)
    file = tmp_path / "c.pth"

    def train(**changed):
        torch.manual_seed(5)
        options = {"model": small_zfnet(3), "split": (images, labels), "epochs": 1, "file": file} | changed
        return cifar10.train(**options)

    train()
    kept = file.read_bytes()
    torch.manual_seed(6)
    changed, word = {
        "network": ({"model": small_zfnet(3, without=("fc7",))}, "number of weights: "),
        "start": ({"model": small_zfnet(3)}, "network at the start"),
        "data": ({"split": (images, labels.flip(0))}, "data"),
        "epochs": ({"epochs": 2}, "epochs: 1; expected 2"),
        "learning rate": ({"lr": 0.1}, "learning rate: 0.01; expected 0.1"),
        "seed": ({"seed": 1}, "seed: 0; expected 1"),
    }[other]
    with pytest.raises(CheckpointError, match=f"c.pth is of another {word}.*another file to start afresh"):
        train(**changed)
    assert file.read_bytes() == kept


@pytest.mark.parametrize("damage", ["cut", "text", "a state dict", "a network"])
def test_what_is_no_checkpoint_is_refused(damage, tmp_path) -> None:
    checkpoint = load("checkpoint").Checkpoint(tmp_path / "c.pth", {"seed": 0})
    assert checkpoint.load() is None
    checkpoint.save({"weights": torch.arange(1000)})
    assert torch.equal(checkpoint.load()["weights"], torch.arange(1000))
    content = checkpoint.path.read_bytes()
    if damage in ("cut", "text"):
        checkpoint.path.write_bytes(content[:-300] if damage == "cut" else b"hello")
    else:
        model = small_zfnet()
        torch.save(model.state_dict() if damage == "a state dict" else model, checkpoint.path)
    with pytest.raises(CheckpointError, match="delete it to start afresh"):
        checkpoint.load()


def test_a_checkpoint_that_cannot_be_written_is_a_typed_error(tmp_path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match="cannot be written .*choose another place"):
        load("checkpoint").Checkpoint(tmp_path / "taken" / "c.pth", {}).save({})


def test_ablate_layers(cifar_zip, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["--data", cifar_zip, "--epochs", 1, "--out", tmp_path / "a", "--variants", "base"]
    run("ablate_layers.py", monkeypatch, *arguments, "--seeds", 1)
    alone = capsys.readouterr().out
    monkeypatch.setattr(torch.optim.SGD, "step", None)  # would fail if a network was trained again
    run("ablate_layers.py", monkeypatch, *arguments, "--seeds", 1)
    assert capsys.readouterr().out == alone and alone.startswith("base, seed 1: error ")
    monkeypatch.undo()
    run("ablate_layers.py", monkeypatch, *arguments, "without conv 3,4, fc 6,7", "--seeds", 0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == alone.strip() and len(lines) == 6
    errors = [float(line.split("error ")[1].split("%")[0]) for line in lines[:2]]
    mean, std = lines[2].split("error ")[1].split("% train")[0].split(" ± ")
    assert lines[2].startswith("base, 2 seeds") and lines[5].startswith("without conv 3,4, fc 6,7, 2 seeds")
    assert float(mean) == pytest.approx(sum(errors) / 2, abs=0.11)
    assert float(std) == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5, abs=0.11)
    assert len(list((tmp_path / "a").glob("*.pth"))) == 4
    with pytest.raises(CheckpointError, match="base seed 1.pth is of another layers"):
        run("ablate_layers.py", monkeypatch, *arguments, "--seeds", 1, "--dropout", 0)


def test_fix_the_first_layer(cifar_zip, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "first"
    arguments = ["--data", cifar_zip, "--epochs", 1, "--out", out]
    run("fix_the_first_layer.py", monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "before, seed 0: error" in printed and "after, seed 0: error" in printed
    assert "stride 4 after a 7x7 kernel folds" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        f"{n}_seed0.{s}" for n in ("after", "before") for s in ("png", "pth")
    ]
    run("fix_the_first_layer.py", monkeypatch, *arguments)
    assert capsys.readouterr().out == printed
    (out / "after_seed0.pth").rename(out / "before_seed0.pth")
    with pytest.raises(CheckpointError, match="is of another number of weights"):
        run("fix_the_first_layer.py", monkeypatch, *arguments)


def test_average_precision_by_hand() -> None:
    transfer = load("transfer")
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    present = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    # precision at the hits: 1/2, 2/4, 3/5; from each hit on the best is 3/5
    assert transfer.average_precision(scores, present) == pytest.approx(3 / 5)
    assert transfer.average_precision(scores, torch.tensor([1.0, 0, 1, 0, 0])) == pytest.approx((1 + 2 / 3) / 2)
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0]])
    scores = torch.tensor([[3.0, 0, 0], [2, 9, 1], [1, 0, 0]])
    assert transfer.quality(scores, labels) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)  # no class 1 here


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
    out = tmp_path / "out"
    arguments = ["--dataset", dataset, "--data", str(root), *MEAN_COLOURS, "--scratch", "--lr", "0.1"]
    transfer.main([*arguments, "--per-class", "4", "8", "--epochs", "20", "--batch", "8", "--out", str(out)])
    histories = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert [len(history) for history in histories] == [20, 20]
    assert all(0 <= value <= 100 for history in histories for epoch in history for value in epoch.values())
    best = max(histories[1], key=lambda epoch: epoch["test"])
    assert best["test"] > 60  # three colours: it learned
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "4 a class" in lines[0] and "8 a class" in lines[1]
    numbers = ["({training:.2f}, {test:.2f})".format(**epoch) for epoch in (histories[1][0], best)]
    assert lines[1].endswith(f": {numbers[0]} -> {numbers[1]}, epoch {histories[1].index(best) + 1}")
    assert all(path.stat().st_size < 10_000 for path in out.iterdir())  # finished: the state has gone


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
    arguments = ["--dataset", "voc2012", "--data", str(tmp_path), *MEAN_COLOURS, "--scratch", "--lr", "0.1"]
    arguments += ["--epochs", "15", "--batch", "6", "--out", str(tmp_path / "out")]
    transfer.main(arguments)
    (file,) = (tmp_path / "out").glob("*.json")
    history = json.loads(file.read_text())
    best = max(history, key=lambda epoch: epoch["test"])
    assert best["test"] > 60 and len(history) == 15
    assert set(best["average precisions"]) == {"cat", "dog", "person", "cow"}  # the others do not occur
    assert best["test"] == pytest.approx(sum(best["average precisions"].values()) / 4)
    first, *classes = capsys.readouterr().out.splitlines()
    assert first.startswith("voc2012") and f"{best['test']:.2f}), epoch" in first
    assert classes == [f"  {kind}: {value:.2f}" for kind, value in best["average precisions"].items()]
    with pytest.raises(InvalidInput, match="voc2012 has its own training part; expected no --per-class"):
        transfer.main([*arguments, "--per-class", "15"])


def test_an_interrupted_transfer_goes_on(tmp_path, monkeypatch) -> None:
    """Killed after two of four epochs, it ends as if it had not been."""
    transfer = load("transfer")
    folders(tmp_path / "data", 8)
    base = [*on_folder(tmp_path), "--scratch", "--lr", "0.01"]
    base += ["--per-class", "5", "--epochs", "4", "--batch", "4"]
    transfer.main([*base, "--out", str(tmp_path / "whole")])
    passes, real = [], transfer.run

    def interrupted(*arguments, **options):
        passes.append(1)
        if len(passes) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(transfer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transfer.main([*base, "--out", str(tmp_path / "twice")])
    monkeypatch.setattr(transfer, "run", real)
    transfer.main([*base, "--out", str(tmp_path / "twice")])
    files = [next((tmp_path / name).glob("*.json")) for name in ("whole", "twice")]
    assert files[0].read_text() == files[1].read_text()
    monkeypatch.setattr(transfer, "run", None)  # would fail if an epoch was trained again
    transfer.main([*base, "--out", str(tmp_path / "twice")])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--lr", "0.2"], "another lr: 0.01; expected 0.2"),
        (["--batch", "7"], "another batch: 4; expected 7"),
        (["--epochs", "3"], "another epochs: 1; expected 3"),
        (["--test-per-class", "1"], "another test_per_class: 50; expected 1"),
        (["--frozen"], None),
        (["--weights"], "another network at the start"),
        (["--data"], "another data"),
    ],
)
def test_a_transfer_of_other_settings_is_refused(other, message, tmp_path) -> None:
    """The file in its place is another run's, finished or not: never its result, and never mixed with it."""
    transfer = load("transfer")
    folders(tmp_path / "data", 6)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(small_zfnet().state_dict(), tmp_path / f"{seed}.pth")
    base = [*on_folder(tmp_path), "--per-class", "4"]
    base += ["--weights", str(tmp_path / "0.pth"), "--lr", "0.01", "--batch", "4", "--epochs", "1"]
    base += ["--out", str(tmp_path / "out")]
    transfer.main(base)
    if other == ["--weights"]:
        other = ["--weights", str(tmp_path / "1.pth")]
    if other == ["--data"]:
        picture("cow", 99).save(tmp_path / "data" / "ant" / "image_0001.jpg")
        other = []
    if message is None:  # a run of its own, in a file of its own
        transfer.main([*base, *other])
        assert len(list((tmp_path / "out").glob("*.pth"))) == 2
        return
    with pytest.raises(CheckpointError, match=f"is of {message}"):
        transfer.main([*base, *other])


def test_weights_of_another_architecture_are_refused(tmp_path) -> None:
    transfer = load("transfer")
    folders(tmp_path / "data", 4)
    torch.save(small_zfnet(without=("fc7",)).state_dict(), tmp_path / "other.pth")
    torch.save(small_zfnet(7).state_dict(), tmp_path / "classes.pth")
    base = [*on_folder(tmp_path), "--out", str(tmp_path / "t")]
    with pytest.raises(WeightsError, match="other.pth does not fit the Sequential; missing: fc7.weight, fc7.bias"):
        transfer.main([*base, "--weights", str(tmp_path / "other.pth")])
    with pytest.raises(WeightsError, match="has 7 classes, the model 10 .*give --model module:factory"):
        transfer.main([*base, "--weights", str(tmp_path / "classes.pth")])
    assert not (tmp_path / "t").exists()


def test_transfer_refuses(tmp_path) -> None:
    transfer = load("transfer")
    folders(tmp_path / "data", 4)
    base = [*on_folder(tmp_path), "--out", str(tmp_path / "t")]
    with pytest.raises(InvalidInput, match="expected --weights or --scratch, and not both"):
        transfer.main(base)
    with pytest.raises(InvalidInput, match="class 'ant' has 4 pictures; expected more than 9: lower --per-class"):
        transfer.main([*base, "--scratch", "--per-class", "9"])
    for option in ("--epochs", "--batch", "--per-class", "--test-per-class", "--size"):
        with pytest.raises(InvalidInput, match="are counts; expected 1 or more"):
            transfer.main([*base, "--scratch", option, "0"])
    for dataset in ("caltech101", "caltech256", "voc2012", "folder"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InvalidInput, match=f"does not hold {dataset} .*; expected"):
            transfer.main([*base, "--scratch", "--dataset", dataset, "--data", str(tmp_path / "empty")])


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    transfer = load("transfer")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 900, 3))
    batches = [(torch.randn(6, 3, 32, 32) + 5, torch.arange(6) % 3)]

    def moved() -> bool:
        before = model[1].running_mean.clone()
        transfer.run(model, batches, "cpu", torch.optim.SGD(model[3].parameters(), 0.01))
        return not torch.equal(before, model[1].running_mean)

    assert moved()
    model.requires_grad_(False)
    model[3].requires_grad_(True)
    assert not moved()


def test_frozen_trains_the_head_alone(tmp_path, monkeypatch) -> None:
    transfer = load("transfer")
    folders(tmp_path / "data", 6)
    weights = tmp_path / "w.pth"
    torch.manual_seed(0)
    torch.save(small_zfnet().state_dict(), weights)
    trained = []
    monkeypatch.setattr(transfer, "new_head", lambda m, k, real=transfer.new_head: (trained.append(m), real(m, k))[1])
    transfer.main(
        [*on_folder(tmp_path), "--weights", str(weights), "--frozen", "--per-class", "4", "--epochs", "1"]
        + ["--out", str(tmp_path / "t")]
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
    assert list(results) == ["relu1", "fc8"] and list(results["relu1"]) == ["svm", "softmax"]
    assert min(results["relu1"].values()) > 60  # colours are seen at once
    assert capsys.readouterr().out.startswith("relu1: svm ")


def test_linear_classifiers_have_the_minimum_of_their_loss() -> None:
    """Two points at distance 2 in one dimension."""
    linear = load("features_by_depth").linear
    points, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    svm = linear("svm", points, labels, 2, c=3.0)
    # for each class: minimise w²/2 + c·(1 - w)², so w = 2c / (1 + 2c), b = 0
    torch.testing.assert_close(svm.weight.detach(), torch.tensor([[-6 / 7], [6 / 7]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(svm.bias.detach(), torch.zeros(2), atol=1e-4, rtol=0)
    # weights -w and w: minimise w² + c·log(1 + exp(-2w)), so w = c / (1 + exp(2w))
    w = float(linear("softmax", points, labels, 2, c=3.0).weight[1])
    assert w == pytest.approx(3 / (1 + np.exp(2 * w)), abs=1e-4)


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
    """Interrupted, it goes on; what was seen of another training is refused."""
    out, whole = tmp_path / "watched", tmp_path / "whole"
    arguments = ["--epochs", 3, "--looks", 1, 2, 3, "--maps", 2, "--data", cifar_zip, "--out"]
    run("watch_training.py", monkeypatch, *arguments, whole)
    printed = capsys.readouterr().out
    assert printed.splitlines()[:3] == ["epoch 1", "epoch 2", "epoch 3"]
    assert "relu5" in printed and "% test" in printed
    assert sorted(path.name for path in whole.iterdir()) == ["seed0.npz", "seed0.png", "seed0.pth"]
    assert len(np.unique(np.asarray(Image.open(whole / "seed0.png").convert("L")))) > 50

    real = FeatureEvolution.__call__

    def interrupted(self, model, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        real(self, model, epoch)

    monkeypatch.setattr(FeatureEvolution, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("watch_training.py", monkeypatch, *arguments, out)
    monkeypatch.setattr(FeatureEvolution, "__call__", real)
    capsys.readouterr()
    run("watch_training.py", monkeypatch, *arguments, out)
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[2:]
    assert (out / "seed0.npz").read_bytes() == (whole / "seed0.npz").read_bytes()

    for changed, message in [
        (["--epochs", 4], "another run: seed 0, 3 epochs; expected seed 0, 4 epochs"),
        (["--maps", 3], "another maps"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            run("watch_training.py", monkeypatch, *arguments, out, *changed)
    (out / "seed0.npz").unlink()
    with pytest.raises(CheckpointError, match=r"past epochs \[1, 2, 3\], which .*seed0.npz has not seen"):
        run("watch_training.py", monkeypatch, *arguments, out)


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
    load("top9_of_a_layer").main([str(tmp_path / "data"), "--layer", "features.4", "--random", "3", "--out", str(out)])
    assert capsys.readouterr().out.startswith("features.4: 128 maps, ")
    assert len(np.unique(np.asarray(Image.open(out).convert("L")))) > 50
