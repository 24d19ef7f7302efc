"""The page: its folder, its size, and what it does in a browser."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_filter_grid import fit, images
from torch import nn
from torchvision.transforms import ToTensor

import deconvviz
from deconvviz.errors import InvalidInput, PictureError
from deconvviz.explorer import Sizes

HOSTILE = """"><img src=x onerror=window.hacked=1>'.png"""
LAYER = "</script><img src=x onerror=hacked=1>"


def pictures(folder: Path, n: int = 12, side: int = 32) -> Path:
    folder.mkdir()
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        name = HOSTILE if i == 3 else f"{i:02}.png"
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def model(maps: int = 70) -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 5, 5, padding=2), LAYER: nn.ReLU(), "pool": nn.MaxPool2d(2)}
    found = nn.Sequential()
    for name, layer in {**layers, "late": nn.Conv2d(5, maps, 3), "relu": nn.ReLU()}.items():
        found.add_module(name, layer)
    with torch.no_grad():
        found.late.bias.fill_(1)
        found.late.bias[7] = -100
    return found.eval()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    grid = fit(pictures(folder / "pictures"), [LAYER, "relu"], model(), transform=ToTensor())
    return grid.explore(folder / "out", title="A <b>title</b>")


def data_of(page: Path, layer: int) -> dict:
    text = (page.parent / "layers" / str(layer) / "data.js").read_text()
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])


def test_the_folder_holds_a_page_sheets_and_data(page):
    root = page.parent
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert {"index.html", "layers/0/data.js", "layers/1/map-69.jpg", "layers/1/wall-1-i.jpg"} <= names
    assert len([name for name in names if name.startswith("layers/1/map-")]) == 70
    data = data_of(page, 1)
    assert {f"images/{n}.jpg" for n in data["names"]} <= names
    assert Image.open(root / "layers/1/map-0.jpg").size == (3 * 3 * 64, 3 * 64)
    assert Image.open(root / "layers/1/wall-0-p.jpg").size == (8 * 96, 8 * 96)


def test_the_data_is_the_grids(page, tmp_path):
    grid = fit(pictures(tmp_path / "pictures"), ["relu"], model(), transform=ToTensor())
    data, found = data_of(page, 1), grid["relu"][3]
    assert data["images"][3] == list(found.images)
    assert data["boxes"][3] == [[*y, *x] for y, x in found.boxes]
    assert data["values"][3] == pytest.approx(found.values, rel=1e-3)
    assert [data["names"][str(n)] for n in found.images] == list(found.names)
    assert data["active"][7] == 0 and sum(data["histogram"][3]) == 12


