"""The GPU backend against its peers and the card: ``python -m benchmarks.gpu --out DIR``, from the repository root.

Every result is verified before it is timed. Times are medians between events on the device; rates stand next to the
card's own, a copy and a bfloat16 matrix product of random numbers measured in the same run. A row that waits for the
host is measured again as a CUDA graph. DIR gets gpu.jsonl and gpu.txt, row by row; what does not fit into the time is
listed as such, and so are peers that are not installed. The exit status is 1 if kvb is wrong. Needs no package but
torch and triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine, peers, results
from benchmarks.journal import Journal
from benchmarks.shapes import GPU, Lookup
from benchmarks.suites import on_device
from benchmarks.suites.case import KVB
from benchmarks.suites.on_device import Problem, Work
from benchmarks.timing import Absent, Attempt, Contestant, Deadline, Effort, EventClock, clock_of, run_on
from kvb.testing.verdicts import device_is_lost

LIMIT = 285.0  # seconds for everything
HOST_BOUND = 1.25  # a call is bound by the host if the device needs less than so many times the host's time for it
GRAPH = f"{KVB}, CUDA graph"


@dataclasses.dataclass
class Session:
    """One run on one device: how long rows are timed, and when all time is used up."""

    device: torch.device
    small: bool = False
    limit: float = LIMIT

    def __post_init__(self) -> None:
        self.deadline = Deadline(self.limit)
        self.clock = clock_of(self.device)
        self.effort = Effort(rounds=1, seconds=0.0, turn=0.01 if self.small else 0.3)

    def require_time(self) -> None:
        if self.deadline.left < 0:
            raise Absent("no time left: name it with --only to measure it alone")

    def calls(self, run: Callable[[], Any]) -> list[float]:
        """The seconds of every timed call, ascending, after two that do not count."""
        first, _ = self.clock.timed(run)
        race = run_on({"": Contestant(run, lambda found: None)}, {"": first}, self.effort, self.clock)
        return sorted(race.turns[""][0])

    def bound_by_host(self, seconds: float) -> bool:
        """Whether the latest calls took as long as it took to submit them."""
        return isinstance(self.clock, EventClock) and seconds < HOST_BOUND * self.clock.submitting


def ceilings(session: Session) -> dict[str, float]:
    """Bytes per second of a copy, read and write, and operations per second of a bfloat16 matrix product.

    Of random numbers: a card that multiplies zeros or ones needs less power, and runs at a higher clock.
    """
    source = torch.randn(1 << (18 if session.small else 28), device=session.device)
    target = torch.empty_like(source)
    size = 128 if session.small else 8192
    left, right = (torch.randn(size, size, device=session.device).bfloat16() for _ in range(2))
    return {
        "copy": 2 * source.nbytes / statistics.median(session.calls(lambda: target.copy_(source))),
        "matmul": 2 * size**3 / statistics.median(session.calls(lambda: left @ right)),
    }


def small(shape: Lookup) -> Lookup:
    """The same shape, fit for a test on a CPU."""
    return Lookup(min(shape.N, 64), min(shape.C, 4), min(shape.K, 300), shape.D, min(shape.V, 8))


def graphed(contestant: Contestant) -> Contestant:
    """The same calls, captured once as a CUDA graph and replayed."""
    contestant.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = contestant.run()

    def replay() -> Any:
        graph.replay()
        return found

    return dataclasses.replace(contestant, run=replay)


# --- rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line: an operator at a shape, by kvb or a peer."""

    operator: str
    shape: str
    work: Callable[[Problem], Work]
    who: str = KVB
    with_values: bool = True

    @property
    def name(self) -> str:
        return f"{self.operator}:{self.shape}"


def _rows() -> tuple[Row, ...]:
    """The most telling rows first: time may run out."""
    rows = [Row("search", shape, on_device.search, with_values=False) for shape in GPU]
    rows += [Row("lookup", shape, on_device.lookup) for shape in ("paper-256", "paper-8k", "seed", "few-queries")]
    for shape in ("paper-8k", "paper-131k", "seed"):
        rows += [Row("gather", shape, on_device.gather)]
        rows += [Row("pooled gather", shape, functools.partial(on_device.gather, pool="mean"))]
        rows += [Row("backward", shape, on_device.backward)]
        rows += [Row("pooled backward", shape, functools.partial(on_device.backward, pool="mean"))]
        rows += [Row("accumulate", shape, on_device.accumulate)]
    rows += [Row("pack", shape, on_device.pack, with_values=False) for shape in ("paper-256", "seed", "k65536-d64")]
    for peer in sorted(peers.known().values(), key=lambda peer: peer.compiles):
        for suite, operator, work in (("search", "search", on_device.search), ("memories", "lookup", on_device.lookup)):
            at = [row.shape for row in rows if row[::3] == (operator, KVB) and row.shape in peer.shapes]
            if suite in peer.suites:
                rows += [Row(operator, shape, work, peer.name, operator == "lookup") for shape in at]
    return tuple(rows)


ROWS = _rows()

