"""Rectifiers rectify the signal: g -> max(g, 0), whatever the sign of the activation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from deconvviz.rules.rule import EXACT, GENERALISED, UNSUPPORTED, Context, Signals, only
from deconvviz.tape import Step, Value

SMOOTH = "leaky_relu prelu elu selu celu gelu silu hardswish mish softplus"
"""Rectifiers other than ReLU and clamps."""


def clamp_kind(step: Step, values: Sequence[Value]) -> str:
    """Clamping at zero from below rectifies; any other clamp has no rule."""
    low, high = {
        "relu6": lambda: (0, 6),
        "hardtanh": lambda: (step.argument(1, "min_val", -1.0), step.argument(2, "max_val", 1.0)),
        "threshold": lambda: (step.argument(1, "threshold"), None),
    }.get(step.operation, lambda: (step.argument(1, "min"), step.argument(2, "max")))()
    if step.operation == "threshold" and step.argument(2, "value") != 0:
        return UNSUPPORTED
    if not isinstance(low, (int, float)) or low != 0 or isinstance(high, Tensor):
        return UNSUPPORTED
    return EXACT if high is None or high == math.inf else GENERALISED


def power_kind(step: Step, values: Sequence[Value]) -> str:
    """A power of what a rectifier gave, which is nowhere negative, rectifies too; any other has no rule."""
    exponent = step.argument(1, "exponent", 2)
    rectified = values[step.inputs[0]].operation in ("relu", "relu6", "softplus")
    return GENERALISED if rectified and isinstance(exponent, (int, float)) and exponent > 0 else UNSUPPORTED


def bounded(step: Step) -> bool:
    """Whether a clamp ends from above too, as a gate does."""
    return step.kind == GENERALISED


def rectify(step: Step, signals: Signals, context: Context) -> Signals:
    """Keep the positive part of the signal, whatever the sign of the activation."""
    return [only(signals).relu(), *[None] * (len(step.inputs) - 1)]
