"""What the search kernels share: reading queries, preparing them for the filter, and exact distances.

A score is ``t * |k|^2 / 2 - t * q.k`` for the centred and scaled query q and key k, in float32 from float16 products:
half their squared distance, up to a constant of the query and its own power of two t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels import layout

# How the keys of a codebook lie in its packed bytes.
CONCAT = tl.constexpr(layout.CONCAT)
FOLDED = tl.constexpr(layout.FOLDED)
ADDED = tl.constexpr(layout.ADDED)

CENTRE = tl.constexpr(1)  # the float where the centre begins: before it stands the scale
NEVER = tl.constexpr(60000.0)  # half norm of what must not win: padding, broken, masked keys and later twins
SEEN = tl.constexpr(30000.0)  # half norms of all others lie below
EPSILON = tl.constexpr(2.0**-23)
FLUSH = tl.constexpr(2.0**-14)  # what a float16 loses at most to MATRIX units that are "flushing"
TINY = tl.constexpr(2.4e-38)  # twice the least normal float32: what the squares of two distances lose below it
SIGNIFICAND = tl.constexpr(52)  # bits of a float64; above them stands its power, as
ONE = tl.constexpr(1023)  # in numbers of [1, 2)
FAR = tl.constexpr(3.0e38)  # more than any score or distance that decides


@triton.jit
def row_offsets(row, book, S, stride_b, stride_s, stride_c, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """Where rows of [B*S] of a codebook begin in queries [B, S, C, D]; FLAT where stride_s leads from row to row.

    ALIGN divides all strides. They are not specialised on, or some batch sizes would compile again.
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
def two_to(field):
    """The float64 2^(field - ONE), for int64 fields of normal numbers."""
    return (field << SIGNIFICAND).to(tl.float64, bitcast=True)


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
def largest(radii, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """The norm that no scaled key exceeds: the packing left the square of the largest of every tile.

    1.0001 is for rounding that square, and for square roots, which are approximate on a GPU.
    """
    tile = tl.arange(0, WIDTH)
    most = tl.load(radii + tile, mask=tile < TILES, other=0.0)
    for first in range(WIDTH, TILES, WIDTH):
        most = tl.maximum(most, tl.load(radii + first + tile, mask=first + tile < TILES, other=0.0))
    return tl.sqrt(tl.max(most, 0)) * 1.0001


@triton.jit
def power_of_two(norm, MATRIX: tl.constexpr):
    """t <= 1, a power of two that brings numbers up to ``norm`` below 2^13, and whether float16 can still hold it."""
    exponent = ((norm.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    shift = tl.maximum(exponent - 12, 0)
    fits = shift <= (14 if MATRIX == "flushing" else 24)
    return ((127 - tl.minimum(shift, 24)) << 23).to(tl.float32, bitcast=True), fits


@triton.jit
def halves(x):
    """x as a sum of two float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def left_parts(q, t, column, D: tl.constexpr, FORM: tl.constexpr):
    """Columns of the left factors, so that they meet what ``key_columns`` says of the keys'."""
    _, _, _, norm_high, norm_low = key_columns(column, D, FORM)
    high, low = halves(-q * t[:, None])
    if FORM == CONCAT:
        # [high | high | low | t | t] meets the keys' [high | low | high | norm]: every pair but low and low.
        high = tl.where(((column >= 2 * D) & (column < 3 * D))[None, :], low, high)
    if FORM != ADDED:
        high = tl.where((norm_high | norm_low)[None, :], t[:, None].to(tl.float16), high)
    return high, low


@triton.jit
def score_error(norm, t, radius, D: tl.constexpr, DEPTH: tl.constexpr, MATRIX: tl.constexpr):
    """How far a score may be off; NaN or Inf where anything overflowed, which fails every comparison."""
    small: tl.constexpr = (1.25 * FLUSH if MATRIX == "flushing" else 2.0**-25) * (D**0.5)
    of_norm = (DEPTH + 9) * EPSILON * radius + small
    of_half = (DEPTH + 4) * EPSILON * radius * radius / 2
    if MATRIX == "flushing":  # the lower part of a half norm
        of_half += 1.25 * FLUSH
    return norm * of_norm + (t * of_half + small * radius)


@triton.jit
def measured(queries, at, keys, at_keys, usable, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """The squared distance of one row and one key each, in float32; FAR where the key is not usable."""
    near = tl.zeros((BR,), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = usable[:, None]
        if D % BD != 0:
            inside = inside & (d < D)[None, :]
        q = tl.load(queries + at[:, None] + d[None, :], mask=inside, other=0.0)
        k = tl.load(keys + at_keys[:, None] + d[None, :], mask=inside, other=0.0)
        apart = q.to(tl.float32) - k.to(tl.float32)
        near += tl.sum(apart * apart, 1)
    return tl.where(usable, near, FAR)


@triton.jit
def certain(least, runner, D: tl.constexpr):
    """Whether rounding in float32 cannot explain that one distance is less than the other.

    A difference, its square and D sums are D + 2 roundings of 2^-24 for each distance; the rest is for this very line.
    Threads that share a row may differ in the last bit of a sum; where that could order two keys, none is certain.
    """
    return (runner - least > runner * ((D + 8) * EPSILON) + D * TINY) & (least < FAR)


@triton.jit
def exact(queries, at, row_ok, keys, at_keys, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """The squared distance of one row and one key each, in float64, and whether the row is finite."""
    distance = tl.zeros((BR,), tl.float64)
    good = row_ok
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = row_ok[:, None] & (d < D)[None, :]
        q = tl.load(queries + at[:, None] + d[None, :], mask=inside, other=0.0)
        k = tl.load(keys + at_keys[:, None] + d[None, :], mask=inside, other=0.0)
        good = good & (tl.min(finite(q).to(tl.int32), 1) != 0)
        apart = q.to(tl.float64) - k.to(tl.float64)
        distance += tl.sum(apart * apart, 1)
    return distance, good


@triton.jit
def finish(indices, distances, listed, count, cell, row_ok, good, sure, choice, distance):
    """Store the nearest keys, and list the rows that are not sure for ``rescan``."""
    tl.store(indices + cell, tl.where(good, choice, 0), mask=row_ok)
    tl.store(distances + cell, tl.where(good, distance, float("nan")), mask=row_ok)
    left = row_ok & good & ~sure
    place = tl.atomic_add(count + tl.zeros_like(choice), left.to(tl.int32), mask=left, sem="relaxed")
    tl.store(listed + place, cell.to(tl.int32), mask=left)
