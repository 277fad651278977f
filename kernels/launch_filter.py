"""Launches the filters of a search: what they are not sure of, they list.

``resident``, ``refine``: small codebooks, whose packed keys stay on the chip
``prepare``, ``search``, ``settle``: larger ones
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvb.kernels import resident, search
from kvb.kernels.device import ceil_div, matrix_units, multiple, power_of_two, processors
from kvb.kernels.launch_table import Filter, Group, Target
from kvb.kernels.launcher import MOST_REGISTERS, Options, run
from kvb.kernels.layout import ADDED, CONCAT, PIECE, Layout
from kvb.kernels.rows import Rows

RESIDENT_K = 256  # codebooks up to here may stay on the chip
RESIDENT_ROWS = 64  # of a tile: their scores against all keys stay in registers
RESIDENT_PROGRAMS = 8  # for each processor: they take turns at memory and arithmetic
REFINE_ROWS, REFINE_COLUMNS = 32, 4  # one thread per row: more would repeat its addresses
REFINE_PROGRAMS = 4  # for each program of ``resident``
REFINE = Options(warps=1)

SMALL_ROWS = 64  # of a tile for batches that fit into it, with 4 warps
MOST_SPLITS = 64  # parts of a codebook, each for programs of its own
LEAST_TILES = 4  # of a part of a codebook
BOOKS = 8  # codebooks searched side by side: their packed keys share the cache
PREPARE_ROWS = 64  # of a program: 64 columns of each fill 32 registers of 128 threads
RADII = 1024  # largest norms of tiles at a time
PREPARE_REGISTERS = 168  # three programs of 128 threads share the 65536 of a multiprocessor
SETTLE_ROWS, SETTLE_COLUMNS = 128, 2  # one thread per row: more would repeat its addresses
SETTLE = Options(registers=MOST_REGISTERS)


def resident_rows(rows: Rows, keys: Tensor, packed: Tensor, layout: Layout, group: Group, listed: Tensor) -> Tensor:
    """Search a small codebook; how many rows it listed, int32 [1]."""
    C, K, D = keys.shape
    _, L, E = group
    group = Group(math.isqrt(RESIDENT_K // L) // E, L, E)  # as many groups as places in one
    tiles = ceil_div(rows.count, RESIDENT_ROWS)
    workers = min(tiles, ceil_div(RESIDENT_PROGRAMS * processors(keys.device), C))
    capacity = min(ceil_div(tiles, workers) * RESIDENT_ROWS, rows.count)  # rows of one program
    counts = torch.zeros(1 + workers * C, dtype=torch.int32, device=keys.device)
    count = counts[:1]
    shared: dict[str, Any] = {
        **rows.arguments,
        "keys": keys,
        "floats": packed.view(torch.float32),
        "indices": rows.indices,
        "distances": rows.distances,
        "open_rows": listed.new_empty(workers * C * capacity),
        "open_words": listed.new_empty(workers * C * capacity * L),
        "opened": counts[1:],
        "K": K,
        "capacity": capacity,
        "NBYTES": layout.NBYTES,
        "NORMS": layout.NORMS,
        "J": group.J,
        "L": L,
        "E": E,
    }
    _resident(rows, packed, layout, workers, K, shared)
    run(
        resident.refine,
        (workers * C, REFINE_PROGRAMS),
        REFINE,
        **shared,
        listed=listed,
        count=count,
        BR=REFINE_ROWS,
        BD=min(REFINE_COLUMNS, power_of_two(D)),
    )
    return count


def _resident(rows: Rows, packed: Tensor, layout: Layout, workers: int, K: int, shared: dict[str, Any]) -> None:
    P0, P1, P2 = _parts(K, layout)
    run(
        resident.resident,
        (workers * len(packed),),
        Options(stages=1, contract=rows.wide),
        **shared,
        words=packed.view(torch.float16),
        rows=rows.count,
        workers=workers,
        TILES=layout.TILES,
        RADII=layout.RADII,
        HIGH=layout.HIGH,
        FORM=layout.FORM,
        DP=layout.DP,
        DEPTH=layout.depth,
        MATRIX=matrix_units(packed.device),
        RADII_WIDTH=min(RADII, power_of_two(layout.TILES)),
        P0=P0,
        P1=P1,
        P2=P2,
        BN=RESIDENT_ROWS,
    )


def _parts(K: int, layout: Layout) -> tuple[int, ...]:
    """Three powers of two that sum up to K keys and few more."""
    if K <= 128 + 64 + 32:
        parts = [part for part in (128, 64, 32) if multiple(K, 32) & part]
    else:  # smaller parts where half norms take registers, too
        parts = [128, 64, 64] if layout.FORM == ADDED else [128, 128]
    return (*parts, 0, 0)[:3]


def filter_rows(rows: Rows, keys: Tensor, packed: Tensor, layout: Layout, column: Target, listed: Tensor) -> Tensor:
    """Search a large codebook; how many rows it listed, int32 [1]."""
    C, K, _ = keys.shape
    entry = _filter_of(rows.count, K, layout, column)
    tiles, row_tiles = ceil_div(K, entry.BK), ceil_div(rows.count, entry.BN)
    # Two programs share a processor.
    splits = max(1, min(MOST_SPLITS, 2 * processors(keys.device) // (row_tiles * C), tiles // LEAST_TILES))
    per_split = ceil_div(tiles, splits)
    splits = ceil_div(tiles, per_split)
    count = listed.new_empty(1)
    groups = listed.new_empty(rows.cells * splits)
    parts = 1 if layout.FORM == CONCAT else 2
    shared: dict[str, Any] = {
        "floats": packed.view(torch.float32),
        "prepared_words": packed.new_empty((C, rows.count, parts, layout.DP), dtype=torch.float16),
        "prepared_floats": packed.new_empty((C, rows.count, 2), dtype=torch.float32),
        "rows": rows.count,
        "NBYTES": layout.NBYTES,
        "FORM": layout.FORM,
        "DP": layout.DP,
    }
    _prepare(rows, layout, count, shared)
    run(
        search.search,
        (row_tiles * C, splits),
        Options(entry.warps, entry.stages, registers=MOST_REGISTERS),
        **shared,
        words=packed.view(torch.float16),
        groups=groups,
        C=C,
        K=K,
        per_split=per_split,
        splits=splits,
        NORMS=layout.NORMS,
        HIGH=layout.HIGH,
        LOW=layout.LOW,
        BN=entry.BN,
        BK=entry.BK,
        BD=PIECE if layout.DP > 128 else layout.DP,
        BOOKS=BOOKS,
        **column.group._asdict(),
    )
    _settle(rows, keys, shared["floats"], layout, column.group, groups, splits, listed, count)
    return count


def _filter_of(rows: int, K: int, layout: Layout, column: Target) -> Filter:
    """Block sizes of ``search``; its tiles of keys end where the packed keys do: see ``Kp`` in layout.py."""
    BN, BK, warps, stages = column.filters.get(layout.DP, column.filters[0])
    if rows <= SMALL_ROWS and layout.DP <= 64:
        BN, warps = SMALL_ROWS, 4
    return Filter(BN, min(BK, 64) if K <= 1024 else BK, warps, stages)


def _prepare(rows: Rows, layout: Layout, count: Tensor, shared: dict[str, Any]) -> None:
    run(
        search.prepare,
        (ceil_div(rows.count, PREPARE_ROWS) * rows.arguments["C"],),
        Options(registers=PREPARE_REGISTERS, contract=rows.wide),
        **rows.arguments,
        **shared,
        count=count,
        TILES=layout.TILES,
        RADII=layout.RADII,
        DEPTH=layout.depth,
        MATRIX=matrix_units(count.device),
        RADII_WIDTH=min(RADII, power_of_two(layout.TILES)),
        BR=PREPARE_ROWS,
        BD=min(PIECE, layout.DP),
    )


def _settle(
    rows: Rows,
    keys: Tensor,
    floats: Tensor,
    layout: Layout,
    group: Group,
    groups: Tensor,
    splits: int,
    listed: Tensor,
    count: Tensor,
) -> None:
    run(
        search.settle,
        (ceil_div(rows.cells, SETTLE_ROWS),),
        SETTLE,
        **rows.arguments,
        keys=keys,
        floats=floats,
        groups=groups,
        indices=rows.indices,
        distances=rows.distances,
        listed=listed,
        count=count,
        rows=rows.count,
        K=keys.shape[1],
        splits=splits,
        NBYTES=layout.NBYTES,
        NORMS=layout.NORMS,
        BR=SETTLE_ROWS,
        BD=SETTLE_COLUMNS,
        **group._asdict(),
    )
