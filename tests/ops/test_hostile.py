"""Thousands of hostile calls of operators, in processes that may die: no signal, and no answer but the reference's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvb import ops

pytestmark = pytest.mark.memory

if ops.backend("cpu") != "cpp":
    pytest.skip("compares the C++ extension with plain PyTorch", allow_module_level=True)

HOSTILE = Path(__file__).with_name("hostile.py")
BATCH = 1000  # calls of one process


def made(first: int, count: int, journal: Path) -> list[str]:
    """What is wrong with the calls ``first`` to ``first + count``; a process that dies is followed by another."""
    wrong, last = [], first + count
    while first < last:
        some = min(BATCH, last - first)
        command = [sys.executable, str(HOSTILE), str(first), str(some), str(journal)]
        path = os.pathsep.join([str(HOSTILE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environ)
        wrong += done.stdout.splitlines()
        first += some
        if done.returncode != 0:  # below 0 for a signal, above for a sanitizer
            reached = int(journal.read_text().split()[-1])
            wrong.append(f"{reached} ended with {done.returncode} {done.stderr[:2000]}".strip())
            first = reached + 1
    return wrong


def test_hostile_calls(tmp_path):
    assert made(0, 600, tmp_path / "journal") == []


@pytest.mark.slow
def test_many_more_hostile_calls(tmp_path):
    assert made(1000, 12_000, tmp_path / "journal") == []
    print("\nhostile: 0 signals and 0 other answers in 12,000 calls")


def test_a_process_that_dies_is_put_down_to_its_call(tmp_path, monkeypatch):
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        "for number in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):\n"
        "    print(number, file=open(sys.argv[3], 'w'))\n"
        "    if number == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if number == 6: print('6 other numbers')\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "HOSTILE", dying)
    assert made(0, 9, tmp_path / "journal") == ["4 ended with -9", "6 other numbers"]
