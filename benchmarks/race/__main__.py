"""The command line: ``python -m benchmarks.race --n 400 --out DIR``; exit status 1 where a result of kvb is wrong."""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import journal, machine, race, table
from benchmarks.race import draws, racing, summary
from benchmarks.timing import HOST, Absent, Clock, Effort, ProcessorClock, timed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=race.__doc__)
    parser.add_argument("--n", type=int, default=400, help="shapes (400: half an hour or so on two free cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the shapes; a smaller --n takes the first of them")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/race"),
        metavar="DIR",
        help="race.jsonl, which is gone on with, .txt and .svg",
    )
    parser.add_argument("--only", nargs="+", choices=draws.OPERATORS, default=[*draws.OPERATORS], metavar="OPERATOR")
    parser.add_argument("--again", nargs="+", type=int, default=[], metavar="INDEX", help="measure only these, print")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=table.THREADS)
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread, instead of wall time: for a busy machine"
    )
    return parser


def _begun(file: Path, about: dict[str, Any]) -> tuple[journal.Journal, list[dict[str, Any]]]:
    """The journal to go on with, and what it says already."""
    lines = list(journal.read(file))
    if lines and any(lines[0].get(name) != about[name] for name in ("seed", "threads", "clock")):
        sys.exit(f"{file} is of another race, {lines[0]}; choose another --out")
    # What follows the last whole line was cut off while it was written.
    found = journal.Journal(file)
    for line in lines or [about]:
        found.write(line)
    return found, lines[1:]


def _measured(draw: draws.Draw, effort: Effort, clock: Clock) -> dict[str, Any]:
    took, facts = timed(lambda: racing.race(draw, effort, clock))
    facts["took"] = took
    says = facts.get("wrong") or (f"{facts['ratio']:.2f} ({facts['best']})" if "ratio" in facts else "alone")
    print(f"{draw.index:>4} {draw}: {says}", flush=True)
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    threads = 1 if options.processor_time else options.threads
    torch.set_num_threads(threads)
    clock = ProcessorClock() if options.processor_time else HOST
    effort = racing.QUICK if options.quick else racing.FULL
    if options.again:
        found = [_measured(draws.draw(options.seed, index)[0], effort, clock) for index in options.again]
        print(summary.text(found, {}))
        return int(any("wrong" in line for line in found))
    about = {"seed": options.seed, "threads": threads, "clock": type(clock).__name__, "load": machine.load()}
    about["facts"] = machine.facts()
    target, lines = _begun(options.out / "race.jsonl", about)
    done = {line["index"] for line in lines}
    left_out: collections.Counter[str] = collections.Counter()
    for index in range(options.n):
        draw, without = draws.draw(options.seed, index)
        if draw.operator not in options.only:
            continue
        left_out += without
        if index not in done:
            lines.append(_measured(draw, effort, clock))
            target.write(lines[-1])
    lines = [line for line in lines if line["index"] < options.n and line["operator"] in options.only]
    said = summary.text(lines, left_out)
    print(said)
    (options.out / "race.txt").write_text(said + "\n")
    try:
        summary.draw(lines, options.out / "race.svg")
    except Absent as absent:
        print(absent)
    return int(any("wrong" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
