"""The block sizes of the search on a GPU: the only part of this program that knows how the kernels are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kvb.kernels import layout
from kvb.kernels.device import target
from kvb.kernels.launch_table import SEARCH, Filter

# A small tile in many warps leaves each with too little to do.
ROWS_AND_WARPS, KEYS, STAGES = ((64, 4), (128, 4), (128, 8), (256, 8)), (64, 128), (2, 3, 4)


def _column(D: int) -> int:
    """The column of the table for a key dim."""
    DP = layout.layout(4096, D).DP
    return DP if DP <= 128 else 0


def current(device: torch.device, D: int) -> Filter:
    """The entry that a search of so many key dims is launched with."""
    return SEARCH[target(device)].filters[_column(D)]


def candidates(device: torch.device, D: int) -> list[Filter]:
    """The current entry, and what may be better."""
    found = [Filter(rows, keys, warps, stages) for rows, warps in ROWS_AND_WARPS for keys in KEYS for stages in STAGES]
    before = current(device, D)
    return [before, *(entry for entry in found if entry != before)]


@contextlib.contextmanager
def replaced(device: torch.device, D: int, entry: Filter) -> Iterator[None]:
    """Searches inside are launched with another entry."""
    filters = SEARCH[target(device)].filters
    before = filters[_column(D)]
    filters[_column(D)] = entry
    try:
        yield
    finally:
        filters[_column(D)] = before
