"""A file that is whole or not there: whoever is killed, or finds the disk full, leaves the old one as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, of its suffix, that replaces it if the block succeeds, and goes if not.

    Parent folders are made as needed. What goes wrong with files raises ``OSError``.
    """
    temporary = path.with_name(f".{uuid4().hex}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
