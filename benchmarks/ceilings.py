"""What the machine can do at most: float32 multiply-adds and memory copies."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import verify
from benchmarks.timing import Absent, Contestant, Effort, WrongResult, race

COPY_BYTES = 1 << 28  # of one tensor: the copy reads and writes as much
ITERATIONS = 1_000_000  # of the multiply-add loop in one call, some 10 ms

# As many independent accumulators as the registers hold, so that neither latency nor memory slows the loop down.
SOURCE = """
#if defined(__AVX512F__)
enum { BYTES = 64, ACCUMULATORS = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, ACCUMULATORS = 12 };
#elif defined(__aarch64__)
enum { BYTES = 16, ACCUMULATORS = 24 };
#else
enum { BYTES = 16, ACCUMULATORS = 12 };
#endif
typedef float Vector __attribute__((vector_size(BYTES)));

extern "C" double flops_per_iteration() { return 2.0 * ACCUMULATORS * (BYTES / sizeof(float)); }

extern "C" float multiply_add(long iterations) {
  Vector sum[ACCUMULATORS], factor = Vector{} + 0.9999f, term = Vector{} + 0.0001f;
  for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = Vector{} + float(i);
  for (long n = 0; n < iterations; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = sum[i] * factor + term;
  }
  for (int i = 1; i < ACCUMULATORS; ++i) sum[0] += sum[i];
  return sum[0][0];
}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    """The loop above, compiled for this machine. The folder can go once the library is loaded."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Absent("no C++ compiler (g++) to measure the multiply-add peak with")
    with tempfile.TemporaryDirectory(prefix="kvb-benchmarks-") as folder:
        source, target = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(SOURCE)
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *options, "-o", target, source], capture_output=True, text=True)
        if done.returncode:
            raise Absent(f"{compiler} cannot compile the multiply-add loop: {done.stderr.strip()[-300:]}")
        library = ctypes.CDLL(str(target))
    library.flops_per_iteration.restype = ctypes.c_double
    library.multiply_add.restype = ctypes.c_float
    library.multiply_add.argtypes = [ctypes.c_long]
    return library


def multiply_add(threads: int) -> tuple[Contestant, float]:
    """A register-only loop on ``threads`` threads, and how many floating-point operations one run of it performs."""
    library = _library()
    pool = ThreadPoolExecutor(threads)

    def run() -> list[float]:
        return list(pool.map(library.multiply_add, [ITERATIONS] * threads))

    def check(results: list[float]) -> None:
        if not all(map(math.isfinite, results)):
            raise WrongResult(f"the multiply-add loop returned {results}")

    return Contestant(run, check), threads * ITERATIONS * library.flops_per_iteration()


def copy(threads: int | None = None, new_memory: bool = False) -> tuple[Contestant, int]:
    """A copy of one large tensor, and the bytes it reads and writes; ``new_memory`` allocates the target each time."""
    source = torch.randn(COPY_BYTES // 4)
    target = torch.empty_like(source)
    run = source.clone if new_memory else functools.partial(target.copy_, source)
    before = None if threads is None else functools.partial(torch.set_num_threads, threads)
    return Contestant(run, lambda result: verify.equal(result, source, "copy"), before), 2 * COPY_BYTES


def _rates(ceiling: Callable[[int], tuple[Contestant, float]], threads: int, effort: Effort) -> list[float]:
    """Units per second on one thread and on ``threads``."""
    pairs = {str(n): ceiling(n) for n in (1, threads)}
    result = race({name: contestant for name, (contestant, _) in pairs.items()}, effort)
    return [amount / result.seconds(name) for name, (_, amount) in pairs.items()]


def measure(effort: Effort) -> tuple[dict[str, float], list[str]]:
    """The ceilings by name in GF/s and GB/s, on one thread and on all of torch's, and what could not be measured."""
    threads = torch.get_num_threads()
    found: dict[str, float] = {}
    absent: list[str] = []

    def add(name: str, ceiling: Callable[[int], tuple[Contestant, float]]) -> None:
        one, all_threads = _rates(ceiling, threads, effort)
        found[f"{name}, 1 thread"], found[f"{name}, {threads} threads"] = one / 1e9, all_threads / 1e9

    try:
        add("float32 multiply-add, GF/s", multiply_add)
    except Absent as error:
        absent.append(str(error))
    try:
        add("copy, read + write, GB/s", copy)
        add("copy into new memory, GB/s", functools.partial(copy, new_memory=True))
    finally:
        torch.set_num_threads(threads)
    return found, absent
