"""captum's targets and neuron selectors, turned into the seed signal that a projection starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from captum._utils.common import _select_targets, _verify_select_neuron
from torch import Tensor

from deconvviz.errors import TargetOutOfRange
from deconvviz.inputs import as_python


def target_seed(output: Tensor, target: Any) -> Tensor:
    """One at each image's target in the model's ``output`` (N, ...), zero elsewhere.

    ``target`` is any form that captum takes: an int, a tuple, a tensor, a list of either, or ``None`` for a
    model with one number an image.

    Raises:
        TargetOutOfRange: there is no such target, or none was given and one is needed.
    """
    return _seed(output, lambda o: _select_targets(o, as_python(target)), f"target {target!r}")


def neuron_seed(activation: Tensor, selector: Any) -> Tensor:
    """One at the selected neurons of a layer's ``activation`` (N, ...), or the selector's own gradient there.

    Raises:
        TargetOutOfRange: there is no such neuron.
    """
    return _seed(
        activation, lambda a: _verify_select_neuron((a,), as_python(selector)), f"neuron_selector {selector!r}"
    )


def selected(output: Tensor, target: Any) -> Tensor:
    """The target's numbers (N, ...) in a model's ``output`` (N, ...), as captum selects them.

    Raises:
        TargetOutOfRange: there is no such target.
    """
    with _fitting(output, f"target {target!r}"):
        return _select_targets(output, target)


def _seed(tensor: Tensor, select: Callable[[Tensor], Tensor], what: str) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = tensor.detach().clone().requires_grad_()
        with _fitting(tensor, what):
            chosen = select(leaf)
            count = (chosen[0] if chosen.dim() else chosen).numel()  # a function may sum over images
            if count != 1:
                raise TargetOutOfRange(
                    f"{what} selects {count} numbers an image from a tensor of shape {tuple(tensor.shape)}; "
                    "expected one: give an index for every axis but the batch's"
                )
            (seed,) = torch.autograd.grad(chosen.sum(), leaf)
    return seed


@contextlib.contextmanager
def _fitting(tensor: Tensor, what: str) -> Iterator[None]:
    """Around a selection in ``tensor``: what is raised is a :class:`TargetOutOfRange`."""
    try:
        yield
    except TargetOutOfRange:
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:
        raise TargetOutOfRange(
            f"{what} does not fit a tensor of shape {tuple(tensor.shape)}"
            f"{f': {error}'.rstrip('.') if str(error) else ''}. Indices count from 0, without the batch axis"
        ) from error
