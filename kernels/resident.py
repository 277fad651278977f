"""The search of small codebooks, whose keys stay on the chip: one float16 product leaves each row a few candidates.

``resident`` scores tiles of rows against all keys. The score of a key is off by at most ``_error``, so the nearest key
is among the candidates: those that score within twice that of the least. A thread keeps the minimum of each group of
its keys, and of each place in a group; the groups and the places within the limit are bits that meet in the candidates.
Where there is one, it is the nearest. All other rows stay open, about one of twenty, and ``refine`` measures their
candidates, about two.

The bound is that of search.py, and for keys k and rows x that float16 leaves off by f and e, each at most 2^-11 of
them: x.k - (x - e).(k - f) = e.(k - f) + x.f, at most (2 * 2^-11 + 2^-22) |x| r. Rows of at most 10 coordinates need
not add that: one product holds all three of ``search``. Rows that no score can be trusted for have NaN as their error,
and no candidate: ``rescan`` takes them.
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
    key_columns,
    largest,
    left_parts,
    measured,
    power_of_two,
    row_offsets,
    score_error,
)


@triton.jit
def _part(words, norms, start: tl.constexpr, DP: tl.constexpr, P: tl.constexpr):
    """P keys from key ``start`` on as right factors, [DP, P], and their half norms."""
    key = start + tl.arange(0, P)
    return tl.load(words + key[None, :] * DP + tl.arange(0, DP)[:, None]), tl.load(norms + key)


@triton.jit
def _error(norm, t, radius, D: tl.constexpr, DEPTH: tl.constexpr, MATRIX: tl.constexpr, FORM: tl.constexpr):
    """How far a score may be off that one product makes of high parts alone."""
    error = score_error(norm, t, radius, D, DEPTH, MATRIX)
    if FORM != CONCAT:
        error += norm * (radius * (1.001 * 2.0**-10))  # 2 * 2^-11 + 2^-22, rounded up
    return error


@triton.jit
def _scores(left, t, right, norm, FORM: tl.constexpr):
    scores = tl.dot(left, right)
    if FORM == ADDED:
        scores = tl.fma(tl.broadcast_to(t[:, None], scores.shape), tl.broadcast_to(norm[None, :], scores.shape), scores)
    return scores


@triton.jit
def _minima(scores, BN: tl.constexpr, P: tl.constexpr, J: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """The least of each group, [BN, L, G], and of each place in a group, [BN, L, J * E], of every thread."""
    scores = tl.permute(tl.reshape(scores, (BN, P // (J * L * E), J, L, E)), (0, 3, 1, 2, 4))
    return tl.min(tl.min(scores, 4), 3), tl.reshape(tl.min(scores, 2), (BN, L, J * E))


@triton.jit
def _bits(minima, limit, BN: tl.constexpr, L: tl.constexpr, N: tl.constexpr):
    """Which of N minima of a thread are within the limit, as the bits of a number; [BN, L] in float32.

    Another pipe than that of comparisons sums up floats, but not where a product of 0 or 1 can be a choice.
    """
    bits = tl.where(minima <= limit[:, None, None], 1.0, 0.0)
    for level in tl.static_range(4):
        if N >> level > 1:
            low, high = tl.split(tl.reshape(bits, (BN, L, N >> level + 1, 2)))
            bits = tl.fma(high, 2.0 ** (2**level), low)
    return tl.reshape(bits, (BN, L))


@triton.jit
def _highest(bits):
    """The place of the highest bit of a positive number below 2^24."""
    return (bits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _key(group, place, thread, J: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    return group * (J * L * E) + place // E * (L * E) + thread * E + place % E


@triton.jit
def _only(groups, places, J: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """256 and the key, where the bits of a row's threads leave one candidate; more, where they leave several."""
    both = groups.to(tl.int32, bitcast=True) | places.to(tl.int32, bitcast=True)
    key = 256 + _key(_highest(groups), _highest(places) & 15, tl.arange(0, L)[None, :], J, L, E)
    # A float32 with one bit has no significand.
    return tl.sum(tl.where(groups == 0, 0, tl.where(both & 0x7FFFFF == 0, key, 1024)), 1)


