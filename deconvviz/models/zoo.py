"""A model by its name: one of torchvision's builders or ``module:factory``, with weights, ready for pictures.

>>> load_model("squeezenet1_1").transform.size
224
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from deconvviz.errors import InvalidInput, WeightsError
from deconvviz.images import IMAGENET_MEAN, IMAGENET_STD, require_normalisation, to_input
from deconvviz.models.weights_file import load_weights


@dataclass(frozen=True)
class Transform:
    """From a picture to the model's input (3, size, size): resize the short side, crop, normalise.

    ``mean`` and ``std`` of one number each make grey pictures (1, size, size).

    Raises:
        InvalidInput: as :func:`~deconvviz.images.require_normalisation`.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __post_init__(self) -> None:
        require_normalisation(self.mean, self.std)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Apply :func:`~deconvviz.images.to_input`."""
        return to_input(picture, self.size, self.resize, self.mean, self.std, self.interpolation)

    @classmethod
    def of(cls, preset: Any) -> Transform:
        """Read one of torchvision's presets, as far as it says; detectors normalise inside the model."""
        resize = min(getattr(preset, "resize_size", None) or [256])
        size = min(getattr(preset, "crop_size", None) or [resize])
        mean, std = getattr(preset, "mean", (0.0,) * 3), getattr(preset, "std", (1.0,) * 3)
        interpolation = getattr(preset, "interpolation", InterpolationMode.BILINEAR)
        return cls(size, resize, tuple(mean), tuple(std), interpolation)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on the CPU, and how its weights' makers used it."""

    model: nn.Module
    transform: Transform
    categories: Sequence[str] | None
    """The names of the classes, if the weights came with them."""
    learned: bool
    """Whether there is something to see: weights were given, or a factory may have loaded its own."""


def load_model(name: str, weights: str | None = None) -> LoadedModel:
    """Build a model and load its weights.

    Args:
        name: one of ``torchvision.models.list_models()``, or ``module:factory``, where ``factory`` is an
            ``nn.Module`` or ``factory()`` gives one, and ``module`` is a Python file, or imported with the current
            folder on the path.
        weights: ``"DEFAULT"`` or another of torchvision's names, downloaded by torchvision; or the path of a
            state dict; ``None`` for seeded random weights.

    Raises:
        InvalidInput: there is no such model, or the factory failed.
        WeightsError: the weights cannot be had, are not a state dict or do not fit the model.
    """
    if ":" in name:
        model = _from_factory(name)
        if weights is not None:
            load_weights(model, Path(weights))
        return LoadedModel(model.eval(), Transform(), None, True)
    names = list_models()
    if name.endswith(".py"):
        raise InvalidInput(f"model {name!r} is a file; expected {name}:factory, with what makes the model in it")
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.4) or names[:4]
        raise InvalidInput(
            f"no model {name!r} in torchvision; did you mean {', '.join(near)}? "
            "A model of your own is given as module:factory"
        )
    published: Any = get_model_weights(name)
    if weights in published.__members__:
        recipe = published[weights]
        model = _build(name, recipe)
    else:
        file = None if weights is None else Path(weights)
        if file is not None and not file.exists():
            known = ", ".join(published.__members__)
            raise WeightsError(f"weights {weights!r} are no file, nor torchvision's for {name} ({known})")
        same = [r for r in published if file is not None and Path(r.url).name == file.name]
        recipe = [*same, *published][0]
        model = _build(name, ported=bool(same))
        if file is not None:
            load_weights(model, file)
    categories = None if weights is None else recipe.meta.get("categories")
    return LoadedModel(model, Transform.of(recipe.transforms()), categories, learned=weights is not None)


def _build(name: str, weights: Any = None, ported: bool = False) -> nn.Module:
    """Call one of torchvision's builders with a fixed seed; nothing but ``weights`` is downloaded."""
    builder = get_model_builder(name)
    options: dict[str, Any] = {"weights": weights}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3") and weights is None:  # published ones want TensorFlow's pictures
        options |= {"init_weights": False, "transform_input": ported}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return builder(**options).eval()
        except (OSError, RuntimeError) as error:  # a URLError is an OSError, a damaged file a RuntimeError
            if weights is None:
                raise
            raise WeightsError(
                f"{weights} could not be downloaded ({error}); "
                f"fetch {weights.url} another way and give the file with --weights"
            ) from error


def _from_factory(name: str) -> nn.Module:
    """Import ``module``, call ``factory()``; what goes wrong in them is told with file and line."""
    module_name, _, factory_name = name.rpartition(":")
    folder = Path.cwd()
    if module_name.endswith(".py"):
        folder, module_name = Path(module_name).resolve().parent, Path(module_name).stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        factory: Any = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InvalidInput(
            f"model {name!r} failed with {type(error).__name__}: {error} "
            f"({Path(place.filename).name}, line {place.lineno}); "
            "expected module:factory, where factory is an nn.Module or factory() gives one"
        ) from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model {name!r} gives a {type(model).__name__}; expected an nn.Module")
    return model
