"""Checks operators in processes of their own, several at a time.

A crash, or an error that sticks to a GPU's context, costs one case: the next ones get a new process. Every failure is
printed, and written, when it is found, so nothing is lost if time runs out.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from kvb import ops
from kvb.testing.cases import CASES
from kvb.testing.verdicts import Verdict, backends

LOST = 3  # exit status of a process whose device no longer works; it has reported that
MOST = 14  # processes at a time: each has a context on the device, and compiles
SHARES = 2  # processes for the cases of one kernel on a GPU, where most of the time goes into compiling
THREADS = 2  # at least, so that what runs in parallel is checked in parallel
PACKAGE = Path(__file__).resolve().parents[1]
WORKER = (sys.executable, "-m", f"{PACKAGE.name}.testing")
SLOWEST = ("lookup", "nearest", "update_keys_", "gather_backward", "gather_backward_rows")  # they start first


Step = tuple[str, int]  # an operator, and one of ``CASES`` by number


@dataclasses.dataclass(frozen=True)
class Job:
    """Some cases of some operators of one backend."""

    backend: str
    device: str
    steps: tuple[Step, ...]

    @property
    def where(self) -> str:
        return f"{self.backend} on {self.device}"


def jobs(devices: Sequence[torch.device], operators: Sequence[str], cases: Sequence[int]) -> list[Job]:
    """All work on the devices, what takes longest first: kernels, whose compilation or interpretation takes minutes."""
    found = []
    for device in devices:
        for name, backend in backends(device).items():
            there = [operator for operator in operators if hasattr(backend.operators, operator)]
            groups, shares = [there], 1
            if name == "triton":
                groups, shares = [[operator] for operator in there], 1 if device.type == "cpu" else SHARES
            for group in groups:
                for share in range(shares):
                    steps = tuple((operator, number) for operator in group for number in cases[share::shares])
                    found += [Job(name, device.type, steps)] if steps else []
    slow = {operator: place for place, operator in enumerate(SLOWEST)}
    return sorted(found, key=lambda job: (job.backend != "triton", slow.get(job.steps[0][0], len(slow))))


class Run:
    """All jobs, and what has come of them so far."""

    work: Sequence[Job]
    worker: Sequence[str]
    record: IO[str] | None
    lock: threading.Lock
    cut: bool

    def __init__(self, work: Sequence[Job], worker: Sequence[str], processes: int, record: IO[str] | None) -> None:
        self.work, self.worker, self.record = work, worker, record
        self.processes = processes
        self.threads: int = max(THREADS, (os.cpu_count() or 1) // processes)
        self.lock, self.cut = threading.Lock(), False
        self.alive: set[subprocess.Popen[str]] = set()
        self.total: collections.Counter[tuple[str, str]] = collections.Counter[tuple[str, str]]()
        for job in work:
            self.total.update((operator, job.where) for operator, _ in job.steps)
        self.left: collections.Counter[tuple[str, str]] = self.total.copy()
        self.failures: dict[tuple[str, str], list[tuple[str, str]]] = {key: [] for key in self.total}

    def tell(self, job: Job, step: Step, failure: str) -> None:
        """A case is done."""
        operator, case = step[0], CASES[step[1]].name
        key = operator, job.where
        with self.lock:
            self.left[key] -= 1
            if self.record is not None:
                facts = {"operator": operator, "backend": job.backend, "device": job.device}
                self.record.write(json.dumps({**facts, "case": case, "failure": failure}) + "\n")
                self.record.flush()
            if failure:
                self.failures[key].append((case, failure))
                print(f"FAIL {operator}, {job.where}, case {case!r}: {failure}", flush=True)
            if self.left[key] == 0:
                self.show(key)

    def show(self, key: tuple[str, str]) -> None:
        found = Verdict(*key, self.total[key], self.failures[key], self.left[key])
        print(f"{found.operator:<22}{found.backend:<20}{found}", flush=True)

    def do(self, job: Job) -> None:
        """The cases of a job, in as many processes as it takes."""
        left = list(job.steps)
        while left and not self.cut:
            self._process(job, left)

    def _process(self, job: Job, left: list[Step]) -> None:
        """Run one process until it ends, and take the cases that it did from ``left``."""
        steps = (f"{operator}:{number}" for operator, number in left)
        command = [*self.worker, job.backend, job.device, str(self.threads), ",".join(steps)]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = self._start(command, errors)
            if process is None or process.stdout is None:
                return
            ready = bool(process.stdout.readline())
            for line in process.stdout:
                if line.endswith("\n"):  # not one that a dying process left unfinished
                    self.tell(job, left.pop(0), json.loads(line))
            status = process.wait()
            with self.lock:
                self.alive.discard(process)
            if self.cut or not left or status == LOST:
                return
            errors.seek(0)
            says = f"the process ended with status {status}: {errors.read().strip()[-600:]}"
        # Without a process that starts there is no use in trying the others.
        for _ in range(1 if ready else len(left)):
            self.tell(job, left.pop(0), says)

    def _start(self, command: Sequence[str], errors: IO[str]) -> subprocess.Popen[str] | None:
        with self.lock:
            if self.cut:
                return None
            process = subprocess.Popen(
                command, cwd=PACKAGE.parent, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            )
            self.alive.add(process)
        return process

    def end(self) -> None:
        """Kill what still runs, and start nothing more."""
        with self.lock:
            self.cut = True
            for process in self.alive:
                process.kill()

    def finish(self, seconds: float | None) -> bool:
        """Do all jobs, in so many seconds at most; whether everything passed."""
        start = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self.processes) as pool:
            try:
                waiting = [pool.submit(self.do, job) for job in self.work]
                concurrent.futures.wait(waiting, timeout=seconds)
            finally:
                self.end()
        for future in waiting:
            future.result()
        for key, number in self.left.items():
            if number:
                self.show(key)
        failed = sum(map(len, self.failures.values()))
        missing = sum(self.left.values())
        took = f"{sum(self.total.values()) - missing} cases in {time.monotonic() - start:.0f} s"
        print(f"{took}: {failed} failed" + (f"; {missing} did not run: no time left" if missing else ""), flush=True)
        return failed == missing == 0


def run(
    devices: Sequence[torch.device],
    *,
    operators: Sequence[str] = ops.NAMES,
    cases: Sequence[int] = range(len(CASES)),
    processes: int | None = None,
    seconds: float | None = None,
    json_lines: Path | None = None,
    worker: Sequence[str] = WORKER,
) -> bool:
    """Check every backend of the devices, print the table, and say whether all passed.

    Args:
        devices: as from ``devices()``.
        operators: of ``kvb.ops.NAMES``.
        cases: numbers of ``CASES``.
        processes: how many run at a time; by default one per CPU, 14 at most.
        seconds: after which whatever still runs is killed, and counts as not passed.
        json_lines: a file that gets one line of JSON for each case when it is done.
        worker: what to run in place of ``python -m kvb.testing``, with its arguments.
    """
    work = jobs(devices, operators, cases)
    processes = processes or max(1, min(MOST, os.cpu_count() or 1))
    print(f"{'operator':<22}{'backend':<20}verdict")
    if json_lines is None:
        return Run(work, worker, processes, None).finish(seconds)
    with json_lines.open("w", encoding="utf-8") as record:
        return Run(work, worker, processes, record).finish(seconds)
