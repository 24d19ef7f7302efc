"""Weights from a file into a model, safely, or a clear word on how they differ.

A file is read with ``weights_only=True``: it can hold tensors and no code. It is a state dict, alone or under
``"state_dict"``, ``"model_state_dict"`` or ``"model"``. A prefix of every name that the model's own names lack is left
out: ``DataParallel``'s ``"module."``, ``torch.compile``'s ``"_orig_mod."``, ``"model."`` of a Lightning module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deconvviz.errors import WeightsError

TRAINING_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Heads of GoogLeNet and Inception v3 that run in train mode only: weights files have them or not."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the state dict in ``path`` into ``model``.

    Raises:
        WeightsError: the file is missing, damaged, holds more than tensors, or does not fit the model.
    """
    load_state(model, _read(path), str(path))


def load_state(model: nn.Module, given: Any, name: str) -> None:
    """Load a state dict in any of its usual wrappings into ``model``; errors call it ``name``.

    Raises:
        WeightsError: it is no state dict, or does not fit the model.
    """
    own = model.state_dict()
    state = _without_prefix(_state_dict(given, name), own)
    optional = (*TRAINING_HEADS, "aux_classifier.")
    missing = [key for key in own if key not in state and not key.startswith(TRAINING_HEADS)]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # old files lack it
    unexpected = [key for key in state if key not in own and not key.startswith(optional)]
    reshaped = {
        key: (tuple(state[key].shape), tuple(own[key].shape))
        for key in own
        if key in state and state[key].shape != own[key].shape
    }
    if reshaped and not missing and not unexpected and len(reshaped) <= 2:  # weight and bias of a head
        (theirs, ours), *_ = reshaped.values()
        if theirs and ours and theirs[1:] == ours[1:]:
            raise WeightsError(
                f"{name} has {theirs[0]} classes, the model {ours[0]} ({', '.join(reshaped)}): "
                f"give --model module:factory with a factory that builds the model for {theirs[0]} classes"
            )
    shapes = [f"{key} {theirs}, not {ours}" for key, (theirs, ours) in reshaped.items()]
    differences = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if found := [f"{what}: {_first(keys)}" for what, keys in differences.items() if keys]:
        raise WeightsError(f"{name} does not fit the {type(model).__name__}; {'; '.join(found)}")
    model.load_state_dict(state, strict=False)


def _read(path: Path) -> Any:
    """What a file of tensors, numbers and texts holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a pickle's protocol helps nobody
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror or error}") from error
    except Exception as error:  # on damaged and hostile files the reader raises almost anything
        raise WeightsError(
            f"{path} is not a file of tensors alone, and was not read further ({type(error).__name__}): "
            "save the weights with torch.save(model.state_dict(), path)"
        ) from error


def _state_dict(given: Any, name: str) -> dict[str, Tensor]:
    """The state dict in what a file holds, in any of its usual wrappings."""
    for wrapping in ("state_dict", "model_state_dict", "model"):
        given = given[wrapping] if isinstance(given, dict) and wrapping in given else given
    if not isinstance(given, dict) or not given or not all(isinstance(t, Tensor) for t in given.values()):
        raise WeightsError(f"{name} holds no state dict: save the weights with torch.save(model.state_dict(), path)")
    return {str(key): tensor for key, tensor in given.items()}


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names that the model's own ones know, if what all of ``state`` begin with keeps them apart."""
    shorter = state
    while not shorter.keys() & own.keys():
        prefix = next(iter(shorter)).partition(".")[0] + "."
        if not all(key.startswith(prefix) for key in shorter):
            return state
        shorter = {key.removeprefix(prefix): tensor for key, tensor in shorter.items()}
    return shorter


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
