"""Write docs/images/demo.png, the picture of the README: a choice of the demo page's units.

    python docs/make_demo_picture.py

The photographs are scikit-image's, CC0.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from deconvviz.demo.results import photographs
from deconvviz.plotting import panel, save_figure

OUT = Path(__file__).parent / "images" / "demo.png"
CHOICE = {"cat": (3, 3, 0), "espresso": (0, 0, 0)}
"""For each photograph, which of the four units of the early, the middle and the late layer."""


def main() -> None:
    rows, labels = [], []
    for photograph in photographs():
        if photograph.name in CHOICE:
            chosen = zip(photograph.stages, CHOICE[photograph.name], strict=True)
            units = [stage.units[index] for stage, index in chosen]
            pairs = [pixels for unit in units for pixels in (unit.patch, unit.projection)]
            rows.append([photograph.pixels, *pairs])
            labels.append("{}, {:.0%}".format(*photograph.labels[0]))
    titles = ["photograph"]
    for stage in photograph.stages:
        titles += [f"{stage.name} unit: the patch", "its projection"]
    save_figure(panel(rows, titles, labels), OUT, dpi=76)
    Image.open(OUT).convert("RGB").save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
