"""The site's settings for Sphinx: ``make docs`` builds it, offline, from the Markdown in this folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import kvb  # noqa: E402

project, author, copyright = "kvb", "kvb contributors", "kvb contributors"
version = release = kvb.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"kvb {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "native"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["linkify"] if False else []
myst_heading_anchors = 4  # the anchors that hosts of Markdown make
suppress_warnings = ["myst.header"] if False else []

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_mock_imports: list[str] = []
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "State", "Source", ("Methods", "Notes")]


def toctree(app: Any, page: str, source: list[str]) -> None:
    """The bulleted links of an index page are its part of the tree, so that the sources need no directives."""
    if page.split("/")[-1] != "index":
        return
    links = re.findall(r"^\* \[[^\]]*\]\(([\w./-]+)\.md\)", source[0], re.MULTILINE)
    source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(links) + "\n```\n"


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with ``code``: nothing else in them is markup."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``)", line)
            parts[::2] = [re.sub(r"([*|`])|(?<=\w)_\b", lambda found: "\\" + found[0], part) for part in parts[::2]]
            lines[number] = "".join(parts)


def setup(app: Any) -> None:
    app.connect("source-read", toctree)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
