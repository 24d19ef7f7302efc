"""Features through training: when each layer settles, and when a feature map jumps (paper, figure 4).

At some epochs the strongest unit of each chosen feature map over all training images is found and projected to
the pixels, as :class:`~deconvviz.filter_grid.FilterGrid` does for a trained model. Two things are then read off,
for a feature map f at the looked-at epochs e1, e2, ...::

    jump(f, e_i)      the strongest image at e_i is not the one at e_(i-1)
    likeness(f, e_i)  cosine of the projections at e_i and e_(i-1), laid over each other field on field

A layer has settled at the first of these epochs after which the median likeness of its maps stays high. (The paper
says "converged" of what is seen; the measure and its threshold are ours.)

The caveats: an early layer's feature is in thousands of images, and which of them is the strongest changes while
its picture does not: read its likeness, not its jumps. And looks that are far apart in epochs are less alike.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
>>> evolution = FeatureEvolution(["1"], [0, 3], torch.randn(20, 3, 16, 16), epochs=(1, 2))
>>> for epoch in (1, 2, 3):
...     _ = nn.init.normal_(model[0].weight)  # your training
...     evolution(model, epoch)
>>> evolution.result.epochs, evolution.result.jumps("1").shape
((1, 2), torch.Size([2, 2]))

Axes: E looks, F chosen feature maps of a layer.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor, nn

from deconvviz.capture import left_as_found, require_module
from deconvviz.errors import CheckpointError, InvalidInput, NoForwardPass
from deconvviz.evolution.result import Evolution, Look
from deconvviz.filter_grid import FilterGrid
from deconvviz.geometry import Axis
from deconvviz.inputs import integer
from deconvviz.mining.archive import hash_of, model_fingerprint, structure
from deconvviz.mining.data import Images
from deconvviz.mining.found import require_same
from deconvviz.models.weights_file import load_state, load_weights
from deconvviz.shards import rank_and_count
from deconvviz.switches import OVERLAPS
from deconvviz.units import require

EPOCHS = (1, 2, 5, 10, 20, 30, 40, 64)
"""The paper's."""


