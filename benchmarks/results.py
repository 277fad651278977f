"""The JSON of results: one document per suite, machine and device, in ``benchmarks/results/<version>/``.

A document holds, and ``validate`` holds it to::

    schema    1
    suite     its name; "scaling" for the scaling study, "gpu" for ``benchmarks.gpu``
    device    "cpu" or "cuda"
    date      YYYY-MM-DD
    slug      the machine in the file's name
    threads   of PyTorch
    load      processes that computed in the minute before, on average
    facts     {name: text}: machine, versions, backends
    rows      [{shape, sizes: {letter: number}, amount, ceiling, contestants, absent}]
    fits, crossover, overhead    of the scaling study only

``amount`` is what the algorithm needs at least: operations, or bytes read and written. ``ceiling`` is null or
``{kind: "flops" | "bytes", rate}``, the most per second of this machine, measured in the same race. ``contestants`` are
``{name: {median, p5, p25, p75, p95, calls, peak_bytes}}``, kvb among them: seconds per call, and the memory of its
first call, result included, or null; ``share_wrong`` too for a peer that may err. ``absent`` is ``{peer: why}``.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import kvb
from benchmarks import machine
from benchmarks.shapes import Module
from benchmarks.suites import CEILING, KVB
from benchmarks.suites.measuring import Outcome

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "results"
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
HEAD = {
    "schema": int,
    "suite": str,
    "device": str,
    "date": str,
    "slug": str,
    "threads": int,
    "load": float,
    "facts": dict,
    "rows": list,
}
STUDY = {"fits": dict, "crossover": dict, "overhead": dict}
ROW = {"shape": str, "sizes": dict, "amount": float, "ceiling": (dict, type(None)), "contestants": dict, "absent": dict}
TIMES = {**dict.fromkeys(QUANTILES, float), "calls": int, "peak_bytes": (int, type(None))}


class BadResult(ValueError):
    """A document that is not what this file describes; the message says where."""


def quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def quantiles(ordered: list[float]) -> dict[str, float]:
    """What a document says of the seconds of calls, ascending."""
    return {name: quantile(ordered, share) for name, share in QUANTILES.items()} | {"calls": len(ordered)}


def row(name: str, shape: Module, found: Outcome) -> dict[str, Any]:
    """One shape of a suite."""
    sizes = {"B": shape.B, "S": shape.S, "C": shape.C, "K": shape.K, "D": shape.D, "V": shape.V}
    ceiling = None
    if found.ceiling_amount is not None:
        rate = found.ceiling_amount / found.race.seconds(CEILING)
        ceiling = {"kind": found.ceiling, "rate": rate}
    contestants = {}
    for who in (KVB, *found.peers):
        calls = sorted(call for turn in found.race.turns[who] for call in turn)
        contestants[who] = {**quantiles(calls), "peak_bytes": found.peak_bytes.get(who)}
    return {
        "shape": name,
        "sizes": sizes,
        "amount": float(found.amount),
        "ceiling": ceiling,
        "contestants": contestants,
        "absent": dict(found.absent),
    }


def from_gpu(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The document of what ``benchmarks.gpu`` found, line by line; its rows are named ``operator:shape``.

    The ceiling is the one that takes longer: bytes over the measured copy, or operations over the measured product.
    """
    machine_line, ceilings, *found = lines
    limits, rows = ceilings["ceilings"], {}
    for facts in found:
        name = f"{facts['operator']}:{facts['shape']}"
        if "sizes" in facts and name not in rows:
            memory, products = facts["nbytes"] / limits["copy"], facts["flops"] / limits["matmul"]
            kind, amount, rate = ("bytes", facts["nbytes"], limits["copy"])
            if products > memory:
                kind, amount, rate = ("flops", facts["flops"], limits["matmul"])
            sizes = {"B": facts["sizes"]["N"], "S": 1, **{letter: facts["sizes"][letter] for letter in "CKDV"}}
            rows[name] = {"shape": name, "sizes": sizes, "amount": float(amount), "contestants": {}, "absent": {}}
            rows[name]["ceiling"] = {"kind": kind, "rate": rate}
        if "seconds" in facts:
            times = {key: facts[key] for key in (*QUANTILES, "calls")}
            wrong = {} if facts["who"].startswith(KVB) else {"share_wrong": facts["share wrong"]}
            rows[name]["contestants"][facts["who"]] = {**times, "peak_bytes": None, **wrong}
        elif name in rows:
            rows[name]["absent"][facts["who"]] = facts.get("absent") or f"wrong, not timed: {facts['wrong']}"
    timed = [row for row in rows.values() if KVB in row["contestants"]]
    made = document("gpu", timed, machine_line["load"])
    names = ("device", "date", "slug", "threads")
    made |= {name: machine_line[name] for name in names} | {"facts": machine_line["machine"]}
    validate(made)
    return made


