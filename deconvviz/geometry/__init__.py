"""Which pixels a unit sees: its receptive field, from the recorded pass of any graph.

Along one axis of the image, unit i of a value sees the pixels::

    [offset + i * jump,  offset + i * jump + size)

Through a window of kernel k, stride s, padding p and dilation d (a convolution, a pool) the three become::

    size + (k - 1) * d * jump,    jump * s,    offset - p * jump

and where branches meet (add, concatenate), the union. Upsampling by S and a transposed convolution make ``jump / S`` of
the jump; a field is then that of all phases of the factor, so some units see a little less. Ceil mode and padding only
add units at the borders, whose fields reach beyond the image: :meth:`Axis.pixels` clips them.

After global pooling, squeeze-and-excite or a linear layer over positions a unit sees the whole image: its
field is *global*, and :attr:`Axis.reason` says why. So it is after a map finer than the image and any operation that is
not known here: a field is never too small.

>>> axis = Axis(image=224, size=43, jump=16, offset=-2, dim=2)      # ZFNet's pool2
>>> axis.pixels(0), axis.pixels(5), axis.crop_size, axis.crop_start(5)
((0, 41), (78, 121), 64, 64)
"""

from __future__ import annotations

from deconvviz.geometry.field import Axis, ReceptiveField
from deconvviz.geometry.ways import Field, Seen, union
from deconvviz.layers import address
from deconvviz.tape import Tape


def receptive_field(tape: Tape, value: int, input: int = 0) -> ReceptiveField:
    """What the units of a value of the pass see of its ``input``-th input (N, C, *S)."""
    start = tape.inputs[input]
    shape = tape.values[start].shape
    fields: dict[int, Field] = {start: tuple(Axis(n, 1, 1, 0, 2 + a) for a, n in enumerate(shape[2:]))}
    unseen = tuple(Axis(n, reason="it does not come from this input") for n in shape[2:])
    counts = tape.counts()
    for step in tape.leading_to(value):
        sees = [fields[i] for i in step.inputs if i in fields]
        if not sees:
            continue
        place = address(step.module, step.number, counts) or "the model"
        shapes = [tuple(tape.values[i].shape) for i in step.inputs]
        for k, output in enumerate(step.outputs):
            if output is not None:
                seen = Seen(step, shapes, tuple(tape.values[output].shape), f"{step.operation} in {place}", k)
                parts = [seen.through(fields[i], n) for n, i in enumerate(step.inputs) if i in fields]
                joint = parts[0]
                for part in parts[1:]:
                    joint = tuple(union(a, b, seen.name) for a, b in zip(joint, part, strict=True))
                fields[output] = joint
    return ReceptiveField(fields.get(value, unseen))


__all__ = ["Axis", "ReceptiveField", "receptive_field"]