class FeatureEvolution:
    """Looks at a model while it trains: call it once an epoch, ``evolution(model, epoch)``.

    Any training loop will do. In Lightning, ``class Watch(FeatureEvolution, Callback): pass`` is a callback; or call
    :meth:`on_train_epoch_end` from the module's own. In a ``torch.distributed`` group the first process looks.
    The model is left as it was found: modes, hooks, buffers, gradients and the random state.

    Args:
        layers: dotted names or calls such as ``"layer1.0.relu#2"``, one or several.
        fmaps: the feature maps of every layer, or a mapping from each layer to its own; ``None`` for all.
        data, transform, limit: the images, see :class:`~deconvviz.mining.data.Images`; their numbers and
            the images must stay the same from epoch to epoch: no random crops.
        epochs: at which to look; other calls return at once. Epochs count from 1; 0 can be the untrained start.
        file: where the looks are kept, whole after each; if it exists, they go on from there.
        run: what sets the training apart (its seed and settings): a file of another run is refused, which is not
            seen otherwise unless an epoch is met twice.
        batch_size: by default the loader's, if ``data`` is one, else 32.
        overlap, on_unsupported: as :class:`~deconvviz.deconvnet.Deconvnet`'s.

    Raises:
        InvalidInput: as it says.
        CheckpointError: the file is damaged, or of another run, other layers, feature maps, data or settings.
    """

    def __init__(
        self,
        layers: str | Sequence[str],
        fmaps: Sequence[int] | Mapping[str, Sequence[int]] | None,
        data: Any,
        epochs: Iterable[int] = EPOCHS,
        *,
        file: str | os.PathLike[str] | None = None,
        run: str = "",
        transform: Callable[[Any], Tensor] | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        overlap: str = "sum",
        on_unsupported: str = "raise",
    ) -> None:
        self.layers = [layers] if isinstance(layers, str) else _listed(layers)
        if not self.layers or not all(isinstance(layer, str) for layer in self.layers):
            raise InvalidInput(
                f"layers is {layers!r}; expected names such as 'layer1' (a module of one checkpoint is not in another)"
            )
        self.fmaps = _fmaps(fmaps, self.layers)
        self.epochs = tuple(_whole_numbers(epochs))
        if not self.epochs or min(self.epochs) < 0:
            raise InvalidInput(f"epochs is {epochs!r}; expected whole numbers, such as {EPOCHS}")
        require("overlap", overlap, OVERLAPS)
        require("on_unsupported", on_unsupported, ("raise", "gradient"))
        if not isinstance(run, str) or not isinstance(file, (str, os.PathLike, type(None))):
            raise InvalidInput(f"file is {file!r} and run {run!r}; expected a path, or None, and a text")
        self.file = None if file is None else Path(file)
        self._data = {"data": data, "transform": transform, "limit": limit, "batch_size": batch_size}
        self._rules = {"overlap": overlap, "on_unsupported": on_unsupported}
        images = Images(data, transform, limit).describe()
        self._about: dict[str, Any] = {"run": run, "layers": self.layers, "maps": self.fmaps, "data": images}
        self._about |= self._rules
        self._result: Evolution | None = None
        if self.file is not None and self.file.exists():
            found = Evolution.load(self.file)
            require_same(found.about, self._about, f"the file {self.file}")
            self._result = found

    def __call__(self, model: nn.Module, epoch: int) -> None:
        """Look at the model as it is after ``epoch``, if that is one of :attr:`epochs`.

        An epoch that was kept with the same weights is not looked at again; the last one, met with other weights
        because training was resumed before it, is replaced.

        Raises:
            CheckpointError: the looks kept so far are of another model, or of another training.
            InvalidInput, UnknownLayer, AmbiguousLayer, LayerNotRun, FeatureMapOutOfRange, UnsupportedOperation: as
                their names say.
        """
        try:
            epoch = integer(epoch)
        except TypeError as error:
            raise InvalidInput(f"epoch is {epoch!r}; expected a whole number: int(epoch)") from error
        if epoch in self.epochs and rank_and_count()[0] == 0:
            self._look(require_module(model), epoch)

    def on_train_epoch_end(self, trainer: Any, module: nn.Module) -> None:
        """Lightning's hook; it counts epochs from 0."""
        self(module, trainer.current_epoch + 1)

    def over(
        self, model: nn.Module, checkpoints: Mapping[int, str | os.PathLike[str] | Mapping[str, Tensor]]
    ) -> Evolution:
        """Look at saved checkpoints instead, all of them, whatever :attr:`epochs` says.

        Args:
            model: of the checkpoints' kind; its own weights stay.
            checkpoints: from the epoch to a state dict or its file, read without running code: alone or under
                ``"state_dict"``, ``"model_state_dict"`` or ``"model"``, with or without a prefix such as ``"module."``.

        Raises:
            InvalidInput: no checkpoints, or not such a mapping.
            WeightsError: a file is missing, damaged, or does not fit the model.
            DeconvvizError: else as for a call.
        """
        trained = copy.deepcopy(require_module(model))
        for epoch, weights in sorted(_checked(checkpoints).items()):
            if isinstance(weights, Mapping):
                load_state(trained, dict(weights), f"the state dict of epoch {epoch}")
            else:
                load_weights(trained, Path(weights))
            self._look(trained, epoch)
        return self.result

    @property
    def result(self) -> Evolution:
        """What was seen so far; raises :class:`NoForwardPass` before the first look."""
        if self._result is None:
            raise NoForwardPass(f"nothing was looked at yet: call it after one of the epochs {self.epochs}")
        return self._result

    def figure(self, **options: Any) -> Figure:
        """Figure 4 of what was seen so far, see :meth:`~deconvviz.evolution.result.Evolution.figure`."""
        return self.result.figure(**options)

    def _look(self, model: nn.Module, epoch: int) -> None:
        about, weights = self._about | {"model": _shape_of(model)}, model_fingerprint(model)
        if self._result is not None:
            require_same(self._result.about, about, "what was seen so far")
        others = self._others(epoch, weights)
        if others is None:
            return
        grid = FilterGrid(model, self.layers, 1, **self._rules)
        with left_as_found(model):
            try:
                grid.fit(**self._data, share=(0, 1), progress=False)
            except InvalidInput:
                if grid._found is None:  # else all gave NaN: the look has no unit, and training goes on
                    raise
            maps = {layer: tuple(grid[layer].maps(self.fmaps[layer])) for layer in self.layers}
        frames = {layer: list(map(_frame, grid[layer].place.field.axes)) for layer in self.layers}
        about |= {"frames": frames, "channels": grid.found.about["image"][0]}
        looks = sorted([*others, Look.of(epoch, weights, maps)], key=lambda look: look.epoch)
        self._result = Evolution(about, tuple(looks))
        if self.file is not None:
            try:
                self._result.save(self.file)
            except CheckpointError as error:  # training goes on; the next look is written with this one
                warnings.warn(f"epoch {epoch} was looked at, but not saved: {error}", stacklevel=3)

    def _others(self, epoch: int, weights: str) -> tuple[Look, ...] | None:
        """The looks at other epochs; ``None`` if this one was looked at with the same weights."""
        kept = self._result.looks if self._result is not None else ()
        before = next((look for look in kept if look.epoch == epoch), None)
        if before is None:
            return kept
        if before.weights == weights:
            return None
        if before is not kept[-1]:
            raise CheckpointError(
                f"epoch {epoch} was seen with other weights, and epochs up to {kept[-1].epoch} after it: they are of "
                "another training. Give another file, or delete it to start afresh"
            )
        return kept[:-1]


