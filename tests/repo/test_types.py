"""Users' code under strict type checkers: the README's, and calls whose result depends on their arguments."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What --strict asks of a file; as a comment, so that mypy's cache of `make lint` holds here too.
STRICT = (
    "# mypy: check-untyped-defs, disallow-any-generics, disallow-incomplete-defs, disallow-subclassing-any, "
    "disallow-untyped-calls, disallow-untyped-decorators, disallow-untyped-defs, extra-checks, no-implicit-reexport, "
    "strict-equality, warn-redundant-casts, warn-return-any, warn-unused-ignores\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The README's code and that of typed_use.py, each as a user's file."""
    folder = tmp_path_factory.mktemp("users")
    readme = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    (folder / "readme.py").write_text(STRICT + readme)
    (folder / "typed_use.py").write_text(STRICT + (ROOT / "tests" / "repo" / "typed_use.py").read_text())
    (folder / "wrong.py").write_text(
        f"{STRICT}import kvb, torch\nx = torch.zeros(1)\n"
        "kvb.KeyValueBottleneck(2, 8, 4, 4)(x, return_values_only=True).indices_\n"
        "kvb.KeyValueBottleneck(2, 8, 4, 4).freeze_key()\nkvb.no_such_name\n"
    )
    return folder


def said(command, *files):
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_mypy_finds_nothing(files):
    pytest.importorskip("mypy", reason="mypy is not installed")
    mypy = [sys.executable, "-m", "mypy"]
    status, text = said(mypy, files / "readme.py", files / "typed_use.py")
    assert status == 0, text
    status, text = said(mypy, files / "wrong.py")
    assert status == 1
    assert [line.partition(": error:")[0][-1] for line in text.splitlines()[:-1]] == ["4", "5", "6"]


@pytest.mark.slow
def test_pyright_finds_nothing(files):
    if not shutil.which("pyright"):
        pytest.skip("pyright is not installed")
    pyright = ["pyright", "--pythonpath", sys.executable]
    status, text = said(pyright, files / "readme.py", files / "typed_use.py")
    assert status == 0, text
    status, text = said([*pyright, "--verifytypes", "kvb", "--ignoreexternal"])
    score = re.search(r"Type completeness score: ([\d.]+)%", text)
    assert score, text
    assert float(score[1]) >= 97, text
