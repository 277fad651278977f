"""Reading the value table: the kernels of ``gather``, and how a kernel finds the row of a pair.

Letters as in ``kvb/ops``. Batch-dependent sizes and strides are plain arguments that are never specialised, so that
every batch size runs the same compiled kernel; C, K and V are constants of the compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def pair_indices(pointers, inside, K: tl.constexpr):
    """The int64 indices at ``pointers`` where ``inside``, and which of them may be used: those of a pair."""
    index = tl.load(pointers, mask=inside, other=0).to(tl.int64)
    return index, inside & (index >= 0) & (index < K)


@triton.jit
def require_pairs(wrong):
    """No index was ``wrong``. Ask outside of loops: an assertion inside keeps their loads from being overlapped."""
    tl.device_assert(~wrong, "an index is out of bounds for its codebook")


@triton.jit
def average(total, DIVISOR: tl.constexpr):
    """``total / DIVISOR``, rounded once: a plain float32 division is only approximate on a GPU."""
    if DIVISOR == 1:
        return total
    elif total.dtype == tl.float64:
        return total / DIVISOR
    else:
        return tl.div_rn(total, tl.full(total.shape, DIVISOR, tl.float32))


@triton.jit
def rounded(total, DTYPE: tl.constexpr):
    """``total`` rounded to nearest as a DTYPE; the interpreter alone would cut to a bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = total.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        total = tl.where(total == total, nearest.to(tl.float32, bitcast=True), total)
    return total.to(DTYPE)


@triton.jit
def store_sums(pointers, total, mask):
    """Store sums as whatever ``pointers`` hold."""
    tl.store(pointers, rounded(total, pointers.dtype.element_ty), mask=mask)


@kernel("kvb_gather", do_not_specialize=["count", "S", "i_b", "i_s", "i_c"])
def gather_each(
    values,  # [C, K, V]
    indices,  # [B, S, C] with the strides i_b, i_s, i_c
    out,  # [B, S, C, V], or [B, C, S, V] where TRANSPOSED
    count,  # B * S * C
    S,
    i_b,
    i_s,
    i_c,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row of ``values`` for every index. A program writes BLOCK_R consecutive rows of ``out``."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    # One 64-bit division for the first row, then 32-bit steps from there.
    if TRANSPOSED:
        book = first // S
        s = (first % S).to(tl.int32) + i
        c = (book % C).to(tl.int32) + s // S
        b = book // C + c // C
    else:
        n = first // C
        c = (first % C).to(tl.int32) + i
        s = (n % S).to(tl.int32) + c // C
        b = n // S + s // S
    c, s = c % C, s % S
    inside = first + i < count
    index, usable = pair_indices(indices + b * i_b + s.to(tl.int64) * i_s + c.to(tl.int64) * i_c, inside, K)
    require_pairs(inside & ~usable)
    row = (c.to(tl.int64) * K + index) * V
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value = tl.load(values + row[:, None] + v[None, :], mask=usable[:, None] & (v < V)[None, :], other=0)
    written = (first + i) * V
    tl.store(out + written[:, None] + v[None, :], value, mask=inside[:, None] & (v < V)[None, :])


@kernel("kvb_gather_pooled", do_not_specialize=["N", "S", "i_b", "i_s", "i_c"])
def gather_pooled(
    values,  # [C, K, V]
    indices,  # [B, S, C] with the strides i_b, i_s, i_c
    out,  # [B, S, V]
    N,
    S,
    i_b,
    i_s,
    i_c,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The fetched rows of all codebooks summed, in codebook order, and divided by DIVISOR."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    pointers = indices + n // S * i_b + n % S * i_s
    ACCUMULATOR: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_N, BLOCK_V], ACCUMULATOR)
    wrong = n < 0
    for first in range(0, C, BLOCK_C):
        # Short sums of sums: BLOCK_C loads in flight, and a smaller rounding error than one long sum.
        part = tl.zeros([BLOCK_N, BLOCK_V], ACCUMULATOR)
        for k in tl.static_range(BLOCK_C):
            c = tl.zeros_like(n) + (first + k)
            inside = (n < N) & (c < C)
            index, usable = pair_indices(pointers + c * i_c, inside, K)
            wrong |= inside & ~usable
            row = (c * K + index) * V
            value = tl.load(values + row[:, None] + v[None, :], mask=usable[:, None] & (v < V)[None, :], other=0)
            part += value.to(ACCUMULATOR)
        total += part
    require_pairs(wrong)
    written = n * V
    mask = (n < N)[:, None] & (v < V)[None, :]
    store_sums(out + written[:, None] + v[None, :], average(total, DIVISOR), mask)
