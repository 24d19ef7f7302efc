"""Figure 7 of the paper: what four quantities do while a patch moves over a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from deconvviz.errors import InvalidInput
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD, displayable, to_pixels

if TYPE_CHECKING:
    from deconvviz.occlusion.maps import OcclusionMaps

COLUMN_INCHES, ROW_INCHES = 2.6, 2.9
MOST_LABELS = 9
"""In the legend of (e); rarer ones are grey."""


def figure7(
    maps: OcclusionMaps, image: int = 0, labels: Sequence[str] | None = None, others: Sequence[Tensor] = (),
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
) -> Figure:  # fmt: skip
    """Draw one image's row: the image with the patch, (b), (c), (d) for each target, and (e).

    (b) and (d) are in cells, one a position of the patch, each with its own scale and its value without a patch.
    ``mean`` and ``std`` undo the images' normalisation.

    Raises:
        InvalidInput: no such image.
    """
    count = len(maps.images)
    if not 0 <= image < count:
        raise InvalidInput(f"image is {image}; expected 0 to {count - 1}")
    targets = maps.targets[image].tolist()
    columns = 4 + len(targets) + bool(len(others))
    figure = Figure(figsize=(COLUMN_INCHES * columns, ROW_INCHES), layout="constrained")
    axes = iter(figure.subplots(1, columns, squeeze=False)[0])

    _patched(next(axes), maps, image, mean, std)
    fmap = int(maps.fmaps[image])
    clean = float(maps.clean_activation[image])
    title = f"(b) activation of map {fmap}\n{maps.layer or 'the model'}, clean {clean:.4g}"
    _heat(figure, next(axes), maps.activation_cells[image], title)
    _pixels(next(axes), displayable(maps.projection[image]), f"(c) map {fmap}, projected")
    if len(others):
        tiles = [displayable(other) for other in others]
        _pixels(next(axes), _mosaic(tiles), f"(c) map {fmap}, other images")
    for t, target in enumerate(targets):
        clean = float(maps.clean_scores[image, t])
        title = f"(d) {maps.score} of\n{_name(target, labels)}, clean {clean:.3g}"
        _heat(figure, next(axes), maps.score_cells[image, t], title)
    _label_map(next(axes), maps.label_cells[image, 0], labels)
    return figure


def _patched(axes: Any, maps: OcclusionMaps, image: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """The image with the patch at its middle position."""
    boxes, covered, fill = maps.boxes, maps.images[image].clone(), maps.fill.expand(maps.images.shape)[image]
    y0, y1, x0, x1 = boxes[len(boxes) // 2, boxes.shape[1] // 2].tolist()
    covered[:, y0:y1, x0:x1] = fill[:, y0:y1, x0:x1]
    _pixels(
        axes,
        to_pixels(covered, mean, std),
        f"(a) a patch of {y1 - y0} x {x1 - x0}\nat {boxes.shape[0]} x {boxes.shape[1]} places",
    )
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=0.8))


def _heat(figure: Figure, axes: Any, cells: Tensor, title: str) -> None:
    drawn = axes.imshow(cells.detach().cpu().float().numpy(), cmap="viridis", interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    _bare(axes, title)


def _label_map(axes: Any, cells: Tensor, labels: Sequence[str] | None) -> None:
    """The most probable label at each position, the commonest ones in colours."""
    numbers, counts = np.unique(cells.cpu().numpy(), return_counts=True)
    shown = numbers[np.argsort(-counts, kind="stable")][:MOST_LABELS].tolist()
    index = np.full(cells.shape, len(shown))
    for i, number in enumerate(shown):
        index[cells.cpu().numpy() == number] = i
    colours = [f"C{i}" for i in range(len(shown))] + ["lightgrey"]
    axes.imshow(index, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(shown) + 0.5, interpolation="nearest")
    patches = [Patch(color=colours[i], label=_name(number, labels)) for i, number in enumerate(shown)]
    if len(numbers) > len(shown):
        patches.append(Patch(color="lightgrey", label=f"{len(numbers) - len(shown)} others"))
    _bare(axes, "(e) most probable label")
    legend = axes.legend(handles=patches, fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _pixels(axes: Any, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels)
    _bare(axes, title)


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=8, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])


def _mosaic(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """A square mosaic of pictures of one size, grey where there is none."""
    side = int(np.ceil(len(tiles) ** 0.5))
    grey = np.full_like(tiles[0], 128)
    rows = [np.concatenate([*tiles[i : i + side], *[grey] * (side - len(tiles[i : i + side]))], 1)
            for i in range(0, len(tiles), side)]  # fmt: skip
    return np.concatenate(rows)


def _name(number: int, labels: Sequence[str] | None) -> str:
    return str(number) if labels is None or number >= len(labels) else str(labels[number]).split(",")[0]
