"""Packing keys for the filter: centre, scale by a power of two, split into float16, fold the norms, bar the twins.

Two kernels: ``survey`` sums up slices of a codebook and lets equal keys meet in a hash table; ``pack`` writes the
layout, tile by tile. Nothing depends on the order in which programs run. Keys that are moved by ``update.py`` are
surveyed there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel
from kvb.kernels.scores import ADDED, CENTRE, FOLDED, NEVER, finite, halves, key_columns

SUM = tl.constexpr(0)  # rows of a survey
LEAST = tl.constexpr(1)
MOST = tl.constexpr(2)
COUNT = tl.constexpr(3)


@triton.jit
def _usable(keys, mask, row, live, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Which keys of a codebook may win: finite, and not masked."""
    usable = live
    if MASKED:
        usable = usable & (tl.load(mask + row, mask=live, other=0) != 0)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = live[:, None] & (d < D)[None, :]
        part = tl.load(keys + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        usable = usable & (tl.min(finite(part).to(tl.int32), 1) != 0)
    return usable


@triton.jit
def mixed(part, d):
    """What coordinates d of a tile of keys, float32, add to the two sums that ``slots`` makes of whole keys."""
    bits = (part + 0.0).to(tl.uint32, bitcast=True)  # -0 equals 0
    # Odd numbers with bits in all places, as hashes multiply by; another one for every coordinate.
    bits = (bits ^ (bits >> 15)) * (2 * d + 0x2C1B3C6D).to(tl.uint32)[None, :]
    bits = bits ^ (bits >> 13)
    return tl.sum(bits * 0x297A2D39, 1), tl.sum((bits ^ (bits >> 9)) * 0x85EBCA6B, 1)


@triton.jit
def slots(one, two, SLOTS: tl.constexpr):
    """Two places in a table of SLOTS, a power of two, that depend on a key's numbers only."""
    one = (one ^ (one >> 16)) * 0x7FEB352D
    two = (two ^ (two >> 16)) * 0x846CA68B
    return ((one ^ (one >> 15)) & (SLOTS - 1)).to(tl.int32), ((two ^ (two >> 15)) & (SLOTS - 1)).to(tl.int32)


@triton.jit
def _slots(keys, row, live, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The slots of keys in memory."""
    one = tl.zeros(row.shape, tl.uint32)
    two = tl.zeros(row.shape, tl.uint32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = live[:, None] & (d < D)[None, :]
        part = tl.load(keys + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        more_one, more_two = mixed(part, d)
        one += more_one
        two += more_two
    return slots(one, two, SLOTS)


@triton.jit
def claim(table, row, one, two, usable, SLOTS: tl.constexpr):
    """Of the usable keys that share a slot, the first gets it."""
    tl.atomic_min(table + one, row.to(tl.int32), mask=usable, sem="relaxed")
    tl.atomic_min(table + SLOTS + two, row.to(tl.int32), mask=usable, sem="relaxed")


@triton.jit
def nothing_seen(BD: tl.constexpr):
    """Sum, least, most and count of no keys."""
    infinite = tl.full((BD,), float("inf"), tl.float32)
    return tl.zeros((BD,), tl.float64), infinite, -infinite, tl.full((), 0, tl.int32)


@triton.jit
def seen(total, least, most, count, part, inside, usable):
    """The same with a tile of keys, of which those ``usable`` count."""
    total += tl.sum(tl.where(inside, part, 0.0).to(tl.float64), 0)
    least = tl.minimum(least, tl.min(tl.where(inside, part, float("inf")), 0))
    most = tl.maximum(most, tl.max(tl.where(inside, part, -float("inf")), 0))
    return total, least, most, count + tl.sum(usable.to(tl.int32), 0)


@triton.jit
def store_survey(out, total, least, most, count, d, D: tl.constexpr):
    """One slice's row of ``surveys``."""
    tl.store(out + SUM * D + d, total, mask=d < D)
    tl.store(out + LEAST * D + d, least.to(tl.float64), mask=d < D)
    tl.store(out + MOST * D + d, most.to(tl.float64), mask=d < D)
    tl.store(out + COUNT * D + d, tl.full(d.shape, count, tl.float64), mask=d < D)


@kernel("kvb_pack_survey")
def survey(
    keys,  # [C, K, D]
    mask,  # [C, K] bytes, not 0 where a key may win; read if MASKED
    surveys,  # [C, SLICES, 4, D] float64: sum, least, most and count of a slice
    table,  # [C, 2, SLOTS] int32: the first usable key that claims a slot
    K,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    SLOTS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sum, least and most of every coordinate over the usable keys of one slice; every such key claims its slots."""
    book = (tl.program_id(0) // SLICES).to(tl.int64)
    piece = tl.program_id(0) % SLICES
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    keys += book * K * D
    mask += book * K
    table += book * 2 * SLOTS
    total, least, most, count = nothing_seen(BD)
    for start in range(piece * SLICE, min(piece * SLICE + SLICE, K), BK):
        row = (start + tl.arange(0, BK)).to(tl.int64)
        usable = _usable(keys, mask, row, row < K, D, BD, MASKED)
        inside = usable[:, None] & (d < D)[None, :]
        part = tl.load(keys + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total, least, most, count = seen(total, least, most, count, part, inside, usable)
        if tl.program_id(1) == 0:
            one, two = _slots(keys, row, usable, SLOTS, D, BD)
            claim(table, row, one, two, usable, SLOTS)
    store_survey(surveys + (book * SLICES + piece) * 4 * D, total, least, most, count, d, D)


@triton.jit
def _centre(surveys, d, D: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """The mean of the usable keys, and how far one of them may lie from it, by coordinate."""
    piece = tl.arange(0, WIDTH)
    inside = (piece < SLICES)[:, None] & (d < D)[None, :]
    at = surveys + piece[:, None] * 4 * D + d[None, :]
    total = tl.sum(tl.load(at + SUM * D, mask=inside, other=0.0), 0)
    count = tl.sum(tl.load(at + COUNT * D, mask=inside, other=0.0), 0)
    least = tl.min(tl.load(at + LEAST * D, mask=inside, other=float("inf")), 0)
    most = tl.max(tl.load(at + MOST * D, mask=inside, other=-float("inf")), 0)
    some = count > 0
    mean = tl.where(some, total / tl.where(some, count, 1.0), 0.0).to(tl.float32)
    reach = tl.maximum(most - mean.to(tl.float64), mean.to(tl.float64) - least)
    return mean, tl.where(some, reach, 0.0)


@triton.jit
def _twin(keys, table, row, usable, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Whether an equal key with a lower index claimed one of the same slots."""
    one, two = _slots(keys, row, usable, SLOTS, D, BD)
    first = tl.load(table + one, mask=usable, other=0).to(tl.int64)
    second = tl.load(table + SLOTS + two, mask=usable, other=0).to(tl.int64)
    like_first = usable & (first < row)
    like_second = usable & (second < row)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = usable[:, None] & (d < D)[None, :]
        part = tl.load(keys + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        a = tl.load(keys + first[:, None] * D + d[None, :], mask=inside, other=0.0)
        b = tl.load(keys + second[:, None] * D + d[None, :], mask=inside, other=0.0)
        like_first = like_first & (tl.min((a == part).to(tl.int32), 1) != 0)
        like_second = like_second & (tl.min((b == part).to(tl.int32), 1) != 0)
    return like_first | like_second


@triton.jit
def _scaled(keys, surveys, row, d, usable, scale, D: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """Coordinates d of the centred and scaled keys of a tile; zero for what must not win."""
    mean, _ = _centre(surveys, d, D, SLICES, WIDTH)
    inside = usable[:, None] & (d < D)[None, :]
    part = tl.load(keys + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    # Scaled first: the difference of two large numbers might overflow.
    return tl.where(inside, part * scale - (mean * scale)[None, :], 0.0)


@kernel("kvb_pack")
def pack(
    keys,  # [C, K, D]
    mask,  # [C, K] bytes, not 0 where a key may win; read if MASKED
    surveys,  # [C, SLICES, 4, D] float64: sum, least, most and count of a slice
    table,  # [C, 2, SLOTS] int32: the first key that claims a slot
    floats,  # [C, NBYTES / 4]: packed keys as float32
    words,  # [C, NBYTES / 2]: packed keys as float16
    K,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    TILES: tl.constexpr,
    RADII: tl.constexpr,
    NORMS: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    FORM: tl.constexpr,
    DP: tl.constexpr,
    KP: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write one tile of BK keys of the layout; ``floats`` and ``words`` are the packed bytes as float32 and float16."""
    book = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    keys += book * K * D
    mask += book * K
    table += book * 2 * SLOTS
    surveys += book * SLICES * 4 * D
    floats += book * (NBYTES // 4)
    words += book * (NBYTES // 2)
    row = (tile * BK + tl.arange(0, BK)).to(tl.int64)
    inside = row < KP
    usable = _usable(keys, mask, row, row < K, D, BD, MASKED)
    usable = usable & ~_twin(keys, table, row, usable, SLOTS, D, BD)

    # The scale brings what encloses all keys below 2^7: no float16 overflows, no half norm reaches 2^13.
    square = tl.full((), 0.0, tl.float64)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mean, reach = _centre(surveys, d, D, SLICES, WIDTH)
        square += tl.sum(reach * reach, 0)
        if tile == 0:
            tl.store(floats + CENTRE + d, mean, mask=d < D)
    around = tl.sqrt(square).to(tl.float32)
    exponent = ((around.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    # The scale 2^(6 - exponent), a normal float32: at most 2^126, and 1 where all keys are equal.
    exponent = tl.minimum(tl.maximum(tl.where(around > 0, exponent, 6), -120), 127)
    scale = ((127 + 6 - exponent) << 23).to(tl.float32, bitcast=True)

    if FORM == ADDED:
        norm = tl.zeros((BK,), tl.float64)
        for start in range(0, DP, BD):
            d = start + tl.arange(0, BD)
            part = _scaled(keys, surveys, row, d, usable, scale, D, SLICES, WIDTH)
            norm += tl.sum(part.to(tl.float64) * part.to(tl.float64), 1)
            high, low = halves(part)
            tl.store(words + HIGH + row[:, None] * DP + d[None, :], high, mask=inside[:, None])
            tl.store(words + LOW + row[:, None] * DP + d[None, :], low, mask=inside[:, None])
        half = tl.where(usable, (norm / 2).to(tl.float32), NEVER)
    else:
        column = tl.arange(0, DP)
        d, in_high, in_low, norm_high, norm_low = key_columns(column, D, FORM)
        part = _scaled(keys, surveys, row, d, usable, scale, D, SLICES, WIDTH)
        once = tl.where((column < D)[None, :], part, 0.0).to(tl.float64)
        norm = tl.sum(once * once, 1)
        half = tl.where(usable, (norm / 2).to(tl.float32), NEVER)
        first, second = halves(half)
        high, low = halves(part)
        folded = tl.where(norm_high[None, :], first[:, None], tl.where(norm_low[None, :], second[:, None], 0.0))
        both = tl.where(in_high[None, :], high, tl.where(in_low[None, :], low, folded.to(tl.float16)))
        tl.store(words + HIGH + row[:, None] * DP + column[None, :], both, mask=inside[:, None])
        if FORM == FOLDED:
            tl.store(
                words + LOW + row[:, None] * DP + column[None, :],
                tl.where(in_high[None, :], low, 0.0),
                mask=inside[:, None],
            )
    tl.store(floats + NORMS + row, half, mask=inside)
    tl.store(floats + RADII + tile, tl.max(tl.where(usable, norm, 0.0), 0).to(tl.float32))
    if tile == 0:
        tl.store(floats, scale)
