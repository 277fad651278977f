"""What all parts share: the device, the folder of the results, the time left, and child processes that end with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timing import Deadline

LOST = 3  # exit status of a process that an error stuck to: the next parts need a new one
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Day:
    """One call of the command."""

    out: Path
    device: torch.device
    small: bool
    budget: float  # seconds from now on

    def __post_init__(self) -> None:
        self.deadline = Deadline(self.budget)

    @property
    def left(self) -> float:
        return self.deadline.left

    def command(self, part: str, budget: float, *more: str) -> list[str]:
        """That of a part as a process of its own."""
        options = ["--out", str(self.out), "--device", self.device.type, "--budget", f"{budget:.0f}"]
        return [sys.executable, "-m", "benchmarks.gpu_day", part, *options, *["--small"] * self.small, *more]

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT)


def finish(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Wait for processes, so many seconds in all, then kill them; exit statuses, None for what was killed."""
    deadline = Deadline(seconds)
    found: list[int | None] = []
    try:
        for process in processes:
            try:
                found.append(process.wait(max(0.0, deadline.left)))
            except subprocess.TimeoutExpired:
                found.append(None)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found
