"""``deconvviz occlude``: figure 7's row for pictures; what falls where a patch covers them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from deconvviz.cli.commands import forward_pass, load, pictures, try_pass, warn_if_random
from deconvviz.errors import InvalidInput
from deconvviz.layers import address, nearest
from deconvviz.models.zoo import LoadedModel
from deconvviz.occlusion import OcclusionSensitivity
from deconvviz.plotting import save_figure


def occlude(arguments: argparse.Namespace) -> int:
    """Write a figure for each picture; several are numbered from 1."""
    loaded = load(arguments)
    labels = _labels(arguments, loaded)
    targets = None if arguments.target is None else [_target(item, labels) for item in arguments.target]
    inputs = pictures(arguments, loaded)
    layer = arguments.layer
    if layer is None:
        layer = last_maps(loaded, inputs[0])
        print(f"layer {layer or '(the model)'}: the last one with maps of several cells")
    for number, image in enumerate(inputs, 1):
        with forward_pass(image):
            maps = OcclusionSensitivity(loaded.model).maps(
                image, arguments.patch, arguments.stride, layer, arguments.fmap, targets,
                baseline=arguments.fill, score=arguments.score, show_progress=True,
            )  # fmt: skip
        out = arguments.out
        if len(inputs) > 1:
            out = out.with_name(f"{out.stem}-{number}{out.suffix}")
        figure = maps.figure(0, labels, mean=loaded.transform.mean, std=loaded.transform.std)
        save_figure(figure, out, dpi=150)
        print(f"wrote {out}")
    warn_if_random(loaded)
    return 0


def last_maps(loaded: LoadedModel, image: Tensor) -> str:
    """The last module of a pass that puts out maps (1, C, H, W) of more than one cell."""
    tape = try_pass(loaded, image)
    for call in reversed(tape.calls):
        shapes = [tape.values[value].shape for value in call.outputs if value is not None]
        if len(shapes) == len(call.outputs) == 1 and len(shapes[0]) == 4 and math.prod(shapes[0][2:]) > 1:
            return address(call.name, call.number, tape.counts())
    raise InvalidInput("no layer of the model has maps of several cells: choose one with --layer")


def _labels(arguments: argparse.Namespace, loaded: LoadedModel) -> Sequence[str] | None:
    """The classes' names: a line each in the user's file, or those that came with the weights."""
    if arguments.labels is None:
        return loaded.categories
    path: Path = arguments.labels
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        expected = "expected a text file of the classes' names, one a line"
        raise InvalidInput(f"--labels {path} cannot be read ({error.strerror}); {expected}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not a text file of names, one a line: {error}") from error


def _target(text: str, labels: Sequence[str] | None) -> int:
    """A class by number or name."""
    if text.removeprefix("-").isdecimal():
        return int(text)
    if labels is not None and text in labels:
        return list(labels).index(text)
    known = "no names are known: give --labels" if labels is None else f"not among the names; {nearest(text, labels)}"
    raise InvalidInput(f"target {text!r} is no number, and {known}")
