"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(block: str, monkeypatch, capsys, tmp_path) -> None:
    def offline(weights=None, **options):
        return torchvision.models.GoogLeNet(num_classes=10, aux_logits=False, init_weights=False)

    monkeypatch.setattr(torchvision.models, "googlenet", offline)
    monkeypatch.chdir(tmp_path)
    small = block.replace("224, 224)  ", "64, 64)  ")
    assert small != block
    names: dict[str, object] = {}
    with torch.no_grad():
        exec(small, names)
    if "falls" in names:
        assert names["falls"].shape == (1, 3, 64, 64) and names["falls"].any()
        assert (tmp_path / "figure7.png").exists()
        return
    assert names["pixels"].shape == (2, 3, 64, 64)
    assert names["several"].shape == (2, 3, 3, 64, 64)
    assert names["fresh"].shape == (2, 64, 3, 64, 64)
    assert "goes back" in capsys.readouterr().out


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
