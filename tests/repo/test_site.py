"""The site: every page has a place in its tree, tasks are two clicks away, and it builds offline without a warning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TASKS = sorted(path for path in (DOCS / "howto").glob("*.md") if path.stem != "index")


def links(page: Path) -> set[Path]:
    """The pages that a page links to."""
    found = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
    return {(page.parent / link).resolve() for link in found if "://" not in link}


def test_every_page_is_reached_from_the_front_page():
    reached, new = set(), {DOCS / "index.md"}
    while new:
        reached |= new
        new = {link for page in new for link in links(page) if DOCS in link.parents} - reached
    assert set(DOCS.rglob("*.md")) == reached


def test_ordinary_tasks_are_two_clicks_away_and_short():
    assert len(TASKS) >= 20
    two_clicks = {task for page in links(DOCS / "index.md") for task in links(page)}
    assert set(TASKS) <= two_clicks
    for task in TASKS:
        code = "".join(re.findall(r"```python\n(.*?)```", task.read_text(), re.DOTALL))
        assert 0 < sum(bool(line.strip()) for line in code.splitlines()) <= 15, task.name


def test_a_tutorial_shows_what_it_prints():
    for page in (DOCS / "tutorials").glob("*.md"):
        text = page.read_text()
        assert "```text" in text or page.stem == "index"
        assert not re.search(r"```text\n(?=```)", text), page.name


@pytest.mark.slow
def test_the_tutorials_as_notebooks(tmp_path):
    pytest.importorskip("matplotlib", reason="needs kvb[demo]")
    done = subprocess.run([sys.executable, DOCS / "notebooks.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    books = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.ipynb")}
    assert books.keys() == {path.stem for path in (DOCS / "tutorials").glob("*.md")} - {"index"}
    for name, book in books.items():
        code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        counts = [cell["execution_count"] for cell in code]
        if f"{name}.ipynb, not executed" in done.stdout:
            assert not any(counts)
        else:
            assert counts == list(range(1, len(code) + 1))
            assert any(cell["outputs"] for cell in code)


@pytest.mark.slow
def test_it_builds_offline_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package, reason="needs kvb[docs]")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(build, capture_output=True, text=True, env={**os.environ, **nowhere})
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"(\w+:)?//[^\"]*", page.read_text())
        assert not loaded, page.name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style.name
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert pages <= {path.relative_to(tmp_path) for path in tmp_path.rglob("*.html")}
