"""The code in docs/understand.md runs as it stands, and what its pages link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import build

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "understand.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(block: str, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exec(block, {"model": build("squeezenet1_0"), "images": images})
    assert capsys.readouterr().out or list(tmp_path.glob("*.png"))


def test_every_section_has_its_code() -> None:
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("page", ["understand.md", "evidence.md", "reproduction.md"])
def test_links(page: str) -> None:
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", (DOCS / page).read_text()):
        assert (DOCS / link).exists(), link
