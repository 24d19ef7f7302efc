"""Random windows over an input, for Hypothesis: convolutions and pools in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import hypothesis.strategies as st
from hypothesis import settings

Sizes = tuple[int, ...]

at_random = settings(max_examples=40, derandomize=True, deadline=None)


class Geometry(NamedTuple):
    """A number for each spatial dimension; ``size`` is the input's."""

    size: Sizes
    kernel_size: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @property
    def options(self) -> dict[str, Sizes]:
        """What a layer of torch is made with."""
        return {name: numbers for name, numbers in self._asdict().items() if name != "size"}


@st.composite
def geometries(draw: st.DrawFn, most_padding: Callable[[int], int] = lambda kernel: kernel // 2) -> Geometry:
    """Windows that fit the input, so that each holds a cell of it: PyTorch's pools go astray otherwise."""

    def each(low: int, high: int) -> Sizes:
        return draw(st.tuples(*[st.integers(low, high)] * spatial))

    spatial = draw(st.integers(1, 3))
    kernel, stride, dilation, more = each(1, 3), each(1, 3), each(1, 3), each(0, 4)
    padding = tuple(draw(st.integers(0, most_padding(k))) for k in kernel)
    size = tuple(d * (k - 1) + 1 + m for k, d, m in zip(kernel, dilation, more, strict=True))
    return Geometry(size, kernel, stride, padding, dilation)
