"""The CPU backend against its peers and the machine: ``python -m benchmarks.cpu``, from the repository root.

Every ratio comes from one race (``benchmarks.timing``) of verified contestants, on two threads. The exit status is 1
when a result is wrong, and 0 otherwise, whatever the ratios; what is missing here is listed as absent.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kvb
from benchmarks import ceilings, memory, table, verify
from benchmarks.peers import faiss
from benchmarks.peers import without_extension as slow_peer
from benchmarks.shapes import KMEANS, KMEANS_SCALED, PAPER, SEARCH, SEED_B, Module, Search
from benchmarks.suites.measuring import measure
from benchmarks.suites.search import frozen_searcher
from benchmarks.table import THREADS, Measured, Row, against, against_best, effort
from benchmarks.timing import Absent, Contestant, Ratio, WrongResult, kept_memory, race, timed
from kvb import functional, ops
from kvb.modules import key_learning
from kvb.modules.seeding import spread_out

# --- search -----------------------------------------------------------------------------------------------------------


def _problem(shape: Search) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(shape.N, 1, shape.C, shape.D, generator=generator)
    return queries, torch.randn(shape.C, shape.K, shape.D, generator=generator)


def _searcher(queries: Tensor, keys: Tensor, threads: int | None = None) -> Contestant:
    """``nearest`` with packed keys; ``threads`` is set before each turn."""
    packed = functional.pack_keys(keys)
    before = None if threads is None else functools.partial(torch.set_num_threads, threads)

    def run() -> tuple[Tensor, Tensor]:
        return functional.nearest(queries, keys, packed=packed)

    return Contestant(run, lambda result: verify.nearest(queries, keys, *result), before)


def nearest(shape: Search, quick: bool) -> Measured:
    """The search against one faiss index per codebook."""
    whole = Module(shape.N, shape.C, shape.K, shape.D, V=1, positions=())
    return against_best(measure("search", whole, effort(quick), lambda peer: peer == "faiss", limits=False))


def peak(shape: Search, quick: bool) -> Measured:
    """Useful operations per second of the search against the multiply-add loop."""
    loop, flops = ceilings.multiply_add(torch.get_num_threads())
    result = race({"kvb": _searcher(*_problem(shape)), "peak": loop}, effort(quick))
    return Measured(
        shape.flops / result.seconds("kvb"),
        flops / result.seconds("peak"),
        "GF/s",
        "float32 multiply-add peak",
        result.ratio("peak", "kvb", shape.flops / flops),
    )


def elsewhere(name: str, capability: str, quick: bool) -> Measured:
    """Another row, in a process restricted to a set of instructions."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "benchmarks.cpu", "--only", name, "--json", str(report)]
        done = subprocess.run(
            command + ["--quick"] * quick,
            cwd=memory.ROOT,
            env=os.environ | {"KVB_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
        )
        if "this machine lacks the instructions" in done.stderr:
            raise Absent(f"the CPU has no {capability}")
        if done.returncode:
            raise WrongResult(f"with {capability}: {(done.stdout + done.stderr).strip()[-300:]}")
        (row,) = json.loads(report.read_text())["rows"]
    if "absent" in row:
        raise Absent(row["absent"])
    return Measured(row["kvb"], row["peer"], row["unit"], row["peer_name"], Ratio(**row["ratio"]))


def threads(shape: Search, quick: bool) -> Measured:
    """The search on one thread against two."""
    queries, keys = _problem(shape)
    find = frozen_searcher(queries, keys)

    def check(found: Tensor) -> None:
        verify.sampled_choice(queries, keys, found)

    contestants = {str(n): Contestant(find, check, functools.partial(torch.set_num_threads, n)) for n in (1, THREADS)}
    try:
        result = race(contestants, effort(quick))
    finally:
        torch.set_num_threads(THREADS)
    one, two = contestants
    return against(result, two, one, "one thread")


def topk(shape: Search, count: int, quick: bool) -> Measured:
    """The ``count`` nearest keys of every query against the nearest one, on one thread."""
    queries, keys = _problem(shape)
    packed = functional.pack_keys(keys)
    alone = functools.partial(torch.set_num_threads, 1)

    def run() -> tuple[Tensor, Tensor]:
        return functional.nearest(queries, keys, packed=packed, topk=count)

    def check(result: tuple[Tensor, Tensor]) -> None:
        verify.several_nearest(queries, keys, *result)

    try:
        result = race({"several": Contestant(run, check, alone), "one": _searcher(queries, keys, 1)}, effort(quick))
    finally:
        torch.set_num_threads(THREADS)
    return Measured(result.seconds("several"), result.seconds("one"), "s", "topk=1", result.ratio("several", "one"))


def large_k(quick: bool) -> Measured:
    """K = 65536 against K = 4096: 16 times the work, in how many times the time."""
    N = 4096 if quick else SEARCH["k65536-d16"].N
    large, small = (_searcher(*_problem(SEARCH[name]._replace(N=N))) for name in ("k65536-d16", "k4096-d16"))
    result = race({"large": large, "small": small}, effort(quick))
    return Measured(
        result.seconds("large"), result.seconds("small"), "s", "K=4096 of kvb", result.ratio("large", "small")
    )


# --- the whole module -------------------------------------------------------------------------------------------------


def forward(shape: Module, quick: bool) -> Measured:
    """A frozen module's forward against the lookup in plain PyTorch, in the best of three chunk sizes."""
    fewer = shape._replace(B=shape.B // 4) if quick and shape.S > 1 else shape
    return against_best(measure("forward", fewer, effort(quick), lambda peer: peer == "torch baddbmm", limits=False))


def peak_memory(quick: bool) -> Measured:
    """Memory of the paper's step beyond keys, packed keys and outputs, as a share of the 32 MB allowed."""
    extra, allowed = memory.extra_bytes(THREADS), 32e6
    return Measured(extra, allowed, "B", "allowed", Ratio(*[extra / allowed] * 3))


def checkpoint_memory(action: str, quick: bool) -> Measured:
    """Memory of saving or loading the paper's module beyond it, as a part of its state."""
    with torch.device("meta"):
        state = kvb.KeyValueBottleneck(PAPER.C, PAPER.K, PAPER.D, PAPER.V).state_dict()
    extra, size = memory.extra_bytes(THREADS, action), sum(value.nbytes for value in state.values())
    return Measured(extra, size, "B", "state", Ratio(*[extra / size] * 3))


def packed_size(quick: bool) -> Measured:
    keys = torch.randn(PAPER.C, PAPER.K, PAPER.D)
    packed = functional.pack_keys(keys)
    ratio = packed.nbytes / keys.nbytes
    return Measured(packed.nbytes, keys.nbytes, "B", "keys", Ratio(*[ratio] * 3))


# --- values and statistics --------------------------------------------------------------------------------------------


def _bandwidth(ours: Contestant, nbytes: int, quick: bool, new_memory: bool = False) -> Measured:
    peer, copied = ceilings.copy(new_memory=new_memory)
    result = race({"kvb": ours, "copy": peer}, effort(quick))
    return Measured(
        nbytes / result.seconds("kvb"),
        copied / result.seconds("copy"),
        "GB/s",
        "copy into new memory" if new_memory else "copy",
        result.ratio("copy", "kvb", nbytes / copied),
    )


def _codes(shape: Module) -> Tensor:
    return torch.randint(shape.K, (shape.B, shape.S, shape.C), generator=torch.Generator().manual_seed(0))


def _seen_from(layout: Tensor) -> Tensor:
    """[B, C, S, *] as the operators take it."""
    return layout.transpose(1, 2)


def gather(quick: bool, new_memory: bool = False) -> Measured:
    """Bytes written per second. The result is large: in memory new to the process, page faults outweigh everything."""
    shape = SEED_B
    values, codes = torch.randn(shape.C, shape.K, shape.V), _codes(shape)
    ours = Contestant(
        lambda: functional.gather(values, codes, layout="bcsv"),
        lambda out: verify.fetched(values, codes, out, "none", "bcsv"),
    )
    nbytes = codes.numel() * shape.V * 4
    if new_memory:
        return _bandwidth(ours, nbytes, quick, new_memory)
    with kept_memory():
        return _bandwidth(ours, nbytes, quick)


def gather_backward(quick: bool) -> Measured:
    """Bytes of gradient read per second."""
    shape = SEED_B
    codes, grad = _codes(shape), _seen_from(torch.randn(shape.B, shape.C, shape.S, shape.V))
    ours = Contestant(
        lambda: torch.ops.kvb.gather_backward(grad, codes, shape.K, "none"),
        lambda found: verify.sums(grad, codes, found),
    )
    return _bandwidth(ours, grad.nbytes, quick)


def accumulate(quick: bool) -> Measured:
    """Bytes of queries read per second."""
    shape = SEED_B
    codes, queries = _codes(shape), _seen_from(torch.randn(shape.B, shape.C, shape.S, shape.D))
    ours = Contestant(
        lambda: torch.ops.kvb.accumulate(queries, codes, shape.K),
        lambda found: verify.sums(queries, codes, found[1], found[0]),
    )
    return _bandwidth(ours, queries.nbytes, quick)


def gather_mean(quick: bool) -> Measured:
    """Mean over codebooks at the paper's step, with indices that the caches have not seen lately."""
    shape = PAPER
    values = torch.randn(shape.C, shape.K, shape.V)
    table, first = values.view(-1, shape.V), torch.arange(shape.C) * shape.K
    sets = [torch.randint(shape.K, (shape.B, 1, shape.C)) for _ in range(64)]
    turns = itertools.cycle(sets), itertools.cycle([(codes[:, 0] + first).contiguous() for codes in sets])

    def ours(codes: Tensor | None = None) -> Tensor:
        return functional.gather(values, next(turns[0]) if codes is None else codes, pool="mean")

    def theirs() -> Tensor:
        return F.embedding_bag(next(turns[1]), table, mode="mean")

    # The first run of each takes the first set.
    contestants = {
        "kvb": Contestant(ours, lambda out: verify.fetched(values, sets[0], out, "mean", "bscv")),
        "peer": Contestant(theirs, lambda out: verify.fetched(values, sets[0], out[:, None], "mean", "bscv")),
    }
    result = race(contestants, effort(quick))
    return against(result, "kvb", "peer", "F.embedding_bag(mean)")


def kmeans(quick: bool) -> Measured:
    """One iteration from random rows: pack, search, accumulate, divide. Scaled down where it would take minutes."""
    shape = KMEANS_SCALED if quick or ops.backend("cpu") == "torch" else KMEANS
    queries = torch.randn(shape.N, 1, shape.C, shape.D)
    keys = queries[torch.randperm(shape.N)[: shape.K], 0].transpose(0, 1).contiguous()

    def iterate() -> tuple[Tensor, Tensor, Tensor]:
        codes, _ = functional.nearest(queries, keys, packed=functional.pack_keys(keys))
        hits, sums = torch.ops.kvb.accumulate(queries, codes, shape.K)
        return codes, hits, torch.where((hits > 0)[..., None], sums / hits.clamp(min=1)[..., None], keys)

    means = torch.empty(0)

    def check(result: tuple[Tensor, Tensor, Tensor]) -> None:
        nonlocal means
        codes, hits, means = result
        verify.sampled_choice(queries, keys, codes)
        verify.equal(hits.sum(-1), torch.full((shape.C,), shape.N), "hits")
        for c in range(0, shape.C, max(1, shape.C // 4)):
            exact = torch.zeros(shape.K, shape.D, dtype=torch.float64)
            exact.index_add_(0, codes[:, 0, c], queries[:, 0, c].double())
            torch.testing.assert_close(means[c].double() * hits[c, :, None], exact, rtol=1e-4, atol=1e-4)

    def check_peer(found: Tensor) -> None:
        # A query between two keys may go either way, and moves both.
        moved = ((found - means).abs() > 1e-4).any(-1).double().mean()
        if moved > 1e-3:
            raise WrongResult(f"{moved:.2%} of faiss' means differ from kvb's")

    theirs = Contestant(faiss.faiss_kmeans(queries, keys), check_peer)
    result = race({"kvb": Contestant(iterate, check), "faiss": theirs}, effort(quick))
    return against(result, "kvb", "faiss", f"faiss Kmeans, {shape.N} x {shape.C} x {shape.D}")


def seeding(quick: bool) -> Measured:
    """Seeds by k-means++ for all codebooks of the paper, of 8*K rows each, as a share of the three minutes allowed."""
    C, K, D = 8 if quick else PAPER.C, PAPER.K, PAPER.D
    rows = torch.randn(C, key_learning.SEEDS_PER_KEY * K, D)
    filled, allowed = torch.ones(rows.shape[:2], dtype=torch.bool), 180 * C / PAPER.C
    taken, (seeds, found) = timed(lambda: spread_out(rows, filled, K, None))
    verify.equal(found, torch.ones_like(found), "seeds")
    _, gaps = functional.nearest(seeds[:1].transpose(0, 1)[:, None], rows[:1])
    verify.equal(gaps, torch.zeros_like(gaps), "distances of seeds from rows")
    if len(seeds[0].unique(dim=0)) != K:
        raise WrongResult("seeds repeat others")
    return Measured(taken, allowed, "s", "allowed", Ratio(*[taken / allowed] * 3))


# --- the table --------------------------------------------------------------------------------------------------------


def without_extension(shape: Module, quick: bool) -> Measured:
    """A frozen module's forward against the same in plain PyTorch, as an installation without a compiler has it."""
    peer = functools.partial(str.__eq__, slow_peer.NAME)
    return against_best(measure("forward", shape, effort(quick), peer, limits=False))


NEAREST = {
    "seed-b": (1.5, 2.5),
    "k1024-d32": (1.7, 2.2),
    "k4096-d8": (1.5, 2.2),
    "k4096-d16": (2.0, 2.5),
    "k1024-d64": (5, 10),
    "k1024-d128": (1.7, 2.2),
    "paper": (1.7, 2.5),
    "one-sample": (1.5, 3),
}
PEAKS = ("k4096-d16", "k1024-d64")
TOPK = {4: 2.5, 8: 3.5, 32: 8.0}
MANY_OF = ("topk-d14", "topk-d64")
ON_THREADS = ("k4096-d16", "paper", "one-codebook", "one-sample")

ROWS = (
    *(Row(f"nearest:{n}", functools.partial(nearest, SEARCH[n]), *bars) for n, bars in NEAREST.items()),
    *(Row(f"peak:{n}", functools.partial(peak, SEARCH[n]), 1.3, 1.6) for n in PEAKS),
    *(Row(f"peak-vnni:{n}", functools.partial(elsewhere, f"peak:{n}", "avx512_vnni"), 0.85) for n in PEAKS),
    *(Row(f"peak-float:{n}", functools.partial(elsewhere, f"peak:{n}", "avx512")) for n in PEAKS),
    *(Row(f"threads:{n}", functools.partial(threads, SEARCH[n]), 1.85) for n in ON_THREADS),
    *(
        Row(f"topk:{count}-{n.partition('-')[2]}", functools.partial(topk, SEARCH[n], count), bar, at_most=True)
        for n, (count, bar) in itertools.product(MANY_OF, TOPK.items())
    ),
    Row("forward:paper", functools.partial(forward, PAPER), 7, 9),
    Row("forward:seed-b", functools.partial(forward, SEED_B), 2.5, 4),
    Row("without-extension:paper", functools.partial(without_extension, PAPER)),
    Row("memory:paper", peak_memory, 1.0, at_most=True),
    Row("memory-of-save:paper", functools.partial(checkpoint_memory, "save"), 0.1, at_most=True),
    Row("memory-of-load:paper", functools.partial(checkpoint_memory, "load"), 1.2, at_most=True),
    Row("packed:paper", packed_size, 1.6, at_most=True),
    Row("gather:seed-b", gather, 0.6),
    Row("gather-new:seed-b", functools.partial(gather, new_memory=True)),
    Row("gather-backward:seed-b", gather_backward, 0.6),
    Row("accumulate:seed-b", accumulate, 0.6),
    Row("gather-mean:paper", gather_mean, 1.0, 1.5),
    Row("kmeans:paper", kmeans, 1.5),
    Row("seeding:paper", seeding, 1.0, at_most=True),
    Row("large-k", large_k, 16.5, at_most=True),
    Row("nearest:smoke", functools.partial(nearest, SEARCH["smoke"]), hidden=True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return table.run(ROWS, "benchmarks.cpu", __doc__, arguments, with_ceilings=True)


if __name__ == "__main__":
    sys.exit(main())
