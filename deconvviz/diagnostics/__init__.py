"""What is wrong with the filters: dead, grey, saturated, duplicate, too fine, folded over (paper, section 4.1).

Looking at AlexNet, the paper found first-layer filters that were black or grey, extremes of frequency with little
between, and aliasing after the stride of 4; smaller kernels and a stride of 2 cured them. Here each is a number with
a threshold, for every ``nn.Conv2d``. With W the kernel (I, kh, kw) of one filter:

==============  ==============================================================================================
dead            RMS(W) <= 0.05 x the layer's 90% quantile (the paper's black squares), or, on the data, never
                positive after its batch norm and before its rectifier
grey            Σ_c kh·kw·mean(W_c)² >= 0.95 Σ W²: constant over the window, so it passes an average only
saturated       not dead, and on the data positive at 99.9% of the cells or more: the rectifier does nothing
duplicate       cosine with another filter of the same input maps >= 0.99 (kernels of 9 weights or more)
high-frequency  the energy of waves shorter than 3 pixels >= 0.95 of the kernel's: a checkerboard, not an edge
==============  ==============================================================================================

and for a layer: *few middle frequencies*, if waves of 3 to 6 pixels hold under 20% of its filters' energy (kernels
of 5x5 or more), and *folded*, if half of its kernels' energy or more is beyond the frequency 1/(2·stride) that its
output can carry, so that the stride folds it over onto lower ones.

Caveats: energies are those of the kernel, as if its input were white noise: untrained kernels are white too and fold
at any stride. Kernels of one pixel have no frequencies. A filter can be silent on few pictures and well elsewhere.

>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU())
>>> _ = nn.init.ones_(model[0].weight[2])
>>> diagnose(model)["0"].filters[2].flags
('grey',)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deconvviz.capture import evaluating, require_initialised, require_module, watch
from deconvviz.diagnostics.result import FLAGS, Diagnosis, Filter, LayerDiagnosis
from deconvviz.diagnostics.spectrum import Spectrum
from deconvviz.errors import InvalidInput
from deconvviz.inputs import input_tensors, like
from deconvviz.rules import UNSUPPORTED
from deconvviz.rules.rectifiers import rectify
from deconvviz.tape import Tape

DEAD_RMS = 0.05
GREY = 0.95
SATURATED = 0.999
DUPLICATE = 0.99
HIGH_FREQUENCY = 0.95
BATCH = 16


def diagnose(model: nn.Module, data: Tensor | Iterable[Any] | None = None) -> Diagnosis:
    """Look for what is wrong with the filters of every ``nn.Conv2d``.

    Args:
        model: any module; it runs in eval mode, and is left as it was found.
        data: images (N, C, H, W), normalised as the model was trained, or an iterable of such batches, or of tuples
            that start with one (a ``DataLoader``); they go to the model's device. Without it only the weights are
            judged.

    Raises:
        UnsupportedModel: it is scripted or compiled, or has lazy layers that no pass has initialised.
        InvalidInput: there is no ``nn.Conv2d``, its weights are not finite, or the data has no images or is not
            what the model takes.
    """
    model = require_module(model)
    require_initialised(model)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise InvalidInput(f"the {type(model).__name__} has no nn.Conv2d to diagnose")
    images, fires = (0, {}) if data is None else _fires(model, convolutions, data)
    layers = [_layer(name, module, fires.get(name), images) for name, module in convolutions.items()]
    return Diagnosis(tuple(layers))


@torch.no_grad()
def clip_filter_rms(model: nn.Module, limit: float = 0.1) -> int:
    """Scale every convolution filter whose RMS exceeds ``limit`` down to it, in place; call it after each step.

    The paper trains so, that no few first-layer filters dominate (section 3). Returns how many were scaled.

    Raises:
        InvalidInput: ``limit`` is not positive, or a filter is computed from other parameters (weight norm).
    """
    model = require_module(model)
    if not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        raise InvalidInput(f"limit is {limit!r}; expected a positive number, such as the paper's 0.1")
    clipped = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if not isinstance(module.weight, nn.Parameter):
                raise InvalidInput(
                    f"the filters of layer {name!r} are computed from other parameters; expected an nn.Parameter: "
                    "remove the parametrization first, or clip what it is computed from"
                )
            over = module.weight.flatten(1).square().mean(1).sqrt() / limit
            if (over > 1).any():
                module.weight.div_(over.clamp(min=1).view(-1, *[1] * (module.weight.dim() - 1)))
                clipped += int((over > 1).sum())
    return clipped


def _layer(name: str, module: nn.Conv2d, fires: Tensor | None, images: int) -> LayerDiagnosis:
    weights = module.weight.detach().cpu().double()
    if not weights.isfinite().all():
        raise InvalidInput(
            f"layer {name!r} has NaN or infinite weights: its training diverged; go back to a checkpoint"
        )
    height, width = weights.shape[2:]
    energy = weights.square().sum((1, 2, 3))
    rms = weights.square().mean((1, 2, 3)).sqrt()
    black = rms <= DEAD_RMS * rms.quantile(0.9)
    spectrum = Spectrum((height, width), module.dilation)
    has_frequencies = height * width > 1
    grey = height * width * weights.mean((2, 3)).square().sum(1) / energy
    bands = [spectrum.share(weights, *band) for band in ((0, 1 / 6), (1 / 6, 1 / 3), (1 / 3, 1))]
    cosine, twin = _twins(weights, module.groups)
    filters = []
    for i in range(len(weights)):
        alive = not bool(black[i])
        flat, low, middle, high = (float(share[i]) if alive and has_frequencies else None for share in (grey, *bands))
        similar = float(cosine[i]) if alive and cosine[i] >= -1 and not black[twin[i]] else None
        on = None if fires is None else float(fires[i])
        found = {
            "dead": not alive or on == 0,
            "grey": flat is not None and flat >= GREY,
            "saturated": alive and on is not None and on >= SATURATED,
            "duplicate": similar is not None and similar >= DUPLICATE and weights[i].numel() >= 9,
            "high-frequency": high is not None and high >= HIGH_FREQUENCY,
        }
        flags = tuple(flag for flag in FLAGS if found[flag])
        other = None if similar is None else int(twin[i])
        filters.append(Filter(i, float(rms[i]), flat, low, middle, high, other, similar, on, flags))
    kernel, stride = (height, width), (module.stride[0], module.stride[1])
    total = float(energy.sum())
    folded = max(0.0, 1 - float(spectrum.carried(weights, stride).sum()) / total) if total else None
    return LayerDiagnosis(name, kernel, stride, weights.float(), tuple(filters), folded, images)


def _twins(weights: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The largest cosine (O,) of each filter with another of its group, and that filter; -2 if there is none."""
    unit = nn.functional.normalize(weights.flatten(1), dim=1).view(groups, len(weights) // groups, -1)
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=1, dim2=2).fill_(-2)
    cosine, twin = cosines.max(2)
    first = torch.arange(groups, device="cpu")[:, None] * unit.shape[1]
    return cosine.flatten(), (twin + first).flatten()


