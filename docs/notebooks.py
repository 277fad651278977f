"""The tutorials as executed notebooks, made of their Markdown: python docs/notebooks.py OUT [PAGE ...]

A ``python`` block becomes a cell, a ``text`` block after it is what the cell prints, and all between is prose. A page
that begins with ``<!-- needs: package -->`` is written without output where that package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

TUTORIALS = Path(__file__).parent / "tutorials"


class Cell(NamedTuple):
    code: bool
    source: str
    shown: str | None = None  # what the page says that it prints


def needs(text: str) -> list[str]:
    """The packages of others that a page uses."""
    found = re.match(r"<!-- needs: (.*?) -->", text)
    return found[1].split(", ") if found else []


def cells(text: str) -> list[Cell]:
    """A page, cut into prose and code; a block under a comment of its own, which names packages, is prose."""
    parts = re.split(
        r"(?<!-->\n)^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, flags=re.DOTALL | re.MULTILINE
    )
    found = [Cell(False, re.sub(r"<!--.*?-->", "", parts[0]).strip())]
    for code, shown, prose in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        found += [Cell(True, code.rstrip(), shown), Cell(False, prose.strip())]
    return [cell for cell in found if cell.source]


def printed(page: list[Cell]) -> list[str]:
    """Run the code of a page from top to bottom in the current folder: what each cell prints."""
    names: dict[str, object] = {"__name__": "__main__"}
    found = []
    for cell in page:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if cell.code:
                exec(cell.source, names)
        found.append(out.getvalue())
    return found


def notebook(page: list[Cell], outputs: list[str] | None) -> dict[str, object]:
    """Jupyter's format 4.5; without outputs the cells have not run."""
    made: list[dict[str, object]] = []
    ran = 0
    for number, (cell, output) in enumerate(zip(page, outputs or [""] * len(page), strict=True)):
        kind: dict[str, object] = {"cell_type": "markdown"}
        if cell.code:
            ran += 1
            stream = {"output_type": "stream", "name": "stdout", "text": output.splitlines(keepends=True)}
            count = ran if outputs else None
            kind = {"cell_type": "code", "execution_count": count, "outputs": [stream] if output else []}
        made.append({**kind, "id": f"cell-{number}", "metadata": {}, "source": cell.source.splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def missing(packages: list[str]) -> str | None:
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision for another torch
            return f"{package} cannot be imported: {str(error)[:80]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("pages", nargs="*", default=sorted(path.stem for path in TUTORIALS.glob("*.md")))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for name in options.pages:
        text = (TUTORIALS / f"{name}.md").read_text()
        page, why = cells(text), missing(needs(text))
        if not any(cell.code for cell in page):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            outputs = printed(page) if why is None else None
            os.chdir(out)
        (out / f"{name}.ipynb").write_text(json.dumps(notebook(page, outputs), indent=1, ensure_ascii=False) + "\n")
        print(f"{name}.ipynb" + (f", not executed: {why}" if why else ""))


if __name__ == "__main__":
    main()
