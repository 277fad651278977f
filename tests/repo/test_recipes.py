"""The recipes of CONTRIBUTING.md, followed on a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kvb

PACKAGE = Path(kvb.__file__).parent
# What each file gets: a line before which it stands, or nothing for the end, and the text.
OPERATOR = {
    "reference/values.py": (
        "",
        '''

def spread(values: Tensor, scale: float) -> Tensor:
    """The largest minus the smallest of every row of values [C, K, V], times a scale: [C, K]."""
    return (values.amax(-1) - values.amin(-1)) * scale
''',
    ),
    "reference/__init__.py": (
        "\n__all__ = [",
        '\nfrom kvb.reference.values import spread\n\n__all__ = [\n    "spread",',
    ),
    "ops/schemas.py": (
        "\nSCHEMAS = ",
        """
@_operator("(Tensor values, float scale) -> Tensor")
def spread(values: Tensor, scale: float) -> Tensor:
    return values.new_empty(values.shape[:2])


SCHEMAS = """,
    ),
    "testing/checks.py": (
        "\nCHECKS",
        """
def check_spread(op: Any, problem: Problem) -> None:
    exact = 2 * (problem.values.double().amax(-1) - problem.values.double().amin(-1)).cpu()
    found = require_like("spreads", op.spread(problem.values, 2.0), exact.shape, problem.values.dtype)
    require_close("spreads", found, exact, 4 * UNIT[problem.values.dtype] * exact)


CHECKS""",
    ),
}
TRIAL = """
import torch, kvb
from kvb import ops, testing
values = torch.randn(2, 5, 3)
torch.library.opcheck(torch.ops.kvb.spread.default, (values, 2.0))
assert torch.ops.kvb.spread(values.to("meta"), 2.0).shape == (2, 5)
mapped = torch.vmap(lambda one: torch.ops.kvb.spread(one, 2.0))(torch.stack([values, -values]))
assert torch.equal(mapped, torch.ops.kvb.spread(values, 2.0).expand(2, 2, 5))
(backend,) = [one for name, one in testing.backends(torch.device("cpu")).items() if name == "torch"]
found = testing.verdict("spread", backend)
assert not found.failures and found.cases == len(testing.CASES), found.failures
assert "spread" in ops.NAMES
print(ops.backend("cpu"), "spread" in ops.operators("cpu"))
"""


def test_an_operator_is_added_in_four_files(tmp_path):
    copy = tmp_path / "kvb"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "experiments"))
    for name, (before, text) in OPERATOR.items():
        source = (copy / name).read_text()
        assert source.count(before) == 1 or not before, name
        (copy / name).write_text(source.replace(before, text) if before else source + text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TRIAL], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"