def _fires(
    model: nn.Module, convolutions: dict[str, nn.Conv2d], data: Tensor | Iterable[Any]
) -> tuple[int, dict[str, Tensor]]:
    """The number of images, and for each convolution with a rectifier the share of cells (O,) where it is positive."""
    images, on, cells = 0, dict[str, Any](), dict[str, int]()
    for batch in _batches(data):
        inputs = input_tensors(batch.to(like(model).device) if isinstance(batch, Tensor) else batch, model)
        images += len(inputs[0])
        with evaluating(model):
            tape, _ = watch(model, inputs)
        places = {response: name for response, name in _responses(tape) if name in convolutions}
        for value, response in tape.replay_all(list(places)).items():
            name = places[value]
            on[name] = on.get(name, 0) + (response > 0).sum((0, 2, 3)).cpu().double()
            cells[name] = cells.get(name, 0) + response[:, 0].numel()
    if not images:
        raise InvalidInput("data has no images; expected (N, C, H, W), or batches of them (a used-up iterator?)")
    return images, {name: count / cells[name] for name, count in on.items()}


def _batches(data: Tensor | Iterable[Any]) -> Iterator[Any]:
    if not isinstance(data, Iterable):
        raise InvalidInput(f"data is a {type(data).__name__}; expected images (N, C, H, W), or batches of them")
    for batch in data.split(BATCH) if isinstance(data, Tensor) else data:
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _responses(tape: Tape) -> Iterator[tuple[int, str]]:
    """What each convolution gives to a rectifier, after its batch norm: the value and the module's name."""
    for step in tape.steps:
        value = step.outputs[0]
        while step.operation == "conv2d" and value is not None:
            users = [user for user in tape.steps if value in user.inputs]
            if users and all(user.rule.back is rectify and user.kind != UNSUPPORTED for user in users):
                yield value, step.module
            value = users[0].outputs[0] if [u.operation for u in users] == ["batch_norm"] else None
