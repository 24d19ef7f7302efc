"""The code in the pages of docs/ runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["occlusion.md"]
BLOCKS = [
    pytest.param(block, id=f"{page}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str) -> None:
    names: dict[str, object] = {}
    exec(block, names)
    assert names["falls"].shape == (1, 3, 64, 64) and names["falls"].any()
    assert names["maps"].score_cells.shape == (1, 2, 7, 7)
