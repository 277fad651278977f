"""The peak memory of a call, and of the paper's forward and training in fresh processes (Linux with glibc)."""

from __future__ import annotations

import ctypes
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kvb
from benchmarks import verify
from benchmarks.shapes import PAPER
from benchmarks.timing import Absent, WrongResult

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """Bytes. ``ru_maxrss`` would do for the peak, but a child inherits its parent's and it cannot be reset."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(kilobytes)


def require() -> None:
    """Raises ``Absent`` where memory cannot be measured."""
    if not CLEAR.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        raise Absent("needs Linux with glibc")


def peak(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result of a call, and the bytes that the process held at most during it beyond those before it.

    What was freed earlier goes back to the system first, so an earlier call hides nothing; what was allocated but not
    yet written to counts for the call that writes to it.

    Raises:
        Absent: no Linux with glibc.
    """
    require()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the peak
    before = _resident("VmRSS")
    result = run()
    return result, max(0, _resident("VmHWM") - before)


def _forward() -> int:
    """Bytes that one forward needs beyond its module, its input and its output."""
    shape = PAPER
    module = kvb.KeyValueBottleneck(shape.C, shape.K, shape.D, shape.V).eval().freeze_keys()
    small = kvb.KeyValueBottleneck(2, shape.K, shape.D, shape.V).eval().freeze_keys()
    x = torch.randn(shape.B, shape.C, shape.D)
    with torch.no_grad():
        small(x[:, :2])  # starts threads and loads code
        out, extra = peak(lambda: module(x))
    indices = module.encode(x)[:, None]
    verify.sampled_choice(x[:, None], module.keys, indices)
    verify.fetched(module.values.detach(), indices, out[:, None], "none", "bscv")
    return extra - out.nbytes


def _training() -> int:
    """Bytes that an epoch of 50,000 samples needs beyond its values and codes."""
    shape = PAPER
    values, codes = torch.zeros(shape.C, shape.K, shape.V).fill_(0.0), torch.empty(50_000, shape.C, dtype=torch.int16)
    data = kvb.CodeDataset(codes.random_(shape.K), torch.randint(shape.V, (50_000,)))
    kvb.training.sgd_step(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int16), torch.zeros(1).long())

    def epoch() -> None:
        for batch, labels in data.batches(shape.B):
            kvb.training.sgd_step(values, batch, labels)

    _, extra = peak(epoch)
    batch, labels = data[: shape.B]
    start = values.clone()
    verify.trained(start, batch, labels, values, kvb.training.sgd_step(values, batch, labels).loss)
    return extra


def _checkpoint(action: str) -> int:
    """Bytes that saving or loading the paper's module needs beyond it."""
    shape = PAPER
    module, other = (kvb.KeyValueBottleneck(shape.C, shape.K, shape.D, shape.V) for _ in range(2))
    small = kvb.KeyValueBottleneck(2, 4, shape.D, shape.V)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/file.pt"
        kvb.save(small, path)  # starts threads and loads code
        kvb.load(small, path)
        kvb.save(module, path)
        run = (
            functools.partial(kvb.save, module, path) if action == "save" else functools.partial(kvb.load, other, path)
        )
        _, extra = peak(run)
        kvb.load(other, path)
    for name, value in module.state_dict().items():
        verify.equal(other.state_dict()[name], value, name)
    return extra


JOBS = {
    "forward": _forward,
    "training": _training,
    "save": functools.partial(_checkpoint, "save"),
    "load": functools.partial(_checkpoint, "load"),
}


def extra_bytes(threads: int, job: str = "forward") -> int:
    """The same of a job, from a process of its own.

    Raises:
        Absent: no Linux with glibc. WrongResult: the job's result is wrong.
    """
    require()
    command = [sys.executable, "-m", "benchmarks.memory", str(threads), job]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise WrongResult(f"peak memory: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(JOBS[sys.argv[2]]()))
