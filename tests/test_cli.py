"""The command line, in process: what is written and printed, and one line for every mistake."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build
from PIL import Image
from torchvision.transforms._presets import ImageClassification

import deconvviz
from deconvviz.cli import commands, main
from deconvviz.images import displayable, to_input

NETS = """
import torch
from torch import nn
from torch.nn import functional as F

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))

def small():
    return nn.Sequential(tiny(), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv(self.relu(self.conv(x))))

class Sine(Twice):
    def forward(self, x):
        return torch.sin(self.conv(x))

class Picky(Twice):
    def forward(self, x):
        if x.shape[-1] > 32:
            raise ValueError("says no")
        return {}["nix"]

def grey():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))

class Silent(Twice):
    def forward(self, x):
        return F.relu(self.conv(x) * 0 - 1)
"""
TINY = ["--model", "nets:tiny", "--size", "32"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with factories in ``nets.py`` and two pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(NETS)
    for seed, name in enumerate(["a.png", "b.jpg"]):
        noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((100, 80), Image.Resampling.BICUBIC).save(tmp_path / name)
    yield tmp_path
    sys.modules.pop("nets", None)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def is_alive(path):
    """Whether a picture has content all over, and is not a plain square."""
    return pixels(path).std() > 5


# ── project ──────────────────────────────────────────────────────────────────────────────────────────────


def test_one_map_of_one_picture_is_the_filter_where_the_unit_is(folder, capsys):
    """A first convolution's unit, by hand: its filter at its place, times its activation."""
    place = ["--layer", "0", "--fmap", 2, "--position", "5,7", "--out", "map.png"]
    assert run("project", "a.png", *TINY, *place) == 0

    image = to_input(Image.open("a.png"), 32, round(32 * 256 / 224))
    import nets

    weight = nets.tiny()[0].weight[2].detach()
    expected = torch.zeros(3, 32, 32)
    expected[:, 5:8, 7:10] = weight * (weight * image[:, 5:8, 7:10]).sum()
    assert np.abs(pixels("map.png").astype(int) - displayable(expected)).max() <= 1
    assert capsys.readouterr() == ("wrote map.png\n", "")


def test_several_pictures_and_maps_make_a_panel(folder, capsys):
    out = folder / "new" / "panel.png"
    assert run("project", "a.png", "b.jpg", *TINY, "--layer", 3, "--fmap", 0, 5, 7, "--out", out) == 0
    width, height = Image.open(out).size
    assert width > 4 * 190 and height > 2 * 190  # the picture and three maps; two rows
    assert is_alive(out)


def test_of_small_signals_the_part_is_drawn_and_framed_in_the_picture(folder, monkeypatch):
    figures = []
    monkeypatch.setattr(commands, "save_figure", lambda figure, path: figures.append(figure))
    place = ["--position", "5,7", "--out", "maps.png"]
    assert run("project", "a.png", "b.jpg", *TINY, "--layer", 0, "--fmap", 2, 3, *place) == 0
    picture, *cells = figures[0].axes[:3]
    assert [axes.images[0].get_array().shape[:2] for axes in (picture, *cells)] == [(32, 32), (7, 7), (7, 7)]
    assert [text.get_text() for text in picture.texts] == ["2", "3"]
    assert [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in picture.patches] == [
        ((4.5, 2.5), 7, 7)
    ] * 2  # 3 x 3 pixels from column 7, row 5, and two around them
    assert len(figures[0].axes[3].patches) == 2 and not any(axes.patches for axes in cells)

    assert run("project", "a.png", "b.jpg", *TINY, "--layer", 0, "--fmap", 2, 3, "--position", "all", *place[2:]) == 0
    assert [axes.images[0].get_array().shape[:2] for axes in figures[1].axes] == [(32, 32)] * 6
    assert not any(axes.patches for axes in figures[1].axes)


def test_one_map_can_be_drawn_too():
    assert run("project", "a.png", *TINY, "--layer", 3, "--fmap", 0, "--out", "map.pdf") == 0
    assert Path("map.pdf").read_bytes().startswith(b"%PDF")


def test_the_strongest_map_is_found_for_each_picture(monkeypatch):
    drawn = {}
    monkeypatch.setattr(commands, "panel", lambda *arguments: drawn.update(labels=arguments[2]))
    monkeypatch.setattr(commands, "save_figure", lambda *_: None)
    assert run("project", "a.png", "b.jpg", *TINY, "--layer", 1, "--fmap", "strongest", "--out", "s.png") == 0
    import nets

    expected = []
    for name in ("a.png", "b.jpg"):
        image = to_input(Image.open(name), 32, round(32 * 256 / 224))
        totals = nets.tiny()[:2](image[None])[0].sum((1, 2))
        expected.append(f"{name}: map {totals.argmax()}")
    assert drawn["labels"] == expected


