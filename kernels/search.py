"""The search on matrix units: a float16 filter with a proven bound, then exact distances of what it leaves.

Each program scores BN queries of one codebook against tiles of keys, three float16 products of the parts of both. The
scores stay in the registers where the products leave them: ``reshape`` to [BN, groups, J, L, E] names that layout, a
group being the J*E keys that one thread holds next to each other and L the threads that share a row. Per group there
is one minimum; per row, thread and place in the tile the best group and the second best minimum. No score leaves its
thread before the last key.

The score of a key is off by at most ``score_error``. So where the second best group lies more than twice that above the
best, the nearest key is in the best group, and direct differences in float32 and float64 find it there. All other rows
are listed for ``rescan``, which looks at every key. The bound, for a row x = t * q and keys k, at most r long, with u =
2^-23 (a truncating matrix unit):
    rounding x and k once and splitting each into two float16, leaving out low times low: 7 u |x| r
    summing DEPTH products and the norm, the small ones first: (DEPTH + 2) u (|x| r + t r^2 / 2), and 2 u t r^2 / 2
    float16 below 2^-14: 2^-25 sqrt(D) (|x| + r)
Where matrix units flush those (MI200), a coordinate loses up to 2^-14, not 2^-25, and so does a half norm: of its two
parts the lower is flushed first, and both together are no larger. What both factors lose at once is less than a quarter
of that while D is below 2^18: r is at least 2^6 / sqrt(D), as the packing scales keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel
from kvb.kernels.scores import (
    ADDED,
    CENTRE,
    CONCAT,
    FAR,
    SEEN,
    certain,
    exact,
    finish,
    finite,
    key_columns,
    largest,
    left_parts,
    measured,
    power_of_two,
    row_offsets,
    score_error,
)


@triton.jit
def _centred(queries, at, row_ok, floats, d, D: tl.constexpr):
    """Coordinates d of rows of queries, centred and scaled like the keys, and whether all of them are finite."""
    inside = row_ok[:, None] & (d < D)[None, :]
    q = tl.load(queries + at[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    good = tl.min(finite(q).to(tl.int32), 1) != 0
    scale = tl.load(floats)
    centre = tl.load(floats + CENTRE + d, mask=d < D, other=0.0)
    q = q * scale - (centre * scale)[None, :]
    return tl.where(inside & good[:, None], q, 0.0), good


@triton.jit
def _operand(
    queries,
    at,
    row_ok,
    floats,
    radius,
    D: tl.constexpr,
    DP: tl.constexpr,
    FORM: tl.constexpr,
    DEPTH: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Whole rows as left factors: minus t times the query in two parts; t; and the error of a score."""
    column = tl.arange(0, DP)
    d, _, _, _, _ = key_columns(column, D, FORM)
    q, good = _centred(queries, at, row_ok, floats, d, D)
    once = tl.where((column < D)[None, :], q, 0.0)
    t, error = _range(tl.sqrt(tl.sum(once * once, 1)), good, radius, D, DEPTH, MATRIX)
    high, low = left_parts(q, t, column, D, FORM)
    return high, low, t, error


@triton.jit
def _range(norm, good, radius, D: tl.constexpr, DEPTH: tl.constexpr, MATRIX: tl.constexpr):
    """The t of rows of this norm, and the error of their scores; Inf where nothing can be said of them."""
    t, fits = power_of_two(norm, MATRIX)
    return t, tl.where(fits & good, score_error(norm * t, t, radius, D, DEPTH, MATRIX), float("inf"))


