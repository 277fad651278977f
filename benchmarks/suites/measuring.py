"""Measures a suite at a shape: kvb and its peers are verified, then race with the machine's ceiling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import ceilings, memory, peers, suites
from benchmarks.shapes import Module
from benchmarks.suites.case import CEILING, KVB
from benchmarks.timing import Absent, Attempt, Contestant, Effort, Race, run_on, timed, verified


@dataclass(frozen=True)
class Outcome:
    """What a case gave: the race, the memory of each first call, and why others did not take part."""

    race: Race
    peak_bytes: Mapping[str, int]
    absent: Mapping[str, str]
    amount: float
    ceiling: str
    ceiling_amount: float | None  # what one run of the ceiling does, if it could be measured

    @property
    def peers(self) -> list[str]:
        """By time, the quickest first."""
        found = [name for name in self.race.turns if name not in (KVB, CEILING)]
        return sorted(found, key=self.race.seconds)

    @property
    def share(self) -> float | None:
        """kvb's useful operations or bytes per second, as a share of the machine's peak."""
        if self.ceiling_amount is None:
            return None
        return self.race.ratio(CEILING, KVB, self.amount / self.ceiling_amount).value


def _observed(run: Callable[[], Any]) -> tuple[tuple[float, int | None], Any]:
    try:
        (seconds, result), extra = memory.peak(lambda: timed(run))
    except Absent:
        seconds, result = timed(run)
        return (seconds, None), result
    return (seconds, extra), result


@functools.cache
def _ceiling(kind: str, threads: int) -> tuple[Contestant, float]:
    return ceilings.multiply_add(threads) if kind == "flops" else ceilings.copy()


def measure(
    suite: str, shape: Module, effort: Effort, only: Callable[[str], bool] = lambda peer: True, limits: bool = True
) -> Outcome:
    """Verify kvb and the chosen peers, then time them and the ceiling in turns.

    Raises:
        Absent: the suite cannot run at this shape on this machine. WrongResult: kvb is wrong.
    """
    with torch.no_grad():
        case = suites.SUITES[suite](shape)
        contestants, first, peaks, absent = {KVB: case.kvb}, {}, {}, {}

        def meet(name: str, contestant: Contestant) -> None:
            first[name], extra = verified(contestant, _observed)
            contestants[name] = contestant
            if extra is not None:
                peaks[name] = extra

        meet(KVB, case.kvb)
        for name, prepare in peers.offers(suite).items():
            if only(name):
                with Attempt() as attempt:
                    meet(name, prepare(case.given))
                if attempt.why:
                    absent[name] = attempt.why
        amount = None
        if limits:
            with Attempt() as attempt:
                contestants[CEILING], amount = _ceiling(case.ceiling, torch.get_num_threads())
                first[CEILING] = verified(contestants[CEILING])
            if attempt.why:
                absent[CEILING] = attempt.why
        race = run_on(contestants, first, effort)
    return Outcome(race, peaks, absent, case.amount, case.ceiling, amount)
