"""The page and the example about many processes, in more than one."""

from __future__ import annotations

import gc
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed" / "ddp.py"


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _page(port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as torchrun does
    os.chdir(folder)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL):
        gc.collect()  # PyTorch can hang where the last that frees a group is a DDP
        exec(block, names)
    os.chdir(ROOT)
    return names["report"].rows


def test_the_page_runs_in_two_processes(processes, tmp_path):
    assert processes(2, _page, free_port(), tmp_path, grouped=False) == [1000, 1000]


def _example(port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as torchrun does
    return runpy.run_path(str(EXAMPLE))["main"]()


@pytest.mark.parametrize("world", [1, 2])
def test_the_example_learns(processes, world):
    assert min(processes(world, _example, free_port(), grouped=False)) > 0.9


@pytest.mark.slow
def test_torchrun_runs_the_example():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"accuracy \d\d\.\d%", done.stdout)
