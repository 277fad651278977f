"""The one fixture of all benchmarks: run once, verify, warm up, then time everybody in turns.

The contestants alternate (A B A B ...), so that a machine that slows down or a neighbour that computes hits all of
them; what counts is the ratio of their medians in one such race.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

TURN = 0.02  # seconds: a turn of a fast contestant repeats it for so long
MOST = 1000  # calls in a turn
SLOW = 0.2  # seconds: a contestant this slow needs no untimed call at the start of its turns


class Absent(Exception):
    """A peer, a compiler or an instruction set that this machine does not have; the message says which."""


class WrongResult(Exception):
    """A result that failed its verification, and so is not timed."""


@dataclass(frozen=True)
class Effort:
    """How long a race goes on: at least ``rounds`` rounds, and until ``seconds`` have passed."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Contestant:
    """What is timed (``run``), how its result is verified, and what is set up untimed before each of its turns."""

    run: Callable[[], Any]
    verify: Callable[[Any], None]
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians, and the quartiles of the same ratio taken round by round."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Race:
    """The seconds of every call, by contestant and round."""

    turns: Mapping[str, list[list[float]]]

    def seconds(self, name: str) -> float:
        """The median over all calls."""
        return statistics.median(call for turn in self.turns[name] for call in turn)

    def ratio(self, over: str, under: str, scale: float = 1.0) -> Ratio:
        """``scale`` times the time of ``over``, divided by the time of ``under``."""
        pairs = zip(self.turns[over], self.turns[under], strict=True)
        rounds = [scale * statistics.median(a) / statistics.median(b) for a, b in pairs]
        low, _, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
        return Ratio(scale * self.seconds(over) / self.seconds(under), low, high)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = run()
    return perf_counter() - start, result


def _begin(contestant: Contestant) -> None:
    if contestant.before is not None:
        contestant.before()


def _verified(contestant: Contestant) -> bool:
    """Run and verify a contestant; whether it is slow."""
    _begin(contestant)
    seconds, result = _timed(contestant.run)
    contestant.verify(result)
    return seconds > SLOW


def _turn(contestant: Contestant, slow: bool) -> list[float]:
    """The seconds of one or more calls in a row.

    Fast contestants run once untimed first: it brings back their caches and threads, while the idle threads of the
    contestant before still spin. A result is released before the next call, outside of the timing.
    """
    _begin(contestant)
    if not slow:
        contestant.run()
    calls: list[float] = []
    end = perf_counter() + TURN
    while not calls or (perf_counter() < end and len(calls) < MOST):
        seconds, result = _timed(contestant.run)
        del result
        calls.append(seconds)
    return calls


def race(contestants: Mapping[str, Contestant], effort: Effort) -> Race:
    """Verify all contestants, then time them in turns.

    Raises:
        WrongResult: from a contestant's ``verify``; nothing was timed.
    """
    slow = {name: _verified(contestant) for name, contestant in contestants.items()}
    turns: dict[str, list[list[float]]] = {name: [] for name in contestants}
    end = perf_counter() + effort.seconds
    rounds = 0
    while rounds < effort.rounds or perf_counter() < end:
        for name, contestant in contestants.items():
            turns[name].append(_turn(contestant, slow[name]))
        rounds += 1
    return Race(turns)


def quickest(runs: Mapping[str, Callable[[], Any]]) -> str:
    """The one whose best of three calls is the shortest: to choose the settings of a peer, before any race."""
    return min(runs, key=lambda name: min(_timed(runs[name])[0] for _ in range(3)))


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep what is freed, so that a large result lands in memory that was used before, without page faults.

    Raises:
        Absent: another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError as error:
        raise Absent("needs glibc's mallopt") from error
    mmap_max, trim_threshold = -4, -1
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        mallopt(mmap_max, 65536)
        mallopt(trim_threshold, 128 * 1024)