def _whole_numbers(items: Any) -> list[int]:
    """Also of NumPy's and tensors; anything else as none."""
    try:
        return [integer(item) for item in items]
    except TypeError:
        return []


def _listed(items: Any) -> list[Any]:
    """What can be iterated as a list; anything else as none."""
    return list(items) if isinstance(items, Iterable) else []


def _fmaps(
    given: Sequence[int] | Mapping[str, Sequence[int]] | None, layers: Sequence[str]
) -> dict[str, list[int] | None]:
    """Of each layer its chosen feature maps; ``None`` for all."""
    if given is None:
        return dict.fromkeys(layers)
    if isinstance(given, Mapping) and set(given) != set(layers):
        raise InvalidInput(f"fmaps is for {sorted(given)}; expected one entry for each of {sorted(layers)}")
    chosen: dict[str, list[int] | None] = {}
    for layer in layers:
        wanted = given[layer] if isinstance(given, Mapping) else given
        maps = _whole_numbers(wanted)
        if not maps or len(set(maps)) < len(maps):
            raise InvalidInput(
                f"fmaps is {wanted!r}; expected numbers of feature maps, one or more, each once, or None for all"
            )
        chosen[layer] = maps
    return chosen


def _checked(checkpoints: Any) -> Mapping[int, Any]:
    if not isinstance(checkpoints, Mapping) or not checkpoints:
        raise InvalidInput(f"checkpoints is {checkpoints!r}; expected a mapping such as {{1: 'epoch1.pth'}}")
    for epoch, weights in checkpoints.items():
        if not _whole_numbers([epoch]) or not isinstance(weights, (str, os.PathLike, Mapping)):
            raise InvalidInput(
                f"checkpoints has {epoch!r}: {type(weights).__name__}; expected an epoch and its state dict or file"
            )
    return {integer(epoch): weights for epoch, weights in checkpoints.items()}


def _frame(axis: Axis) -> list[int]:
    """What units see along an axis: offset, jump and size in pixels, or (0, 0, image) for all of it."""
    whole = axis.reason or axis.size >= axis.image
    return [0, 0, axis.image] if whole else [axis.offset, axis.jump, axis.size]


def _shape_of(model: nn.Module) -> str:
    """What stays the same in training: the layers, and the names and shapes of the weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return hash_of(structure(model), shapes)
