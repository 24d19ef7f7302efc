"""What each command does with its parsed arguments; every function returns the exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deconvviz.capture import require_module, watch
from deconvviz.comparison import compare, shuffled_weights
from deconvviz.deconvnet import Deconvnet
from deconvviz.demo import run_demo
from deconvviz.diagnostics import diagnose
from deconvviz.errors import DeconvvizError, InvalidInput, OperationFailed
from deconvviz.images import (
    PICTURE_SUFFIXES,
    crop_to_signal,
    display_scale,
    displayable,
    load_picture,
    save_picture,
    to_pixels,
)
from deconvviz.layers import address
from deconvviz.models.zoo import LoadedModel, load_model
from deconvviz.plotting import Box, comparison_panel, panel, save_figure
from deconvviz.tape import Tape

CLIP_FRAMES = 16
"""Length of the clip on which a video model is checked."""
OF_SHAPE = (RuntimeError, ValueError, IndexError, AssertionError)
"""What a model raises at an input of the wrong shape."""


def say(text: str) -> None:
    """Write one line to stderr."""
    print("deconvviz:", " ".join(text.split()), file=sys.stderr)


def demo(arguments: argparse.Namespace) -> int:
    """Write the demo page."""
    print(f"open {run_demo(arguments.out)}")
    return 0


def project(arguments: argparse.Namespace) -> int:
    """Write feature maps of a layer, projected to the pixels of pictures."""
    if arguments.panel and arguments.position != "max":
        raise InvalidInput("--panel shows each map's strongest position: leave --position or --panel out")
    loaded = load(arguments)
    inputs = pictures(arguments, loaded)
    draw = _draw_comparisons if arguments.panel else _draw_projections
    draw(arguments, loaded, inputs)
    print(f"wrote {arguments.out}")
    warn_if_random(loaded)
    return 0


def _draw_projections(arguments: argparse.Namespace, loaded: LoadedModel, inputs: Sequence[Tensor]) -> None:
    """Write one map of one picture as pixels; more as a panel with a row for each picture, of small ones the part."""
    rows, scales, labels, frames = [], [], [], []
    for path, image in zip(arguments.images, inputs, strict=True):
        with _recorded(loaded, image, arguments) as deconv:
            maps = _maps(deconv, arguments)
            pixels = deconv.project(arguments.layer, maps, position=arguments.position)[0]
        for fmap, projection in zip(maps, pixels, strict=True):
            if not projection.any():
                layer = arguments.layer or "the model"
                why = "it is silent, or rectifiers on the way back stop its signal"
                say(f"warning: nothing of map {fmap} of {layer} comes back to the pixels of {path} ({why}): plain grey")
        boxes = list(map(_part, pixels))
        rows.append([_pixels(image, loaded), *map(displayable, map(_cut, pixels, boxes))])
        scales.append([None, *map(display_scale, pixels)])
        frames.append([(box, str(m)) for box, m in zip(boxes, maps, strict=True) if box is not None])
        found = [f": map {m}" for m, asked in zip(maps, arguments.fmap, strict=True) if asked == "strongest"]
        labels.append(path.name + "".join(found[:1]))
    if len(rows) == len(arguments.fmap) == 1 and arguments.out.suffix.lower() in PICTURE_SUFFIXES:
        save_picture(displayable(pixels[0]), arguments.out)
    else:
        titles = [f"{arguments.layer} {'' if m == 'strongest' else 'map '}{m}" for m in arguments.fmap]
        save_figure(panel(rows, ["picture", *titles], labels, scales, frames), arguments.out)


def _part(projection: Tensor) -> Box | None:
    """Where the signal of a projection (C, H, W) is, if that is less than half of its sides."""
    y0, y1, x0, x1 = box = crop_to_signal(projection, margin=2)
    return box if 2 * (y1 - y0) < projection.shape[1] and 2 * (x1 - x0) < projection.shape[2] else None


def _cut(projection: Tensor, box: Box | None) -> Tensor:
    return projection if box is None else projection[:, box[0] : box[1], box[2] : box[3]]


def _draw_comparisons(arguments: argparse.Namespace, loaded: LoadedModel, inputs: Sequence[Tensor]) -> None:
    """Write the panel of methods, a row for each map of each picture."""
    shuffled = shuffled_weights(loaded.model)
    comparisons = []
    for image in inputs:
        with _recorded(loaded, image, arguments) as deconv:
            maps = _maps(deconv, arguments)
        comparisons += [
            compare(loaded.model, image, arguments.layer, fmap, shuffled, arguments.on_unsupported) for fmap in maps
        ]
    save_figure(comparison_panel(comparisons, loaded.transform.mean, loaded.transform.std), arguments.out)


def filters(arguments: argparse.Namespace) -> int:
    """Print what is wrong with the filters; write a layer's kernels as a mosaic."""
    loaded = load(arguments)
    inputs = pictures(arguments, loaded)
    for image in inputs[:1]:
        try_pass(loaded, image)
    diagnosis = diagnose(loaded.model, inputs or None)
    print(diagnosis)
    if arguments.out:
        save_figure(diagnosis.figure(arguments.layer), arguments.out, dpi=150)
        print(f"wrote {arguments.out}")
    warn_if_random(loaded)
    return 0


