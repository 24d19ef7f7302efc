"""``deconvviz occlude``, in process: what is written and said, and one line for every mistake."""

import numpy as np
import pytest
from PIL import Image
from test_cli import folder, run  # noqa: F401

from deconvviz import OcclusionSensitivity
from deconvviz.images import to_input
from deconvviz.occlusion import maps as maps_module

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
"""
TINY = ["--model", "nets:net", "--size", "32", "--patch", 8, "--stride", 8]


@pytest.fixture(autouse=True)
def net(folder):  # noqa: F811
    with (folder / "nets.py").open("a") as file:
        file.write(NET)
    (folder / "names.txt").write_text("ant\nbee, wasp\ncat\ndog\neel\n")


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, in order: the maps, and the labels."""
    calls, draw = [], maps_module.figure7

    def note(maps, image, labels, *more):
        calls.append((maps, labels))
        return draw(maps, image, labels, *more)

    monkeypatch.setattr(maps_module, "figure7", note)
    return calls


def test_a_row_of_one_picture(folder, capsys, drawn):  # noqa: F811
    names = ["--labels", "names.txt", "--target", "cat", 4]
    assert run("occlude", "a.png", *TINY, *names, "--out", "new/row.png") == 0
    assert capsys.readouterr().out.splitlines() == [
        "layer 4: the last one with maps of several cells", "wrote new/row.png",
    ]  # fmt: skip
    width, height = Image.open("new/row.png").size
    assert width > 4 * height and np.asarray(Image.open("new/row.png")).std() > 20
    import nets

    image = to_input(Image.open("a.png"), 32, round(32 * 256 / 224))[None]
    expected = OcclusionSensitivity(nets.net().eval()).maps(image, 8, 8, "4", targets=[2, 4])
    ((maps, labels),) = drawn
    assert labels == ["ant", "bee, wasp", "cat", "dog", "eel"]
    assert maps.targets.tolist() == [[2, 4]] and np.allclose(maps.score_cells, expected.score_cells)
    assert np.allclose(maps.activation_cells, expected.activation_cells, rtol=1e-5)


def test_several_pictures_are_numbered_and_options_heeded(folder, capsys, drawn):  # noqa: F811
    options = ["--layer", "0", "--fmap", 3, "--fill", "blur", "--score", "logit"]
    assert run("occlude", "a.png", "b.jpg", *TINY, *options, "--out", "o.pdf") == 0
    assert capsys.readouterr().out.splitlines() == ["wrote o-1.pdf", "wrote o-2.pdf"]
    assert {path.name for path in folder.glob("*.pdf")} == {"o-1.pdf", "o-2.pdf"}
    assert [(m.layer, int(m.fmaps[0]), m.score) for m, _ in drawn] == [("0", 3, "logit")] * 2
    assert drawn[0][1] is None and not np.allclose(drawn[0][0].score_cells, drawn[1][0].score_cells)


def test_random_weights_are_said_to_be_so(capsys):
    options = ["--model", "squeezenet1_1", "--size", 64, "--patch", 32, "--stride", 32]
    assert run("occlude", "a.png", *options, "--out", "o.png") == 0
    out, err = capsys.readouterr()
    assert "layer classifier.2:" in out and "weights are random" in err


MISTAKES = {
    "no output": ([], "required: --out"),
    "unknown layer": (["--layer", "9", "--out", "o.png"], "no layer '9'"),
    "map out of range": (["--fmap", "8", "--out", "o.png"], "expected 0 to 7"),
    "target out of range": (["--target", "5", "--out", "o.png"], "classes 0 to 4"),
    "a name without names": (["--target", "cat", "--out", "o.png"], "give --labels"),
    "unknown name": (["--target", "cap", "--labels", "names.txt", "--out", "o.png"], "did you mean 'cat'"),
    "a name in capitals": (["--target", "CAT", "--labels", "names.txt", "--out", "o.png"], "did you mean 'cat'"),
    "missing names": (["--labels", "nix.txt", "--out", "o.png"], "--labels nix.txt cannot be read (No such file"),
    "names that are a picture": (["--labels", "b.jpg", "--out", "o.png"], "not a text file"),
    "patch too large": (["--patch", "33", "--out", "o.png"], "does not fit images of 32 x 32"),
    "no stride": (["--stride", "0", "--out", "o.png"], "expected 1 pixel or more"),
    "unknown fill": (["--fill", "grey", "--out", "o.png"], "'grey'; expected a finite number or one of mean"),
    "no fill": (["--fill", "nan", "--out", "o.png"], "'nan'; expected a finite number or one of mean"),
    "endless fill": (["--fill", "inf", "--out", "o.png"], "'inf'; expected a finite number or one of mean"),
    "target from the end": (["--target", "-1", "--out", "o.png"], "classes 0 to 4"),
    "unknown score": (["--score", "odds", "--out", "o.png"], "invalid choice: 'odds'"),
    "no maps": (["--model", "nets:flat", "--out", "o.png"], "choose one with --layer"),
    "no classes": (["--model", "nets:tiny", "--out", "o.png"], "scores (N, classes)"),
    "too small an input": (["--size", "2", "--patch", "1", "--out", "o.png"], "(1, 3, 2, 2)"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_code_2(arguments, message, capsys, folder):  # noqa: F811
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    assert run("occlude", "a.png", *TINY, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("deconvviz: ") and err.count("\n") == 1 and message in err
    assert {path.name for path in folder.iterdir()} <= before
