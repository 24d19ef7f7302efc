"""Shared fixtures: the shared data folder, seeded models built once a session."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
import torchvision


@functools.cache
def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A torchvision classification model with random weights, in eval mode, built once."""
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torchvision.models.get_model(name, weights=None, **options).eval()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real weights and photographs; tests that need it are skipped without it."""
    folder = os.environ.get("DECONVVIZ_DATA")
    if not folder:
        pytest.skip("DECONVVIZ_DATA is not set: no real weights and photographs")
    return Path(folder)


@pytest.fixture(scope="session")
def squeezenet(data: Path) -> torch.nn.Module:
    """SqueezeNet 1.0 with real ImageNet weights."""
    model = torchvision.models.squeezenet1_0(weights=None)
    model.load_state_dict(torch.load(data / "squeezenet1_0.pth", weights_only=True))
    return model.eval()
