"""Table 1 on five frontal dogs: the table on the standard output, and a picture of what was covered.

    python docs/make_correspondence.py WEIGHTS PHOTOGRAPHS PICTURE.png

``WEIGHTS`` is a state dict of torchvision's ``squeezenet1_0``, ``PHOTOGRAPHS`` a folder with one picture of each
ImageNet class, sorted by class. Their owners' rights keep the picture out of these pages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from deconvviz.correspondence import correspondence
from deconvviz.images import load_picture, to_input, to_pixels
from deconvviz.models.zoo import load_model
from deconvviz.plotting import panel, save_figure

LAYERS = ("features.12", "classifier.3")
SIDE = 40
# Centres (y, x) in pixels of the 224 x 224 crop, by class; right and left are the dog's.
DOGS = {
    193: {"right eye": (107, 50), "left eye": (103, 126), "nose": (176, 85)},
    227: {"right eye": (83, 81), "left eye": (87, 143), "nose": (146, 113)},
    237: {"right eye": (83, 71), "left eye": (85, 155), "nose": (139, 99)},
    254: {"right eye": (97, 99), "left eye": (112, 166), "nose": (122, 122)},
    256: {"right eye": (89, 74), "left eye": (90, 151), "nose": (169, 118)},
}


def box(centre: tuple[int, int]) -> tuple[int, int, int, int]:
    y, x = (c - SIDE // 2 for c in centre)
    return y, y + SIDE, x, x + SIDE


def main() -> None:
    weights, folder, picture = sys.argv[1:]
    model = load_model("squeezenet1_0", weights).model
    paths = sorted(Path(folder).iterdir())
    images = torch.stack([to_input(load_picture(paths[label])) for label in DOGS])
    boxes = {part: [box(dog[part]) for dog in DOGS.values()] for part in next(iter(DOGS.values()))}
    print(correspondence(model, images, boxes, LAYERS, draws=30))
    rows = []
    for part in boxes:
        hidden = images.clone()
        for image, (y0, y1, x0, x1) in zip(hidden, boxes[part], strict=True):
            image[:, y0:y1, x0:x1] = 0
        rows.append([to_pixels(image) for image in hidden])
    save_figure(panel(rows, labels=list(boxes)), picture, dpi=60)


if __name__ == "__main__":
    main()
