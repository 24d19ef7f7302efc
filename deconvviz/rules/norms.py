"""Norms go back by scale alone: their statistics are constants of the pass, like switches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deconvviz.precision import at_least_float32, precise
from deconvviz.rules.rule import EXACT, GENERALISED, Context, Run, Signals, only
from deconvviz.tape import Step, Value


def _batch_norm(x: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Any:  # fmt: skip
    batch = training or running_var is None
    spread = _variance(x, [0, *range(2, x.dim())]).flatten() if batch else running_var
    return _per_channel(torch.rsqrt(spread + eps), x), _per_channel(weight, x)


def _instance_norm(x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None,
                   bias: Any = None, use_input_stats: Any = True, momentum: Any = 0.1,
                   eps: float = 1e-5) -> Any:  # fmt: skip
    batch = use_input_stats or running_var is None
    spread = _variance(x, range(2, x.dim())) if batch else running_var.view(-1, *[1] * (x.dim() - 2))
    return torch.rsqrt(spread + eps), _per_channel(weight, x)


def _group_norm(x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                cudnn_enabled: bool = True) -> tuple[Any, ...]:  # fmt: skip
    spread = _variance(x.reshape(len(x), num_groups, -1), [2])
    factor = torch.rsqrt(spread + eps).repeat_interleave(x.shape[1] // num_groups, 1)
    return factor.reshape(*x.shape[:2], *[1] * (x.dim() - 2)), _per_channel(weight, x)


def _layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
                eps: float = 1e-5, cudnn_enable: bool = True) -> tuple[Any, ...]:  # fmt: skip
    return torch.rsqrt(_variance(x, range(-len(normalized_shape), 0)) + eps), weight


def _rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: Any = None) -> tuple[Any, ...]:
    square = x.to(at_least_float32(x)).square()
    mean = square.mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    return torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps)), weight


def _normalize(x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    lengths = x.to(at_least_float32(x)).norm(p, dim, keepdim=True)
    return (lengths.clamp_min(eps).reciprocal(),)


_FACTORS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "normalize": _normalize,
}


def observe_norm(step: Step, values: Sequence[Value], inputs: Sequence[Tensor], run: Run) -> Any:
    """Keep the factors that the norm multiplies its input by."""
    if step.kind == EXACT:  # the running variance, which later training would overwrite
        step.kept = step.argument(2, "running_var").clone()
    else:
        with torch.no_grad():
            step.kept = _factors(step, inputs)
    return run()


def _factors(step: Step, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    arguments, keywords = step.filled(inputs)
    return _FACTORS[step.operation](*arguments, **keywords)


def rerun_norm(step: Step, *inputs: Tensor) -> Any:
    """With copies of the running statistics, which a pass in train mode would update."""

    def copied(item: Any) -> Any:
        return item.clone() if isinstance(item, Tensor) and not isinstance(item, nn.Parameter) else item

    arguments = tuple(copied(item) for item in step.arguments)
    keywords = {name: copied(item) for name, item in step.keywords.items()}
    return replace(step, arguments=arguments, keywords=keywords).call(*inputs)


def batch_norm_kind(step: Step, values: Sequence[Value]) -> str:
    """With running statistics exact; with the batch's, generalised."""
    batch = step.argument(5, "training", False) or step.argument(2, "running_var") is None
    return GENERALISED if batch else EXACT


def scale(step: Step, signals: Signals, context: Context) -> Signals:
    """Multiply by the recorded factors; no shift."""
    signal, factors = only(signals), step.kept
    if isinstance(factors, Tensor):
        deviation = torch.sqrt(precise(factors) + step.argument(7, "eps", 1e-5))
        factors = [deviation.reciprocal().to(signal.dtype), step.argument(3, "weight")]
        if len(signal) > 1 and factors[1] is not None:  # one pass over many signals; one alone keeps its bits
            factors = [factors[0] * factors[1].detach()]
        shape = [-1, *[1] * (len(context.values[step.inputs[0]].shape) - 2)]
        factors = [None if factor is None else factor.detach().view(shape) for factor in factors]
    for factor in factors:
        if factor is not None:
            signal = signal * factor.to(signal.dtype)
    return [signal]


def _variance(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The biased variance over ``dims``, in float32 at least."""
    return x.to(at_least_float32(x)).var(tuple(dims), correction=0, keepdim=True)


def _per_channel(item: Tensor | None, x: Tensor) -> Tensor | None:
    """(C,) shaped to multiply ``x`` (N, C, ...)."""
    return None if item is None else item.detach().view(-1, *[1] * (x.dim() - 2))
