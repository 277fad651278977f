"""The promised ratios, held on this machine: ``python -m benchmarks.bars``; exit status 1 where one falls short.

Promised are the bars of ``benchmarks.cpu``, ``.training``, ``.graphs`` and ``.memory_layers``, and those below. What is
missing here is listed as absent and breaks nothing.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import cpu, graphs, memory_layers, overhead, peers, suites, table, training
from benchmarks.race import draws, racing, summary
from benchmarks.shapes import SHAPES
from benchmarks.suites import KVB
from benchmarks.suites.measuring import Outcome, measure
from benchmarks.table import Measured, Row, against_best
from benchmarks.timing import Absent, Effort, Ratio, WrongResult

FULL, QUICK = Effort(rounds=5, seconds=3.0, patience=5.0), Effort(rounds=2, seconds=0.3, patience=1.0)
PUBLISHED = "dkvb-pytorch"
IMPORT_SECONDS = 0.25  # that `import kvb` may add to `import torch`
RACED, RACED_QUICK = 120, 24  # shapes of benchmarks.race


@functools.cache
def _measured(suite: str, shape: str, quick: bool, only: Callable[[str], bool]) -> Outcome:
    return measure(suite, SHAPES[shape], QUICK if quick else FULL, only, limits=False)


def _everyone(peer: str) -> bool:
    return peer != "pykeops"  # it takes minutes to compile, and was never the best


def _quick(peer: str) -> bool:
    return peers.known()[peer].quick


def _plain(peer: str) -> bool:
    return peer.startswith("torch")


def _published(peer: str) -> bool:
    return peer == PUBLISHED


def _faster(suite: str, shape: str, quick: bool, only: Callable[[str], bool]) -> Measured:
    """kvb against the best of the chosen peers."""
    return against_best(_measured(suite, shape, quick, only))


def search(shape: str, quick: bool) -> Measured:
    return _faster("search", shape, quick, _quick if quick else _everyone)


def search_mean(quick: bool) -> Measured:
    """The geometric mean of the rows before."""
    rows = [search(shape, quick) for shape in suites.shapes("search")]
    value, low, high = (
        statistics.geometric_mean(getattr(row.ratio, part) for row in rows) for part in Ratio.__annotations__
    )
    mean = [statistics.geometric_mean(getattr(row, who) for row in rows) for who in ("kvb", "peer")]
    return Measured(*mean, "s", "best of each", Ratio(value, low, high))


def less_memory(shape: str, quick: bool) -> Measured:
    """The published package's peak memory over kvb's."""
    found = _measured("memories", shape, quick, _published)
    if PUBLISHED not in found.peak_bytes or KVB not in found.peak_bytes:
        raise Absent("; ".join(found.absent.values()) or "memory cannot be measured here")
    ours, theirs = found.peak_bytes[KVB], found.peak_bytes[PUBLISHED]
    return Measured(ours, theirs, "B", PUBLISHED, Ratio(*[theirs / max(1, ours)] * 3))


def call(with_gradient: bool, quick: bool) -> Measured:
    """A call on one pair, in calls of ``nn.Linear``."""
    race = overhead.measure(with_gradient, QUICK if quick else FULL)
    seconds = [race.seconds(who) for who in (overhead.KVB, overhead.PEER)]
    return Measured(*seconds, "s", overhead.PEER, race.ratio(overhead.KVB, overhead.PEER))


def imports(quick: bool) -> Measured:
    """What ``import kvb`` adds to ``import torch`` in new processes: seconds of a CPU, by a quarter of one."""
    code = "import os, torch; begun = sum(os.times()[:2]); import kvb; print(sum(os.times()[:2]) - begun)"
    runs = [
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        for _ in range(5 + 10 * (not quick))
    ]
    low, middle, high = statistics.quantiles([float(run.stdout) for run in runs])
    ratio = Ratio(*(seconds / IMPORT_SECONDS for seconds in (middle, low, high)))
    return Measured(middle, IMPORT_SECONDS, "s", "a quarter second", ratio)


@functools.cache
def _raced(quick: bool) -> list[dict[str, Any]]:
    """The first shapes of ``benchmarks.race``, without those that a compiler takes seconds for."""
    drawn = [draws.draw(0, index)[0] for index in range(RACED_QUICK if quick else RACED)]
    found = [racing.race(one, racing.QUICK if quick else racing.FULL) for one in drawn if not one.compiled]
    for line in found:
        if "wrong" in line:
            raise WrongResult(f"{summary.shape(line)}: {line['wrong']}")
    return summary.raced(found)


def race_mean(quick: bool) -> Measured:
    """The best opponent's time over kvb's at random shapes, geometric mean."""
    found = _raced(quick)
    value, low, high = (statistics.geometric_mean(line[part] for line in found) for part in ("ratio", "low", "high"))
    ours = statistics.geometric_mean(line["seconds"][KVB] for line in found)
    theirs = statistics.geometric_mean(line["seconds"][line["best"]] for line in found)
    return Measured(ours, theirs, "s", "best of each", Ratio(value, low, high))


def race_losses(quick: bool) -> Measured:
    """The share of those shapes where kvb loses."""
    found = _raced(quick)
    lost = len(summary.losses(found))
    return Measured(lost, len(found), "shapes", "of so many", Ratio(*[lost / len(found)] * 3))


def _at(take: Callable[..., Measured], *arguments: object) -> Callable[[bool], Measured]:
    """``take`` with its first arguments, to be called with ``quick``."""
    return functools.partial(take, *arguments)


def _versus(suite: str, shape: str, only: Callable[[str], bool]) -> Callable[[bool], Measured]:
    return lambda quick: _faster(suite, shape, quick, only)


OWN = (
    *(Row(f"search:{shape}", _at(search, shape), 1.3) for shape in suites.shapes("search")),
    Row("search-mean", search_mean, 1.8, 2.3),
    Row("memories:seed_a", _versus("memories", "seed_a", _published), 6),
    Row("memories:paper_cifar10", _versus("memories", "paper_cifar10", _published), 20),
    Row("less-memory:seed_a", _at(less_memory, "seed_a"), 6),
    Row("less-memory:paper_cifar10", _at(less_memory, "paper_cifar10"), 20),
    Row("one-sample", _versus("forward", "one_sample", _plain), 3),
    Row("call:forward", _at(call, False), 2.5, at_most=True),
    Row("call:gradient", _at(call, True), 3.5, at_most=True),
    Row("import", imports, 1, at_most=True),
    Row("race:mean", race_mean, 1),
    Row("race:losses", race_losses, 0.02, at_most=True),
)
ROWS = tuple(
    row for row in (*OWN, *cpu.ROWS, *training.ROWS, *graphs.ROWS, *memory_layers.ROWS) if row.must is not None
)


def main(arguments: Sequence[str] | None = None) -> int:
    return table.run(ROWS, "benchmarks.bars", __doc__, arguments, held=True)


if __name__ == "__main__":
    sys.exit(main())
