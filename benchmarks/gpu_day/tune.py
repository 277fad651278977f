"""Block sizes around those of the launch table: all are verified side by side first, then timed one by one.

The first pass compiles, which takes the time, on all CPUs; the second finds the compiled kernels in Triton's cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import verify
from benchmarks.gpu import small
from benchmarks.gpu_day import launch_table
from benchmarks.gpu_day.day import LOST, Day, finish
from benchmarks.journal import Journal, read
from benchmarks.shapes import GPU, Lookup
from benchmarks.timing import Attempt, Effort, clock_of
from kvb import functional
from kvb.testing.verdicts import device_is_lost

SHAPES = ("paper-8k", "paper-131k", "k65536-d8", "k65536-d64", "k4096-d128")
MOST = 16384  # queries: enough to fill a card
SHARES = 3  # processes that verify one shape's entries
SAMPLE = 64  # positions that are verified
EFFORT = Effort(rounds=3, seconds=0.0, turn=0.05)


def shape_of(name: str, tiny: bool) -> Lookup:
    shape = GPU[name]._replace(N=min(GPU[name].N, MOST))
    return small(shape)._replace(C=1, N=80) if tiny else shape


class Search:
    """The search of one shape, with whatever entry the launch table has."""

    def __init__(self, name: str, day: Day) -> None:
        self.shape = shape_of(name, day.small)
        N, C, K, D, _ = self.shape
        generator = torch.Generator(day.device).manual_seed(0)
        self.queries = torch.randn(N, 1, C, D, device=day.device, generator=generator)
        self.keys = torch.randn(C, K, D, device=day.device, generator=generator)
        self.packed = functional.pack_keys(self.keys)

    def __call__(self) -> tuple[Tensor, Tensor]:
        return torch.ops.kvb.nearest(self.queries, self.keys, self.packed, None, 1)

    def verify(self, found: tuple[Tensor, Tensor]) -> None:
        rows = torch.linspace(0, self.shape.N - 1, SAMPLE).long().to(self.queries.device)
        queries, indices, distances = (part[rows].cpu() for part in (self.queries, *found))
        verify.nearest(queries, self.keys.cpu(), indices[..., 0], distances[..., 0])


def entries(name: str, day: Day) -> list[Any]:
    found = launch_table.candidates(day.device, GPU[name].D)
    return found[:2] if day.small else found


def _shares(day: Day) -> int:
    return 1 if day.small else SHARES


def check(day: Day, name: str, share: int) -> int:
    """Verify a share of a shape's entries."""
    journal, search = Journal(_verified(day), go_on=True), Search(name, day)
    for entry in entries(name, day)[share :: _shares(day)]:
        # An entry may ask for more than the card has.
        with Attempt() as attempt, launch_table.replaced(day.device, search.shape.D, entry):
            search.verify(search())
        journal.write({"shape": name, "entry": entry._asdict(), "failure": attempt.error_line})
        if attempt.error and device_is_lost(day.device):
            return LOST
    return 0


def _verified(day: Day) -> Path:
    return day.out / "tune-verified.jsonl"


def measure(day: Day) -> int:
    """Time every entry that was right; the exit status is 1 if a current one was not."""
    journal, wrong = Journal(day.out / "tune.jsonl"), False
    known = {(line["shape"], *line["entry"].values()): line["failure"] for line in read(_verified(day))}
    for name in SHAPES:
        search, best = Search(name, day), None
        for number, entry in enumerate(entries(name, day)):
            failure = known.get((name, *entry), "not verified: its process was cut off")
            facts = {"shape": name, "entry": entry._asdict(), "current": number == 0, "failure": failure}
            wrong = wrong or (number == 0 and bool(failure))
            if day.left < 5:
                facts["failure"] = "no time left"
            if not facts["failure"]:
                with launch_table.replaced(day.device, search.shape.D, entry):
                    facts["seconds"] = statistics.median(_calls(search, day))
                best = min(best or facts["seconds"], facts["seconds"])
            journal.write(facts)
            print(line(facts), flush=True)
        if best is not None:
            print(f"{name}: the best of these takes {best * 1e3:.4g} ms", flush=True)
    return int(wrong)


def _calls(search: Search, day: Day) -> Iterator[float]:
    clock = clock_of(day.device)
    search()
    for _ in range(1 if day.small else EFFORT.rounds):
        yield from clock.turn(search, 0.0 if day.small else EFFORT.turn)


def line(facts: dict[str, Any]) -> str:
    entry = ", ".join(f"{name} {size}" for name, size in facts["entry"].items())
    says = facts["failure"] or f"{facts['seconds'] * 1e3:.4g} ms"
    return f"{facts['shape']:<12} {entry:<44} {says}{'  (the current entry)' if facts['current'] else ''}"


def main(day: Day) -> int:
    """Both passes; most of the time may go into the first."""
    Journal(_verified(day))
    parts = [(name, share) for name in SHAPES for share in range(_shares(day))]
    budget = 0.6 * day.left
    finish([day.start(day.command("tune-check", budget, "--only", f"{n}:{s}")) for n, s in parts], budget)
    return measure(day)