def test_position_and_size_are_heeded():
    for out, options in {
        "max": [],
        "all": ["--position", "all"],
        "size": ["--size", 48],
        "resize": ["--resize", 64],
    }.items():
        assert run("project", "a.png", *TINY, "--layer", 3, "--fmap", 1, "--out", f"{out}.png", *options) == 0
    assert Image.open("size.png").size == (48, 48)
    assert len({pixels(f"{name}.png").tobytes() for name in ("max", "all", "resize")}) == 3
    reached = {name: (pixels(f"{name}.png") != 128).any(-1).sum() for name in ("max", "all")}
    assert reached["all"] > 5 * reached["max"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_gets_its_own_normalisation(channels, monkeypatch):
    """What the model sees, and what the figure shows of it."""
    mean, std = [0.2, 0.3, 0.4][:channels], [0.5, 0.6, 0.7][:channels]
    seen, drawn = [], {}
    load = commands.load_model

    def watched(*arguments):
        loaded = load(*arguments)
        loaded.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        return loaded

    monkeypatch.setattr(commands, "load_model", watched)
    monkeypatch.setattr(commands, "panel", lambda *arguments: drawn.update(rows=arguments[0]))
    monkeypatch.setattr(commands, "save_figure", lambda *_: None)
    model = ["--model", "nets:grey" if channels == 1 else "nets:tiny", "--size", "32"]
    place = ["--layer", 3, "--fmap", 0, 1, "--out", "p.png"]
    assert run("project", "a.png", *model, *place, "--mean", *mean, "--std", *std) == 0

    preset = ImageClassification(crop_size=32, resize_size=round(32 * 256 / 224), mean=mean, std=std)
    picture = Image.open("a.png").convert("L" if channels == 1 else "RGB")
    assert torch.equal(seen[0], preset(picture)[None])
    crop = preset(picture) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert np.abs(drawn["rows"][0][0] - 255 * crop.numpy().transpose(1, 2, 0)).max() < 1


def test_the_panel_of_methods():
    """Guided backprop and saliency are beside it: six cells a row, a row for each map."""
    assert run("project", "a.png", *TINY, "--layer", 3, "--fmap", 0, 5, "--panel", "--out", "panel.png") == 0
    width, height = Image.open("panel.png").size
    assert width > 6 * 190 and height > 2 * 190
    assert is_alive("panel.png")


def test_weights_from_a_file_make_the_difference(capsys):
    torch.save({"state_dict": build("squeezenet1_1", seed=1).state_dict()}, "weights.pth")
    place = ["--layer", "features.4", "--fmap", 3, "--size", 64, "--out"]
    assert run("project", "a.png", "--model", "squeezenet1_1", *place, "random.png") == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "random" in warning
    assert run("project", "a.png", "--model", "squeezenet1_1", "--weights", "weights.pth", *place, "a1.png") == 0
    assert capsys.readouterr().err == ""
    assert (pixels("random.png") != pixels("a1.png")).any()
    assert is_alive("random.png") and is_alive("a1.png")


@pytest.mark.parametrize("panel", [(), ("--panel",)])
def test_the_strongest_map_beside_others(panel):
    options = ["--model", "nets:tiny", "--size", 32, "--layer", 3, *panel, "--out"]
    assert run("project", "a.png", *options, "both.png", "--fmap", 5, "strongest") == 0
    assert is_alive("both.png")


def test_a_map_of_which_nothing_comes_back_is_told(capsys):
    options = ["--model", "nets:Silent", "--size", 32, "--layer", "", "--fmap", 1, "--out", "grey.png"]
    assert run("project", "a.png", *options) == 0
    warning = capsys.readouterr().err
    assert "nothing of map 1 of the model comes back to the pixels of a.png" in warning and "stop its signal" in warning
    assert (pixels("grey.png") == 128).all()


def test_an_unsupported_operation_can_be_taken_by_its_gradient():
    options = ["--model", "nets:Sine", "--size", 32, "--layer", "", "--fmap", 1, "--out", "sine.png"]
    assert run("project", "a.png", *options) == 2
    assert run("project", "a.png", *options, "--on-unsupported", "gradient") == 0
    assert (pixels("sine.png") != 128).any()


# ── check and layers ─────────────────────────────────────────────────────────────────────────────────────


def test_layers_lists_every_call_with_its_address_type_and_shape(capsys):
    assert run("layers", "--model", "nets:Twice", "--size", 20) == 0
    assert [re.split("  +", line) for line in capsys.readouterr().out.splitlines()] == [
        ["layer", "type", "output"],
        ["conv#1", "Conv2d", "(1, 3, 20, 20)"],
        ["relu#1", "ReLU", "(1, 3, 20, 20)"],
        ["conv#2", "Conv2d", "(1, 3, 20, 20)"],
        ["relu#2", "ReLU", "(1, 3, 20, 20)"],
        ["(the model)", "Twice", "(1, 3, 20, 20)"],
    ]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("resnet18", "layer1.0.relu#2 ReLU (1, 64, 16, 16)"),
        ("r3d_18", "layer4.1.relu Re"),
        ("fcn_resnet50", "classifier.4 Conv2d (1, 21, 8, 8)"),
    ],
)
def test_layers_of_torchvision(name, row, capsys):
    assert run("layers", "--model", name, "--size", 64) == 0
    out, err = capsys.readouterr()
    assert any(" ".join(line.split()).startswith(row) for line in out.splitlines())
    assert err == ""


