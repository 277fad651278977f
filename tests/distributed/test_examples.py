"""``sharded.py`` and ``fsdp.py`` of ``examples/distributed`` in several processes, and as torchrun starts them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_pages import free_port

FOLDER = Path(__file__).parents[2] / "examples" / "distributed"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def _run(port, script, *arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return runpy.run_path(str(FOLDER / script))["main"](*arguments)


def _launched(script):
    done = subprocess.run([*LAUNCH, str(FOLDER / script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_a_split_table_learns(processes, split):
    for before, after, same in processes(2, _run, free_port(), "sharded.py", split, grouped=False):
        assert before < 0.5
        assert after > 0.9
        assert same


@pytest.mark.parametrize("world", [2, 3])
def test_split_values_learn(processes, world):
    for accuracy, *same in processes(world, _run, free_port(), "fsdp.py", grouped=False):
        assert accuracy > 0.9
        assert same == [True, True]


@pytest.mark.slow
def test_torchrun_runs_the_scripts():
    printed = _launched("sharded.py")
    assert printed.count("values (4, 256, 10) of (8, 256, 10)") == 2
    assert re.search(r"accuracy 0\.\d+ -> (1|0\.9)\S+, loss \S+, the same after loading: True", printed)
    printed = _launched("fsdp.py")
    assert printed.count("values (4, 64, 16) of (8, 64, 16)") == 2
    assert re.search(r"accuracy (9\d\.\d|100\.0)%; the same from parts: True, from the file: True", printed)
