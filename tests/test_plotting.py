"""Panels: what each cell shows and says, and that matplotlib's global state is left alone."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from deconvviz import plotting
from deconvviz.errors import InvalidInput, PictureError
from deconvviz.images import display_scale, displayable, load_picture, to_pixels
from deconvviz.plotting import METHODS, comparison_panel, panel, save_figure

GREY = np.full((8, 8, 3), 128, dtype=np.uint8)


@dataclass(frozen=True)
class Comparison:
    label: str
    image: Tensor
    deconvnet: Tensor
    saliency: Tensor
    guided_backprop: Tensor
    randomized: Tensor


def comparison(label="features.10 map 42"):
    generator = torch.Generator().manual_seed(0)
    image, deconvnet, saliency, guided = (torch.randn(3, 16, 16, generator=generator) for _ in range(4))
    return Comparison(label, image, deconvnet, saliency.abs()[:1], 100 * guided, torch.zeros(3, 16, 16))


def shown(axes):
    """The pixels in a cell, or None."""
    return axes.images[0].get_array() if axes.images else None


def test_cells_titles_labels_and_scales():
    pictures = [[np.full((4, 6, 3), 10 * y + x, dtype=np.uint8) for x in range(3)] for y in range(2)]
    figure = panel(
        pictures,
        titles=["a", "b", "c"],
        labels=["up", "down"],
        scales=[[None, 0.0131, 0.0], [2e-9, None, 12.0]],
    )
    cells = np.array(figure.axes).reshape(2, 3)
    for y in range(2):
        for x in range(3):
            assert (shown(cells[y, x]) == pictures[y][x]).all()
    assert [axes.get_title() for axes in cells.flat] == ["a", "b", "c", "", "", ""]
    assert [axes.get_ylabel() for axes in cells.flat] == ["up", "", "", "down", "", ""]
    below = [axes.get_xlabel() for axes in cells.flat]
    assert below == ["", "±1.3e-02", "all zero", "±2.0e-09", "", "±1.2e+01"]
    assert not any(len(axes.get_xticks()) or len(axes.get_yticks()) for axes in cells.flat)


def test_empty_cells_and_short_rows():
    figure = panel([[GREY, None, GREY], [GREY]])
    assert [shown(axes) is not None for axes in figure.axes] == [True, False, True, True, False, False]


def test_the_size_follows_from_the_cells():
    assert panel([[GREY] * 5] * 3).get_size_inches().tolist() == [10.0, 6.0]


def test_long_rows_go_on_below_under_their_own_titles():
    rows, scales = [[GREY] * 23, [GREY]], [[float(x + 1) for x in range(23)], [None]]
    figure = panel(rows, [f"map {x}" for x in range(23)], ["one", "two"], scales)
    lines = np.asarray(figure.axes).reshape(6, 10)
    assert [axes.get_title() for axes in lines[2]] == ["map 20", "map 21", "map 22", *[""] * 7]
    assert [axes.get_title() for axes in lines[4]] == [f"map {x}" for x in range(10, 20)]
    assert [axes.get_ylabel() for axes in lines[:, 0]] == ["one", "", "", "two", "", ""]
    assert [axes.get_xlabel() for axes in lines[2, :4]] == ["±2.1e+01", "±2.2e+01", "±2.3e+01", ""]
    assert [[shown(axes) is not None for axes in line].count(True) for line in lines] == [10, 10, 3, 1, 0, 0]
    assert [round(axes.get_position().y0, 3) for axes in lines[:, 0]] == pytest.approx(
        np.linspace(0.842, 0.017, 6), abs=0.01
    )
    width, height = figure.get_size_inches()
    assert 20 < width < 21 and 12 < height < 16


def test_cells_are_of_one_size_and_keep_their_aspect(tmp_path):
    figure = panel([[GREY, np.repeat(GREY, 2, axis=1)], [GREY, None]], titles=["a", "b"], labels=["c", "d"])
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert boxes[0].width == pytest.approx(boxes[0].height, rel=0.01)
    assert boxes[1].width == pytest.approx(2 * boxes[1].height, rel=0.01)
    assert max(boxes[0].width, boxes[0].height) == pytest.approx(2 * figure.dpi, rel=0.15)
    assert boxes[1].width == pytest.approx(boxes[0].width, rel=0.15)


def test_long_texts_wrap_and_dollars_are_dollars(tmp_path):
    figure = panel([[GREY]], titles=["layer4.2.conv3 unit (512, 3, 4) of resnet50"], labels=["cost $x_{$"])
    assert figure.axes[0].get_title().count("\n") == 1
    save_figure(figure, tmp_path / "a.png")  # mathtext would raise


def test_a_name_that_is_no_text_is_drawn(tmp_path):
    """A file's name that is not UTF-8 comes as surrogates, which matplotlib's fonts refuse."""
    figure = panel([[GREY]], labels=[os.fsdecode(b"caf\xe9.jpg")])
    assert figure.axes[0].get_ylabel() == "caf?.jpg"
    save_figure(figure, tmp_path / "a.png")


def test_texts_stay_inside_and_off_the_pictures():
    long = "a title of many words that fills more than three lines of this cell"
    figure = panel([[GREY, GREY]] * 2, [long] * 2, [long] * 2, [[1.0, 1.0]] * 2)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in (axes.title, axes.yaxis.label, axes.xaxis.label):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            if text.get_text():
                assert not any(box.overlaps(other.get_window_extent()) for other in figure.axes)


def test_no_layout_engine():
    """Its time grows with the square of the rows: two hundred take half a minute."""
    assert panel([[GREY]], ["title"], ["label"], [[1.0]]).get_layout_engine() is None


def test_a_huge_figure_gets_fewer_pixels(tmp_path, monkeypatch):
    save_figure(Figure(figsize=(0.5, 700)), tmp_path / "high.jpg")  # matplotlib refuses 2^16 a side
    assert load_picture(tmp_path / "high.jpg").height == 65_500
    monkeypatch.setattr(plotting, "MAX_PIXELS", 10_000)
    save_figure(Figure(figsize=(3, 2)), tmp_path / "large.png")
    assert math.prod(load_picture(tmp_path / "large.png").size) == pytest.approx(10_000, rel=0.02)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "0 rows without a cell"),
        ([[], []], {}, "2 rows without a cell"),
        ([[GREY, GREY]], {"titles": ["a"]}, "titles has 1 entries, expected 2"),
        ([[GREY, GREY]], {"labels": ["a", "b"]}, "labels has 2 entries, expected 1"),
        ([[GREY], [GREY]], {"scales": [[1.0]]}, "scales has 1 entries, expected 2"),
        ([[GREY], [GREY]], {"scales": [[1.0], []]}, r"scales\[1\] has 0 entries, expected 1"),
        ([[GREY], [GREY]], {"frames": [[]]}, "frames has 1 entries, expected 2"),
        ([[GREY, GREY / 255]], {}, r"rows\[0\]\[1\] is a ndarray of float64 \(8, 8, 3\), expected uint8"),
        ([[torch.zeros(3, 8, 8)]], {}, r"rows\[0\]\[0\] is a Tensor"),
    ],
)
def test_panel_refuses(rows, options, message):
    with pytest.raises(InvalidInput, match=message):
        panel(rows, **options)


def test_comparison_panel():
    rows = [comparison("features.10 map 42"), comparison("features.0 map 1")]
    figure = comparison_panel(iter(rows))
    cells = np.array(figure.axes).reshape(2, 6)
    titles = ["image", "what the unit sees", "deconvnet", "saliency (captum)", "guided backprop", "deconvnet, shuffled"]
    assert [axes.get_title() for axes in cells[0]] == titles
    for axes, row in zip(cells, rows, strict=True):
        maps = [row.deconvnet, row.saliency, row.guided_backprop, row.randomized]
        assert axes[0].get_ylabel() == row.label
        assert [cell.get_xlabel() for cell in axes[:2]] == ["scales: for a signal of 1", ""]
        for cell in axes[:2]:
            assert (shown(cell) == to_pixels(row.image)).all()
        for cell, values in zip(axes[2:], maps, strict=True):
            assert (shown(cell) == displayable(values)).all()
        below = [f"±{display_scale(values):.1e}" for values in maps[:3]] + ["all zero"]
        assert [cell.get_xlabel() for cell in axes[2:]] == below


def test_comparison_panel_shows_the_part_with_the_signals():
    """One part for all methods, though the deconvnet's signal fills less of it than the shuffled one's."""
    signals = [torch.zeros(3, 64, 48) for _ in METHODS]
    for signal in signals:
        signal[:, 30:34, 20:30] = torch.randn(3, 4, 10)
    signals[3][0, 40] = 1
    row = replace(comparison(), image=torch.randn(3, 64, 48), **dict(zip(METHODS.values(), signals, strict=True)))
    image, patch, *cells = comparison_panel([row]).axes
    assert shown(image).shape == (64, 48, 3)
    (frame,) = image.patches
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((-0.5, 27.5), 48, 15)
    assert (shown(patch) == to_pixels(row.image)[28:43]).all()
    for cell, signal in zip(cells, signals, strict=True):
        assert (shown(cell) == displayable(signal[:, 28:43])).all()


def test_comparison_panel_takes_the_normalisation():
    row = comparison()
    mean, std = (0.5, 0.5, 0.5), (0.1, 0.1, 0.1)
    cell = comparison_panel([row], mean, std).axes[0]
    assert (shown(cell) == to_pixels(row.image, mean, std)).all()


def test_comparison_panel_without_comparisons():
    with pytest.raises(InvalidInput, match="0 rows without a cell"):
        comparison_panel([])


@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg"])
def test_save_figure(tmp_path, suffix):
    path = tmp_path / "new" / f"a.{suffix}"
    save_figure(panel([[GREY, GREY]]), path, dpi=50)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix in ("png", "jpg"):
        assert load_picture(path).size == (200, 100)


def test_save_figure_refuses(tmp_path):
    figure = panel([[GREY]])
    with pytest.raises(InvalidInput, match=r"ends in '\.xyz', expected \.png"):
        save_figure(figure, tmp_path / "a.xyz")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(PictureError, match=r"a\.png cannot be written"):
        save_figure(figure, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_settings_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = comparison_panel([comparison()])
    save_figure(figure, tmp_path / "a.png")
    assert isinstance(figure, Figure)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_asked(tmp_path):
    """In a fresh process, since other tests may have imported pyplot (captum does)."""
    code = f"""
import sys, numpy as np
from deconvviz.plotting import panel, save_figure
save_figure(panel([[np.zeros((8, 8, 3), np.uint8)]]), {str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
