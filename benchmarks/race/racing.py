"""One shape: kvb and its opponents are verified, and then race, the quickest two of the opponents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.race import searches, steps, tables
from benchmarks.race.draws import Draw
from benchmarks.race.entry import Entry
from benchmarks.suites import KVB
from benchmarks.timing import HOST, Attempt, Clock, Contestant, Effort, WrongResult, run_on, verified

FULL, QUICK = Effort(rounds=7, seconds=0.4, patience=1.0), Effort(rounds=3, seconds=0.0, patience=0.3, turn=0.005)
RACING = 2  # opponents: two are often as quick as each other
TRIALS = 3  # calls that tell who is quick

ENTRIES: dict[str, Callable[[Draw], Entry]] = {
    "search": searches.search,
    "forward": searches.forward,
    "gather": tables.gather,
    "backward": tables.backward,
    "training_step": steps.training_step,
    "autograd_step": steps.autograd_step,
}


def _trial(contestant: Contestant, draw: Draw, patience: float, clock: Clock) -> float:
    """Verify a contestant; the seconds of its best call, the first one too unless it compiles."""
    seconds = verified(contestant, clock.timed)
    if draw.compiled:
        seconds = clock.timed(contestant.run)[0]
    if seconds > patience:
        return seconds
    return min(clock.timed(contestant.run)[0] for _ in range(TRIALS))


@torch.no_grad()
def race(draw: Draw, effort: Effort, clock: Clock = HOST) -> dict[str, Any]:
    """What a line of the journal says of a shape: ``ratio`` is the best opponent's time over kvb's."""
    if draw.compiled:
        torch.compiler.reset()
    facts = {**draw._asdict(), "work": draw.work}
    try:
        entry = ENTRIES[draw.operator](draw)
        ours = _trial(entry.kvb, draw, effort.patience, clock)
    except WrongResult as wrong:
        return {**facts, "wrong": str(wrong)}
    contestants, trials, absent = {KVB: entry.kvb}, {}, {}
    for name, prepare in entry.opponents.items():
        with Attempt() as attempt:
            contestant = prepare()
            trials[name] = _trial(contestant, draw, effort.patience, clock)
            contestants[name] = contestant
        if attempt.why:
            absent[name] = attempt.why
    quickest = sorted(trials, key=trials.__getitem__)[:RACING]
    first = {KVB: ours, **{name: trials[name] for name in quickest}}
    found = run_on({name: contestants[name] for name in first}, first, effort, clock)
    facts |= {"seconds": {name: found.seconds(name) for name in found.turns}, "trials": trials, "absent": absent}
    if quickest:
        best = min(quickest, key=found.seconds)
        ratio = found.ratio(best, KVB)
        facts |= {"best": best, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    return facts
