"""The exact search by direct differences: for few queries, float64, more than one neighbour, and what the filter left.

Every key is looked at in float32; where one might be nearer than the nearest so far, its tile is measured in float64.
Of float64 numbers all are measured, and each distance has a power of two of its own: their squares leave any range.
Ranks are found one after the other: the next one is the least (distance, index) after the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel
from kvb.kernels.scores import EPSILON, ONE, SIGNIFICAND, TINY, finite, row_offsets, two_to

NOWHERE = tl.constexpr(1 << 20)  # the power of a distance that is more than any


@triton.jit
def _tile(queries, at, good, keys, key, inside, start, D: tl.constexpr, BD: tl.constexpr, DTYPE: tl.constexpr):
    """Coordinates of rows [BR, BD] and keys [BK, BD] from ``start`` on, and which of these keys are finite so far."""
    d = start + tl.arange(0, BD)
    q = tl.load(queries + at[:, None] + d[None, :], mask=good[:, None] & (d < D)[None, :], other=0.0).to(DTYPE)
    k = tl.load(
        keys + key[:, None].to(tl.int64) * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
    ).to(DTYPE)
    return q, k, tl.min(finite(k).to(tl.int32), 1) != 0


@triton.jit
def _squares(
    queries,
    at,
    good,
    keys,
    key,
    inside,
    DTYPE: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Squared distances [BK, BR] by direct difference, and whether the keys are finite.

    Keys come first: threads that few rows leave over go along the first axis.
    """
    total = tl.zeros((BK, BR), DTYPE)
    whole = inside
    for start in range(0, D, BD):
        q, k, here = _tile(queries, at, good, keys, key, inside, start, D, BD, DTYPE)
        whole = whole & here
        apart = k[:, None, :] - q[None, :, :]
        total += tl.sum(apart * apart, 2)
    return total, whole