def document(suite: str, rows: Iterable[Mapping[str, Any]], load: float, **study: Any) -> dict[str, Any]:
    made = {
        "schema": SCHEMA,
        "suite": suite,
        "device": "cpu",
        "date": datetime.date.today().isoformat(),
        "slug": machine.slug(),
        "threads": torch.get_num_threads(),
        "load": float(load),
        "facts": machine.facts(),
        "rows": list(rows),
        **study,
    }
    validate(made)
    return made


def peers(row: Mapping[str, Any]) -> list[str]:
    """The peers of a row, the quickest first."""
    others = {name: times["median"] for name, times in row["contestants"].items() if not name.startswith(KVB)}
    return sorted(others, key=others.__getitem__)


def ratio(row: Mapping[str, Any], peer: str) -> float:
    """How many times faster than a peer kvb is."""
    return row["contestants"][peer]["median"] / row["contestants"][KVB]["median"]


def share(row: Mapping[str, Any]) -> float | None:
    """kvb's operations or bytes per second, as a share of the ceiling."""
    if row["ceiling"] is None:
        return None
    return row["amount"] / row["contestants"][KVB]["median"] / row["ceiling"]["rate"]


def mean_ratio(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The geometric mean of the ratios to each row's best peer; None where no row has one."""
    ratios = [ratio(row, peers(row)[0]) for row in rows if peers(row)]
    return statistics.geometric_mean(ratios) if ratios else None


# --- the schema -------------------------------------------------------------------------------------------------------


def _hold(where: str, found: Any, wanted: Mapping[str, Any]) -> None:
    """``found`` has exactly the wanted names, of the wanted types."""
    if not isinstance(found, dict):
        raise BadResult(f"{where}: expected an object, got {type(found).__name__}")
    missing, more = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or more:
        raise BadResult(f"{where}: missing {sorted(missing)}, unknown {sorted(more)}")
    for name, kind in wanted.items():
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise BadResult(f"{where}.{name}: got {type(value).__name__} {value!r:.50}")


def _numbers(where: str, found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise BadResult(f"{where}.{name}: expected a number >= 0, got {value!r:.50}")


def _texts(where: str, found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        if not isinstance(value, str):
            raise BadResult(f"{where}.{name}: expected a text, got {value!r:.50}")


def _validate_row(where: str, found: Any) -> None:
    _hold(where, found, ROW)
    _hold(f"{where}.sizes", found["sizes"], dict.fromkeys("BSCKDV", int))
    _numbers(f"{where}.sizes", found["sizes"])
    _texts(f"{where}.absent", found["absent"])
    if found["ceiling"] is not None:
        _hold(f"{where}.ceiling", found["ceiling"], {"kind": str, "rate": float})
        if found["ceiling"]["kind"] not in ("flops", "bytes"):
            raise BadResult(f"{where}.ceiling.kind: got {found['ceiling']['kind']!r}")
    if KVB not in found["contestants"]:
        raise BadResult(f"{where}.contestants: no {KVB!r}")
    for name, times in found["contestants"].items():
        here = f"{where}.contestants.{name}"
        _hold(here, times, TIMES | {key: float for key in ("share_wrong",) if key in times})
        ordered = [times[p] for p in QUANTILES]
        if times["calls"] < 1 or not all(value > 0 for value in ordered) or ordered != sorted(ordered):
            raise BadResult(f"{here}: quantiles of {times['calls']} calls out of order: {ordered}")


def validate(found: Any) -> None:
    """Raises ``BadResult`` where a document is not as described above."""
    study = isinstance(found, dict) and found.get("suite") == "scaling"
    _hold("document", found, HEAD | STUDY if study else HEAD)
    if found["schema"] != SCHEMA:
        raise BadResult(f"document.schema: expected {SCHEMA}, got {found['schema']}")
    _texts("document.facts", found["facts"])
    if not found["rows"]:
        raise BadResult("document.rows: empty")
    for number, one in enumerate(found["rows"]):
        _validate_row(f"document.rows[{number}]", one)


# --- files ------------------------------------------------------------------------------------------------------------


def path(found: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Where a document belongs: <version>/<suite>--<machine>--<device>.json."""
    return folder / found["facts"]["kvb"] / f"{found['suite']}--{found['slug']}--{found['device']}.json"


def write(found: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    validate(found)
    target = path(found, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    return target


def committed(version: str = kvb.__version__, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The documents of a version by suite and machine, ``suite--machine--device``, validated."""
    found = {}
    for file in sorted((folder / version).glob("*.json")):
        try:
            one = json.loads(file.read_text())
            validate(one)
        except ValueError as error:
            raise BadResult(f"{file}: {error}") from error
        if path(one, folder) != file:
            raise BadResult(f"{file}: belongs at {path(one, folder)}")
        found[file.stem] = one
    return found