COLUMNS = "{:<27} {:<16} {:>8} {:>10} {:>8} {:>6} {:>8} {:>6} {:>8}"
HEAD = COLUMNS.format("row", "who", "N", "time", "GB/s", "copy", "TFLOP/s", "matmul", "wrong")


def _outcome(attempt: Attempt, who: str) -> dict[str, str]:
    """What stopped a row: a missing peer or device feature, a failure of kvb, or one of a peer."""
    if who == KVB and attempt.error and not attempt.absent:
        return {"wrong": attempt.error_line}
    return {"absent": attempt.why} if attempt.error else {}


def _timed(contestant: Contestant, work: Work, session: Session, limits: dict[str, float]) -> dict[str, Any]:
    """Verify and time a contestant; rates, and their shares of the card's."""
    share_wrong = contestant.verify(contestant.run()) or 0.0
    calls = session.calls(contestant.run)
    seconds = statistics.median(calls)
    return {
        "seconds": seconds,
        **results.quantiles(calls),
        "GB/s": work.nbytes / seconds / 1e9,
        "TFLOP/s": work.flops / seconds / 1e12,
        "of copy": work.nbytes / seconds / limits["copy"],
        "of matmul": work.flops / seconds / limits["matmul"],
        "share wrong": share_wrong,
    }


def measure(row: Row, session: Session, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Verify and time a row, and the same as a CUDA graph if it waits for the host; what the report says of each."""
    facts: dict[str, Any] = {"operator": row.operator, "shape": row.shape, "who": row.who}
    contestant = None
    with Attempt() as attempt:
        session.require_time()
        shape = small(GPU[row.shape]) if session.small else GPU[row.shape]
        given = on_device.problem(shape, session.device, row.with_values)
        work = row.work(given)
        facts["sizes"] = given.shape._asdict()
        facts |= {"nbytes": work.nbytes, "flops": work.flops}
        contestant = work.kvb if row.who == KVB else peers.offers(work.suite)[row.who](work.given)
        facts |= _timed(contestant, work, session, limits)
    yield facts | _outcome(attempt, row.who)
    if contestant is None or row.who != KVB or attempt.error or not session.bound_by_host(facts["seconds"]):
        return
    with Attempt() as attempt:
        facts |= {"who": GRAPH, **_timed(graphed(contestant), work, session, limits)}
    yield facts | {"who": GRAPH} | _outcome(attempt, KVB)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} us"


def line(facts: dict[str, Any]) -> str:
    name = f"{facts['operator']}:{facts['shape']}"
    for outcome, word in (("absent", "absent: "), ("wrong", "WRONG: ")):
        if outcome in facts:
            return f"{name:<27} {facts['who']:<16} {word}{facts[outcome]}"
    computes = facts["TFLOP/s"] > 0
    return COLUMNS.format(
        name,
        facts["who"],
        facts["sizes"]["N"],
        _time(facts["seconds"]),
        f"{facts['GB/s']:.0f}",
        f"{facts['of copy']:.0%}",
        f"{facts['TFLOP/s']:.3g}" if computes else "",
        f"{facts['of matmul']:.0%}" if computes else "",
        f"{facts['share wrong']:.2%}",
    )


# --- the command ------------------------------------------------------------------------------------------------------


def run(session: Session, rows: Sequence[Row], out: Path) -> bool:
    """Measure rows; every line is printed, and on disk, as soon as it is known. Whether nothing of kvb was wrong."""
    journal, table = Journal(out / "gpu.jsonl"), out / "gpu.txt"
    table.write_text("")

    def say(text: str) -> None:
        print(text, flush=True)
        with table.open("a") as file:
            file.write(text + "\n")

    facts = machine.device_facts(session.device)
    about = {"device": session.device.type, "slug": machine.slug(session.device), "load": machine.load()}
    about |= {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads()}
    journal.write({"machine": facts, **about})
    for name, fact in facts.items():
        say(f"{name:<16} {fact}")
    right = True
    with torch.no_grad():
        limits = ceilings(session)
        journal.write({"ceilings": limits})
        say(f"ceilings: copy {limits['copy'] / 1e9:.4g} GB/s, bfloat16 matmul {limits['matmul'] / 1e12:.4g} TFLOP/s")
        say(HEAD)
        for number, row in enumerate(rows):
            for found in measure(row, session, limits):
                journal.write(found)
                say(line(found))
                right = right and "wrong" not in found
            if not right and device_is_lost(session.device):
                say(f"the device no longer works: {len(rows) - number - 1} rows are left")
                break
    return right


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA or HIP device, and torch finds none here")
    return torch.device(name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets gpu.jsonl and gpu.txt")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program itself")
    parser.add_argument("--small", "--quick", action="store_true", help="small problems, short times")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for everything (%(default)g)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help='operators ("search") or rows ("search:seed")')
    options = parser.parse_args(arguments)
    known = {row.name for row in ROWS} | {row.operator for row in ROWS}
    for name in options.only or ():
        if name not in known:
            parser.error(f"no row {name!r}; expected one of {', '.join(sorted(known))}")
    session = Session(_device(options.device), options.small, options.limit)
    chosen = [row for row in ROWS if not options.only or {row.name, row.operator} & set(options.only)]
    return 0 if run(session, chosen, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
