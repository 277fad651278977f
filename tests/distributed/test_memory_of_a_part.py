"""A process needs the memory of its part of a table, and little more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

MEGABYTE = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("split", "megabytes"), [("codebooks", 100), ("pairs", 100), ("codebooks", 2000)])
def test_four_processes_train_a_table(split, megabytes):
    """bfloat16 values from the meta device on, 50 steps; the bar is the part, a tenth of it, and 300 MB."""
    script = str(Path(__file__).with_name("giant.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run([*launch, script, split, str(megabytes)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = re.findall(r"rank (\d) start (\d+) peak (\d+) part (\d+) first (\S+) last (\S+)", done.stdout)
    assert sorted(rank for rank, *_ in found) == ["0", "1", "2", "3"]
    for _, start, peak, part, first, last in found:
        assert int(part) >= 0.9 * megabytes * MEGABYTE
        assert int(peak) - int(start) <= 1.1 * int(part) + 30 * MEGABYTE
        if megabytes == 2000:  # PyTorch with DTensor takes 400 MB itself, more than a tenth of less
            assert int(peak) <= 1.1 * int(part) + 300 * MEGABYTE
        assert float(last) < float(first)
