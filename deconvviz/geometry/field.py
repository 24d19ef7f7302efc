"""Along each axis of the image, what the units of a layer see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """How units see one axis of the image, in pixels; the whole of it if there is a :attr:`reason`."""

    image: int
    """Pixels of the image along this axis."""
    size: int = 0
    jump: int = 0
    """Pixels from the field of one unit to that of the next."""
    offset: int = 0
    """Where the field of unit 0 starts; negative in the padding."""
    dim: int = 0
    """The dimension of the value that runs along this axis."""
    reason: str = ""
    """Why the field is global: the operation that mixes all positions."""
    coarsest: int = 1
    """A multiple of the jumps before each upsampling, in pixels; 1 without one."""
    rigid: bool = False
    """The pass holds a size of its own along this axis (an adaptive pool, a learned map, a mirror, a size that the
    model asks for), so that a crop would not be computed as a part of the whole."""
    near: float = -math.inf
    far: float = math.inf
    """Where padding mirrors the map: a field that starts at ``first`` reaches to ``near - first`` at least, and one
    that ends at ``end`` begins at ``far - end`` at the latest."""

    def pixels(self, position: int) -> tuple[int, int]:
        """The pixels ``[first, end)`` that the unit at ``position`` sees, clipped to the image.

        At the image's border they can be more than it sees: windows that do not fit leave the last pixels out.
        """
        if self.reason:
            return 0, self.image
        first = self.offset + position * self.jump
        end = first + self.size
        lowest, highest = min(first, self.far - end), max(end, self.near - first)
        if self.far - highest < first and self.near - lowest > end:  # from one border to the other, and back
            return 0, self.image
        return min(max(int(lowest), 0), self.image), min(max(int(highest), 0), self.image)

    @property
    def crop_size(self) -> int:
        """Pixels of a crop that any unit can be computed from, all of one size.

        Crops start at multiples of every jump on the way, so that each layer falls on the same pixels as in the whole
        image. One that touches the far border ends on it exactly: border padding falls where it fell.
        """
        if self.reason or self.rigid:
            return self.image
        grid = self._grid
        size = self.size + grid - self.jump + self.offset % self.jump
        return min(size + (self.image - size) % grid, self.image)

    def crop_start(self, position: int) -> int:
        """The first pixel of the crop for the unit at ``position``."""
        if self.crop_size == self.image:
            return 0
        aligned = (self.offset + position * self.jump) // self._grid * self._grid
        return min(max(aligned, 0), self.image - self.crop_size)

    @property
    def _grid(self) -> int:
        """Pixels at whose multiples crops start."""
        return math.lcm(self.jump, self.coarsest)


@dataclass(frozen=True)
class ReceptiveField:
    """What the units of a layer see of the image: one :class:`Axis` a spatial axis, (y, x) for pictures."""

    axes: tuple[Axis, ...]

    @property
    def reason(self) -> str:
        """Why units see the whole image along some axis; empty if they don't."""
        return next((axis.reason for axis in self.axes if axis.reason), "")

    @property
    def covers_image(self) -> bool:
        """Whether a crop would be the whole image, along every axis."""
        return all(axis.crop_size == axis.image for axis in self.axes)

    def box(self, position: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The pixels [first, end) along each axis that the unit at ``position`` (map cells) sees."""
        return tuple(axis.pixels(i) for axis, i in zip(self.axes, position, strict=True))

    def __str__(self) -> str:
        if self.reason:
            return f"the whole image ({self.reason})"
        sizes, jumps = [axis.size for axis in self.axes], [axis.jump for axis in self.axes]
        return " x ".join(map(str, sizes)) + " pixels, jump " + " x ".join(map(str, dict.fromkeys(jumps)))
