"""What the search kernels share: reading queries, preparing them for the filter, and exact distances.

A score is ``t * |k|^2 / 2 - t * q.k`` for the centred and scaled query q and key k, in float32 from float16 products:
half their squared distance, up to a constant of the query and its own power of two t.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How a codebook's keys lie in its packed bytes, by D: see ``layout`` in launch_search.py.
CONCAT = tl.constexpr(0)  # one row [high | low | high | norm's high | norm's low]: one product of depth 32
FOLDED = tl.constexpr(1)  # high and low apart, the norm in two spare columns of high
ADDED = tl.constexpr(2)  # high and low apart, the norm added after the products

CENTRE = tl.constexpr(1)  # the float where the centre begins: before it stands the scale
NEVER = tl.constexpr(60000.0)  # half norm of what must not win: padding, broken, masked keys and later twins
SEEN = tl.constexpr(30000.0)  # half norms of all others lie below
EPSILON = tl.constexpr(2.0**-23)


@triton.jit
def row_offsets(row, book, S, stride_b, stride_s, stride_c, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """Where rows of [B*S] of a codebook begin in queries [B, S, C, D]; FLAT where stride_s leads from row to row.

    ALIGN divides all strides. They are not specialised on, or some batch sizes would compile anew.
    """
    if FLAT:
        return tl.multiple_of(row.to(tl.int64) * stride_s + book * stride_c, ALIGN)
    batch, position = (row // S).to(tl.int64), (row % S).to(tl.int64)
    return tl.multiple_of(batch * stride_b + position * stride_s + book * stride_c, ALIGN)


@triton.jit
def finite(x):
    """Neither NaN nor Inf."""
    return tl.abs(x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)) < float("inf")


@triton.jit
def key_columns(column, D: tl.constexpr, FORM: tl.constexpr):
    """What the columns of a row with a folded norm hold: the coordinate, and masks of high, low and both norm parts."""
    if FORM == CONCAT:
        in_high = (column < D) | ((column >= 2 * D) & (column < 3 * D))
        in_low = (column >= D) & (column < 2 * D)
        d = tl.where(column < 3 * D, column % D, D)
        norm_high = column == 3 * D
        norm_low = column == 3 * D + 1
    else:
        in_high = column < D
        in_low = column < 0
        d = column
        norm_high = column == D
        norm_low = column == D + 1
    return d, in_high, in_low, norm_high, norm_low


@triton.jit
def largest(packed, tiles, WIDTH: tl.constexpr):
    """The norm no scaled key exceeds: the packing left the largest of every tile."""
    tile = tl.arange(0, WIDTH)
    return tl.sqrt(tl.max(tl.load(packed + tile, mask=tile < tiles, other=0.0), 0)) * 1.0001


@triton.jit
def power_of_two(norm):
    """t <= 1, a power of two that brings numbers up to ``norm`` below 2^13, and whether float16 can still hold it."""
    exponent = ((norm.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    shift = tl.maximum(exponent - 12, 0)
    fits = shift <= 24
    return ((127 - tl.minimum(shift, 24)) << 23).to(tl.float32, bitcast=True), fits


@triton.jit
def halves(x):
    """x as a sum of two float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)
