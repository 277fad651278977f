"""Blocks on the pages that need packages of others: ``<!-- needs: avalanche -->`` above one names them."""

import importlib
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of the packages
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- needs: ([\w, .]+) -->\n)?```python\n(.*?)```", re.DOTALL)
CASES = [
    pytest.param(page, number, id=f"{page.stem}-{needs}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, (needs, _) in enumerate(BLOCK.findall(page.read_text()))
    if needs
]


@pytest.mark.parametrize(("page", "number"), CASES)
def test_a_block_runs_after_those_before_it(page, number, tmp_path, monkeypatch):
    """After the blocks before it that need kvb alone, or no package besides its own."""
    monkeypatch.chdir(tmp_path)
    found = BLOCK.findall(page.read_text())
    wanted = set(found[number][0].split(", "))
    for package in sorted(wanted):
        try:
            importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"{package} cannot be imported: {str(error)[:80]}")
    names: dict = {}
    for needs, block in found[: number + 1]:
        if not needs or set(needs.split(", ")) <= wanted:
            exec(block, names)


def test_there_are_some():
    assert len(CASES) >= 3
