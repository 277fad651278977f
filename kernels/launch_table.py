"""The launch table: block sizes of the filter and the layout of its scores, by architecture. ``SEARCH`` is all of it.

Not one entry is measured: they are what compiles without spilling, fits into shared memory, and keeps two programs on a
multiprocessor where that is possible.
"""

from __future__ import annotations

from typing import NamedTuple


class Filter(NamedTuple):
    """Block sizes of ``search``: BN rows times BK keys."""

    BN: int
    BK: int
    warps: int
    stages: int


class Group(NamedTuple):
    """How the scores of a row lie in registers: J * E next to each other in a thread, L threads sharing the row."""

    J: int
    L: int
    E: int


LANES = Group(4, 4, 2)  # the accumulators of mma and wgmma
ROWS = Group(1, 1, 8)  # a row per thread, as tcgen05 leaves them


class Target(NamedTuple):
    """A column of the table: the layout of scores, and ``search`` by the columns of a packed row.

    Large tiles feed the matrix units; registers and shared memory bound them. ``resident`` is the largest key dim for
    which ``resident`` keeps a whole small codebook on the chip: where products take both factors from registers, the
    keys and the scores of a row do not fit at once.
    """

    group: Group
    filters: dict[int, Filter]  # by DP; 0 for more than 128, which come in pieces
    resident: int


SEARCH = {
    "sm_75": Target(LANES, {}, resident=0),  # without matrix units no filter is faster than ``scan``
    "sm_80": Target(
        LANES,
        {
            16: Filter(128, 128, 4, 3),
            32: Filter(128, 64, 4, 3),
            64: Filter(128, 64, 4, 3),
            128: Filter(128, 32, 4, 2),
            0: Filter(128, 64, 8, 2),
        },
        resident=0,
    ),
    "sm_90": Target(
        LANES,
        {
            16: Filter(128, 128, 4, 3),
            32: Filter(256, 128, 8, 3),
            64: Filter(256, 128, 8, 3),
            128: Filter(128, 128, 8, 2),
            0: Filter(128, 128, 8, 2),
        },
        resident=32,
    ),
    "sm_100": Target(
        ROWS,
        {
            16: Filter(128, 64, 4, 3),
            32: Filter(128, 64, 4, 3),
            64: Filter(128, 64, 4, 3),
            128: Filter(128, 64, 4, 2),
            0: Filter(128, 64, 8, 2),
        },
        resident=30,
    ),
    "sm_120": Target(
        LANES,
        {
            16: Filter(128, 128, 4, 3),
            32: Filter(128, 64, 4, 3),
            64: Filter(128, 64, 4, 2),
            128: Filter(128, 32, 4, 2),
            0: Filter(64, 64, 4, 2),
        },
        resident=0,
    ),
    "gfx942": Target(
        LANES,
        {
            16: Filter(128, 64, 4, 2),
            32: Filter(128, 64, 4, 2),
            64: Filter(64, 64, 4, 2),
            128: Filter(64, 64, 4, 2),
            0: Filter(64, 64, 4, 2),
        },
        resident=32,
    ),
    "gfx950": Target(
        LANES,
        {
            16: Filter(128, 64, 4, 2),
            32: Filter(128, 64, 4, 2),
            64: Filter(128, 64, 4, 2),
            128: Filter(64, 64, 4, 2),
            0: Filter(64, 64, 4, 2),
        },
        resident=32,
    ),
}
