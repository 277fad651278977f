"""The timing harness of all benchmarks: run once, verify, warm up, then time all contestants in turns.

The contestants alternate (A B A B ...), so that a machine that slows down or a neighbour that computes hits all of
them; what counts is the ratio of their medians in one such race. A clock says how calls are timed: on the host, or
between events on a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch

from kvb.testing import attempts

TURN = 0.02  # seconds: a turn of a fast contestant repeats it for so long
MOST = 1000  # calls in a turn
SLOW = 0.2  # seconds: a contestant this slow needs no untimed call at the start of its turns


class Absent(Exception):
    """A peer, a compiler or an instruction set that this machine does not have; the message says which."""


class WrongResult(Exception):
    """A result that failed its verification, and so is not timed."""


class Attempt(attempts.Attempt):
    """The attempt of a contestant: it may be absent, wrong, or fail in a way of its own."""

    @property
    def absent(self) -> bool:
        return isinstance(self.error, Absent)

    @property
    def why(self) -> str:
        """Why a contestant does not take part; empty if it does."""
        if self.absent:
            return str(self.error)
        if isinstance(self.error, WrongResult):
            return f"wrong, not timed: {self.error}"
        return f"failed: {self.error_line}"[:300] if self.error else ""


@dataclass(frozen=True)
class Effort:
    """How long a race goes on: at least ``rounds`` rounds, and until ``seconds`` have passed.

    A contestant that needs more than ``patience`` seconds for its verified call is not called again: that call counts.
    """

    rounds: int
    seconds: float
    patience: float = float("inf")
    turn: float = TURN


@dataclass(frozen=True)
class Contestant:
    """What is timed (``run``), how its result is verified, and what is set up untimed before each of its turns.

    ``verify`` raises ``WrongResult``; of a contestant that may err, it returns the share of wrong choices instead.
    """

    run: Callable[[], Any]
    verify: Callable[[Any], float | None]
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
        most = max(len(self.turns[over]), len(self.turns[under]))
        # Who was called once only stands against every round of the other.
        pairs = zip(
            *(turn * most if len(turn) == 1 else turn for turn in map(self.turns.get, (over, under))), strict=True
        )
        rounds = [scale * statistics.median(a) / statistics.median(b) for a, b in pairs]
        low, _, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
        return Ratio(scale * self.seconds(over) / self.seconds(under), low, high)


# --- clocks -----------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of one call, and its result."""
    start = perf_counter()
    result = run()
    return perf_counter() - start, result


def processor_seconds(run: Callable[[], Any], calls: int, repeats: int) -> float:
    """The least processor time of a call, over ``repeats`` times ``calls`` in a row; the first call apart."""
    run()
    found = []
    for _ in range(repeats):
        start = process_time()
        for _ in range(calls):
            run()
        found.append((process_time() - start) / calls)
    return min(found)


class HostClock:
    """Times each call from its start to its return."""

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        return timed(run)

    def turn(self, run: Callable[[], Any], seconds: float) -> list[float]:
        """The seconds of each of one or more calls in a row, which go on for about ``seconds``.

        A result is released before the next call, outside of the timing.
        """
        calls: list[float] = []
        end = perf_counter() + seconds
        while not calls or (perf_counter() < end and len(calls) < MOST):
            taken, result = self.timed(run)
            del result
            calls.append(taken)
        return calls


class ProcessorClock(HostClock):
    """Times each call by the processor time that this process takes: for one thread on a busy machine."""

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        start = process_time()
        result = run()
        return process_time() - start, result


class EventClock:
    """Times each call between two events on a CUDA or HIP device; calls are submitted one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.submitting = 0.0  # seconds of the host for each call of the latest turn

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        result = []
        (seconds,) = self._seconds(lambda: result.append(run()), 1)
        return seconds, result[0]

    def turn(self, run: Callable[[], Any], seconds: float) -> list[float]:
        (one,) = self._seconds(run, 1)
        return self._seconds(run, max(5, min(MOST, int(seconds / max(one, 1e-6)))))

    def _seconds(self, run: Callable[[], Any], calls: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
        torch.cuda.synchronize(self.device)
        start = perf_counter()
        for before, after in pairs:
            before.record()
            run()
            after.record()
        self.submitting = (perf_counter() - start) / calls
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


Clock = HostClock | EventClock
HOST = HostClock()


def clock_of(device: torch.device) -> Clock:
    return HOST if device.type == "cpu" else EventClock(device)


class Deadline:
    """When so many seconds, from now on, are used up."""

    def __init__(self, seconds: float) -> None:
        self.end = perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - perf_counter()


# --- races ------------------------------------------------------------------------------------------------------------


def _begin(contestant: Contestant) -> None:
    if contestant.before is not None:
        contestant.before()


def verified(contestant: Contestant, run: Callable[[Callable[[], Any]], Any] = timed) -> Any:
    """Run and verify a contestant; the seconds of that first call.

    ``run`` may observe more of the call than its time: it returns what it saw and the result.

    Raises:
        WrongResult: from the contestant's ``verify``.
    """
    _begin(contestant)
    seen, result = run(contestant.run)
    contestant.verify(result)
    return seen


def race(contestants: Mapping[str, Contestant], effort: Effort, clock: Clock = HOST) -> Race:
    """Verify all contestants, then time them in turns.

    Raises:
        WrongResult: from a contestant's ``verify``; nothing was timed.
    """
    first = {name: verified(contestant, clock.timed) for name, contestant in contestants.items()}
    return run_on(contestants, first, effort, clock)


def run_on(
    contestants: Mapping[str, Contestant], first: Mapping[str, float], effort: Effort, clock: Clock = HOST
) -> Race:
    """Time contestants in turns that were verified by a first call of so many seconds.

    Fast contestants run once untimed at the start of a turn: it brings back their caches and threads, while the idle
    threads of the contestant before still spin.
    """
    turns: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for name, seconds in first.items():
        if seconds > effort.patience:
            turns[name] = [[seconds]]
    racing = [name for name in contestants if not turns[name]]
    end = perf_counter() + effort.seconds
    rounds = 0
    while racing and (rounds < effort.rounds or perf_counter() < end):
        for name in racing:
            _begin(contestants[name])
            if first[name] <= SLOW:
                contestants[name].run()
            turns[name].append(clock.turn(contestants[name].run, effort.turn))
        rounds += 1
    return Race(turns)


def quickest(runs: Mapping[str, Callable[[], Any]], clock: Clock = HOST) -> str:
    """The one whose best of three calls is the shortest: to choose the settings of a peer, before any race."""
    return min(runs, key=lambda name: min(clock.timed(runs[name])[0] for _ in range(3)))


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
