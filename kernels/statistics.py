"""Sums of queries that are rounded once, and the same in any order: the kernels of ``accumulate``.

Multiples of one power of two have an exact sum in float64 as long as it takes 53 bits, whatever the order in which
atomics add them. ``table_rows`` in scatter.py finds the peak of each sum, which is the largest of its numbers, and how
many they are. From these ``add_queries`` takes two powers of two: it cuts each number to a multiple of the first, and
what is left to a multiple of the second, and sums the two kinds apart. What is left then is below 2^-100 of the peak
times the square of the count, and dropped. Few numbers of float32 leave anything after the first cut.

Source: Demmel and Nguyen, Fast reproducible floating-point summation, ARITH 2013.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel
from kvb.kernels.scatter import load_rows, source_offsets
from kvb.kernels.scores import ONE, SIGNIFICAND, two_to
from kvb.kernels.values import store_sums


@triton.jit
def _power(peak):
    """The power of two, as the field of a float64, that brings numbers up to ``peak`` below 4."""
    if peak.dtype == tl.int32:
        peak = peak.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    return tl.minimum(tl.maximum(peak >> SIGNIFICAND, 1), 2 * ONE - 1)  # such that its inverse is normal, too


@triton.jit
def _cut(x, field):
    """x to the nearest multiple of 2^-52 times ``field``'s power of two, which is twice x or more; and the rest."""
    much = 1.5 * two_to(field)
    upper = (x + much) - much
    return upper, x - upper


@kernel("kvb_statistics_add", do_not_specialize=["count", "S", "x_b", "x_s", "x_c", "x_v"])
def add_queries(
    x,  # [B, S, C, V] with the strides x_b, x_s, x_c, x_v
    rows,  # [B * S * C] of the table; C * K where skipped
    hits,  # [C, K] int64
    peaks,  # [C, K, V] the bits of the largest magnitude of every sum
    parts,  # [2, C, K, V] float64, zero: sums of upper and of lower parts, both divided by the power of the peak
    count,  # B * S * C
    S,
    x_b,
    x_s,
    x_c,
    x_v,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add BLOCK_R queries, in the order of [B, S, C], to both tables of exact sums."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.load(rows + r, mask=r < count, other=C * K).to(tl.int64)
    usable = row < C * K
    inside = usable[:, None] & (v < V)[None, :]
    at = (row * V)[:, None] + v[None, :]
    power = _power(tl.load(peaks + at, mask=inside, other=0))
    query = load_rows(x, source_offsets(r // C, r % C, S, x_b, x_s, x_c, ALIGN), usable, v, x_v, V, UNIT).to(tl.float64)
    query *= two_to(-power + 2 * ONE)  # below 4
    hit = tl.load(hits + row, mask=usable, other=1).to(tl.float64).to(tl.int64, bitcast=True) >> SIGNIFICAND
    # With n hits below 2^b, the upper parts sum up to 2^(b+2), in multiples of 2^(b-49).
    first = hit + 4  # the field of 2^(b+3)
    upper, rest = _cut(query, first[:, None])
    # The rest is at most 2^(b-50): the lower parts sum up to 2^(2b-50), in multiples of 2^(2b-101).
    lower, _ = _cut(rest, (first + (hit - ONE) - 51)[:, None])
    tl.atomic_add(parts + at, upper, mask=inside & (upper != 0), sem="relaxed")
    tl.atomic_add(parts + C * K * V + at, lower, mask=inside & (lower != 0), sem="relaxed")


@kernel("kvb_statistics_round")
def round_sums(
    parts,  # [2, SIZE] float64: sums of upper and of lower parts
    peaks,  # [SIZE] the bits of the largest magnitude of every sum
    sums,  # [SIZE] float32, or float64
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of both parts, which is the only rounding, at its own power of two."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    power = _power(tl.load(peaks + i, mask=i < SIZE, other=0))
    total = tl.load(parts + i, mask=i < SIZE, other=0.0) + tl.load(parts + SIZE + i, mask=i < SIZE, other=0.0)
    store_sums(sums + i, total * two_to(power), i < SIZE)
