"""The recipes of CONTRIBUTING.md, followed on a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import kvb
from kvb import ops

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


def tried(folder, changes, trial, **environment):
    """What a process prints that runs on a copy of the package with some files changed."""
    copy = folder / "kvb"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "experiments"))
    for name, (before, text) in changes.items():
        source = (copy / name).read_text()
        assert source.count(before) == 1 or not before, name
        (copy / name).write_text(source.replace(before, text) if before else source + text)
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", trial], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def recipe(title):
    """The text of a recipe."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    return text.split(f"### {title}\n")[1].split("\n### ")[0]


def test_an_operator_is_added_in_four_files(tmp_path):
    assert "in these four files" in recipe("Add an operator")
    assert all(f"kvb/{name}" in recipe("Add an operator") for name in list(OPERATOR)[1:])
    assert tried(tmp_path, OPERATOR, TRIAL)[1] == "False"


# --- a backend --------------------------------------------------------------------------------------------------------

BACKEND = {
    "ops/backends.py": (
        "\ndef packed_nbytes(",
        """
_backends["cpu"] = "mine", ""
counted = []


def _count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    counted.append(K)
    return reference.count(queries, indices, K)


_mine = torch.library.Library("kvb", "FRAGMENT")


def register_mine() -> None:
    _mine.impl("count", _count, "CPU")


def packed_nbytes(""",
    ),
}
BACKEND_TRIAL = """
import torch, kvb
from kvb import ops, testing
from kvb.ops import backends
backends.register_mine()
assert ops.backend("cpu") == "mine" and ops.operators("cpu") == ("count",), ops.operators("cpu")
found = testing.backends(torch.device("cpu"))
assert list(found) == ["mine", "torch"]
assert not testing.verdict("count", found["mine"]).failures and backends.counted
module = kvb.KeyValueBottleneck(2, 9, 3, 4).train()
module(torch.randn(5, 2, 3)).sum().backward()
print(ops.backend("cpu"))
"""


def test_a_backend_is_added_in_one_file(tmp_path):
    """One operator of its own, and the reference for all others."""
    assert "one file" in recipe("Add a backend or a device")
    assert "kvb/ops/backends.py" in recipe("Add a backend or a device")
    assert tried(tmp_path, BACKEND, BACKEND_TRIAL, KVB_CPU_CAPABILITY="torch") == ["mine"]


def test_a_device_without_a_backend_needs_no_file():
    assert ops.backend("meta") == "torch"
    keys = torch.empty(2, 9, 3, device="meta")
    assert torch.ops.kvb.pack_keys(keys).device.type == "meta"


# --- splitters and decoders -------------------------------------------------------------------------------------------


class Folded(nn.Module):
    """Heads of every second channel."""

    def forward(self, x):
        return torch.stack([x[..., ::2], x[..., 1::2]], 1)


class Largest(nn.Module):
    """Logits: the largest value over codebooks."""

    def forward(self, values):
        return values.amax(1)


def test_a_splitter_and_a_decoder_are_added_without_a_file():
    assert "Nothing has to be registered" in recipe("Add a splitter or a decoder")
    model = kvb.BottleneckedEncoder(nn.Identity(), 6, 2, 9, 3, 4, splitting_mode=Folded()).eval()
    x = torch.randn(5, 6)
    values = model(x)
    assert torch.equal(values, model.bottleneck(Folded()(x)))
    assert Largest()(values).shape == (5, 4)


# --- how keys learn ---------------------------------------------------------------------------------------------------

RULE = {
    "reference/statistics.py": ("hits.new_full((), decay)", "hits.new_full((), decay * decay)"),
    "testing/checks.py": ("decay if hits.any() else 1.0", "decay * decay if hits.any() else 1.0"),
}
RULE_TRIAL = """
import torch
from kvb import testing
cases = [case for case in testing.CASES if case.name in ("plain", "float64")]
for name, backend in testing.backends(torch.device("cpu")).items():
    print(name, len(testing.verdict("update_keys_", backend, cases).failures))
"""


def test_the_rule_of_the_averages_stands_in_three_files():
    """Found by what mixes the old averages with the new statistics."""
    found = []
    for folder in ("kvb", "kernels", "csrc"):
        for path in sorted((PACKAGE.parent / folder).glob("**/*")):
            if path.suffix in (".py", ".cpp", ".h", ".inc") and re.search(r"\b(lerp|_?mix)\(", path.read_text()):
                found.append(path.relative_to(PACKAGE.parent).as_posix())
    assert found == ["kvb/reference/statistics.py", "kernels/update.py", "csrc/table/update.cpp"]
    assert re.findall(r"`(\w+/\S+/?\S*\.(?:py|cpp))`", recipe("Change how keys learn"))[:3] == [
        *("kvb/reference/statistics.py", "csrc/table/update.cpp", "kernels/update.py")
    ]


def test_a_backend_that_does_not_follow_a_new_rule_is_found(tmp_path):
    """The rule changes in the reference, and in what is expected; C++ is as it was built."""
    words = tried(tmp_path, RULE, RULE_TRIAL)
    failures = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert failures.pop("torch") == 0
    assert all(failures.values())
