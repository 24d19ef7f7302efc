"""Find a layer: by dotted name, by module, or by call ("layer1.0.relu#2"); list the choices when it fails.

A module that runs several times in a pass (a reused ``nn.ReLU``) has one address a call, numbered from 1.
Its name alone is then ambiguous, and said to be so.

>>> from torch import nn
>>> locate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "1#2")
('1', 2)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from deconvviz.errors import AmbiguousLayer, InvalidInput, LayerNotRun, NoForwardPass, UnknownLayer
from deconvviz.tape import Call, Tape

Layer = str | nn.Module


def locate(model: nn.Module, layer: Layer) -> tuple[str, int | None]:
    """The dotted name of ``layer`` and the number of its call, ``None`` if not chosen.

    Raises:
        UnknownLayer: the model has no such layer; the message suggests the nearest names.
        InvalidInput: ``layer`` is neither a name nor a module.
    """
    names = {module: name for name, module in model.named_modules()}
    if isinstance(layer, nn.Module):
        if layer in names:
            return names[layer], None
        raise UnknownLayer(
            f"this {type(layer).__name__} is not a module of the {type(model).__name__}; "
            "give one of its own modules, or a dotted name such as "
            + ", ".join(repr(name) for name in list(names.values())[1:4])
        )
    if not isinstance(layer, str):
        given = f"a tensor {tuple(layer.shape)}" if isinstance(layer, Tensor) else repr(layer)
        raise InvalidInput(f"layer is {given}; expected a dotted name, a module or a call such as 'relu#2'")
    name, mark, number = layer.partition("#")
    if mark and not (number.isdecimal() and int(number) > 0):
        raise InvalidInput(f"layer {layer!r}: the call after '#' is counted from 1, as in '{name}#2'")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UnknownLayer(
            f"no layer {name!r} in the {type(model).__name__}; {nearest(name, list(names.values()))}"
        ) from None
    return names[module], int(number) if number else None


def one_or_several(layers: Layer | Iterable[Layer]) -> list[Layer]:
    """Layers, of which one can stand alone.

    Raises:
        InvalidInput: there is none.
    """
    if isinstance(layers, (str, nn.Module)):
        return [layers]
    chosen = list(layers) if isinstance(layers, Iterable) else []
    if not chosen:
        raise InvalidInput(f"layers is {layers!r}; expected dotted names, modules or calls, one or more")
    return chosen


def layer_name(model: nn.Module, layer: Layer) -> str:
    """How results name a layer: as it was given, or by a module's dotted name."""
    return layer if isinstance(layer, str) else locate(model, layer)[0]


def find_call(tape: Tape, name: str, number: int | None) -> Call:
    """The recorded call of a layer.

    Raises:
        LayerNotRun: the pass never called it, or not that often.
        AmbiguousLayer: it ran several times and no call was chosen.
    """
    calls = [call for call in tape.calls if call.name == name]
    if not calls:
        ran = [call.name for call in tape.calls if call.name]
        inside = [other for other in ran if other.startswith(f"{name}.")]  # of a container, or of a traced module
        near = f"choose a layer inside it, such as {inside[-1]!r}" if inside else nearest(name, ran)
        raise LayerNotRun(f"{described(name)} exists, but this pass never called it; {near}")
    if number is None and len(calls) > 1:
        choices = ", ".join(f"'{name}#{call.number}'" for call in calls)
        raise AmbiguousLayer(f"{described(name)} runs {len(calls)} times in a pass: choose one of {choices}")
    if number is not None and number > len(calls):
        raise LayerNotRun(f"{described(name)} ran {len(calls)} time(s) in this pass; '{name}#{number}' did not")
    return calls[0] if number is None else next(call for call in calls if call.number == number)


def described(name: str) -> str:
    """How an error names a layer; ``""`` is the model itself."""
    return f"layer {name!r}" if name else "the model"


def only_output(call: Call) -> int:
    """The one value of the pass that a call puts out; raises as :func:`only_value`."""
    return only_value(call.outputs, described(call.name))


def only_value(values: Sequence[int | None], what: str) -> int:
    """The one value of the pass that goes into or comes out of a call, ``what`` in an error.

    Raises:
        InvalidInput: there are several tensors, or none.
        NoForwardPass: the tensor does not depend on the inputs.
    """
    if len(values) != 1:
        raise not_one(what, len(values))
    if values[0] is None:
        raise NoForwardPass(
            f"{what} does not depend on the inputs through any operation seen in the pass "
            "(it may go through numpy, .detach() or code that hides its operations): choose a layer before it"
        )
    return values[0]


def not_one(what: str, count: int) -> InvalidInput:
    """The error of a call, ``what``, that gives several tensors or none."""
    wrap = ", or wrap it in a module that returns one" if what == described("") else ""
    return InvalidInput(f"{what} gives {count} tensors; expected one: choose a layer inside it that gives one{wrap}")


def address(name: str, number: int, counts: Mapping[str, int]) -> str:
    """How a call is written: the name, and its number if the module ran more than once."""
    return f"{name}#{number}" if counts.get(name, 1) > 1 else name


def nearest(name: str, names: Sequence[str]) -> str:
    """A sentence with the nearest of ``names``, whatever their case."""
    known = {n.lower(): n for n in names if n}
    near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5) or list(known)[:5]
    return "did you mean " + ", ".join(repr(known[n]) for n in near) + "?" if near else "it has none"
