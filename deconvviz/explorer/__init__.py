"""A page to browse what every feature map looks for: one folder, no server, nothing fetched.

``index.html`` opens from ``file://``. Its pictures are sprite sheets that load when they come into view: for
each layer walls of 64 maps, and one sheet for each map (projections, patches, the same units with shuffled
weights). Names of files and layers are data, never markup.

The folder::

    index.html
    images/7.jpg              the image of number 7, as the model sees it
    layers/0/data.js          values, images, boxes and statistics of the first layer's maps
    layers/0/wall-0-p.jpg     projections of maps 0 to 63; wall-0-i.jpg: patches
    layers/0/map-42.jpg       map 42
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from tqdm import tqdm

from deconvviz.errors import InvalidInput
from deconvviz.explorer.sheets import PERCENTILE, WALL_SIDE, MapSheet, Sizes, wall_of
from deconvviz.grid.layer import GridLayer
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD, atomic_write, displayable, to_pixels
from deconvviz.mining.strongest import EDGES
from deconvviz.templates import render

TILES_AT_ONCE = 4608
"""Units whose tiles are held in memory together, of one wall's sheet of maps at least."""


def explore(
    layers: Iterable[GridLayer],
    out: str | os.PathLike[str],
    *,
    shuffled: nn.Module | None = None,
    title: str = "Feature maps",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    sizes: Sizes | None = None,
    progress: bool = True,
) -> Path:
    """Write the page for these layers of a grid.

    Args:
        layers: of one grid.
        out: the folder; files in it are replaced.
        shuffled: the model with shuffled weights, to show the same units of; ``None`` leaves them out.
        title: of the page.
        mean, std: those that the images were normalised with.
        sizes: of tiles and photographs, and the JPEG quality.
        progress: show a bar with the rate and what is left.

    Returns:
        The path of ``index.html``.

    Raises:
        InvalidInput: the images are not pictures (C, H, W), one can't be read again, or ``sizes`` is something else.
        PictureError: the folder cannot be written.
    """
    if not isinstance(sizes, Sizes | None):
        raise InvalidInput(f"sizes is {sizes!r}; expected a deconvviz.explorer.Sizes, such as Sizes(tile=32)")
    layers, sizes, page = list(layers), sizes or Sizes(), Path(out, "index.html")
    written: set[int] = set()
    for number, layer in enumerate(layers):
        if len(layer.place.field.axes) != 2:
            raise InvalidInput(
                f"the images have {len(layer.place.field.axes)} spatial axes; the page shows pictures (3, H, W)"
            )
        total = sum(len(layer.numbers(fmap)) for fmap in range(len(layer)))
        with tqdm(total=total, unit="unit", desc=layer.name or "(the model)", disable=not progress) as bar:
            _write_layer(layer, shuffled, page.parent / "layers" / str(number), written, mean, std, sizes, bar)
    settings = {
        "layers": [_about(layer) for layer in layers],
        "wall": WALL_SIDE,
        "edges": EDGES,
        "blocks": 2 if shuffled is None else 3,
    }
    html = render("explorer.html", title=title, settings=_script(settings))
    with atomic_write(page, [".html"]) as file:
        file.write_text(html, encoding="utf-8")
    return page


def _write_layer(
    layer: GridLayer,
    shuffled: nn.Module | None,
    folder: Path,
    written: set[int],
    mean: Sequence[float],
    std: Sequence[float],
    sizes: Sizes,
    bar: tqdm,
) -> None:
    """A layer's sheets and data, and the images that are not ``written`` yet."""
    images, k, wall = folder.parent.parent / "images", _shown(layer), WALL_SIDE**2
    at_once = max(wall, TILES_AT_ONCE // k // wall * wall)
    for start in range(0, len(layer), at_once):
        fmaps = range(start, min(start + at_once, len(layer)))
        sheets = {fmap: MapSheet(k, 2 if shuffled is None else 3, sizes) for fmap in fmaps}
        for unit in layer.units(fmaps, shuffled):
            number = layer.numbers(unit.fmap)[unit.rank]
            if number not in written:
                picture = Image.fromarray(to_pixels(unit.image, mean, std))
                picture.thumbnail((sizes.photograph, sizes.photograph))
                _save(picture, images / f"{number}.jpg", sizes)
                written.add(number)
            box = layer.box(unit.fmap, unit.rank)
            patch, inside = unit.patch(box), unit.inside(box)
            if patch.numel():  # else the unit sees padding alone
                sheet = sheets[unit.fmap]
                sheet.put(0, unit.rank, displayable(unit.projection[inside], percentile=PERCENTILE))
                sheet.put(1, unit.rank, to_pixels(patch, mean, std))
                if unit.control is not None:
                    sheet.put(2, unit.rank, displayable(unit.control[inside], percentile=PERCENTILE))
            bar.update()
        for fmap, sheet in sheets.items():
            _save(sheet.picture(), folder / f"map-{fmap}.jpg", sizes)
        for first in range(start, fmaps.stop, wall):
            part = [sheets[fmap] for fmap in fmaps if first <= fmap < first + wall]
            for block, kind in enumerate("pi"):
                picture = wall_of([sheet.block(block) for sheet in part], sizes.thumbnail)
                _save(picture, folder / f"wall-{first // wall}-{kind}.jpg", sizes)
    with atomic_write(folder / "data.js", [".js"]) as file:
        file.write_text(f"explorer.loaded({_script(_data(layer))});\n", encoding="utf-8")


def _shown(layer: GridLayer) -> int:
    """How many units of a map there can be: not more than images."""
    return max(1, min(layer.strongest.values.shape[1], layer.strongest.seen))


def _about(layer: GridLayer) -> dict[str, Any]:
    place = layer.place
    return {
        "name": layer.name or "(the model)",
        "maps": place.maps,
        "space": list(place.space),
        "field": str(place.field),
        "image": [axis.image for axis in place.field.axes],
        "seen": layer.strongest.seen,
        "dead": len(layer.dead),
        "k": _shown(layer),
    }


def _data(layer: GridLayer) -> dict[str, Any]:
    """What the page tells of a layer's maps, by map; numbers are rounded to what can be read."""
    state, fmaps = layer.strongest, range(len(layer))
    images = [layer.numbers(fmap) for fmap in fmaps]
    used = sorted({number for numbers in images for number in numbers})
    return {
        "values": [[float(f"{v:.4g}") for v in state.values[m, : len(images[m])].tolist()] for m in fmaps],
        "images": images,
        "boxes": [[sum(layer.box(m, rank), ()) for rank in range(len(images[m]))] for m in fmaps],
        "positions": [[layer.position(m, rank) for rank in range(len(images[m]))] for m in fmaps],
        "mean": [float(f"{state.mean(m):.4g}") for m in fmaps],
        "active": [active / max(state.seen, 1) for active in state.active.tolist()],
        "histogram": state.histogram.tolist(),
        "names": {number: layer.data.name(number) for number in used},
    }


def _script(data: Any) -> str:
    """JSON that is safe inside a ``<script>``: no markup can start in it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def _save(picture: Image.Image, path: Path, sizes: Sizes) -> None:
    with atomic_write(path, [".jpg"]) as file:
        picture.save(file, quality=sizes.quality, optimize=True)
