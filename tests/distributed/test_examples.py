"""``examples/distributed/sharded.py`` in several processes, and as torchrun starts it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_pages import free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "distributed" / "sharded.py"


def _run(port, split):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return runpy.run_path(str(SCRIPT))["main"](split)


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_a_split_table_learns(processes, split):
    for before, after, same in processes(2, _run, free_port(), split, grouped=False):
        assert before < 0.5
        assert after > 0.9
        assert same


@pytest.mark.slow
def test_torchrun_runs_the_script():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("values (4, 256, 10) of (8, 256, 10)") == 2
    assert re.search(r"accuracy 0\.\d+ -> (1|0\.9)\S+, loss \S+, the same after loading: True", done.stdout)
