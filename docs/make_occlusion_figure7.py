"""Figure 7 for SqueezeNet on the demo's three photographs: docs/images/occlusion_figure7.png.

    python docs/make_occlusion_figure7.py WEIGHTS

``WEIGHTS`` is a state dict of torchvision's ``squeezenet1_0``. The photographs are scikit-image's, CC0 or in the public
domain. Each row is the figure of ``examples/occlusion_figure7.py``, which prints the numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from deconvviz.demo.data import demo_photographs

DOCS = Path(__file__).parent
OUT = DOCS / "images" / "occlusion_figure7.png"
sys.path.insert(0, str(DOCS.parent / "examples"))

import occlusion_figure7  # noqa: E402


def main() -> None:
    (weights,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for name, photograph in demo_photographs().items():
            pictures.append(Path(folder, f"{name}.png"))
            photograph.save(pictures[-1])
        drawn = Path(folder, "drawn")
        options = ["--model", "squeezenet1_0", "--weights", weights, "--out", str(drawn)]
        occlusion_figure7.main([*map(str, pictures), *options])
        rows = [np.asarray(Image.open(drawn / picture.name).convert("RGB")) for picture in pictures]
    page = Image.fromarray(np.concatenate([row[:-25] for row in rows]))  # without each row's empty foot
    page.resize((page.width * 4 // 5, page.height * 4 // 5), Image.Resampling.LANCZOS).save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
