"""Pages of results, which fetch nothing; whatever is put in is text, never markup."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The HTML of a file in this folder; a value that it names and that is not given raises jinja2's error."""
    loader = PackageLoader("deconvviz")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)
