"""The search of small codebooks, whose keys stay on the chip: one float16 product leaves each row a few candidates.

``resident`` scores tiles of rows against all keys. The score of a key is off by at most ``error``, so the nearest key
is among the candidates, those that score within twice that of the least. Where there is one, it is the nearest. The
candidates of all other rows, about two for each, are bits of words: ``refine`` measures them.

The bound, for a row x and a key k that float16 leaves off by e and f: x.k - (x - e).(k - f) = e.(k - f) + x.f, at most
|e| r + |x| max |f|. Both are measured, which makes them less than half of what rounding could do. To that comes
``score_error``. Rows of at most 10 coordinates need neither: one product holds all three of ``search``.

Rows that no score can be trusted for get NaN as their error, and no candidate.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def _scores(left, t, right, norm, FORM: tl.constexpr):
    scores = tl.dot(left, right)
    if FORM == ADDED:
        scores += t[:, None] * norm[None, :]
    return scores


@triton.jit
def _least(scores, BN: tl.constexpr, P: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """The least score of each row and thread."""
    return tl.min(tl.min(tl.reshape(scores, (BN, P // (L * E), L, E)), 3), 1)


@triton.jit
def _candidates(scores, limit, BN: tl.constexpr, P: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """Which of P scores are within the limit: words [BN, P / (16 L), L] of 16 bits, one for each key of a thread."""
    J: tl.constexpr = min(16 // E, P // (L * E))
    W: tl.constexpr = P // (J * L * E)
    near = tl.permute(tl.reshape(scores, (BN, W, J, L, E)), (0, 1, 3, 2, 4)) <= limit[:, None, None, None, None]
    # In floats, which another pipe adds up; of 16 bits they are exact. A product and a sum would become a choice.
    bits = tl.where(near, 1.0, 0.0)
    for level in tl.static_range(4 if J * E == 16 else 3):
        low, high = tl.split(tl.reshape(bits, (BN, W, L, J * E // 2 ** (level + 1), 2)))
        bits = tl.fma(high, 2.0 ** (2**level), low)
    return tl.reshape(bits, (BN, W, L)).to(tl.int32)


@triton.jit
def _key(word, bit, L: tl.constexpr, E: tl.constexpr):
    """The key of a bit of a word."""
    return word // L * (16 * L) + word % L * E + bit // E * (L * E) + bit % E


@triton.jit
def _highest(bits):
    """The place of the highest bit; 1 to 65535."""
    return (bits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127 & 15


@triton.jit
def _summary(words, first: tl.constexpr, W: tl.constexpr, L: tl.constexpr):
    """A sum over all words of a row that tells of a single candidate: nonzero words | their places | the words."""
    place = first + tl.arange(0, W)[:, None] * L + tl.arange(0, L)[None, :]
    return tl.sum(tl.where(words != 0, words + (place << 20) + (1 << 27), 0), 1)


@triton.jit(do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c", "workers", "capacity"])
def resident(
    queries,
    keys,
    floats,
    words,
    indices,
    distances,
    open_rows,
    open_words,
    opened,
    rows,
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    workers,
    capacity,
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
    RADII_WIDTH: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    BN: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    WORDS: tl.constexpr,
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
    rest = largest(floats + RADII + TILES, TILES, RADII_WIDTH)
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
    slot = tl.program_id(0) * capacity.to(tl.int64)
    filled = 0
    for tile in tl.range(tl.program_id(0) // C, tl.cdiv(rows, BN), workers):
        line = tile * BN + tl.arange(0, BN)
        row_ok = line < rows
        at = row_offsets(tl.minimum(line, rows - 1), book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
        query = tl.load(queries + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        q = query.to(tl.float32) * scale - centre[None, :]
        norm = tl.sqrt(tl.sum(tl.where(real, q * q, 0.0), 1))
        t, fits = power_of_two(norm)
        left = left_parts(q, t, column, D, FORM)[0]
        norm *= t
        error = score_error(norm, t, radius, D, DEPTH)
        if FORM != CONCAT:
            lost = tl.where(real, -q * t[:, None] - left.to(tl.float32), 0.0)
            error += 1.001 * (tl.sqrt(tl.sum(lost * lost, 1)) * radius + norm * rest)
        error = tl.where(fits, error, float("nan"))

        scores_0 = _scores(left, t, right_0, norm_0, FORM)
        least = _least(scores_0, BN, P0, L, E)
        if P1 > 0:
            scores_1 = _scores(left, t, right_1, norm_1, FORM)
            least = tl.minimum(least, _least(scores_1, BN, P1, L, E))
        if P2 > 0:
            scores_2 = _scores(left, t, right_2, norm_2, FORM)
            least = tl.minimum(least, _least(scores_2, BN, P2, L, E))
        least = tl.min(least, 1)
        limit = least + 2 * error
        words_0 = _candidates(scores_0, limit, BN, P0, L, E)
        summary = _summary(words_0, 0, words_0.shape[1], L)
        if P1 > 0:
            words_1 = _candidates(scores_1, limit, BN, P1, L, E)
            summary += _summary(words_1, P0 // 16, words_1.shape[1], L)
        if P2 > 0:
            words_2 = _candidates(scores_2, limit, BN, P2, L, E)
            summary += _summary(words_2, (P0 + P1) // 16, words_2.shape[1], L)
        summary = tl.sum(summary, 1)

        word = summary & 0xFFFFF
        sure = (summary >> 27 == 1) & ((word & (word - 1)) == 0) & (least < t * SEEN)
        choice = tl.where(sure, _key(summary >> 20 & 127, _highest(word), L, E), 0)
        key = tl.load(keys + choice[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        apart = tl.where(real, query.to(tl.float64) - key.to(tl.float64), 0.0)
        cell = line.to(tl.int64) * C + book
        tl.store(indices + cell, choice, mask=row_ok & sure)
        tl.store(distances + cell, tl.sum(apart * apart, 1), mask=row_ok & sure)

        left_open = row_ok & ~sure
        place = slot + filled + tl.cumsum(left_open.to(tl.int32), 0) - 1
        filled += tl.sum(left_open.to(tl.int32), 0)
        tl.store(open_rows + place, line, mask=left_open)
        _keep(open_words + place * WORDS, words_0, 0, left_open, words_0.shape[1], L)
        if P1 > 0:
            _keep(open_words + place * WORDS, words_1, P0 // 16, left_open, words_1.shape[1], L)
        if P2 > 0:
            _keep(open_words + place * WORDS, words_2, (P0 + P1) // 16, left_open, words_2.shape[1], L)
    tl.store(opened + tl.program_id(0), filled)


@triton.jit
def _keep(out, words, first: tl.constexpr, row_ok, W: tl.constexpr, L: tl.constexpr):
    place = first + tl.arange(0, W)[:, None] * L + tl.arange(0, L)[None, :]
    tl.store(out[:, None, None] + place[None], words.to(tl.int16), mask=row_ok[:, None, None])


@triton.jit(do_not_specialize=["rows", "S", "stride_b", "stride_s", "stride_c", "capacity"])
def refine(
    queries,
    keys,
    floats,
    open_rows,
    open_words,
    opened,
    indices,
    distances,
    listed,
    count,
    S,
    stride_b,
    stride_s,
    stride_c,
    C,
    K,
    capacity,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    NORMS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The nearest candidate of the rows that one program of ``resident`` left open; what is not sure is listed."""
    book = (tl.program_id(0) % C).to(tl.int64)
    at_keys = book * K * D
    norms = floats + book * (NBYTES // 4) + NORMS
    slot = tl.program_id(0) * capacity.to(tl.int64)
    total = tl.load(opened + tl.program_id(0))
    word = tl.arange(0, WIDTH)
    for first in range(tl.program_id(1) * BR, total, tl.num_programs(1) * BR):
        item = first + tl.arange(0, BR)
        row_ok = item < total
        place = slot + tl.minimum(item, total - 1)
        line = tl.load(open_rows + place)
        at = row_offsets(line, book, S, stride_b, stride_s, stride_c, FLAT, ALIGN)
        inside = row_ok[:, None] & (word < WORDS)[None, :]
        left = tl.load(open_words + place[:, None] * WORDS + word[None, :], mask=inside, other=0).to(tl.int32) & 0xFFFF
        least = tl.full((BR,), FAR, tl.float32)
        runner = least
        choice = tl.zeros((BR,), tl.int32)
        while tl.max(tl.max(left, 1), 0) != 0:
            # One candidate of every row that has one left.
            lowest = left & -left
            candidates = tl.where(left != 0, _key(word[None, :], _highest(lowest), L, E), 16 * WORDS)
            key = tl.min(candidates, 1)
            left = tl.where(candidates == key[:, None], left ^ lowest, left)
            some = key < 16 * WORDS
            usable = some & (tl.load(norms + key, mask=some, other=FAR) < SEEN)
            near = measured(queries, at, keys, at_keys + key.to(tl.int64) * D, usable, D, BR, BD)
            runner = tl.minimum(runner, tl.maximum(least, near))
            choice = tl.where(near < least, key, choice)
            least = tl.minimum(least, near)
        sure = certain(least, runner, D)
        distance, good = exact(queries, at, row_ok, keys, at_keys + choice.to(tl.int64) * D, D, BR, BD)
        cell = line.to(tl.int64) * C + book
        finish(indices, distances, listed, count, cell, row_ok, good, sure, choice, distance)
