"""Tables of rows that kvb is held to: what a row is, and the command line that measures them one by one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, machine
from benchmarks.suites.case import KVB
from benchmarks.suites.measuring import Outcome
from benchmarks.timing import Absent, Effort, Race, Ratio, WrongResult

THREADS = 2
FULL, QUICK = Effort(rounds=7, seconds=5.0), Effort(rounds=3, seconds=0.6)
SCALES = {"s": (1e3, "ms"), "GF/s": (1e-9, "GF/s"), "GB/s": (1e-9, "GB/s"), "B": (1e-6, "MB"), "shapes": (1, "shapes")}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row's numbers: kvb's figure, its peer's in the same unit, and the ratio that the bar is about."""

    kvb: float
    peer: float
    unit: str
    peer_name: str
    ratio: Ratio


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ``must`` and ``aim`` are lower bounds of the ratio, or upper ones with ``at_most``."""

    name: str
    measure: Callable[[bool], Measured]  # takes ``quick``
    must: float | None = None
    aim: float | None = None
    at_most: bool = False
    hidden: bool = False  # measured only if asked for by name

    def verdict(self, ratio: float) -> str:
        if self.must is None:
            return ""
        if self.at_most:
            return "ok" if ratio <= self.must else "above must"
        return "ok" if ratio >= self.must else "below must"


def effort(quick: bool) -> Effort:
    return QUICK if quick else FULL


def against(race: Race, ours: str, peer: str, peer_name: str) -> Measured:
    """How many times faster ``ours`` is than ``peer``."""
    return Measured(race.seconds(ours), race.seconds(peer), "s", peer_name, race.ratio(peer, ours))


def against_best(found: Outcome) -> Measured:
    """kvb against the quickest peer of a suite.

    Raises:
        Absent: no peer took part.
    """
    if not found.peers:
        raise Absent("; ".join(found.absent.values()) or "no such peer")
    best = found.peers[0]
    return against(found.race, KVB, best, best)


# --- the table --------------------------------------------------------------------------------------------------------


def _figure(value: float, unit: str) -> str:
    scale, name = SCALES[unit]
    return f"{value * scale:.4g} {name}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


COLUMNS = "{:<23} {:>11} {:>11} {:>7} {:>15} {:>6} {:>5}  {:<11} {}"
HEAD = COLUMNS.format("row", "kvb", "peer", "ratio", "quartiles", "must", "aim", "", "peer")


def _line(row: Row, m: Measured) -> str:
    return COLUMNS.format(
        row.name,
        _figure(m.kvb, m.unit),
        _figure(m.peer, m.unit),
        _number(m.ratio.value),
        f"{m.ratio.low:.3g} to {m.ratio.high:.3g}",
        ("<= " if row.at_most else "") + _number(row.must),
        _number(row.aim),
        row.verdict(m.ratio.value),
        m.peer_name,
    ).rstrip()


def _measure(row: Row, quick: bool) -> dict[str, Any]:
    """Measure a row and print its line; what the JSON report says of it."""
    try:
        measured = row.measure(quick)
    except Absent as absent:
        print(f"{row.name:<23} absent: {absent}", flush=True)
        return {"name": row.name, "absent": str(absent)}
    except WrongResult as wrong:
        print(f"{row.name:<23} WRONG: {wrong}", flush=True)
        return {"name": row.name, "wrong": str(wrong)}
    print(_line(row, measured), flush=True)
    bars = {"must": row.must, "aim": row.aim, "at_most": row.at_most, "verdict": row.verdict(measured.ratio.value)}
    return {"name": row.name, **dataclasses.asdict(measured), **bars}


def _chosen(rows: Sequence[Row], only: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[Row]:
    if only is None:
        return [row for row in rows if not row.hidden]
    for name in only:
        if not any(name in (row.name, row.name.partition(":")[0]) for row in rows):
            parser.error(f"no row {name!r}; expected one of {', '.join(row.name for row in rows)}")
    return [row for row in rows if row.name in only or (row.name.partition(":")[0] in only and not row.hidden)]


def run(
    table: Sequence[Row],
    module: str,
    about: str,
    arguments: Sequence[str] | None,
    *,
    with_ceilings: bool = False,
    held: bool = False,
) -> int:
    """The command line of a table of rows; the exit status: 1 where a result is wrong, or, ``held``, misses its bar."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller problems: a minute or so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    one = table[0].name
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f'rows ("{one}") or groups of them ("{one.partition(":")[0]}")'
    )
    options = parser.parse_args(arguments)
    chosen = _chosen(table, options.only, parser)
    torch.set_num_threads(THREADS)
    facts = machine.facts()
    for name, fact in facts.items():
        print(f"{name:<20} {fact}")
    limits: dict[str, float] = {}
    if options.only is None and with_ceilings:
        limits, absent = ceilings.measure(effort(options.quick))
        for name, limit in limits.items():
            print(f"{name}: {limit:.4g}")
        for reason in absent:
            print(f"absent: {reason}")
    print(HEAD, flush=True)
    rows = [_measure(row, options.quick) for row in chosen]
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "ceilings": limits, "rows": rows}, indent=1) + "\n")
    short = [row["name"] for row in rows if held and row.get("verdict") not in (None, "", "ok")]
    if short:
        print(f"below their bars: {', '.join(short)}")
    return 1 if short or any("wrong" in row for row in rows) else 0
