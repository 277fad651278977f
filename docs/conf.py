"""The site's settings for Sphinx. ``make docs`` builds it, offline, from the Markdown in this folder."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

# The site is built without the packages of others. Of these kvb asks for names only.
for package, base in {"lightning.pytorch": "Callback", "torchmetrics": "Metric"}.items():
    sys.modules[package] = ModuleType(package)
    setattr(sys.modules[package], base, type(base, (), {}))
sys.modules["onnxscript"] = MagicMock()  # asked for numbers as kvb.integrations.onnx is imported

import kvb  # noqa: E402

project, author, copyright = "kvb", "kvb contributors", "kvb contributors"
version = release = kvb.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "furo"
html_title = f"kvb {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text, copybutton_prompt_is_regexp = r">>> |\.\.\. ", True
myst_heading_anchors = 4  # the anchors that hosts of Markdown make

add_module_names = False
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "State", "Methods", "Output", ("Outputs", "params_style"), "Errors"]

# --- the tree ---------------------------------------------------------------------------------------------------------

SECTIONS = ["tutorials/index", "howto/index", "reference/index", "explanation/index", "results"]
SOURCE = re.search(r'^Source = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def listed(section: str) -> list[str]:
    """The pages that a section lists with bullets, as it names them."""
    return re.findall(r"^\* \[[^\]]*\]\(([\w./-]+)\.md\)", (HERE / f"{section}.md").read_text(), re.MULTILINE)


def children(page: str) -> list[str]:
    """What stands below a page in the tree. A page of this folder that no section lists stands below How-to."""
    if page == "index":
        return SECTIONS
    if page not in SECTIONS:
        return []
    if page != "howto/index":
        return listed(page)
    known = {os.path.normpath(Path(section).parent / name) for section in SECTIONS for name in listed(section)}
    rest = sorted({path.stem for path in HERE.glob("*.md")} - known - {"index", "results"})
    return [*listed(page), *(f"../{name}" for name in rest)]


def read(app: Any, page: str, source: list[str]) -> None:
    """Add the tree, and let links that leave this folder lead to the repository: sources need neither."""

    def leads_out(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(page).parent / link[1])
        return f"]({SOURCE}/blob/main/{target[3:]})" if target.startswith("..") else link[0]

    source[0] = re.sub(r"\]\((\.\./[^)#]*)\)", leads_out, source[0])
    if below := children(page):
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(below) + "\n```\n"


# --- docstrings -------------------------------------------------------------------------------------------------------

# What is shown as it stands: an example, an indented block after "::", and ``code``.
LITERAL = re.compile(r"(^ *>>> .*?(?=\n *\n|\n *\w+:\n|\Z)|::\n(?:\n| +[^\n]*\n)+|``.*?``)", re.MULTILINE | re.DOTALL)


def table(found: re.Match[str]) -> str:
    """The lines of a table, each of which stays a line."""
    return "\n" + re.sub(r"^( +)\\\|", r"\1|", found[0], flags=re.M) + "\n"


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Nothing else in a docstring is markup."""
    parts = LITERAL.split("\n".join(lines) + "\n")
    for place in range(0, len(parts), 2):
        text = re.sub(r"[*|`]|(?<=\w)_(?!\w)", r"\\\g<0>", parts[place])
        text = re.sub(r"^( +[\w, ]+: [A-Z])\.", r"\1\\.", text, flags=re.M)  # "C." is no item of a list
        text = re.sub(r"^Examples:$", r"\n\g<0>", text, flags=re.M)
        text = re.sub(r"(^ +\\\|.*\n)+", table, text, flags=re.M)
        # These are prose here, not lists of types.
        text = re.sub(
            r"^Returns:\n(    \w+: )?", lambda m: f"Outputs:\n{m[1]}" if m[1] else "Output:\n", text, flags=re.M
        )
        text = re.sub(r"^Raises:$", "Errors:", text, flags=re.M)
        after_code = place > 0 and parts[place - 1].endswith("``")
        parts[place] = f"\\ {text}" if after_code and text[0].isalpha() else text
    lines[:] = "".join(parts).split("\n")


def setup(app: Any) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon reads it
