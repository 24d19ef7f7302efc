"""What the training examples keep between runs: a file that is whole or not there, and that no other training takes.

A training says what it is ``about`` (the hash of its data and of the weights it starts from, its settings). The file
holds that beside the state, so a run with another network, other data or other settings is refused, not mixed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deconvviz.errors import CheckpointError
from deconvviz.files import replaced
from deconvviz.mining.archive import hash_of, model_fingerprint
from deconvviz.mining.found import require_same


def network(model: nn.Module) -> dict[str, Any]:
    """What a training is about as far as its network goes: the layers with their settings, and where it starts."""
    return {
        "number of weights": sum(parameter.numel() for parameter in model.parameters()),
        "layers": hash_of(str(model)),
        "network at the start": model_fingerprint(model),
    }


class Checkpoint:
    """The state of one training in one file, of tensors, numbers and texts alone.

    Args:
        path: of the file; its folder is made when needed.
        about: texts and numbers that must be the same for a training to go on.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)

    def load(self) -> dict[str, Any] | None:
        """The state kept last, ``None`` if there is no file.

        Raises:
            CheckpointError: the file cannot be read, or is of another training.
        """
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            about, state = kept["about"], kept["state"]
        except Exception as error:  # on damaged files the reader raises almost anything
            raise CheckpointError(
                f"{self.path} is damaged or no checkpoint of this example ({type(error).__name__}): "
                "delete it to start afresh"
            ) from error
        require_same(about, self.about, f"the checkpoint {self.path}")
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file in one step; raises :class:`CheckpointError` if it cannot be written."""
        try:
            with replaced(self.path) as part:
                torch.save({"about": self.about, "state": dict(state)}, part)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            raise CheckpointError(
                f"{self.path} cannot be written ({error}): make space or choose another place"
            ) from error
