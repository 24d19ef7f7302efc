"""The site of docs/: `make docs` builds it into docs/_build, offline and with warnings as errors."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import Any

project = "deconvviz"
author = "The deconvviz developers"
version = release = version_of("deconvviz")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "deconvviz"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True

nitpicky = True
# Other packages' names are not linked: that would need their inventories from the network.
nitpick_ignore_regex = [
    ("py:.*", r"(captum|collections|matplotlib|nn|np|numpy|os|pathlib|PIL|torch|torchvision)\..*"),
    ("py:class", "Figure"),  # imported for type checkers alone
]

COLON = "\N{RATIO}"


def setup(app: Any) -> None:
    """Read docstrings as they are written for people."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    app.connect("missing-reference", by_short_name)


def before_napoleon(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """``(N, *S)`` is no emphasis; what stands before an attribute's first colon is no type."""
    lines[:] = [re.sub(r"(?<![\w*`])\*(?=[A-Za-z]+[,)])", r"\*", line) for line in lines]
    if what in ("attribute", "property", "data"):
        lines[0] = lines[0].replace(":", COLON)


def after_napoleon(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Put the colons back."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def by_short_name(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Find ``:class:`NoForwardPass``` in whichever module it is."""
    if node.get("refdomain") != "py" or node.get("refspecific"):
        return None
    node["refspecific"] = True
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, text
    )
