"""What a look at a model's filters found: the result of :func:`~deconvviz.diagnostics.diagnose`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from torch import Tensor

from deconvviz.errors import UnknownLayer
from deconvviz.plotting.filters import mosaic

FLAGS = ("dead", "grey", "saturated", "duplicate", "high-frequency")
"""What can be wrong with a filter."""
FEW_MIDDLE = 0.2
"""Below this share of energy in middle frequencies a layer has few of them."""
FOLDED = 0.5
"""From this share of energy beyond what its stride can carry a layer folds much over."""


@dataclass(frozen=True)
class Filter:
    """One filter of a layer and what is wrong with it; shares are 0..1, ``None`` where they have no meaning."""

    number: int
    rms: float
    """Root mean square of the kernel's weights."""
    grey: float | None
    """Share of the kernel's energy in its mean over the window."""
    low: float | None
    """Share of the energy in waves longer than 6 pixels; ``middle``: 3 to 6; ``high``: shorter than 3."""
    middle: float | None
    high: float | None
    twin: int | None
    """The most similar other filter on the same input maps, and their cosine."""
    cosine: float | None
    fires: float | None
    """Share of the data's cells where it is positive; ``None`` without data or without a rectifier after it."""
    flags: tuple[str, ...]
    """Some of :data:`FLAGS`."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """One convolution: its filters, and what the layer as a whole does to frequencies."""

    layer: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    weights: Tensor
    """A copy of the kernels (O, I, kh, kw)."""
    filters: tuple[Filter, ...]
    folded: float | None
    """Share of the kernels' energy that the stride folds over, 0..1; ``None`` without energy."""
    images: int
    """How many images of data were seen."""

    def flagged(self, flag: str) -> list[int]:
        """The numbers of the filters with one of :data:`FLAGS`."""
        return [found.number for found in self.filters if flag in found.flags]

    @property
    def advice(self) -> tuple[str, ...]:
        """Plain sentences on what is wrong and what to try; none if nothing is."""
        return (*self._of_filters(), *self._of_frequencies())

    def figure(self) -> Figure:
        """The kernels as a mosaic, the flagged ones framed."""
        return mosaic(self)

    def _of_filters(self) -> Iterator[str]:
        silent = f", or silent on the {self.images} images given" if self.images else ""
        remedies = {
            "dead": f"no weights to speak of{silent}; prune (what a positive bias gives is a constant, for the next "
            "layer's bias), or train with a lower rate and clip_filter_rms",
            "grey": "only an average over the window passes, at the cost of an edge detector, and tells less",
            "saturated": f"on everywhere in the {self.images} images given, so the rectifier does nothing; look at the "
            "bias",
            "duplicate": "another does the same; fewer maps would do, or train longer with dropout",
            "high-frequency": "changes from one pixel to the next, mostly noise; regularise, or train longer",
        }
        for flag, remedy in remedies.items():
            if numbers := self.flagged(flag):
                yield f"{len(numbers)} of {len(self.filters)} filters ({_listed(numbers)}): {remedy}"

    def _of_frequencies(self) -> Iterator[str]:
        (height, width), stride = self.kernel, max(self.stride)
        large = min(height, width) >= 5
        smaller = f"try {_odd(height * 7 / 11)}x{_odd(width * 7 / 11)}"  # the paper's step, from 11x11 to 7x7
        middles = [found.middle for found in self.filters if found.middle is not None]
        if large and middles and (middle := sum(middles) / len(middles)) < FEW_MIDDLE:
            yield f"waves of 3 to 6 pixels, the middle, hold {middle:.0%} of its filters' energy: {smaller}"
        if stride > 1 and self.folded is not None and self.folded >= FOLDED:
            yield (
                f"stride {stride} after a {height}x{width} kernel folds {self.folded:.0%} of its energy over: "
                f"{smaller if large else 'keep the kernel'}, stride {stride // 2}"
            )


@dataclass(frozen=True)
class Diagnosis:
    """Every convolution of a model, in the model's order; prints as a table."""

    layers: tuple[LayerDiagnosis, ...]

    @property
    def images(self) -> int:
        """How many images of data were seen."""
        return self.layers[0].images

    def __getitem__(self, layer: str) -> LayerDiagnosis:
        for found in self.layers:
            if found.layer == layer:
                return found
        names = ", ".join(repr(found.layer) for found in self.layers)
        raise UnknownLayer(f"no convolution {layer!r} was diagnosed; expected one of {names}")

    @property
    def healthy(self) -> bool:
        """Whether no filter is flagged and no layer has an advice."""
        return not any(layer.advice for layer in self.layers)

    def figure(self, layer: str | None = None) -> Figure:
        """The mosaic of one layer, by default the first."""
        return (self.layers[0] if layer is None else self[layer]).figure()

    def __str__(self) -> str:
        names = [layer.layer or "the model" for layer in self.layers]
        width = max([len("layer"), *map(len, names)])
        lines = [f"{'layer':<{width}}  kernel   filters  " + "  ".join(FLAGS) + "  folded"]
        for name, layer in zip(names, self.layers, strict=True):
            counts = "  ".join(f"{len(layer.flagged(flag)) or '-':>{len(flag)}}" for flag in FLAGS)
            shape = f"{layer.kernel[0]}x{layer.kernel[1]}/{max(layer.stride)}"
            folded = "-" if layer.folded is None else f"{layer.folded:.0%}"
            lines.append(f"{name:<{width}}  {shape:<7}  {len(layer.filters):>7}  {counts}  {folded:>6}")
        lines += [
            f"{name}: {advice}" for name, layer in zip(names, self.layers, strict=True) for advice in layer.advice
        ]
        return "\n".join(lines)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _odd(size: float) -> int:
    """The odd number nearest to a kernel's size, at least 3."""
    return max(3, 2 * round((size - 1) / 2) + 1)
