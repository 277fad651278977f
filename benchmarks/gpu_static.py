"""How fast the search on an H100 should be, from its machine code: ``python -m benchmarks.gpu_static``, without a GPU.

Every shape goes through ``launch.nearest``, whose kernels are compiled for sm_90 and disassembled. Instructions and
matrix products are counted, once for every time they run, and divided by what the card does in a second. The same is
done for a plain kernel that reduces every score with ``tl.min`` and ``tl.argmin``, and for the loop of ``search``
without its certificate. Letters as in ``kvb/ops``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.shapes import GPU, Lookup
from benchmarks.timing import Contestant, Effort, race
from benchmarks.triton_static.kernels import TARGET, best_without_certificate, kernels_of_search, plain_kernels
from benchmarks.triton_static.offline import Compiled, compiling_for
from benchmarks.triton_static.predict import cost, floor
from kvb.kernels import launch

# Where the loop over keys is everything, for what it costs with and without its certificate.
LOOPS = {f"loop-d{D}": Lookup(65536, 1, 65536, D, D) for D in (8, 14, 32, 64)}
SHAPES = GPU | LOOPS


def bars(shape: Lookup, who: str = "kvb") -> dict[str, float]:
    """Upper bounds of figures, by name, of a search or of its loop alone; a shape that no bar is set for has none."""
    found = {}
    if who == "alone":
        return {"loop_alu": 1.5, "loop_all": 2.0 if shape.D <= 14 else 3.1 if shape.D <= 32 else 3.5}
    if shape.K > 256 and shape.D <= 64:
        found["loop_alu"] = 1.8
        found["loop_all"] = 2.5 if shape.D <= 14 else 3.6 if shape.D <= 32 else 4.1
        found["shuffles"] = 0
    if shape.K <= 256:
        found["padding"] = 1.15
        found["ratio"] = 1.7
    elif shape.C == 256:
        found["ratio"] = 2.5
    return found


def _verdict(figures: dict[str, float], limits: dict[str, float]) -> str:
    # A search without matrix products has no figures of their loop.
    known = {name: limit for name, limit in limits.items() if not math.isnan(figures[name])}
    above = [f"{name} {figures[name]:.3g} > {limit:g}" for name, limit in known.items() if figures[name] > limit]
    return "above: " + ", ".join(above) if above else "ok" if limits else ""


COLUMNS = "{:<22} {:<6} {:>11} {:>11} {:>5} {:>8} {:>8} {:>8} {:>9} {:>8} {:>6}  {}"
HEAD = COLUMNS.format(
    "shape", "", "loop", "alu/all", "pad", "memory", "matrix", "alu", "predicted", "floor", "ratio", "bars"
)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def report(name: str, who: str, kernels: Sequence[Compiled], packed: int, limits: dict[str, float]) -> dict[str, Any]:
    """Print a line; what the JSON report says of it."""
    shape = SHAPES[name]
    found, lowest = cost(kernels, shape, packed), floor(shape)
    figures = dataclasses.asdict(found) | {"ratio": found.seconds / max(lowest)}
    verdict = _verdict(figures, limits)
    print(
        COLUMNS.format(
            name,
            who,
            f"{found.loop_alu:.2f}/{found.loop_all:.2f}",
            f"{found.alu:.2f}/{found.all:.2f}",
            f"{found.padding:.2f}",
            _time(found.memory_seconds),
            _time(found.matrix_seconds),
            _time(found.alu_seconds),
            _time(found.seconds),
            _time(max(lowest)),
            f"{figures['ratio']:.2f}",
            verdict,
        ).rstrip(),
        flush=True,
    )
    seconds = {"floor_memory_seconds": lowest[0], "floor_matrix_seconds": lowest[1]}
    return {"shape": name, "who": who, **figures, **seconds, "bars": limits, "verdict": verdict}


def call_times(shape: Lookup) -> dict[str, float]:
    """Microseconds of Python in one call, everything but the launches themselves."""
    untouched = functools.partial(torch.empty, device="meta")
    queries, keys = untouched((shape.N, 1, shape.C, shape.D)), untouched((shape.C, shape.K, shape.D))
    packed = untouched((shape.C, launch.packed_nbytes(shape.K, shape.D, keys.dtype)), dtype=torch.uint8)
    indices, values = untouched((shape.N, 1, shape.C), dtype=torch.int64), untouched((shape.C, shape.K, shape.V))
    grad = untouched((shape.N, 1, shape.C, shape.V))
    calls = {
        "pack_keys": lambda: launch.pack_keys(keys),
        "nearest": lambda: launch.nearest(queries, keys, packed, None, 1),
        "lookup": lambda: launch.lookup(queries, keys, packed, values, None, "none"),
        "gather": lambda: launch.gather(values, indices, "none", "bscv"),
        "gather_backward": lambda: launch.gather_backward(grad, indices, shape.K, "none"),
    }
    contestants = {name: Contestant(call, lambda found: None) for name, call in calls.items()}
    with compiling_for(TARGET):
        found = race(contestants, Effort(rounds=5, seconds=0.0))
    return {name: 1e6 * found.seconds(name) for name in calls}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SHAPES, help=f"shapes: {', '.join(SHAPES)}")
    options = parser.parse_args(arguments)
    print(
        f"triton {triton.__version__}, {TARGET}: ALU and all instructions per pair of query and key, seconds of an H100"
    )
    print(HEAD)
    rows = []
    for name in options.only or SHAPES:
        shape = SHAPES[name]
        ours, packed = kernels_of_search(shape)
        rows.append(report(name, "kvb", ours, packed, bars(shape)))
        if name in LOOPS:
            rows.append(report(name, "alone", best_without_certificate(ours, shape), packed, bars(shape, "alone")))
        else:
            rows.append(report(name, "plain", *plain_kernels(shape), {}))
    calls = {name: call_times(SHAPES[name]) for name in options.only or ("few-queries", "paper-256", "seed")}
    for name, times in calls.items():
        print(f"{name}: Python per call, " + ", ".join(f"{call} {time:.0f} us" for call, time in times.items()))
    if options.json:
        facts = {"triton": triton.__version__, "target": TARGET, "rows": rows, "python_microseconds": calls}
        options.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
