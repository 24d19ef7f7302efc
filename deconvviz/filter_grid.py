"""What every feature map looks for, over a whole data set: the paper's figure 2 for any model and data.

One pass over the data finds the k strongest units of every map of the chosen layers, exactly: one an image, at
its strongest position. Each is then projected to the pixels of its receptive field, beside that part of its
image. (Whether one unit an image, and which crop, the paper does not say.)

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU())
>>> grid = FilterGrid(model, ["1", "4"]).fit(torch.randn(20, 3, 32, 32), progress=False)
>>> found = grid["4"][2]
>>> len(found.values), found.projections[0].shape == found.patches[0].shape
(9, True)
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from captum.log import log_usage
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from deconvviz.capture import evaluating, left_as_found, require_module
from deconvviz.comparison import shuffled_weights
from deconvviz.errors import AmbiguousLayer, InvalidInput, NoForwardPass, UnknownLayer
from deconvviz.explorer import explore
from deconvviz.grid.feature_map import mosaic
from deconvviz.grid.layer import GridLayer, LayerPlace, find_places
from deconvviz.images import display_scale, displayable
from deconvviz.inputs import input_images, like, require_autocast, whole_number
from deconvviz.layers import Layer, locate, one_or_several
from deconvviz.mining.archive import model_fingerprint
from deconvviz.mining.data import Images
from deconvviz.mining.found import Found
from deconvviz.mining.passes import mine, mining
from deconvviz.mining.shares import joined, of_share, own_share
from deconvviz.mining.strongest import Strongest
from deconvviz.shards import together
from deconvviz.switches import OVERLAPS
from deconvviz.units import require


class FilterGrid(Attribution):
    """The strongest units of every feature map of ``layers``, and their projections.

    Args:
        model: any ``nn.Module``; it runs in eval mode, and is left as it was found.
        layers: one layer or several: dotted names, modules, or calls such as ``"layer1.0.relu#2"``. The output of
            each is one tensor (N, maps, *S).
        k: how many units of each map.
        overlap, on_unsupported: as :class:`~deconvviz.deconvnet.Deconvnet`'s.

    Raises:
        UnsupportedModel, UnknownLayer, InvalidInput: as their names say.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        k: int = 9,
        *,
        overlap: str = "sum",
        on_unsupported: str = "raise",
    ) -> None:
        self.model = require_module(model)
        Attribution.__init__(self, model)
        require("overlap", overlap, OVERLAPS)
        require("on_unsupported", on_unsupported, ("raise", "gradient"))
        self.k, self.overlap, self.gradient = whole_number("k", k), overlap, on_unsupported == "gradient"
        self._single = isinstance(layers, (str, nn.Module))
        self._located = list(dict.fromkeys(locate(self.model, layer) for layer in one_or_several(layers)))
        self._places: tuple[LayerPlace, ...] = ()
        self._found: Found | None = None
        self._images: Images | None = None

    # ── from data ────────────────────────────────────────────────────────────────────────────────────────────

    def fit(
        self,
        data: Any,
        *,
        transform: Callable[[Any], Tensor] | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: float = 60.0,
        share: tuple[int, int] | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        progress: bool = True,
    ) -> FilterGrid:
        """Find the strongest units in ``data``: anew, or from where a checkpoint left off.

        Args:
            data, transform, limit: see :class:`~deconvviz.mining.data.Images`.
            batch_size, workers: by default the loader's, if ``data`` is one, else 32 and 0.
            checkpoint: a file that is written now and then, when the pass is broken off, and at the end; if it
                exists, the pass goes on from there, to the bits of a pass that was never interrupted.
            every: seconds between checkpoints.
            share: ``(i, n)``: only every n-th image from the i-th, to be merged. In an initialised
                ``torch.distributed`` group each process takes its own by itself, and all get the whole result.
            autocast: the dtype to compute in, such as ``torch.bfloat16``.
            channels_last: lay images out so; many models are faster.
            progress: show a bar with the rate and what is left.

        Raises:
            InvalidInput: ``data`` is none of these, its images are of several shapes or others each time, or none
                could be used (the first hundred decide, if one reason keeps all of them from being read).
            CheckpointError: the checkpoint is damaged, of another model, layers or data, or can't be written: at
                the start, or at the end, when what was found can still be used and saved elsewhere.
            LayerNotRun, AmbiguousLayer: as their names say.
            OtherProcessFailed: another process of the group raised, or was killed.
        """
        require_autocast(autocast)
        rank, world = own_share(share)
        grouped = world > 1 and share is None
        with together(grouped), evaluating(self.model), left_as_found(self.model):
            images = Images(data, transform, limit)
            batch_size = whole_number("batch_size", images.batch_size if batch_size is None else batch_size)
            workers = whole_number("workers", images.workers if workers is None else workers, 0)
            precision = f"{autocast or like(self.model).dtype}{' channels_last' if channels_last else ''}"
            sample = images.sample()
            places = find_places(self.model, self._located, sample[None].to(like(self.model)))
            about = self._about(places, images, sample) | {"precision": precision}
            path = None if checkpoint is None else of_share(Path(checkpoint), rank, world)
            found = self._start(path, about, places, (rank, world))
            done, total = found.shares[0][2], len(images.order[rank::world]) or None
            batches = images.batches(sample.shape, batch_size, workers, (rank, world), done)
            calls = [place.call for place in places]
            with (
                mining(self.model, calls, found.layers, like(self.model), autocast, channels_last) as miner,
                tqdm(total=total, initial=done, unit="image", disable=not progress) as bar,
            ):
                found = mine(miner, batches, found, path, every, bar.update)
            self._places, self._found, self._images = places, found, images
            if path is not None:
                found.save(path)
        if grouped:
            self._found = found = joined(found, like(self.model).device)
        if not any(layer.seen for layer in found.layers):
            fewer = f"share {(rank, world)} has none, give fewer shares than images"
            raise InvalidInput(f"no image could be used: {next(iter(self.left_out.values()), fewer)}")
        return self

    def _start(
        self, path: Path | None, about: dict[str, Any], places: Sequence[LayerPlace], share: tuple[int, int]
    ) -> Found:
        """What a checkpoint holds, if there is one; else nothing yet."""
        device = like(self.model).device
        if path is not None and path.exists():
            return Found.resumed(path, about, share, device)
        layers = (Strongest.empty(p.maps, len(p.space), self.k, device) for p in places)
        return Found(about, tuple(layers), ((*share, 0),), {}, {})

    def _about(self, places: Sequence[LayerPlace], images: Images, sample: Tensor) -> dict[str, Any]:
        return {
            "model": model_fingerprint(self.model),
            "layers": [place.address for place in places],
            "k": self.k,
            "maps": [[place.maps, *place.space] for place in places],
            "data": images.describe(),
            "image": list(sample.shape),
        }

    def merge(self, *others: FilterGrid) -> FilterGrid:
        """The grid of several shares of one data set: the same bits in any order and grouping.

        Raises:
            CheckpointError: they are of different models, layers or data, or share images.
            InvalidInput: one is no grid.
        """
        merged = copy.copy(self)
        for other in others:
            if not isinstance(other, FilterGrid):
                raise InvalidInput(f"others holds a {type(other).__name__}; expected grids of other shares")
            merged._found = merged.found.merged(other.found)
        return merged

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was found (units and statistics, no pictures) to one ``.npz`` file."""
        self.found.save(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        data: Any = None,
        *,
        transform: Callable[[Any], Tensor] | None = None,
        limit: int | None = None,
        overlap: str = "sum",
        on_unsupported: str = "raise",
    ) -> FilterGrid:
        """Read a file of :meth:`save` or a checkpoint; pictures and projections need the ``data`` too.

        Raises:
            CheckpointError: the file is damaged, or of another model or data.
        """
        found = Found.load(path)
        about = found.about
        grid = cls(model, about["layers"], about["k"], overlap=overlap, on_unsupported=on_unsupported)
        found.require({"model": model_fingerprint(grid.model)}, str(path))
        if data is not None:
            grid._images = Images(data, transform, limit)
            found.require({"data": grid._images.describe()}, str(path))
        with evaluating(grid.model):
            grid._places = find_places(
                grid.model, grid._located, torch.zeros(1, *about["image"], device="cpu").to(like(grid.model))
            )
        grid._found = found
        return grid

    # ── results ──────────────────────────────────────────────────────────────────────────────────────────────

    def __getitem__(self, layer: Layer) -> GridLayer:
        """A layer's maps: ``grid["features.10"][42]`` is one :class:`~deconvviz.grid.feature_map.FeatureMap`."""
        found = self.found
        name, number = locate(self.model, layer)
        matching = [
            (place, strongest)
            for place, strongest in zip(self._places, found.layers, strict=True)
            if place.call[0] == name and number in (None, place.call[1])
        ]
        if not matching:
            raise UnknownLayer(f"the grid has no layer {layer!r}; it has {', '.join(map(repr, self.layers))}")
        if len(matching) > 1:
            calls = ", ".join(repr(place.address) for place, _ in matching)
            raise AmbiguousLayer(f"the grid has several calls of layer {name!r}: choose one of {calls}")
        return GridLayer(*matching[0], self._images, found.checksums, self.model, self.overlap, self.gradient)

    def __iter__(self) -> Iterator[GridLayer]:
        return (self[name] for name in self.layers)

    @property
    def layers(self) -> list[str]:
        """The layers' addresses; raises :class:`NoForwardPass` before :meth:`fit`."""
        return list(self.found.about["layers"])

    @property
    def found(self) -> Found:
        """The mined units of all layers; raises :class:`NoForwardPass` before :meth:`fit`."""
        if self._found is None:
            raise NoForwardPass("nothing has been mined yet: call fit(data) first, or FilterGrid.load(path, model)")
        return self._found

    def name(self, image: int) -> str:
        """An image's file, or "image 7"."""
        return self._images.name(image) if self._images is not None else f"image {image}"

    @property
    def left_out(self) -> dict[int, str]:
        """Number of each image that was left out, and why: it could not be read, or gave NaN or infinite values."""
        bad = {n: "NaN or infinite activations" for layer in self.found.layers for n in layer.left_out}
        return dict(sorted({**bad, **self.found.broken}.items()))

    def explore(
        self, out: str | os.PathLike[str], *, control: bool = True, title: str | None = None, **options: Any
    ) -> Path:
        """Write a page to browse all maps of all layers: a folder that opens without a server.

        Args:
            out: the folder.
            control: beside each map, the same units in the model with shuffled weights.
            title: of the page; by default the model's class.
            options: ``mean``, ``std``, ``sizes`` and ``progress``, as :func:`deconvviz.explorer.explore` takes them.

        Returns:
            The path of its ``index.html``.
        """
        shuffled = shuffled_weights(self.model).eval() if control else None
        name = title or f"{type(self.model).__name__}: what its feature maps look for"
        return explore(self, out, shuffled=shuffled, title=name, **options)

    @staticmethod
    def filters(model: nn.Module, layer: Layer, common_scale: bool = True, cell: int = 48) -> NDArray[np.uint8]:
        """A convolution's kernels about mid-grey, as pixels (H, W, 3); other than 3 input maps by their mean.

        ``common_scale`` makes their brightness comparable; else each has its own contrast.
        """
        model = require_module(model)
        module = model.get_submodule(locate(model, layer)[0])
        if not isinstance(module, nn.Conv2d):
            raise InvalidInput(f"layer {layer!r} is a {type(module).__name__}; expected a Conv2d, which has kernels")
        kernels = module.weight.detach()
        scale = display_scale(kernels) or None if common_scale else None
        columns = math.ceil(math.sqrt(1.5 * len(kernels)))
        pictures = [displayable(kernel, scale) for kernel in kernels]
        return mosaic(pictures, columns, math.ceil(len(kernels) / columns), cell, gap=max(cell // 12, 1))

    @log_usage()
    def attribute(self, inputs: Tensor, fmaps: Sequence[int] | None = None) -> Any:
        """Mine a batch, and project: the data-set form is :meth:`fit` and ``grid[layer][fmap]``.

        Args:
            inputs: (N, C, *S), normalised as the model was trained.
            fmaps: of which maps; all by default.

        Returns:
            (F, min(k, N), C, *S), the strongest units first; a list of these if the grid has a list of layers.
            What :meth:`fit` found stays.
        """
        inputs = input_images(inputs, self.model)
        grid = copy.copy(self).fit(inputs.detach(), progress=False)
        results = [_stacked(layer, layer.chosen(fmaps), min(self.k, len(inputs)), inputs) for layer in grid]
        return results[0] if self._single else results


def _stacked(layer: GridLayer, fmaps: list[int], k: int, inputs: Tensor) -> Tensor:
    """All units' projections, each over its whole image."""
    pixels = inputs.new_zeros((len(fmaps), k, *inputs.shape[1:]))
    for unit in layer.units(list(dict.fromkeys(fmaps))):
        for place in (i for i, fmap in enumerate(fmaps) if fmap == unit.fmap):
            pixels[place, unit.rank] = unit.whole()
    return pixels
