"""``deconvviz grid`` and ``explore``, in process and under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import NETS

from deconvviz.cli import main

OPTIONS = ["--model", "nets:tiny", "--size", "32", "--layers", "1", "3"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with a factory in ``nets.py`` and pictures in ``photos``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "photos").mkdir()
    for seed in range(12):
        noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((60, 48), Image.Resampling.BICUBIC).save(f"photos/{seed:02}.png")
    Path("photos/05.png").write_bytes(b"broken")
    yield tmp_path
    sys.modules.pop("nets", None)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_grid_writes_a_figure_for_each_layer_and_lists_broken_pictures(capsys):
    assert run("grid", "photos", *OPTIONS, "--out", "found", "--batch-size", 4) == 0
    out, err = capsys.readouterr()
    assert out == "wrote found/0-1.png\nwrote found/1-3.png\n"
    assert "left out: 05.png: PictureError: " in err
    assert np.asarray(Image.open("found/1-3.png").convert("RGB")).std() > 20
    assert {path.name for path in Path("found").iterdir()} == {"0-1.png", "1-3.png", "grid.npz"}


def test_maps_can_be_chosen():
    assert run("grid", "photos", *OPTIONS, "--out", "all", "--maps", 0, 1, 2, 3) == 0
    assert run("grid", "photos", *OPTIONS, "--out", "one", "--maps", 2) == 0
    assert run("grid", "photos", *OPTIONS, "--out", "random", "--random", 1) == 0
    widths = {name: Image.open(f"{name}/0-1.png").width for name in ("all", "one", "random")}
    assert widths["one"] >= 2 * 3 * 96  # no cell of the mosaics is drawn smaller than it is
    assert widths["all"] > 3 * widths["one"] and widths["random"] == widths["one"]


def test_explore_writes_the_page_and_goes_on_from_what_is_there(capsys):
    assert run("explore", "photos", *OPTIONS, "--out", "page", "--limit", 8, "--no-control") == 0
    assert capsys.readouterr().out == "open page/index.html\n"
    first = Path("page/grid.npz").read_bytes()
    assert run("explore", "photos", *OPTIONS, "--out", "page", "--limit", 8) == 0
    assert Path("page/layers/1/map-7.jpg").exists()
    assert len(Path("page/grid.npz").read_bytes()) == len(first)


def test_grey_pictures_with_a_normalisation_of_their_own():
    grey = ["--model", "nets:grey", *OPTIONS[2:], "--mean", 0.2, "--std", 0.3]
    assert run("explore", "photos", *grey, "--out", "page", "--limit", 4, "--no-control") == 0
    from deconvviz.images import to_input

    pixels = np.asarray(Image.open("page/images/0.jpg")).astype(int)
    crop = 255 * (0.2 + 0.3 * to_input(Image.open("photos/00.png"), 32, round(32 * 256 / 224), [0.2], [0.3]))
    assert np.abs(pixels - crop.numpy().transpose(1, 2, 0)).mean() < 6  # JPEG
    assert run("explore", "photos", *grey[:-1], 0.4, "--out", "page", "--limit", 4) == 2


MISTAKES = {
    "a model's own error": (["grid", "photos", "--model", "nets:Picky", *OPTIONS[2:], "--out", "o"], "KeyError: 'nix'"),
    "three channels for one": (["grid", "photos", "--model", "nets:grey", *OPTIONS[2:], "--out", "o"], "--mean and"),
    "other layers": (["explore", "photos", *OPTIONS[:-1], "--out", "page"], "is of another layers"),
    "no folder": (["grid", "nix", *OPTIONS, "--out", "o"], "nix is not a folder"),
    "no picture": (["grid", "empty", *OPTIONS, "--out", "o"], "holds no picture"),
    "out among the pictures": (
        ["grid", "photos", *OPTIONS, "--out", "photos/../photos/o"],
        "is inside photos",
    ),
    "unknown layer": (["grid", "photos", *OPTIONS[:-1], "9", "--out", "o"], "no layer '9'"),
    "map out of range": (["grid", "photos", *OPTIONS, "--out", "o", "--maps", "77"], "expected 0 to 3"),
    "no units": (["grid", "photos", *OPTIONS, "--out", "o", "--k", "0"], "'0'; expected 1 or more"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_code_2(arguments, message, capfd):
    Path("empty").mkdir()
    assert run("explore", "photos", *OPTIONS, "--out", "page", "--limit", 2) == 0
    capfd.readouterr()
    assert main(arguments) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("deconvviz: ")]
    assert message in errors[-1]


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}])
def test_half_a_torchrun(monkeypatch, environment, capfd):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["explore", "photos", *OPTIONS, "--out", "page"]) == 2
    assert "WORLD_SIZE and what torchrun sets" in capfd.readouterr().err


def test_a_port_that_is_taken(monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        group = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        assert main(["explore", "photos", *OPTIONS, "--out", "page"]) == 2
    assert "WORLD_SIZE and what torchrun sets" in capfd.readouterr().err


def test_torchrun_shares_the_pictures(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "deconvviz", "explore", "photos", *OPTIONS, "--out", "page"]
    package = str(Path(__file__).parent.parent)
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "open page/index.html\n"
    assert {path.name for path in Path("page").glob("grid*")} == {"grid.0of2.npz", "grid.1of2.npz"}
