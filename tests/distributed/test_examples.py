"""The scripts in ``examples/distributed`` as torchrun starts them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"


def run(script: str, *arguments: str, processes: int = 2) -> str:
    """What a script prints in so many processes on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("split", "part"),
    [("codebooks", "(4, 256, 10)"), pytest.param("pairs", "(8, 128, 10)", marks=pytest.mark.slow)],
)
def test_sharded(split, part):
    printed = run("sharded.py", "--split", split)
    for rank in range(2):
        assert f"process {rank}: values {part} of (8, 256, 10)" in printed
    before, after = map(float, re.search(r"accuracy (\S+) -> (\S+),", printed).groups())
    assert before < 0.5
    assert after > 0.9
    assert "the same after loading: True" in printed
