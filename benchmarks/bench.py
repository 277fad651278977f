"""The command behind ``python -m kvb bench``: verify, measure, and show a table that grows line by line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, peers, results
from benchmarks.peers import need
from benchmarks.shapes import FEW, SHAPES
from benchmarks.suites import KVB, SUITES, shapes
from benchmarks.suites.measuring import measure
from benchmarks.timing import Absent, Effort, WrongResult


class Plan(NamedTuple):
    """What to measure, and for how long each."""

    suites: tuple[str, ...]
    shapes: tuple[str, ...]
    effort: Effort
    slow_peers: bool


QUICK = Plan(("search", "forward"), FEW, Effort(rounds=2, seconds=0.3, patience=1.0), False)
FULL = Plan(tuple(SUITES), tuple(SHAPES), Effort(rounds=3, seconds=1.0, patience=3.0), True)
COLUMNS = ("suite:shape", "kvb", "best peer", "time", "faster", "ceiling", "memory", "its", "others, times slower")
WIDTHS = (28, 9, 16, 9, 7, 7, 8, 8, 0)
BUSY = 0.5  # a load beyond which the machine is not ours alone
LEGEND = """\
kvb, time      median seconds per call; every result was verified first
faster         the best peer's time divided by kvb's
ceiling        kvb's share of the most this machine does: float32 multiply-adds, or bytes copied, in the same race
memory, its    peak memory of the first call beyond what was there before, kvb's and the best peer's"""


def seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def size(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def times(value: float) -> str:
    return f"{value:.3g}x" if value < 1000 else f"{value:.0f}x"


def wrong(row: dict[str, Any], peer: str) -> str:
    """What has to be said of a peer that chose other keys than the nearest."""
    share = row["contestants"][peer].get("share_wrong", 0.0)
    return f" ({share:.2%} wrong)" if share else ""


def cells(suite: str, row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    ours, ranked, share = row["contestants"][KVB], results.peers(row), results.share(row)
    best = ranked[0] if ranked else None
    theirs = row["contestants"][best] if best else None
    return (
        f"{suite}:{row['shape']}",
        seconds(ours["median"]),
        f"{best}{wrong(row, best)}" if best else "none here",
        seconds(theirs["median"]) if theirs else "",
        times(results.ratio(row, best)) if best else "",
        "" if share is None else f"{share:.0%}",
        size(ours["peak_bytes"]),
        size(theirs["peak_bytes"]) if theirs else "",
        ", ".join(f"{name} {times(results.ratio(row, name))}{wrong(row, name)}" for name in ranked[1:]),
    )


class Screen(NamedTuple):
    """Where the table grows: what takes its lines, and what takes the name of the line that is being measured."""

    show: Callable[[tuple[str, ...]], None]
    doing: Callable[[str], None]


@contextlib.contextmanager
def screen() -> Iterator[Screen]:
    """A live table where rich is installed and somebody watches, plain lines otherwise."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.live import Live
        from rich.table import Table

        table = Table(*COLUMNS, caption_justify="left")
        with Live(table, refresh_per_second=4):
            yield Screen(lambda line: table.add_row(*line), lambda name: setattr(table, "caption", name))
        return

    def show(line: tuple[str, ...]) -> None:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, WIDTHS, strict=True)).rstrip(), flush=True)

    show(COLUMNS)
    yield Screen(show, lambda name: None)


def list_peers() -> None:
    """Who kvb can be compared with here, and why not with the others."""
    found = peers.listed()
    width = max(map(len, found))
    for name, (role, why) in found.items():
        print(f"{name:<{width}}  {role}")
        if why:
            print(f"{'':<{width}}  absent: {why}")


def run(plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """The documents of all suites, and what was wrong; the table goes to the terminal."""
    made, wrong, absent, load = [], [], {}, machine.load()

    def takes_part(peer: str) -> bool:
        return plan.slow_peers or peers.known()[peer].quick

    with screen() as on_screen:
        for suite in plan.suites:
            rows = []
            for name, shape in shapes(suite).items():
                if name not in plan.shapes:
                    continue
                on_screen.doing(f"measuring {suite}:{name}")
                try:
                    row = results.row(name, shape, measure(suite, shape, plan.effort, takes_part))
                except Absent as why:
                    absent[f"{suite}:{name}"] = str(why)
                except WrongResult as why:
                    wrong.append(f"{suite}:{name}: {why}")
                else:
                    rows.append(row)
                    absent |= {f"{peer}, {suite}:{name}": why for peer, why in row["absent"].items()}
                    on_screen.show(cells(suite, row))
            if rows:
                made.append(results.document(suite, rows, load))
        on_screen.doing("")
    by_reason: dict[str, list[str]] = {}
    for who, why in absent.items():
        by_reason.setdefault(why, []).append(who)
    for why, those in by_reason.items():
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        print(f"not timed: {those[0]}{more}: {why}")
    for why in wrong:
        print(f"WRONG: {why}")
    return made, wrong


def main(full: bool, only_peers: bool, target: Path | None, plots: Path | None) -> int:
    """Run the command; the exit status is 1 when a result of kvb is wrong."""
    if only_peers:
        list_peers()
        return 0
    if plots:
        try:
            need.package("matplotlib", "matplotlib")
        except Absent as absent:
            sys.exit(f"--plot: {absent}")
    for name, fact in machine.facts().items():
        print(f"{name:<20} {fact}")
    if machine.load() > BUSY:
        print(f"{'note':<20} this machine is busy (load {machine.load():.1f}): come back when it is quiet")
    made, wrong = run(FULL if full else QUICK)
    print(LEGEND)
    for found in made:
        mean = results.mean_ratio(found["rows"])
        if found["suite"] == "search" and mean is not None:
            print(f"search, geometric mean over the best peers: {times(mean)} faster")
    if not full:
        print("more suites, shapes and peers: python -m kvb bench --full; who is missing: python -m kvb bench --peers")
    if target:
        target.write_text(json.dumps(made, indent=1) + "\n")
    if plots:
        from benchmarks import plots as drawing

        for file in drawing.draw(made, plots):
            print(f"wrote {file}")
    return 1 if wrong else 0