def test_sheets_show_the_projections(page, tmp_path):
    """A tile of a sheet against the projection it is to show."""
    from deconvviz.explorer.sheets import PERCENTILE
    from deconvviz.grid.feature_map import fitted
    from deconvviz.images import displayable

    grid = fit(pictures(tmp_path / "pictures"), ["relu"], model(), transform=ToTensor())
    sheet = np.asarray(Image.open(page.parent / "layers/1/map-3.jpg")).astype(float)
    for rank, projection in enumerate(grid["relu"][3].projections):
        y, x = 64 * (rank // 3), 64 * (rank % 3)
        expected = fitted(displayable(projection, percentile=PERCENTILE), 64).astype(float)
        both = np.stack([sheet[y : y + 64, x : x + 64].mean(2).ravel(), expected.mean(2).ravel()])
        assert np.corrcoef(both)[0, 1] > 0.9  # JPEG keeps the light, and less of the colours


def test_pictures_of_two_channels_are_grey(tmp_path):
    page = fit(torch.randn(4, 2, 20, 20), ["0"], nn.Sequential(nn.Conv2d(2, 3, 3))).explore(tmp_path)
    assert page.is_file() and len(list(tmp_path.glob("images/*"))) == 4


def test_what_it_cannot_show(tmp_path):
    with pytest.raises(InvalidInput, match="1 spatial axes; the page shows pictures"):
        fit(torch.randn(4, 2, 20), ["0"], nn.Sequential(nn.Conv1d(2, 3, 3))).explore(tmp_path / "a")
    assert not list(tmp_path.glob("*/index.html"))
    for sizes in ({"tile": 0}, {"quality": 500}):
        with pytest.raises(InvalidInput, match="1 pixel or more, and a quality of 1 to 95"):
            Sizes(**sizes)
    with pytest.raises(InvalidInput, match=r"sizes is \(1, 2\); expected a deconvviz.explorer.Sizes"):
        fit(images(2, 20)).explore(tmp_path, control=False, sizes=(1, 2))


@pytest.mark.parametrize("out", ["file", "file/folder"])
def test_a_file_in_the_way(out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match="cannot be written"):
        fit(images(4, 8), ["0"], nn.Sequential(nn.Conv2d(3, 4, 3))).explore(tmp_path / out)


def test_no_more_tiles_than_images(tmp_path, monkeypatch, capsys):
    """A grid of 300 units a map over 12 pictures has sheets for 12; and few maps at a time are as many at once."""
    grid = fit(images(12, size=32), ["4"], k=300)
    whole = grid.explore(tmp_path / "whole", control=False)
    assert "4: 100%" in capsys.readouterr().err
    width, height = Image.open(whole.parent / "layers" / "0" / "map-0.jpg").size
    assert (width, height) == (2 * 4 * 64, 3 * 64)
    monkeypatch.setattr("deconvviz.explorer.TILES_AT_ONCE", 1)
    parts = grid.explore(tmp_path / "parts", control=False, progress=False)
    assert capsys.readouterr().err == ""
    for one, other in zip(sorted(whole.parent.rglob("*.jpg")), sorted(parts.parent.rglob("*.jpg")), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_quality_and_control_are_adjustable(tmp_path):
    grid, size = fit(images(size=32), ["4"]), {}
    for name, options in {"plain": {}, "small": {"control": False, "sizes": Sizes(32, 48, 60, 30)}}.items():
        root = grid.explore(tmp_path / name, **options).parent
        size[name] = sum(path.stat().st_size for path in root.rglob("*.jpg"))
    assert size["small"] < size["plain"] / 2


@pytest.mark.slow
def test_the_built_wheel_in_a_clean_environment_writes_the_same_page(page, tmp_path):
    """Its dependencies are those of this environment, found behind its own packages."""
    source, copy = Path(deconvviz.__file__).parent, tmp_path / "source"
    shutil.copytree(source, copy / "deconvviz", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source.parent / name, copy)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", tmp_path, copy], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip()[-200:]}")
    venv.create(tmp_path / "clean", symlinks=True)
    python = tmp_path / "clean" / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    script = (
        "from test_explorer import *; import deconvviz; print(deconvviz.__file__)\n"
        "grid = fit(pictures(Path('pictures')), [LAYER, 'relu'], model(), transform=ToTensor())\n"
        "grid.explore('out', title='A <b>title</b>')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ran = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert Path(ran.stdout.strip()).is_relative_to(packages)
    theirs, ours = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "out", page.parent)
    )
    assert theirs == ours


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, if the machine has it."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser test")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver: no browser test")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield found
    found.quit()


def opened(browser, page, hash=""):
    browser.get("about:blank")
    browser.get(page.as_uri() + hash)
    until(
        lambda: browser.execute_script(
            "return !document.getElementById('wall').hidden || !document.getElementById('map').hidden"
        )
    )
    return lambda script: browser.execute_script("return " + script)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


def press(browser, key):
    from selenium.webdriver.common.keys import Keys

    browser.find_element("tag name", "body").send_keys(getattr(Keys, key, key))


def test_it_opens_from_a_file_quietly(browser, page):
    browser.get_log("browser"), browser.get_log("performance")
    ask = opened(browser, page)
    assert ask("document.querySelectorAll('#layers a').length") == 2
    assert ask("document.querySelectorAll('#tiles a').length") == 5
    opened(browser, page, "#relu/3")
    until(lambda: ask("[...document.images].every((i) => i.complete && i.naturalWidth > 0)"))
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file://", "data:", "about:", "chrome")) for url in asked)
    failed = [e for e in events if e["method"] == "Network.loadingFailed"]
    assert not failed


def test_the_wall_loads_its_sheets_as_it_scrolls(browser, page):
    ask = opened(browser, page, "#relu")
    last = "document.querySelector('#tiles li:last-child .layer').style.backgroundImage"
    assert ask("document.querySelectorAll('#tiles a').length") == 70
    ask("scrollTo(0, document.body.scrollHeight)")
    until(lambda: "wall-1-p.jpg" in ask(last))
    assert ask("document.querySelectorAll('#tiles .dead').length") == 1


