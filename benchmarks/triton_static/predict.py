"""What a search costs on an H100, from its machine code: instructions, matrix products, bytes, and the time they take.

Instructions and matrix products are counted, once for every time they run, and divided by what the card does in a
second. Letters as in ``kvb/ops``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import triton

from benchmarks.shapes import Lookup
from benchmarks.triton_static import machine_code
from benchmarks.triton_static.kernels import round_up
from benchmarks.triton_static.offline import Compiled, Launch

# A second of an H100: lane operations of the ALU pipe, of all pipes together, matrix operations, bytes of memory.
ALU, ISSUE, MATRIX, MEMORY = 16.5e12, 33e12, 798e12, 3.0e12
UNROLLED = 2  # keys of a group that ``settle`` measures in one trip of its loop
# Of normal queries and keys, K=200, D=32: rows that ``resident`` leaves open, and most candidates of 32 such rows.
OPEN, CANDIDATES = 0.07, 5


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
        """Memory traffic overlaps with computing; matrix products and the rest follow each other."""
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
    """One search: instructions per pair of query and key, in the loop over keys and in all kernels; seconds."""

    kernels: tuple[str, ...]
    uncounted: tuple[str, ...]  # kernels that hardly ever do any work
    registers: int  # per thread of the kernel with the products
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
    depth = 32 if shape.D <= 10 else 3 * round_up(shape.D, 16)
    memory = shape.query_bytes + shape.key_bytes + 4 * shape.N * shape.C
    return memory / MEMORY, 2.0 * depth * shape.N * shape.C * shape.K / MATRIX
