"""captum's targets and neuron selectors, turned into the seed signal that a projection starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum._utils.common import _select_targets, _verify_select_neuron
from torch import Tensor

from deconvviz.errors import TargetOutOfRange


def target_seed(output: Tensor, target: Any) -> Tensor:
    """One at each image's target in the model's ``output`` (N, ...), zero elsewhere.

    ``target`` is any form that captum takes: an int, a tuple, a tensor, a list of either, or ``None`` for a
    model with one number an image.

    Raises:
        TargetOutOfRange: there is no such target, or none was given and one is needed.
    """
    return _seed(output, lambda o: _select_targets(o, target), f"target {target!r}")


def neuron_seed(activation: Tensor, selector: Any) -> Tensor:
    """One at the selected neurons of a layer's ``activation`` (N, ...), or the selector's own gradient there.

    Raises:
        TargetOutOfRange: there is no such neuron.
    """
    return _seed(activation, lambda a: _verify_select_neuron((a,), selector), f"neuron_selector {selector!r}")


def _seed(tensor: Tensor, select: Callable[[Tensor], Tensor], what: str) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = tensor.detach().clone().requires_grad_()
        try:
            selected = select(leaf)
            count = (selected[0] if selected.dim() else selected).numel()  # a function may sum over images
            if count != 1:
                raise TargetOutOfRange(
                    f"{what} selects {count} numbers an image from a tensor of shape {tuple(tensor.shape)}; "
                    "expected one: give an index for every axis but the batch's"
                )
            (seed,) = torch.autograd.grad(selected.sum(), leaf)
        except TargetOutOfRange:
            raise
        except (AssertionError, IndexError, RuntimeError, TypeError) as error:
            raise TargetOutOfRange(
                f"{what} does not fit a tensor of shape {tuple(tensor.shape)}"
                f"{f': {error}' if str(error) else ''}. Indices count from 0, without the batch axis"
            ) from error
    return seed
