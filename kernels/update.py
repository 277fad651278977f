"""Moving the keys: one pass over a codebook and its statistics, which surveys the new keys for packing as it goes.

What belongs to whole pairs, [C, K], is decided before (launch_keys.py): by what the average of a pair is divided, and
which row replaces it. So a program reads and writes nothing but its own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel
from kvb.kernels.pack import claim, mixed, nothing_seen, seen, slots, store_survey
from kvb.kernels.scores import finite
from kvb.kernels.values import rounded


@triton.jit
def _mix(one, other, weight):
    """``one`` at weight 0 and ``other`` at weight 1, to the last bit."""
    return tl.where(weight < 0.5, one + weight * (other - one), other - (other - one) * (1 - weight))


@triton.jit
def _divide(x, by):
    """``x / by``, rounded once: a plain float32 division is only approximate on a GPU."""
    if x.dtype == tl.float64:
        return x / by
    else:
        return tl.div_rn(x, by)


@kernel("kvb_update_keys", do_not_specialize=["R"])
def update(
    keys,  # [C, K, D]
    averages,  # [C, K, D]
    cluster_size,  # [C, K]
    sums,  # [C, K, D]
    keep,  # [] the share of the old averages
    sizes,  # [C, K] the new cluster sizes
    divisors,  # [C, K] of averages, which makes keys of them; negative where a key stays
    places,  # [C, K] the spare row that replaces a pair, or -1; None where none does
    spare,  # [C, R, D] or None
    surveys,  # [C, SLICES, 4, D] as for ``survey``; None where another pass looks at the keys
    table,  # [C, 2, SLOTS] as for ``survey``, or None
    K,
    R,  # spare rows per codebook
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    SLOTS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Columns BD of one slice of a codebook: averages, keys and cluster sizes; where surveyed, BD holds whole rows."""
    book = (tl.program_id(0) // SLICES).to(tl.int64)
    piece = tl.program_id(0) % SLICES
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    share = tl.load(keep)
    total, least, most, count = nothing_seen(BD)
    for start in range(piece * SLICE, min(piece * SLICE + SLICE, K), BK):
        row = (start + tl.arange(0, BK)).to(tl.int64)
        live = row < K
        inside = live[:, None] & (d < D)[None, :]
        pair = book * K + row
        at = pair[:, None] * D + d[None, :]
        size = tl.load(sizes + pair, mask=live, other=0.0)
        divisor = tl.load(divisors + pair, mask=live, other=-1.0)
        before = tl.load(keys + at, mask=inside, other=0.0).to(sums.dtype.element_ty)
        average = tl.load(averages + at, mask=inside, other=0.0).to(sums.dtype.element_ty)
        average = _mix(tl.load(sums + at, mask=inside, other=0.0), average, share)
        mean = _divide(average, tl.where(divisor < 0, 1.0, divisor)[:, None])
        key = tl.where((divisor < 0)[:, None], before, mean)
        if places is not None:
            place = tl.load(places + pair, mask=live, other=-1)
            dead = (place >= 0)[:, None]
            from_row = spare + ((book * R + place) * D)[:, None] + d[None, :]
            fresh = tl.load(from_row, mask=inside & dead, other=0.0).to(key.dtype)
            key = tl.where(dead, fresh, key)
            average = tl.where(dead, fresh * size[:, None], average)
        key = rounded(key, keys.dtype.element_ty)
        tl.store(keys + at, key, mask=inside)
        tl.store(averages + at, rounded(average, averages.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            tl.store(cluster_size + pair, rounded(size, cluster_size.dtype.element_ty), mask=live)
        if surveys is not None:
            key = key.to(tl.float32)
            usable = live & (tl.min(finite(key).to(tl.int32), 1) != 0)
            total, least, most, count = seen(total, least, most, count, key, usable[:, None] & (d < D)[None, :], usable)
            one, two = mixed(tl.where(inside, key, 0.0), d)
            one, two = slots(one, two, SLOTS)
            claim(table + book * 2 * SLOTS, row, one, two, usable, SLOTS)
    if surveys is not None:
        store_survey(surveys + (book * SLICES + piece) * 4 * D, total, least, most, count, d, D)
