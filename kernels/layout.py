"""How the keys of a codebook lie in its packed bytes, by the number of keys K and their dim D."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kvb.kernels.device import ceil_div, multiple, power_of_two

# Where the norm and the two float16 parts of a key stand.
CONCAT = 0  # one row [high | low | high | norm's high | norm's low]: one product of depth 32
FOLDED = 1  # high and low apart, the norm in two spare columns of high
ADDED = 2  # high and low apart, the norm added after the products

CONCAT_DIMS = 10  # 3 D + 2 columns of 32
PIECE = 64  # columns at a time of rows with more than 128
TILE = 64  # keys that one program packs, and whose largest norm is one number


class Layout(NamedTuple):
    """Where things lie in one packed codebook: floats first, counted in float32, then parts of keys, in float16.

    scale | centre [D] | radii [TILES], squared | NORMS: half norms [Kp] | HIGH: [Kp, DP] | LOW: [Kp, DP]
    """

    FORM: int
    DP: int
    Kp: int
    TILES: int
    RADII: int
    NORMS: int
    HIGH: int
    LOW: int
    NBYTES: int

    @property
    def depth(self) -> int:
        """Products summed one after the other at full size: the small ones of parts come first, if they come apart.

        8 are what rounds the small ones, which are 2^-11 of the others, and the norm.
        """
        return 3 * self.DP if self.DP > 128 else self.DP + 8


@functools.lru_cache(maxsize=256)
def layout(K: int, D: int) -> Layout:
    if D <= CONCAT_DIMS:
        form, DP = CONCAT, 32
    elif D <= 128:
        DP = power_of_two(max(16, D))  # the least depth of a product is 16
        form = FOLDED if D + 2 <= DP else ADDED
    else:
        form, DP = ADDED, multiple(D, PIECE)
    Kp = multiple(K, 64 if K <= 1024 else 128)  # whole tiles of the filter: see ``filter_of`` in launch_filter.py
    tiles = ceil_div(Kp, TILE)
    # Floats in multiples of 16: what follows begins at 64 bytes.
    radii = multiple(1 + D, 16)
    norms = radii + multiple(tiles, 16)
    high = 2 * (norms + Kp)
    low = high if form == CONCAT else high + Kp * DP
    return Layout(form, DP, Kp, tiles, radii, norms, high, low, multiple(2 * (low + Kp * DP), 64))


def packed_nbytes(K: int, D: int, dtype: torch.dtype) -> int:
    """Bytes of one packed codebook; float64 keys are searched as they are."""
    return 64 if dtype == torch.float64 else layout(int(K), int(D)).NBYTES  # of a tracer's sizes too