@triton.jit
def group_minima(scores, BN: tl.constexpr, G: tl.constexpr, J: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    return tl.min(tl.min(tl.reshape(scores, (BN, G, J, L, E)), 4), 2)


@triton.jit
def best_of(best, tile, second, BN: tl.constexpr, P: tl.constexpr):
    """Over the P places of a row: the best minimum, its place and tile, and the second best minimum of all."""
    best = tl.reshape(best, (BN, P))
    places = tl.broadcast_to(tl.arange(0, P)[None, :], (BN, P))
    least = tl.min(best, 1)
    place = tl.min(tl.where(best == least[:, None], places, P), 1)
    chosen = places == place[:, None]
    tile = tl.sum(tl.where(chosen, tl.reshape(tile, (BN, P)), 0), 1)
    second = tl.min(tl.where(chosen, tl.reshape(second, (BN, P)), best), 1)
    return least, place, tile, second


@triton.jit
def _measure(
    queries,
    at,
    keys,
    at_keys,
    norms,
    base,
    least,
    runner,
    choice,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    J: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
):
    """Squared differences in float32 of the keys of group ``base``: the nearest so far, and the next nearest's."""
    for member in tl.range(0, J * E, loop_unroll_factor=2):
        key = base + member // E * (L * E) + member % E
        usable = tl.load(norms + key) < SEEN
        near = measured(queries, at, keys, at_keys + key.to(tl.int64) * D, usable, D, BR, BD)
        runner = tl.minimum(runner, tl.maximum(least, near))
        choice = tl.where(near < least, key, choice)
        least = tl.minimum(least, near)
    return least, runner, choice


@kernel("kvb_nearest_prepare", do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c"])
def prepare(
    queries,  # [B, S, C, D], with the strides below and 1
    floats,  # [C, NBYTES / 4]: packed keys as float32
    prepared_words,  # [C, B * S, 2, DP] float16: high and low part; [C, B * S, 1, DP] if CONCAT
    prepared_floats,  # [C, B * S, 2]: t and error
    count,  # [1] int32: how many rows are listed, here set to 0
    rows,  # B * S
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    TILES: tl.constexpr,
    RADII: tl.constexpr,
    FORM: tl.constexpr,
    DP: tl.constexpr,
    DEPTH: tl.constexpr,
    MATRIX: tl.constexpr,
    RADII_WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write rows of queries as the filter multiplies them: [C, rows, 2, DP] float16, and [C, rows, 2] t and error."""
    book = (tl.program_id(0) % C).to(tl.int64)
    line = tl.program_id(0) // C * BR + tl.arange(0, BR)
    row_ok = line < rows
    if tl.program_id(0) == 0:
        tl.store(count, 0)
    at = row_offsets(line, book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
    floats += book * (NBYTES // 4)
    line = book * rows + line
    radius = largest(floats + RADII, TILES, RADII_WIDTH)
    out = prepared_words + line[:, None] * (DP if FORM == CONCAT else 2 * DP)
    if DP == BD:
        high, low, t, error = _operand(queries, at, row_ok, floats, radius, D, DP, FORM, DEPTH, MATRIX)
        _store_parts(out + tl.arange(0, DP)[None, :], high, low, row_ok, DP, FORM)
    else:
        norm = tl.zeros((BR,), tl.float32)
        good = row_ok
        for start in range(0, D, BD):
            q, some = _centred(queries, at, row_ok, floats, start + tl.arange(0, BD), D)
            norm += tl.sum(q * q, 1)
            good = good & some
        t, error = _range(tl.sqrt(norm), good, radius, D, DEPTH, MATRIX)
        for start in range(0, DP, BD):
            column = start + tl.arange(0, BD)
            q, _ = _centred(queries, at, good, floats, column, D)
            high, low = left_parts(q, t, column, D, FORM)
            _store_parts(out + column[None, :], high, low, row_ok, DP, FORM)
    tl.store(prepared_floats + 2 * line, t, mask=row_ok)
    tl.store(prepared_floats + 2 * line + 1, error, mask=row_ok)


@triton.jit
def _store_parts(out, high, low, row_ok, DP: tl.constexpr, FORM: tl.constexpr):
    tl.store(out, high, mask=row_ok[:, None])
    if FORM != CONCAT:
        tl.store(out + DP, low, mask=row_ok[:, None])


@kernel("kvb_nearest_filter", do_not_specialize=["rows", "per_split", "splits"])
def search(
    prepared_words,  # [C, B * S, 2, DP] float16: high and low part; [C, B * S, 1, DP] if CONCAT
    prepared_floats,  # [C, B * S, 2]: t and error
    floats,  # [C, NBYTES / 4]: packed keys as float32
    words,  # [C, NBYTES / 2]: packed keys as float16
    groups,  # [B * S, C, splits] int32: the first key of the best group, or -1 - that where not sure
    rows,  # B * S
    C,
    K,
    per_split,  # tiles of a part
    splits,  # parts of a codebook, each for programs of its own
    NBYTES: tl.constexpr,
    NORMS: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    FORM: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    J: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    BOOKS: tl.constexpr,
):
    """BN rows against ``per_split`` tiles of BK keys of their codebook: the best group, as -1 - group where unsure.

    Programs take BOOKS codebooks at a time, so that their packed keys stay in the cache.
    """
    G: tl.constexpr = BK // (J * L * E)
    row_tiles = tl.cdiv(rows, BN)
    batch = tl.program_id(0) // (BOOKS * row_tiles) * BOOKS
    width = min(C - batch, BOOKS)
    inner = tl.program_id(0) - batch * row_tiles
    book = (batch + inner % width).to(tl.int64)
    row = (inner // width) * BN + tl.arange(0, BN)
    row_ok = row < rows
    line = book * rows + tl.minimum(row, rows - 1)
    words += book * (NBYTES // 2) + HIGH
    norms = floats + book * (NBYTES // 4) + NORMS
    t = tl.load(prepared_floats + 2 * line)
    left = prepared_words + line[:, None] * (DP if FORM == CONCAT else 2 * DP)
    if DP == BD:
        d = tl.arange(0, DP)
        high = tl.load(left + d[None, :])
        if FORM != CONCAT:
            low = tl.load(left + DP + d[None, :])

    lows = words + (LOW - HIGH)
    inner_at = tl.arange(0, BK)[None, :] * DP + tl.arange(0, BD)[:, None]
    best = tl.full((BN, G, L), FAR, tl.float32)
    second = best
    best_tile = tl.zeros((BN, G, L), tl.int32)
    start_tile = tl.program_id(1) * per_split
    for tile in tl.range(start_tile, min(start_tile + per_split, tl.cdiv(K, BK))):
        key = tile * BK + tl.arange(0, BK)
        if DP == BD:
            first = tl.cast(tile, tl.int64) * (BK * DP)
            right = tl.load(words + first + inner_at)
            if FORM == CONCAT:
                scores = tl.dot(high, right)
            else:
                scores = tl.dot(low, right)
                scores = tl.dot(high, tl.load(lows + first + inner_at), scores)
                scores = tl.dot(high, right, scores)
        else:
            scores = tl.zeros((BN, BK), tl.float32)
            for start in range(0, DP, BD):
                d = start + tl.arange(0, BD)
                high = tl.load(left + d[None, :])
                low = tl.load(left + DP + d[None, :])
                at_keys = words + key.to(tl.int64)[None, :] * DP + d[:, None]
                right = tl.load(at_keys)
                scores = tl.dot(low, right, scores)
                scores = tl.dot(high, tl.load(at_keys + (LOW - HIGH)), scores)
                scores = tl.dot(high, right, scores)
        if FORM == ADDED:
            scores += t[:, None] * tl.load(norms + key)[None, :]
        least = group_minima(scores, BN, G, J, L, E)
        second = tl.minimum(second, tl.maximum(best, least))
        best_tile = tl.where(least < best, tile, best_tile)
        best = tl.minimum(best, least)

    least, place, tile, runner = best_of(best, best_tile, second, BN, G * L)
    base = tile * BK + place // L * (J * L * E) + place % L * E
    error = tl.load(prepared_floats + 2 * line + 1)
    # Negated, so that NaN is not sure.
    sure = (runner - least > 2 * error) & (least < t * SEEN)
    cell = (row.to(tl.int64) * C + book) * splits + tl.program_id(1)
    tl.store(groups + cell, tl.where(sure, base, -1 - base), mask=row_ok)


@kernel("kvb_nearest_settle", do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c", "splits"])
def settle(
    queries,  # [B, S, C, D], with the strides below and 1
    keys,  # [C, K, D]
    floats,  # [C, NBYTES / 4]: packed keys as float32
    groups,  # [B * S, C, splits] int32: the first key of the best group, or -1 - that where not sure
    indices,  # [B, S, C] int64
    distances,  # [B, S, C] float32: squared distances
    listed,  # [B * S * C] int32: rows of codebooks left for ``rescan``
    count,  # [1] int32: how many are listed
    rows,  # B * S
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    splits,  # parts of a codebook, each for programs of its own
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    NORMS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    J: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
):
    """Find the nearest key of each row in the groups that the filter chose, and list the rows that are not sure."""
    cell = tl.program_id(0) * BR + tl.arange(0, BR)
    row_ok = cell < rows * C
    cell = tl.minimum(cell, rows * C - 1)
    book = (cell % C).to(tl.int64)
    at = row_offsets(cell // C, book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
    at_keys = book * K * D
    norms = floats + book * (NBYTES // 4) + NORMS
    least = tl.full((BR,), FAR, tl.float32)
    runner = least
    choice = tl.zeros((BR,), tl.int32)
    sure = row_ok
    for split in range(0, splits):
        base = tl.load(groups + cell * splits + split)
        sure = sure & (base >= 0)
        base = tl.where(base < 0, -1 - base, base)
        least, runner, choice = _measure(
            queries, at, keys, at_keys, norms, base, least, runner, choice, D, BR, BD, J, L, E
        )
    sure = sure & certain(least, runner, D)
    distance, good = exact(queries, at, row_ok, keys, at_keys + choice.to(tl.int64) * D, D, BR, BD)
    finish(indices, distances, listed, count, cell, row_ok, good, sure, choice, distance)
