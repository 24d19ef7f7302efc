"""``deconvviz grid`` and ``explore``: what every feature map looks for in a folder of pictures.

Both keep what they have found in the output folder, so a second run goes on where the first was stopped, and a
run with other pictures, layers or weights is refused rather than mixed in. Under ``torchrun`` the processes
share the pictures, and the first writes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from deconvviz.cli.commands import load, say, try_pass, warn_if_random
from deconvviz.errors import InvalidInput
from deconvviz.explorer import Sizes
from deconvviz.filter_grid import FilterGrid
from deconvviz.models.zoo import LoadedModel
from deconvviz.plotting import save_figure
from deconvviz.shards import rank_and_count


def grid(arguments: argparse.Namespace) -> int:
    """Write figure 2 for each layer."""
    with _process_group():
        loaded, found = _mined(arguments)
        if _first():
            for number, layer in enumerate(found):
                maps, random = arguments.maps, None if arguments.maps else arguments.random
                mean, std = loaded.transform.mean, loaded.transform.std
                path = arguments.out / f"{number}-{_file_name(layer.name)}.png"
                save_figure(layer.figure(maps, random, mean=mean, std=std), path, dpi=200)
                print(f"wrote {path}")
    return 0


def explore(arguments: argparse.Namespace) -> int:
    """Write the page."""
    with _process_group():
        loaded, found = _mined(arguments)
        if _first():
            page = found.explore(
                arguments.out,
                control=not arguments.no_control,
                title=f"{arguments.model}: what its feature maps look for",
                mean=loaded.transform.mean,
                std=loaded.transform.std,
                sizes=Sizes(quality=arguments.quality),
            )
            print(f"open {page}")
    return 0


def _mined(arguments: argparse.Namespace) -> tuple[LoadedModel, FilterGrid]:
    if Path(arguments.out).resolve().is_relative_to(Path(arguments.folder).resolve()):
        raise InvalidInput(
            f"--out {arguments.out} is inside {arguments.folder}, where its figures would be taken for photographs by "
            "the next run; expected a folder beside it"
        )
    loaded = load(arguments)
    size, channels = loaded.transform.size, len(loaded.transform.mean)
    try_pass(loaded, torch.zeros(1, channels, size, size, device=arguments.device))
    found = FilterGrid(loaded.model, arguments.layers, arguments.k, on_unsupported=arguments.on_unsupported).fit(
        arguments.folder,
        transform=loaded.transform,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        checkpoint=Path(arguments.out, "grid.npz"),
        progress=_first(),
    )
    if _first():
        for number, reason in list(found.left_out.items())[:10]:
            say(f"left out: {found.name(number)}: {reason}")
        if len(found.left_out) > 10:
            say(f"left out: {len(found.left_out) - 10} more")
        warn_if_random(loaded)
    return loaded, found


@contextmanager
def _process_group() -> Iterator[None]:
    """The group that ``torchrun`` asks for by its environment variables, if it does."""
    try:
        started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
        if started:
            distributed.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise InvalidInput(f"WORLD_SIZE and what torchrun sets beside it do not fit: {error}") from error
    try:
        yield
    finally:
        if started:
            distributed.destroy_process_group()


def _first() -> bool:
    return rank_and_count()[0] == 0


def _file_name(layer: str) -> str:
    return "".join(c if c.isalnum() or c in ".-_" else "_" for c in layer) or "model"
