"""How cost grows: ``python -m benchmarks.scaling --json FILE``; N, K, C and D over three decades each.

The forward of a frozen module and of plain PyTorch, time and memory, with exponents fitted on the large end; the
smallest problem at which kvb is the faster of the two; the overhead of a call. ``benchmarks.report`` files the result.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, overhead, results
from benchmarks.shapes import Module
from benchmarks.suites import KVB
from benchmarks.suites.measuring import measure
from benchmarks.timing import Absent, Effort

BASE = Module(B=1024, C=16, K=1024, D=16, V=16, positions=())
AXES = {
    "N": (16, 64, 256, 1024, 4096, 16384),
    "K": (64, 256, 1024, 4096, 16384, 65536),
    "C": (1, 4, 16, 64, 256, 1024),
    "D": (2, 8, 32, 128, 512, 2048),
}
CUBES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)  # N = C = K = D = V
LARGE_END = 3  # points that a fit takes
PEER = "torch baddbmm"
FULL, QUICK = Effort(rounds=5, seconds=1.0, patience=5.0), Effort(rounds=1, seconds=0.0, patience=1.0)


def shape(axis: str, size: int) -> Module:
    """The base with one size changed; N is B here."""
    return BASE._replace(**{"B" if axis == "N" else axis: size})


def cube(size: int) -> Module:
    return Module(size, size, size, size, size, ())


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent of the power law through points, by least squares on logarithms; None for fewer than two."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def points(rows: Sequence[Mapping[str, Any]], axis: str, who: str, what: str) -> list[tuple[float, float]]:
    """(size, seconds or bytes) of a contestant along an axis."""
    found = []
    for row in rows:
        name, _, size = row["shape"].partition("=")
        times = row["contestants"].get(who)
        if name == axis and times and times[what] is not None:
            found.append((float(size), times[what]))
    return found


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Exponents by axis and contestant, of time and of memory."""
    return {
        axis: {
            who: {
                name: slope(points(rows, axis, who, what)[-LARGE_END:])
                for name, what in (("time", "median"), ("memory", "peak_bytes"))
            }
            for who in (KVB, PEER)
        }
        for axis in AXES
    }


def crossover(ratios: Mapping[int, float]) -> int | None:
    """The smallest cube from which on kvb is always the faster one."""
    found = None
    for size in sorted(ratios, reverse=True):
        if ratios[size] < 1:
            break
        found = size
    return found


def study(effort: Effort, axes: Mapping[str, Sequence[int]] = AXES, cubes: Sequence[int] = CUBES) -> dict[str, Any]:
    """Measure everything; the document."""
    load, rows = machine.load(), []

    def only(peer: str) -> bool:
        return peer == PEER

    for axis, sizes in axes.items():
        for size in sizes:
            at = shape(axis, size)
            try:
                rows.append(results.row(f"{axis}={size}", at, measure("forward", at, effort, only)))
            except Absent as absent:
                print(f"{axis}={size}: absent: {absent}", flush=True)
                continue
            times = {who: f"{found['median'] * 1e3:.4g} ms" for who, found in rows[-1]["contestants"].items()}
            print(f"{axis}={size}: {times}", flush=True)
    ratios = {}
    for size in cubes:
        race = measure("forward", cube(size), effort, only, limits=False).race
        ratios[size] = race.ratio(PEER, KVB).value
    print(f"plain PyTorch's time over kvb's at N = C = K = D = V: {ratios}", flush=True)
    calls = {}
    for name, with_gradient in (("forward", False), ("gradient", True)):
        race = overhead.measure(with_gradient, effort)
        seconds = {who: race.seconds(who) for who in (overhead.KVB, overhead.PEER)}
        calls[name] = {**seconds, "ratio": race.ratio(overhead.KVB, overhead.PEER).value}
    print(f"overhead of a call: {calls}", flush=True)
    return results.document(
        "scaling",
        rows,
        load,
        fits=fits(rows),
        crossover={"size": crossover(ratios), "ratios": {str(size): ratio for size, ratio in ratios.items()}},
        overhead=calls,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="gets the document")
    options = parser.parse_args(arguments)
    found = study(QUICK if options.quick else FULL)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