def test_one_of_a_kind_is_counted_as_one(browser, page):
    ask = opened(browser, page, "#relu")
    assert "12 images, 1 dead map. " in ask("document.getElementById('wall-facts').textContent")
    browser.find_element("id", "search").send_keys("64")
    assert ask("document.getElementById('status').textContent") == "1 map of relu"


def test_a_long_layer_name_breaks_behind_a_dot(browser, page):
    ask = opened(browser, page)
    assert ask("breakable('layer1.0.relu').map((part) => part.nodeName ?? part).join('|')") == (
        "layer1.|WBR|0.|WBR|relu|WBR"
    )


def test_the_histogram_is_labelled_by_its_edges(browser, page):
    ask = opened(browser, page, "#relu/3")
    labels = ask("[...document.querySelectorAll('#histogram text')].map((text) => text.textContent)")
    assert labels[1:] == ["0.003906", "0.0625", "1", "16", "256"]


def test_search_sorting_and_keys(browser, page):
    ask = opened(browser, page, "#relu")
    search = browser.find_element("id", "search")
    search.send_keys("6")
    assert ask("[...document.querySelectorAll('#tiles a')].map((a) => a.hash.split('/')[1]).join()") == (
        "6,60,61,62,63,64,65,66,67,68,69"
    )
    search.send_keys("4\n")
    until(lambda: ask("document.getElementById('map-name').textContent") == "relu, map 64")
    press(browser, "ARROW_RIGHT")
    until(lambda: ask("location.hash") == "#relu/65" and ask("document.title") == "relu, map 65")
    press(browser, "ESCAPE")
    until(lambda: not ask("document.getElementById('wall').hidden"))
    browser.find_element("id", "search").clear()
    for order, first in {"dead": "7", "number": "0"}.items():
        browser.find_element("css selector", f"#sort option[value={order}]").click()
        until(lambda first=first: ask("document.querySelector('#tiles a').hash") == f"#relu/{first}")
    browser.find_element("css selector", "[value=o]").click()
    assert ask("document.querySelectorAll('#tiles li:first-child .layer').length") == 2


@pytest.mark.parametrize("hash", ["#nix", "#relu/999", "#%zz", "#relu/3/4", "#"])
def test_a_wrong_link_shows_a_wall(browser, page, hash):
    ask = opened(browser, page, hash)
    assert not ask("document.getElementById('wall').hidden")


def test_hostile_names_do_nothing(browser, page):
    number = next(int(n) for n, name in data_of(page, 0)["names"].items() if name == HOSTILE)
    fmap = next(m for m, numbers in enumerate(data_of(page, 0)["images"]) if number in numbers)
    from urllib.parse import quote

    ask = opened(browser, page, f"#{quote(LAYER, safe='')}/{fmap}")
    assert ask("document.getElementById('map-name').textContent") == f"{LAYER}, map {fmap}"
    assert HOSTILE in ask("document.getElementById('units').textContent")
    assert ask("document.querySelector('h1').textContent") == "A <b>title</b>"
    time.sleep(0.3)
    assert ask("window.hacked") is None
    assert ask("document.querySelectorAll('img[onerror], img[src=x], nav b').length") == 0


def test_two_thousand_maps_stay_smooth(browser, tmp_path):
    grid = fit(images(4, 8), ["0"], nn.Sequential(nn.Conv2d(3, 2048, 3)), k=1)
    page = grid.explore(tmp_path / "out", control=False, sizes=Sizes(16, 16, 16, 50))
    ask = opened(browser, page)
    assert ask("document.querySelectorAll('#tiles a').length") == 2048
    seconds = ask("(() => { const a = performance.now(); redraw(); return performance.now() - a; })()") / 1000
    assert seconds < 1
    loaded = "[...document.querySelectorAll('#tiles .layer')].filter((n) => n.style.backgroundImage).length"
    time.sleep(0.3)
    assert ask(loaded) < 600  # lazily: what is near the window


def test_names_and_roles_for_a_screen_reader(browser, page):
    ask = opened(browser, page, "#relu")
    assert ask("document.querySelector('#tiles a').getAttribute('aria-label')").startswith("Map 0, fires in ")
    assert ask("document.querySelectorAll('#tools label').length") >= 5
    assert ask("document.querySelector('#layers [aria-current]').textContent").startswith("relu")
    assert "70 maps" in ask("document.getElementById('status').textContent")
    opened(browser, page, "#relu/3")
    assert ask("[...document.images].every((i) => i.alt)")