@contextmanager
def _recorded(loaded: LoadedModel, image: Tensor, arguments: argparse.Namespace) -> Iterator[Deconvnet]:
    """A deconvnet that has seen the model's pass over a picture."""
    with Deconvnet(loaded.model, on_unsupported=arguments.on_unsupported) as deconv:
        with forward_pass(image), torch.no_grad():
            loaded.model(image)
        yield deconv


def _maps(deconv: Deconvnet, arguments: argparse.Namespace) -> list[int]:
    """The maps that were asked for, by number."""
    return [int(deconv.strongest(arguments.layer)[0]) if m == "strongest" else m for m in arguments.fmap]


def _pixels(image: Tensor, loaded: LoadedModel) -> NDArray[np.uint8]:
    return to_pixels(image[0], loaded.transform.mean, loaded.transform.std)


def check(arguments: argparse.Namespace) -> int:
    """Print how every operation of a model goes back; 1 if one has no rule."""
    model, noise = _on_noise(arguments)
    with forward_pass(noise):
        report = Deconvnet(model, on_unsupported=arguments.on_unsupported).check(noise)
    print(report)
    return 0 if report.supported else 1


def layers(arguments: argparse.Namespace) -> int:
    """Print every module call of a pass, in the order they end: address, type, shape of the output."""
    model, noise = _on_noise(arguments)
    with forward_pass(noise):
        tape, _ = watch(model, (noise,))
    counts = tape.counts()
    rows = [("layer", "type", "output")]
    for call in tape.calls:
        shapes = [str(tuple(tape.values[value].shape)) for value in call.outputs if value is not None]
        kind = type(model.get_submodule(call.name)).__name__
        rows.append((address(call.name, call.number, counts) or "(the model)", kind, ", ".join(shapes)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, kind, shape in rows:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape}")
    return 0


def load(arguments: argparse.Namespace) -> LoadedModel:
    """The model on its device, with pictures prepared as the user asked."""
    loaded = load_model(arguments.model, arguments.weights)
    size = arguments.size or loaded.transform.size
    resize = arguments.resize or round(size * loaded.transform.resize / loaded.transform.size)
    transform = replace(loaded.transform, size=size, resize=resize)
    if (arguments.mean is None) != (arguments.std is None):
        raise InvalidInput("--mean and --std go together: give both, or neither for the model's own")
    if arguments.mean is not None:
        transform = replace(transform, mean=tuple(arguments.mean), std=tuple(arguments.std))
    return replace(loaded, model=loaded.model.to(arguments.device), transform=transform)


def pictures(arguments: argparse.Namespace, loaded: LoadedModel) -> list[Tensor]:
    """The pictures that were named, each (1, C, H, W), as the model takes them."""
    return [loaded.transform(load_picture(path))[None].to(arguments.device) for path in arguments.images]


def warn_if_random(loaded: LoadedModel) -> None:
    """Say that a model without weights has learned nothing."""
    if not loaded.learned:
        say("warning: without --weights the weights are random, so this shows nothing learned")


def _on_noise(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model, and noise of the shape that its first convolution takes."""
    loaded = load(arguments)
    model = require_module(loaded.model)
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    space = 2 if first is None else len(first.kernel_size)
    shape = [
        1,
        len(loaded.transform.mean) if first is None else first.in_channels,
        *[loaded.transform.size] * min(space, 2),
    ]
    shape[2:2] = [CLIP_FRAMES] * (space - 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(arguments.device)
    return model, noise


@contextmanager
def forward_pass(image: Tensor) -> Iterator[None]:
    """Tell what the model's own code raises as what it is: this input does not suit it."""
    try:
        yield
    except OperationFailed as error:
        raise InvalidInput(f"{error}{_remedy(error.__cause__)}") from error
    except DeconvvizError:
        raise
    except Exception as error:
        failed = f"the model failed on an input of shape {tuple(image.shape)}"
        raise InvalidInput(f"{failed} with {type(error).__name__}: {error}{_remedy(error)}") from error


def _remedy(error: BaseException | None) -> str:
    return "; --size, --mean and --std say how pictures are prepared" if isinstance(error, OF_SHAPE) else ""


def try_pass(loaded: LoadedModel, image: Tensor) -> Tape:
    """What the model does with an image, or a clear error, before longer work begins."""
    with forward_pass(image):
        return watch(require_module(loaded.model), (image,))[0]
