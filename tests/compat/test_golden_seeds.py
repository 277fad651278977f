"""tests/data/golden_seeds.pt is what its generator makes, where the published packages are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PLACE = Path(__file__).parents[1] / "data" / "make_golden_seeds.py"
# A folder with the authors' repository as "authors", and each version of the other packages.
PUBLISHED = os.environ.get("KVB_PUBLISHED")
_spec = importlib.util.spec_from_file_location("make_golden_seeds", PLACE)
generator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generator)


def test_the_published_packages_give_these_numbers():
    folders = [f"--authors={PUBLISHED}/authors", f"--packages={PUBLISHED}"] if PUBLISHED else []
    done = subprocess.run([sys.executable, PLACE, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.splitlines()[-1].startswith("0 cases"):
        pytest.skip("no published package is installed, and KVB_PUBLISHED names no folder with them")
    assert "cases are as in golden_seeds.pt" in done.stdout


def test_every_case_has_its_versions_and_a_difference_shows():
    golden = torch.load(generator.GOLDEN, weights_only=True)
    assert {name.split("_")[0] for name in golden} == generator.VERSIONS.keys()
    assert generator.differences(golden, golden, "") == []
    other = torch.load(generator.GOLDEN, weights_only=True)
    other["v01_plain"]["state"]["values"][0, 0, 0] += 0.01
    other["author_topk"]["out"][2][0] += 1
    other["v00_plain"]["pickle"] = other["author_embedding"]["pickle"]
    other["v00_wide"]["options"]["embed_dim"] = 9
    assert sorted(generator.differences(other, golden, "")) == [
        ".author_topk.out[2]: other numbers",
        ".v00_plain.pickle: other names in the pickle",
        ".v00_wide.options.embed_dim: 9 instead of 8",
        ".v01_plain.state.values: other numbers",
    ]
