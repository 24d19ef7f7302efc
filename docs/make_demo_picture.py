"""Write docs/images/demo.png, the picture of the README: a choice of the demo page's units.

    python docs/make_demo_picture.py

The photographs are scikit-image's, CC0.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from deconvviz.demo import TILE, show_photographs
from deconvviz.plotting import panel, save_figure

OUT = Path(__file__).parent / "images" / "demo.png"
CHOICE = {"cat": (3, 3, 0), "espresso": (0, 0, 0)}
"""For each photograph, which of the four units of the early, the middle and the late layer."""


def main() -> None:
    rows, labels = [], []
    with tempfile.TemporaryDirectory() as folder:
        for photograph in show_photographs(Path(folder)):
            if photograph.name not in CHOICE:
                continue
            row = [_pixels(folder, photograph.file)]
            for stage, index in zip(photograph.stages, CHOICE[photograph.name], strict=True):
                pair = _pixels(folder, stage.units[index].file)
                row += [pair[:, :TILE], pair[:, TILE:]]
            rows.append(row)
            labels.append("{}, {:.0%}".format(*photograph.labels[0]))
    titles = ["photograph"]
    for stage in ("early", "middle", "late"):
        titles += [f"{stage} unit: the patch", "its projection"]
    OUT.parent.mkdir(exist_ok=True)
    save_figure(panel(rows, titles, labels), OUT, dpi=76)
    Image.open(OUT).convert("RGB").save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def _pixels(folder: str, file: str) -> np.ndarray:
    return np.asarray(Image.open(Path(folder, file)))


if __name__ == "__main__":
    main()
