"""How fast the search on an H100 should be, from its machine code: ``python -m benchmarks.gpu_static``, without a GPU.

Every shape goes through ``launch.nearest``, whose kernels are compiled for sm_90 and disassembled. Instructions and
matrix products are counted, once for every time they run, and divided by what the card does in a second. The same is
done for a plain kernel that reduces every score with ``tl.min`` and ``tl.argmin``, and for the loop of ``search``
without its certificate. Letters as in ``kvb/ops.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import machine_code
from benchmarks.offline import Compiled, Launch, compiling_for
from benchmarks.shapes import GPU, Lookup
from kvb.kernels import launch
from kvb.kernels.scores import ADDED, CONCAT, FAR
from kvb.kernels.search import best_of, group_minima

TARGET = "sm_90"
# A second of an H100: lane operations of the ALU pipe, of all pipes together, matrix operations, bytes of memory.
ALU, ISSUE, MATRIX, MEMORY = 16.5e12, 33e12, 798e12, 3.0e12
# Where the loop over keys is everything, for what it costs with and without its certificate.
LOOPS = {f"loop-d{D}": Lookup(65536, 1, 65536, D, D) for D in (8, 14, 32, 64)}
SHAPES = GPU | LOOPS
UNROLLED = 2  # keys of a group that ``settle`` measures in one trip of its loop
# Of normal queries and keys, K=200, D=32: rows that ``resident`` leaves open, and most candidates of 32 such rows.
OPEN, CANDIDATES = 0.07, 5


# --- the plain kernel -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def plain(
    queries, high, low, norms, indices, N, K, stride_n, stride_c,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The nearest of K keys, split into float16 parts [C, K, DP], by the least score of each tile."""
    c = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, DP)
    inside = (n[:, None] < N) & (d < D)[None, :]
    x = tl.load(queries + c * stride_c + n.to(tl.int64)[:, None] * stride_n + d[None, :], mask=inside, other=0.0)
    x_high = x.to(tl.float16)
    x_low = (x - x_high.to(tl.float32)).to(tl.float16)
    best = tl.full((BN,), float("inf"), tl.float32)
    chosen = tl.zeros((BN,), tl.int32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        at = c * K * DP + k[None, :] * DP + d[:, None]
        y_high, y_low = tl.load(high + at), tl.load(low + at)
        product = tl.dot(x_high, y_high, tl.dot(x_high, y_low, tl.dot(x_low, y_high)))
        scores = tl.load(norms + c * K + k)[None, :] - 2.0 * product
        least, place = tl.min(scores, 1), tl.argmin(scores, 1)
        closer = least < best
        best = tl.where(closer, least, best)
        chosen = tl.where(closer, first + place, chosen)
    tl.store(indices + c * N + n, chosen, mask=n < N)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _plain_kernels(shape: Lookup) -> tuple[list[Compiled], int]:
    """The plain kernel, and the bytes of its keys."""
    DP = max(16, triton.next_power_of_2(shape.D))
    K = _round_up(shape.K, 64)
    queries, parts = _untouched(shape.N, shape.C, shape.D), _untouched(shape.C, K, DP, dtype=torch.float16)
    with compiling_for(TARGET) as kernels:
        plain[(triton.cdiv(shape.N, 128), shape.C)](
            queries, parts, parts, _untouched(shape.C, K), _untouched(shape.C, shape.N, dtype=torch.int32), shape.N, K,
            *queries.stride()[:2], D=shape.D, DP=DP, BN=128, BK=64,
        )  # fmt: skip
    return kernels, 2 * parts.nbytes


# --- the loop of the search without its certificate -------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def best_alone(
    prepared_words, prepared_floats, floats, words, groups, rows, C, K,
    NBYTES: tl.constexpr, NORMS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, FORM: tl.constexpr,
    DP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, J: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``search`` without the second best minimum, so that no row can be sure."""
    G: tl.constexpr = BK // (J * L * E)
    book = (tl.program_id(0) % C).to(tl.int64)
    row, d = tl.program_id(0) // C * BN + tl.arange(0, BN), tl.arange(0, DP)
    line = book * rows + tl.minimum(row, rows - 1)
    t = tl.load(prepared_floats + 2 * line)
    left = prepared_words + line[:, None] * (DP if FORM == CONCAT else 2 * DP) + d[None, :]
    high = tl.load(left)
    if FORM != CONCAT:
        low = tl.load(left + DP)
    words += book * (NBYTES // 2) + HIGH
    lows = words + (LOW - HIGH)
    norms = floats + book * (NBYTES // 4) + NORMS
    inner_at = tl.arange(0, BK)[None, :] * DP + d[:, None]
    best = tl.full((BN, G, L), FAR, tl.float32)
    best_tile = tl.zeros((BN, G, L), tl.int32)
    for tile in tl.range(0, tl.cdiv(K, BK)):
        right = tl.load(words + tile * (BK * DP) + inner_at)
        if FORM == CONCAT:
            scores = tl.dot(high, right)
        else:
            scores = tl.dot(low, right)
            scores = tl.dot(high, tl.load(lows + tile * (BK * DP) + inner_at), scores)
            scores = tl.dot(high, right, scores)
        if FORM == ADDED:
            scores += t[:, None] * tl.load(norms + tile * BK + tl.arange(0, BK))[None, :]
        least = group_minima(scores, BN, G, J, L, E)
        best_tile = tl.where(least < best, tile, best_tile)
        best = tl.minimum(best, least)
    _, place, tile, _ = best_of(best, best_tile, best, BN, G * L)
    base = tile * BK + place // L * (J * L * E) + place % L * E
    tl.store(groups + row.to(tl.int64) * C + book, base, mask=row < rows)


def _best_alone(ours: Sequence[Compiled], shape: Lookup) -> list[Compiled]:
    """That kernel with the constants, and for the codebooks, that ``search`` was launched with.

    In one stage: what it takes to copy tiles ahead belongs to no filter.
    """
    like = next(kernel for kernel in ours if kernel.name == "search")
    names = ("NBYTES", "NORMS", "HIGH", "LOW", "FORM", "DP", "BN", "BK", "J", "L", "E")
    one, half = _untouched(1), _untouched(1, dtype=torch.float16)
    with compiling_for(TARGET) as kernels:
        best_alone[(triton.cdiv(shape.N, like.constants["BN"]) * shape.C,)](
            half, one, one, half, _untouched(1, dtype=torch.int32), shape.N, shape.C, shape.K,
            **{name: like.constants[name] for name in names},
            num_warps=like.num_warps, num_stages=1,
        )  # fmt: skip
    return kernels


# --- what a launch costs ----------------------------------------------------------------------------------------------


def _untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that takes no memory: nothing is ever written to it, as launches only compile."""
    return torch.empty(shape, dtype=dtype)


def _our_kernels(shape: Lookup) -> tuple[list[Compiled], int]:
    """The kernels of a search with packed keys, and the bytes of those keys."""

    queries, keys = _untouched(shape.N, 1, shape.C, shape.D), _untouched(shape.C, shape.K, shape.D)
    with compiling_for(TARGET) as kernels:
        packed = launch.pack_keys(keys)
        before = len(kernels)
        launch.nearest(queries, keys, packed, None, 1)
    return kernels[before:], packed.nbytes


def _nest(kernel: Compiled, launch: Launch) -> list[float] | None:
    """Trips of the loops of a kernel, outermost first, on average; nothing for kernels that hardly ever do work."""
    given = launch.arguments
    # Trips that the compiler knows; a loop of one trip is none to it.
    pieces = triton.cdiv(given.get("DP", given.get("D", 1)), given["BD"]) if "BD" in given else 1
    inner = [pieces] if pieces > 1 else []
    if kernel.name in ("plain", "best_alone"):
        return [triton.cdiv(given["K"], given["BK"])]
    if kernel.name in ("search", "scan"):
        return [triton.cdiv(given["K"], given["BK"]) / given["splits"], *inner]
    if kernel.name == "resident":
        return [triton.cdiv(given["rows"], given["BN"]) / given["workers"], *inner]
    if kernel.name == "refine":
        return [OPEN * given["capacity"] / (given["BR"] * launch.grid[1]), CANDIDATES, *inner]
    if kernel.name == "prepare":
        return inner
    if kernel.name == "settle":
        return [given["splits"], given["J"] * given["E"] / UNROLLED, *inner]
    return None


def _bytes(kernel: Compiled, launch: Launch, shape: Lookup, packed: int) -> float:
    """Memory that one launch has to move; float32 queries and distances, int64 indices."""
    given, name = launch.arguments, kernel.name
    rows = given.get("N", given.get("rows", given.get("count")))
    queries, results = 4 * shape.D, 12
    if name == "refine":  # what ``resident`` wrote of open rows and this reads; keys stay in the cache
        return OPEN * launch.grid[0] * given["capacity"] * (queries + results + 2 * (4 + 4 * given["L"]))
    parts = 2 * given.get("DP", 0) * (1 if given.get("FORM") == 0 else 2) + 8
    groups = 4 * given.get("splits", 1)
    of_a_query = {
        "plain": queries + results,
        "prepare": queries + parts,
        "search": parts + groups,
        "best_alone": parts + groups,
        "settle": queries + groups + results,
        "resident": queries + results,
        "scan": queries + results,
    }[name]
    keys = {"plain": shape.key_bytes, "scan": shape.key_bytes, "search": packed, "resident": packed}.get(name, 0)
    return keys + of_a_query * rows * shape.C


def _weights(code: machine_code.Code, nest: Sequence[float]) -> list[float]:
    """How often every instruction runs in one program: loops within one another have the trips of ``nest``.

    Loops one after the other count like the first: too much if anything.
    """
    depths = [sum(place in loop for loop in code.loops) for place in range(len(code.instructions))]
    return [math.prod(nest[:depth]) for depth in depths]


@dataclasses.dataclass
class Work:
    """What the launches of one kernel do in all: lane operations, matrix operations, bytes."""

    alu: float = 0.0
    all: float = 0.0
    flops: float = 0.0
    memory: float = 0.0

    @property
    def alu_seconds(self) -> float:
        return max(self.alu / ALU, self.all / ISSUE)

    @property
    def seconds(self) -> float:
        """Memory beside computing; matrix products and all else one after the other."""
        return max(self.memory / MEMORY, self.flops / MATRIX + self.alu_seconds)


def work(kernel: Compiled, code: machine_code.Code, shape: Lookup, packed: int) -> Work | None:
    """Of all launches of a kernel; nothing for one that hardly ever does any."""
    counts = [machine_code.count([instruction]) for instruction in code.instructions]
    done = Work()
    for started in kernel.launches:
        nest = _nest(kernel, started)
        if nest is None:
            return None
        programs = math.prod(started.grid)
        weights = _weights(code, nest)
        lanes = 32 * kernel.num_warps * programs
        done.alu += lanes * sum(weight * one.alu for weight, one in zip(weights, counts, strict=True))
        done.all += lanes * sum(weights)
        flops = sum(weight * one.flops for weight, one in zip(weights, counts, strict=True) if one.matrix)
        done.flops += flops * kernel.num_warps * programs
        done.memory += _bytes(kernel, started, shape, packed)
    return done


@dataclasses.dataclass(frozen=True)
class Cost:
    """One search: instructions a pair of query and key, in the loop over keys and in all kernels; seconds."""

    kernels: tuple[str, ...]
    uncounted: tuple[str, ...]  # kernels that hardly ever do any work
    registers: int  # of a thread of the kernel with the products
    spilled: int
    shuffles: int  # in its loop
    loop_alu: float
    loop_all: float
    alu: float
    all: float
    padding: float  # pairs multiplied, by useful pairs
    memory_seconds: float
    matrix_seconds: float
    alu_seconds: float
    seconds: float  # kernels one after the other


def _depth(kernel: Compiled) -> int:
    """Of all products of a pair: three of DP columns each, one, or all three in one."""
    return kernel.constants["DP"] * (1 if kernel.name == "resident" or kernel.constants.get("FORM") == 0 else 3)


def cost(kernels: Sequence[Compiled], shape: Lookup, packed: int) -> Cost:
    """Of the kernels of one call, whose keys take so many bytes when packed."""
    codes = {kernel: machine_code.read(kernel) for kernel in kernels}
    works = {kernel: done for kernel, code in codes.items() if (done := work(kernel, code, shape, packed)) is not None}
    useful = shape.N * shape.C * shape.K
    facts: dict[str, Any] = dict.fromkeys(("loop_alu", "loop_all", "padding"), math.nan)
    facts |= dict.fromkeys(("registers", "spilled", "shuffles"), 0)
    for kernel, done in works.items():
        if done.flops:
            code = codes[kernel]
            loop = code.search_loop()
            # One trip of the loop over keys, or over rows where the keys stay.
            nest = _nest(kernel, kernel.launches[0]) or []
            weights = _weights(code, [1.0, *nest[1:]])
            body = [(weights[place], code.instructions[place]) for place in code.search_body()]
            products = [weight * machine_code.count([one]).flops for weight, one in body]
            pairs = sum(products) / 32 / (2 * _depth(kernel))
            facts |= {
                "registers": code.registers,
                "spilled": code.spilled,
                "shuffles": loop.shuffles,
                "loop_alu": sum(weight * machine_code.count([one]).alu for weight, one in body) / pairs,
                "loop_all": sum(weight for weight, _ in body) / pairs,
                "padding": done.flops / (2 * _depth(kernel)) / useful,
            }
    return Cost(
        kernels=tuple(map(str, works)),
        uncounted=tuple(sorted({kernel.name for kernel in kernels if kernel not in works})),
        alu=sum(done.alu for done in works.values()) / useful,
        all=sum(done.all for done in works.values()) / useful,
        memory_seconds=sum(done.memory for done in works.values()) / MEMORY,
        matrix_seconds=sum(done.flops for done in works.values()) / MATRIX,
        alu_seconds=sum(done.alu_seconds for done in works.values()),
        seconds=sum(done.seconds for done in works.values()),
        **facts,
    )


def floor(shape: Lookup) -> tuple[float, float]:
    """Seconds of memory and of matrix products that no exact search can do without.

    Memory: queries and keys once, one 32-bit index each. Products: three of float16 with D padded to 16, or one of
    depth 32 that holds all three.
    """
    depth = 32 if shape.D <= 10 else 3 * _round_up(shape.D, 16)
    memory = shape.query_bytes + shape.key_bytes + 4 * shape.N * shape.C
    return memory / MEMORY, 2.0 * depth * shape.N * shape.C * shape.K / MATRIX


# --- the table --------------------------------------------------------------------------------------------------------


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
    found = {}
    with compiling_for(TARGET):
        for name, call in calls.items():
            seconds = timeit.repeat(call, number=50, repeat=5)
            found[name] = 1e6 * statistics.median(seconds[1:]) / 50
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SHAPES, help=f"shapes: {', '.join(SHAPES)}")
    options = parser.parse_args(arguments)
    print(
        f"triton {triton.__version__}, {TARGET}: ALU and all instructions a pair of query and key, seconds of an H100"
    )
    print(HEAD)
    rows = []
    for name in options.only or SHAPES:
        shape = SHAPES[name]
        ours, packed = _our_kernels(shape)
        rows.append(report(name, "kvb", ours, packed, bars(shape)))
        if name in LOOPS:
            rows.append(report(name, "alone", _best_alone(ours, shape), packed, bars(shape, "alone")))
        else:
            rows.append(report(name, "plain", *_plain_kernels(shape), {}))
    calls = {name: call_times(SHAPES[name]) for name in options.only or ("few-queries", "paper-256", "seed")}
    for name, times in calls.items():
        print(f"{name}: Python a call, " + ", ".join(f"{call} {time:.0f} us" for call, time in times.items()))
    if options.json:
        facts = {"triton": triton.__version__, "target": TARGET, "rows": rows, "python_microseconds": calls}
        options.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