@triton.jit
def _distance(query, keys, choice, d, real, D: tl.constexpr):
    """The squared distance of rows [BN, DP] and one key each, in float64 from the ``real`` columns.

    Threads that share a row may differ in its last bit. It decides nothing, and one stores it.
    """
    key = tl.load(keys + choice[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    apart = tl.where(real, query.to(tl.float64) - key.to(tl.float64), 0.0)
    return tl.sum(apart * apart, 1)


@triton.jit
def _leave_open(opened, slot, open_rows, open_words, left, line, groups, places, L: tl.constexpr):
    """Append the lines ``left``, and the bits of their threads, to what a program leaves open from ``slot`` on."""
    place = slot + tl.atomic_add(opened + tl.zeros_like(line), 1, mask=left, sem="relaxed")
    tl.store(open_rows + place, line, mask=left)
    bits = groups.to(tl.int32) << 16 | places.to(tl.int32)
    tl.store(open_words + place[:, None] * L + tl.arange(0, L)[None, :], bits, mask=left[:, None])


@kernel(
    "kvb_nearest_resident", do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c", "workers", "capacity"]
)
def resident(
    queries,  # [B, S, C, D], with the strides below and 1
    keys,  # [C, K, D]
    floats,  # [C, NBYTES / 4]: packed keys as float32
    words,  # [C, NBYTES / 2]: packed keys as float16
    indices,  # [B, S, C] int64
    distances,  # [B, S, C] float32: squared distances
    open_rows,  # [programs, capacity] int32: the rows that a program left open
    open_words,  # [programs, capacity, L] int32: which groups and places of each thread may hold the nearest key
    opened,  # [programs] int32: how many
    rows,  # B * S
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    workers,  # programs of a codebook
    capacity,  # rows that a program may leave open
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    TILES: tl.constexpr,
    RADII: tl.constexpr,
    NORMS: tl.constexpr,
    HIGH: tl.constexpr,
    FORM: tl.constexpr,
    DP: tl.constexpr,
    DEPTH: tl.constexpr,
    MATRIX: tl.constexpr,
    RADII_WIDTH: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    BN: tl.constexpr,
    J: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
):
    """The nearest keys of tiles of BN rows that pass by one codebook; rows with more than one candidate stay open.

    The keys come in up to three parts, P0 >= P1 >= P2, powers of two, so that few products fall on padding.
    """
    book = (tl.program_id(0) % C).to(tl.int64)
    keys += book * K * D
    floats += book * (NBYTES // 4)
    words += book * (NBYTES // 2) + HIGH
    norms = floats + NORMS
    radius = largest(floats + RADII, TILES, RADII_WIDTH)
    right_0, norm_0 = _part(words, norms, 0, DP, P0)
    if P1 > 0:
        right_1, norm_1 = _part(words, norms, P0, DP, P1)
    if P2 > 0:
        right_2, norm_2 = _part(words, norms, P0 + P1, DP, P2)
    column = tl.arange(0, DP)
    real = (column < D)[None, :]
    d = key_columns(column, D, FORM)[0]
    scale = tl.load(floats)
    centre = tl.load(floats + CENTRE + d, mask=d < D, other=0.0) * scale
    opened += tl.program_id(0)
    slot = tl.program_id(0) * capacity.to(tl.int64)
    for tile in tl.range(tl.program_id(0) // C, tl.cdiv(rows, BN), workers):
        line = tile * BN + tl.arange(0, BN)
        row_ok = line < rows
        at = row_offsets(tl.minimum(line, rows - 1), book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
        query = tl.load(queries + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        q = query.to(tl.float32) * scale - centre[None, :]
        norm = tl.sqrt(tl.sum(tl.where(real, q * q, 0.0), 1))
        t, fits = power_of_two(norm, MATRIX)
        left = left_parts(q, t, column, D, FORM)[0]
        error = tl.where(fits, _error(norm * t, t, radius, D, DEPTH, MATRIX, FORM), float("nan"))

        groups_0, places = _minima(_scores(left, t, right_0, norm_0, FORM), BN, P0, J, L, E)
        if P1 > 0:
            groups_1, others = _minima(_scores(left, t, right_1, norm_1, FORM), BN, P1, J, L, E)
            places = tl.minimum(places, others)
        if P2 > 0:
            groups_2, others = _minima(_scores(left, t, right_2, norm_2, FORM), BN, P2, J, L, E)
            places = tl.minimum(places, others)
        least = tl.min(tl.min(places, 2), 1)
        limit = least + 2 * error
        places = _bits(places, limit, BN, L, J * E)
        groups = _bits(groups_0, limit, BN, L, P0 // (J * L * E))
        if P1 > 0:
            groups = tl.fma(_bits(groups_1, limit, BN, L, P1 // (J * L * E)), 2.0 ** (P0 // (J * L * E)), groups)
        if P2 > 0:
            groups = tl.fma(_bits(groups_2, limit, BN, L, P2 // (J * L * E)), 2.0 ** ((P0 + P1) // (J * L * E)), groups)

        choice = _only(groups, places, J, L, E)
        sure = (choice >> 8 == 1) & (least < t * SEEN)
        choice = tl.where(sure, choice & 255, 0)
        distance = _distance(query, keys, choice, d, real, D)
        cell = line.to(tl.int64) * C + book
        tl.store(indices + cell, choice, mask=row_ok & sure)
        tl.store(distances + cell, distance, mask=row_ok & sure)
        _leave_open(opened, slot, open_rows, open_words, row_ok & ~sure, line, groups, places, L)


@kernel("kvb_nearest_refine", do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c", "capacity"])
def refine(
    queries,  # [B, S, C, D], with the strides below and 1
    keys,  # [C, K, D]
    floats,  # [C, NBYTES / 4]: packed keys as float32
    open_rows,  # [programs, capacity] int32: the rows that a program left open
    open_words,  # [programs, capacity, L] int32: which groups and places of each thread may hold the nearest key
    opened,  # [programs] int32: how many
    indices,  # [B, S, C] int64
    distances,  # [B, S, C] float32: squared distances
    listed,  # [B * S * C] int32: rows of codebooks left for ``rescan``
    count,  # [1] int32: how many are listed
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    capacity,  # rows that a program may leave open
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
    """The nearest candidate of the rows that one program of ``resident`` left open; what is not sure is listed."""
    book = (tl.program_id(0) % C).to(tl.int64)
    at_keys = book * K * D
    norms = floats + book * (NBYTES // 4) + NORMS
    slots = tl.program_id(0) * capacity.to(tl.int64)
    total = tl.load(opened + tl.program_id(0))
    thread = tl.arange(0, L)[None, :]
    for first in range(tl.program_id(1) * BR, total, tl.num_programs(1) * BR):
        item = first + tl.arange(0, BR)
        row_ok = item < total
        slot = slots + tl.minimum(item, total - 1)
        line = tl.load(open_rows + slot)
        at = row_offsets(line, book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
        word = tl.load(open_words + slot[:, None] * L + thread, mask=row_ok[:, None], other=0)
        groups, left = word >> 16 & 0xFFFF, word & 0xFFFF
        places = left
        least = tl.full((BR,), FAR, tl.float32)
        runner = least
        choice = tl.zeros((BR,), tl.int32)
        while tl.max(tl.max(groups, 1), 0) != 0:
            # The next candidate of every row: one more place in a group, or the next group.
            group, place = groups & -groups, left & -left
            found = tl.where(groups != 0, _key(_highest(group), _highest(place), thread, J, L, E), 256)
            key = tl.min(found, 1)
            taken = found == key[:, None]
            left = tl.where(taken, left ^ place, left)
            groups = tl.where(left == 0, groups ^ group, groups)
            left = tl.where(left == 0, places, left)
            usable = (key < 256) & (tl.load(norms + key, mask=key < 256, other=FAR) < SEEN)
            near = measured(queries, at, keys, at_keys + key.to(tl.int64) * D, usable, D, BR, BD)
            runner = tl.minimum(runner, tl.maximum(least, near))
            choice = tl.where(near < least, key, choice)
            least = tl.minimum(least, near)
        sure = certain(least, runner, D)
        distance, good = exact(queries, at, row_ok, keys, at_keys + choice.to(tl.int64) * D, D, BR, BD)
        cell = line.to(tl.int64) * C + book
        finish(indices, distances, listed, count, cell, row_ok, good, sure, choice, distance)