def test_check_prints_the_table_and_fails_on_an_operation_without_a_rule(capsys):
    assert run("check", "--model", "squeezenet1_1", "--size", 64) == 0
    assert "30 exact" in capsys.readouterr().out
    assert run("check", "--model", "nets:Sine", "--size", 32) == 1
    assert "sin" in capsys.readouterr().out
    assert run("check", "--model", "nets:Sine", "--size", 32, "--on-unsupported", "gradient") == 0


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────

PROJECT = ["project", "a.png", *TINY, "--out", "out.png"]
UNIT = ["--layer", "3", "--fmap", "1"]
MISTAKES = {
    "no command": ([], "arguments are required: COMMAND"),
    "unknown command": (["paint"], "invalid choice: 'paint'"),
    "no model": (["check"], "required: --model"),
    "unknown model": (["check", "--model", "resnet81"], "did you mean resnet18"),
    "failing factory": (["check", "--model", "nets:nix"], "AttributeError"),
    "unknown weights": (["check", "--model", "resnet18", "--weights", "V7"], "IMAGENET1K_V1"),
    "unknown device": (["check", *TINY, "--device", "nix"], "no device 'nix'"),
    "device of an absent backend": (["check", *TINY, "--device", "hpu"], "no device 'hpu'"),
    "device without content": (["check", *TINY, "--device", "meta"], "no device 'meta'"),
    "quality": (["explore", "photos", *TINY, "--layers", "3", "--quality", "500", "--out", "o"], "expected 1 to 95"),
    "no pixels": (["check", *TINY, "--size", "0"], "'0'; expected 1 pixel or more"),
    "too small an input": (["layers", "--model", "nets:tiny", "--size", "2"], "(1, 3, 2, 2)"),
    "the size left out": (["layers", "--model", "nets:small"], "; --size, --mean and --std say how pictures"),
    "the size left out of project": (
        ["project", "a.png", "--model", "nets:small", "--out", "o.png", "--layer", "0", "--fmap", "1"],
        "; --size, --mean and --std say how pictures",
    ),
    "a model of two pictures": (["layers", "--model", "raft_small", "--size", "64"], "dtype and device\n"),
    "a model's own error": (["filters", "a.png", "--model", "nets:Picky"], "says no; --size, --mean and --std"),
    "an error that no size mends": (["check", "--model", "nets:Picky", "--size", "32"], "KeyError: 'nix'\n"),
    "grey pictures for RGB": ([*PROJECT, *UNIT, "--mean", "0.5", "--std", "0.5"], "(1, 1, 32, 32)"),
    "a mean alone": ([*PROJECT, *UNIT, "--mean", "0.5"], "--mean and --std go together"),
    "no deviation": ([*PROJECT, *UNIT, "--mean", "0", "--std", "0"], "std above 0"),
    "two channels": ([*PROJECT, *UNIT, "--mean", "0", "0", "--std", "1", "1"], "three for RGB"),
    "not a mean": ([*PROJECT, *UNIT, "--mean", "x", "--std", "1"], "'x'; expected a finite number"),
    "a clip is needed": (
        ["project", "a.png", "--model", "r3d_18", "--out", "o.png", *UNIT],
        "failed on an input",
    ),
    "missing picture": (["project", "nix.png", *TINY, *UNIT, "--out", "out.png"], "nix.png cannot be opened"),
    "not a picture": (["project", "nets.py", *TINY, *UNIT, "--out", "out.png"], "nets.py is not a picture"),
    "unknown layer": ([*PROJECT, "--layer", "9", "--fmap", "1"], "no layer '9'"),
    "layer called twice": (
        ["project", "a.png", "--model", "nets:Twice", "--size", "32", "--out", "o.png", "--layer", "relu"]
        + ["--fmap", "1"],
        "'relu#1', 'relu#2'",
    ),
    "map out of range": ([*PROJECT, "--layer", "3", "--fmap", "8"], "expected 0 to 7"),
    "not a map": ([*PROJECT, "--layer", "3", "--fmap", "x"], "'x'; expected a map's number, or 'strongest'"),
    "position out of range": ([*PROJECT, *UNIT, "--position", "0,99"], "outside a map of 13 x 13 cells"),
    "position of one number": ([*PROJECT, *UNIT, "--position", "1"], "expected 'max', 'all', (y, x)"),
    "position from the end": ([*PROJECT, *UNIT, "--position", "-1,2"], "as in --position=-1,2"),
    "not a position": (
        [*PROJECT, *UNIT, "--position", "top"],
        "'top'; expected 'max', 'all', or map cells Y,X",
    ),
    "size above resize": ([*PROJECT, *UNIT, "--resize", "16"], "expected 1 <= size <= resize"),
    "unknown format": (["project", "a.png", *TINY, *UNIT, "--out", "o.bmp"], "'o.bmp' does not end in"),
    "a folder in the way": (
        ["project", "a.png", *TINY, *UNIT, "--out", "nets.py/o.png"],
        "cannot be written",
    ),
    "panel elsewhere": ([*PROJECT, *UNIT, "--panel", "--position", "all"], "--panel shows"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_code_2(arguments, message, capsys, folder):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deconvviz: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert {path.name for path in folder.iterdir()} <= {"a.png", "b.jpg", "nets.py", "__pycache__"}


def test_a_mistake_leaves_the_old_picture_as_it_was(folder):
    (folder / "out.png").write_bytes(b"old")
    assert run(*PROJECT, "--layer", 3, "--fmap", 8) == 2
    assert (folder / "out.png").read_bytes() == b"old"


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [Payload(), {"0.weight": Payload()}], ids=["bare", "inside"])
@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
def test_weights_that_run_code_are_refused_and_not_run(kind, content, capsys, folder):
    if kind == "pickle":
        Path("evil.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "evil.pth")
    assert run(*PROJECT, *UNIT, "--weights", "evil.pth") == 2
    err = capsys.readouterr().err
    assert "evil.pth is not a file of tensors alone" in err and err.count("\n") == 1
    assert not (folder / "executed").exists()

    if kind == "pickle":  # the payload works where nothing stops it
        pickle.loads(Path("evil.pth").read_bytes())
    else:
        torch.load("evil.pth", weights_only=False)
    assert (folder / "executed").exists()


def test_a_failed_download_is_one_line(monkeypatch, capsys):
    def refuse(*arguments, **keywords):
        raise OSError("no network here")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert run("check", "--model", "resnet18", "--weights", "DEFAULT") == 2
    err = capsys.readouterr().err
    assert "no network here" in err and err.count("\n") == 1


def test_ctrl_c_is_130_and_silent(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_model", interrupt)
    assert run("check", *TINY) == 130
    assert capsys.readouterr() == ("", "")


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(commands, "watch", lambda *a, **k: (None, None))
    with pytest.raises(AttributeError):
        run("layers", *TINY)


# ── as a program ─────────────────────────────────────────────────────────────────────────────────────────


def test_python_m_deconvviz():
    command = [sys.executable, "-m", "deconvviz", "check", "--model", "resnet81"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("deconvviz: no model 'resnet81'") and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "deconvviz", "layers", "--model", "nets:tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_closed_output_is_no_error():
    command = f"{sys.executable} -m deconvviz layers --model nets:tiny >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_no_error():
    command = f'"{sys.executable}" -m deconvviz layers --model nets:tiny >&-'
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, env=environment())
    assert (done.returncode, done.stderr) == (0, b"")


def environment():
    return os.environ | {"PYTHONPATH": str(Path(commands.__file__).parents[2])}


@pytest.mark.parametrize("arguments", [[], ["demo"], ["project"], ["check"], ["layers"]])
def test_help_is_no_mistake(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(*arguments, "--help")
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert out.startswith("usage: deconvviz")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        run("--version")
    assert (end.value.code, capsys.readouterr().out) == (0, f"deconvviz {deconvviz.__version__}\n")