@triton.jit
def _scaled_squares(
    queries,
    at,
    good,
    keys,
    key,
    inside,
    D: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """The same of float64, whose squares may leave its range: distances are size * 2^power, with sizes of [1/2, 1).

    Each pair of a row and a key is scaled by its largest difference, so that only what is far too small to matter is
    lost. A difference that overflows is halved first.
    """
    most = tl.zeros((BK, BR), tl.float64)
    whole = inside
    for start in range(0, D, BD):
        q, k, here = _tile(queries, at, good, keys, key, inside, start, D, BD, tl.float64)
        whole = whole & here
        most = tl.maximum(most, tl.max(tl.abs(k[:, None, :] - q[None, :, :]), 2))
    over = most == float("inf")
    half = tl.where(over, 0.5, 1.0)
    # 0 of subnormal numbers stands for 2^-1074 here: they become integers.
    field = most.to(tl.int64, bitcast=True) >> SIGNIFICAND
    power = tl.where(over, ONE, tl.where(field == 0, -1074, field - ONE))
    near = -(power >> 1)  # 2^-power in two steps, as it may overflow
    first, second = two_to(near + ONE), two_to(-power - near + ONE)
    total = tl.zeros((BK, BR), tl.float64)
    for start in range(0, D, BD):
        q, k, _ = _tile(queries, at, good, keys, key, inside, start, D, BD, tl.float64)
        apart = k[:, None, :] * half[:, :, None] - q[None, :, :] * half[:, :, None]
        apart = apart * first[:, :, None] * second[:, :, None]
        total += tl.sum(apart * apart, 2)
    bits = total.to(tl.int64, bitcast=True)
    shift = (bits >> SIGNIFICAND) - (ONE - 1)
    power = tl.where(total == 0, -NOWHERE, 2 * (power + over.to(tl.int64)) + shift)
    size = tl.where(total == 0, 0.0, (bits - (shift << SIGNIFICAND)).to(tl.float64, bitcast=True))
    return power.to(tl.int32), size, whole


@triton.jit
def _unscaled(power, size):
    """size * 2^power, rounded once; 0 or Inf beyond the range of float64."""
    power = tl.minimum(tl.maximum(power, -2040), 2040).to(tl.int64)  # enough for both, and each step is normal
    near = power >> 1
    return size * two_to(near + ONE) * two_to(power - near + ONE)


@triton.jit
def _after(power, size, key, last_power, last, last_key, WIDE: tl.constexpr):
    """Which (distances, keys) [BK, BR] come after the last one of each row."""
    after = (size > last[None, :]) | ((size == last[None, :]) & (key > last_key[None, :]))
    if WIDE:
        after = (power > last_power[None, :]) | ((power == last_power[None, :]) & after)
    return after


@triton.jit
def _least(power, size, key, among, K, WIDE: tl.constexpr):
    """The least (distance, key) of each row among some; key K where there is none."""
    lowest = power
    if WIDE:
        lowest = tl.min(tl.where(among, power, NOWHERE), 0)
        among = among & (power == lowest[None, :])
    least = tl.min(tl.where(among, size, float("inf")), 0)
    return lowest, least, tl.min(tl.where(among & (size == least[None, :]), key, K), 0)


@triton.jit
def _next(
    queries,
    at,
    good,
    keys,
    mask,
    start,
    stop,
    K,
    last_power,
    last,
    last_key,
    last_spare,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Of the keys from ``start`` to ``stop``, the least (distance, key) after the last one, and K if there is none.

    Also the lowest key that may not win after ``last_spare``: it fills a rank that no other key is left for. Powers of
    distances are read if WIDE.
    """
    best_power = tl.full((BR,), NOWHERE, tl.int32)
    best = tl.full((BR,), float("inf"), tl.float64)
    choice = tl.full((BR,), K, tl.int32)
    spare = tl.full((BR,), K, tl.int32)
    limit = tl.full((BR,), float("inf"), tl.float32)
    for first in range(start, stop, BK):
        key = first + tl.arange(0, BK)
        allowed = key < stop
        if MASKED:
            allowed = allowed & (tl.load(mask + key, mask=allowed, other=0) != 0)
        look = True
        if not WIDE:
            near, _ = _squares(queries, at, good, keys, key, key < stop, tl.float32, D, BR, BK, BD)
            # Negated, so that NaN is looked at.
            possible = allowed[:, None] & ~(near > limit[None, :])
            possible = good[None, :] & (possible | (choice == K)[None, :])
            look = tl.max(tl.max(possible.to(tl.int32), 1), 0) != 0
        if look:
            power = 0
            if WIDE:
                power, size, whole = _scaled_squares(queries, at, good, keys, key, key < stop, D, BR, BK, BD)
            else:
                size, whole = _squares(queries, at, good, keys, key, key < stop, tl.float64, D, BR, BK, BD)
            usable = (allowed & whole)[:, None] & good[None, :]
            here = tl.broadcast_to(key[:, None], (BK, BR))
            after = usable & _after(power, size, here, last_power, last, last_key, WIDE)
            least_power, least, lowest = _least(power, size, here, after, K, WIDE)
            better = least < best
            if WIDE:
                better = (least_power < best_power) | ((least_power == best_power) & better)
            better = (lowest < K) & (better | (choice == K))
            if WIDE:
                best_power = tl.where(better, least_power, best_power)
            best = tl.where(better, least, best)
            choice = tl.where(better, lowest, choice)
            barred = (key < stop)[:, None] & ~usable & (here > last_spare[None, :])
            spare = tl.minimum(spare, tl.min(tl.where(barred, here, K), 0))
            limit = (best * (1 + EPSILON * (D + 8)) + D * TINY).to(tl.float32)  # as ``certain`` in scores.py
    return best_power, best, choice, spare


@triton.jit
def _search_row(
    queries,
    at,
    row_ok,
    keys,
    mask,
    indices,
    distances,
    out,
    start,
    stop,
    K,
    T,
    PARTIAL: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """All T ranks of BR rows of one codebook, stored from ``out`` on; the last index."""
    good = row_ok
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        q = tl.load(queries + at[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
        good = good & (tl.min(finite(q).to(tl.int32), 1) != 0)
    last_power = tl.full((BR,), -2 * NOWHERE, tl.int32)
    last = tl.full((BR,), -1.0, tl.float64)
    last_key = tl.full((BR,), -1, tl.int32)
    last_spare = last_key
    choice = last_key
    for rank in range(0, T):
        power, best, choice, spare = _next(
            queries,
            at,
            good,
            keys,
            mask,
            start,
            stop,
            K,
            last_power,
            last,
            last_key,
            last_spare,
            WIDE,
            MASKED,
            D,
            BR,
            BK,
            BD,
        )
        none = choice == K
        if WIDE:
            last_power = power
        last = best
        last_key = choice
        if not PARTIAL:
            last_spare = tl.where(none, spare, last_spare)
            choice = tl.where(none, spare, choice)
        choice = tl.where(good, choice, rank)
        tl.store(indices + out + rank, choice, mask=row_ok)
        if WIDE:
            best = _unscaled(power, best)
        tl.store(distances + out + rank, tl.where(good, best, float("nan")), mask=row_ok)
    return choice


@kernel("kvb_nearest_scan", do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c", "T", "splits"])
def scan(
    queries,  # [B, S, C, D], with the strides below and 1
    keys,  # [C, K, D]
    mask,  # [C, K] bytes, not 0 where a key may win; read if MASKED
    values,  # [C, K, V]; read if FETCH
    indices,  # [B, S, C, T] int64, or [B * S * C, splits] int32 if PARTIAL
    distances,  # [B, S, C, T], or [B * S * C, splits] if PARTIAL; float64 if WIDE or PARTIAL, else float32
    fetched,  # [B, S, C, V]; written if FETCH
    rows,  # B * S
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    T,  # ranks
    splits,  # parts of a codebook, each for programs of its own
    per_split,  # keys of a part
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    PARTIAL: tl.constexpr,
    FETCH: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """BR rows of one codebook against ``per_split`` of its keys; with FETCH, the value of the nearest as well."""
    book = (tl.program_id(0) % C).to(tl.int64)
    row = tl.program_id(0) // C * BR + tl.arange(0, BR)
    row_ok = row < rows
    at = row_offsets(row, book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
    cell = row.to(tl.int64) * C + book
    start = tl.program_id(1) * per_split
    out = cell * splits + tl.program_id(1) if PARTIAL else cell * T
    choice = _search_row(
        queries,
        at,
        row_ok,
        keys + book * K * D,
        mask + book * K,
        indices,
        distances,
        out,
        start,
        min(start + per_split, K),
        K,
        T,
        PARTIAL,
        WIDE,
        MASKED,
        D,
        BR,
        BK,
        BD,
    )
    if FETCH:
        for first in range(0, V, BV):
            v = first + tl.arange(0, BV)
            inside = row_ok[:, None] & (v < V)[None, :]
            value = tl.load(values + (book * K + choice.to(tl.int64))[:, None] * V + v[None, :], mask=inside)
            tl.store(fetched + cell[:, None] * V + v[None, :], value, mask=inside)


@kernel("kvb_nearest_merge", do_not_specialize=["cells", "splits"])
def merge(
    part_indices,  # [B * S * C, splits] int32
    part_distances,  # [B * S * C, splits] float64
    indices,  # [B, S, C] int64
    distances,  # [B, S, C] float32
    cells,  # B * S * C
    K,
    splits,
    BR: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The nearest of all parts of each row's codebook; the first key where none may win."""
    cell = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    part = tl.arange(0, WIDTH)
    inside = (cell < cells)[:, None] & (part < splits)[None, :]
    at = cell[:, None] * splits + part[None, :]
    distance = tl.load(part_distances + at, mask=inside, other=float("inf"))
    index = tl.load(part_indices + at, mask=inside, other=2147483647)  # no key has it
    broken = tl.max((distance != distance).to(tl.int32), 1) != 0
    known = (index < K) & (distance == distance)
    least = tl.min(tl.where(known, distance, float("inf")), 1)
    lowest = tl.min(tl.where(known & (distance == least[:, None]), index, K), 1)
    tl.store(indices + cell, tl.where(lowest < K, lowest, 0), mask=cell < cells)
    tl.store(distances + cell, tl.where(broken, float("nan"), least), mask=cell < cells)


@kernel("kvb_nearest_rescan", do_not_specialize=["S", "stride_b", "stride_s", "stride_c"])
def rescan(
    queries,  # [B, S, C, D], with the strides below and 1
    keys,  # [C, K, D]
    mask,  # [C, K] bytes, not 0 where a key may win; read if MASKED
    listed,  # [B * S * C] int32: rows of codebooks left for ``rescan``
    count,  # [1] int32: how many are listed
    indices,  # [B, S, C] int64
    distances,  # [B, S, C] float32: squared distances
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """The whole search of the rows that the filter listed, one at a time."""
    for item in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        cell = tl.load(listed + item)
        book = (cell % C).to(tl.int64)
        row = cell // C + tl.arange(0, 1)
        at = row_offsets(row, book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
        _search_row(
            queries,
            at,
            row >= 0,
            keys + book * K * D,
            mask + book * K,
            indices,
            distances,
            cell + tl.zeros((1,), tl.int64),
            0,
            K,
            K,
            1,
            False,
            False,
            MASKED,
            D,
            1,
            BK,
            BD,
        )
