"""The command line: ``deconvviz demo | project | occlude | grid | explore | filters | check | layers``.

Parsers only; :mod:`~deconvviz.cli.commands` does the work. A user's mistake ends in exit code 2 and one line on
stderr, never in a traceback. A new command is an entry of :data:`COMMANDS`.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from deconvviz import __version__
from deconvviz.cli.commands import check, demo, filters, layers, project, say
from deconvviz.cli.grid import explore, grid
from deconvviz.cli.occlude import occlude
from deconvviz.errors import DeconvvizError, InvalidInput
from deconvviz.occlusion.fills import FILLS
from deconvviz.occlusion.maps import SCORES
from deconvviz.plotting import FIGURE_SUFFIXES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 from ``check`` if an operation is unsupported; 2 for a user's mistake; 130 after Ctrl-C.
    """
    for name in ("stdout", "stderr"):  # a shell may have closed them
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `deconvviz layers ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DeconvvizError, OSError) as error:
        say(str(error))
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leave the usage out: one line tells what is wrong and where to read more."""
        if "expected one argument" in message:  # argparse takes a value such as -1,2 for an option
            message += "; a value that begins with '-' goes after '=', as in --position=-1,2"
        raise InvalidInput(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="deconvviz", description="See what a CNN has learned.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, summary, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        add_options(command)
    return parser


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: demo_out")


def _project_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    _model_options(parser)
    add = parser.add_argument
    add("--layer", required=True, metavar="L", help="as `deconvviz layers` lists them")
    add("--fmap", type=_fmap, nargs="+", required=True, metavar="I", help="feature maps, or 'strongest'")
    add("--position", type=_position, default="max", metavar="max|all|Y,X", help="in map cells; default: max")
    add(
        "--panel",
        action="store_true",
        help="beside captum's methods and shuffled weights, all from a signal of 1 instead of the activation",
    )
    add("--out", type=_figure, required=True, metavar="FILE", help=", ".join(FIGURE_SUFFIXES))


def _occlude_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    _loading_options(parser)
    add = parser.add_argument
    add("--layer", metavar="L", help="whose map is watched; default: the last with maps of several cells")
    add("--fmap", type=_fmap, default="strongest", metavar="I", help="a feature map; default: 'strongest'")
    add("--patch", type=_pixel_count, default=32, metavar="PIXELS", help="side of the patch; default: 32")
    add("--stride", type=_pixel_count, default=8, metavar="PIXELS", help="its step; default: 8")
    add("--target", nargs="+", metavar="T", help="classes by number or name; default: the most probable")
    add(
        "--fill",
        type=_fill,
        default=None,
        metavar="F",
        help=f"a number or {', '.join(FILLS)}; default: 0, grey",
    )
    add("--score", choices=SCORES, default="probability", help="of the targets; default: probability")
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="the classes' names, one a line; default: the weights' own",
    )
    add("--out", type=_figure, required=True, metavar="FILE", help="of several pictures numbered: FILE-1, ...")


def _filters_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="to see which filters fire")
    _loading_options(parser)
    add = parser.add_argument
    add("--layer", metavar="L", help="the convolution to draw; default: the first")
    add("--out", type=_figure, metavar="FILE", help=f"its kernels as a mosaic: {', '.join(FIGURE_SUFFIXES)}")


def _mining_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, also in its subfolders")
    _model_options(parser)
    add = parser.add_argument
    add("--layers", nargs="+", required=True, metavar="L", help="as `deconvviz layers` lists them")
    add("--k", type=_count, default=9, metavar="K", help="units of each map; default: 9")
    add("--limit", type=_count, metavar="N", help="take only the first N pictures")
    add("--batch-size", type=_count, metavar="N", help="default: 32; halved where the memory does not suffice")
    add(
        "--workers",
        type=_whole_number,
        default=0,
        metavar="N",
        help="processes that read pictures; default: 0",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="a stopped run goes on from what is there")


def _grid_options(parser: argparse.ArgumentParser) -> None:
    _mining_options(parser)
    add = parser.add_argument
    add("--maps", type=_whole_number, nargs="+", metavar="I", help="draw these maps of each layer")
    add("--random", type=_count, default=16, metavar="N", help="draw so many at random; default: 16")


def _explore_options(parser: argparse.ArgumentParser) -> None:
    _mining_options(parser)
    add = parser.add_argument
    add("--no-control", action="store_true", help="leave the units with shuffled weights out")
    add("--quality", type=_quality, default=65, metavar="Q", help="of the JPEGs, 1 to 95; default: 65")


def _model_options(parser: argparse.ArgumentParser) -> None:
    _loading_options(parser)
    parser.add_argument(
        "--on-unsupported", choices=("raise", "gradient"), default="raise", help="operations without a rule"
    )


def _loading_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="of torchvision, module:factory or file.py:factory")
    add("--weights", metavar="W", help="DEFAULT or another of torchvision's, or a state dict's FILE")
    add("--size", type=_pixel_count, metavar="PIXELS", help="side of the input; default: the model's own")
    add("--resize", type=_pixel_count, metavar="PIXELS", help="short side before the crop")
    of_pictures = "one number makes them grey, three RGB; default: the model's own"
    add("--mean", type=_number, nargs="+", metavar="M", help=f"of pictures of 0 to 1: {of_pictures}, or ImageNet's")
    add("--std", type=_number, nargs="+", metavar="S", help="their standard deviation, as many numbers")
    add("--device", type=_device, default=torch.device("cpu"), metavar="D", help="default: cpu")


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, Callable[..., None]]] = {
    "demo": (demo, "Look at real features of a real network: write a page.", _demo_options),
    "project": (project, "Project feature maps of a layer to the pixels of pictures.", _project_options),
    "occlude": (
        occlude,
        "Watch a model while a patch covers pictures: the paper's figure 7.",
        _occlude_options,
    ),
    "filters": (
        filters,
        "Find dead, grey, duplicate and aliased filters (the paper's section 4.1).",
        _filters_options,
    ),
    "grid": (grid, "Find what every feature map looks for: the paper's figure 2.", _grid_options),
    "explore": (explore, "Find what every feature map looks for: write a page to browse.", _explore_options),
    "check": (check, "List how every operation of a model goes back.", _model_options),
    "layers": (layers, "List the layers of a model and the shapes they put out.", _loading_options),
}


def _fmap(text: str) -> int | str:
    return text if text == "strongest" else _whole_number(text, "a map's number, or 'strongest'")


def _fill(text: str) -> str | float:
    return text if text in FILLS else _number(text, f"a finite number or one of {', '.join(FILLS)}")


def _number(text: str, expected: str = "a finite number") -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")


def _position(text: str) -> str | tuple[int, ...]:
    if text in ("max", "all"):
        return text
    return tuple(_whole_number(part, "'max', 'all', or map cells Y,X") for part in text.split(","))


def _pixel_count(text: str) -> int:
    if (count := _whole_number(text, "a number of pixels")) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected 1 pixel or more")
    return count


def _count(text: str) -> int:
    if (count := _whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected 1 or more")
    return count


def _quality(text: str) -> int:
    if not 1 <= (quality := _whole_number(text)) <= 95:
        raise argparse.ArgumentTypeError(f"{text!r}; expected 1 to 95")
    return quality


def _whole_number(text: str, expected: str = "a whole number") -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}") from None


def _figure(text: str) -> Path:
    if (path := Path(text)).suffix.lower() not in FIGURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(FIGURE_SUFFIXES)}")
    return path


def _device(text: str) -> torch.device:
    try:
        found = torch.zeros(1, device=text)
        found.cpu()
        return found.device
    except Exception as error:  # a backend that is not installed raises what it likes
        raise argparse.ArgumentTypeError(f"no device {text!r}: {error}") from error
