"""Kernels whose machine code is compared: those of a search, a plain one, and the filter without its certificate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from benchmarks.shapes import Lookup
from benchmarks.triton_static.offline import Compiled, compiling_for
from kvb.kernels import launch
from kvb.kernels.scores import ADDED, CONCAT, FAR
from kvb.kernels.search import best_of, group_minima

TARGET = "sm_90"


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that takes no memory: nothing is ever written to it, as launches only compile."""
    return torch.empty(shape, dtype=dtype)


def kernels_of_search(shape: Lookup) -> tuple[list[Compiled], int]:
    """The kernels of a search with packed keys, and the bytes of those keys."""
    queries, keys = untouched(shape.N, 1, shape.C, shape.D), untouched(shape.C, shape.K, shape.D)
    with compiling_for(TARGET) as kernels:
        packed = launch.pack_keys(keys)
        before = len(kernels)
        launch.nearest(queries, keys, packed, None, 1)
    return kernels[before:], packed.nbytes


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


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def plain_kernels(shape: Lookup) -> tuple[list[Compiled], int]:
    """The plain kernel, and the bytes of its keys."""
    DP = max(16, triton.next_power_of_2(shape.D))
    K = round_up(shape.K, 64)
    queries, parts = untouched(shape.N, shape.C, shape.D), untouched(shape.C, K, DP, dtype=torch.float16)
    with compiling_for(TARGET) as kernels:
        plain[(triton.cdiv(shape.N, 128), shape.C)](
            queries, parts, parts, untouched(shape.C, K), untouched(shape.C, shape.N, dtype=torch.int32), shape.N, K,
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


def best_without_certificate(ours: Sequence[Compiled], shape: Lookup) -> list[Compiled]:
    """That kernel with the constants, and for the codebooks, that ``search`` was launched with.

    In one stage: what it takes to copy tiles ahead belongs to no filter.
    """
    like = next(kernel for kernel in ours if kernel.name == "search")
    names = ("NBYTES", "NORMS", "HIGH", "LOW", "FORM", "DP", "BN", "BK", "J", "L", "E")
    one, half = untouched(1), untouched(1, dtype=torch.float16)
    with compiling_for(TARGET) as kernels:
        best_alone[(triton.cdiv(shape.N, like.constants["BN"]) * shape.C,)](
            half, one, one, half, untouched(1, dtype=torch.int32), shape.N, shape.C, shape.K,
            **{name: like.constants[name] for name in names},
            num_warps=like.num_warps, num_stages=1,
        )  # fmt: skip
    return kernels
