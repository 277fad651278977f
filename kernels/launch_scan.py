"""Launches the exact search by direct differences, ``scan`` and ``merge``, and ``rescan`` of what a filter left."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.kernels import scan
from kvb.kernels.device import ceil_div, multiple, power_of_two, processors
from kvb.kernels.launch_pack import allowed
from kvb.kernels.launcher import MOST_REGISTERS, Options, run
from kvb.kernels.rows import Rows

ROWS = 16  # at once, where there are so many
ELEMENTS, COLUMNS = 4096, 16  # of a tile of rows, keys and columns
LEAST = 1024  # keys that a part of a codebook should have
MOST_SPLITS = 64  # parts of a codebook, each for programs of its own
VALUES = 64  # columns of a value at a time
SCAN = Options(warps=8, registers=MOST_REGISTERS, contract=False)

MERGE_ROWS = 32  # of a program, with all parts of each
MERGE = Options()

RESCAN_KEYS, RESCAN_COLUMNS = 256, 16  # of a tile: one row takes all of ELEMENTS
RESCAN_PROGRAMS = 8  # for each processor
RESCAN = Options(warps=8, registers=MOST_REGISTERS, contract=False)


def splits(C: int, K: int, device: torch.device) -> int:
    """Parts of a codebook that ``scan`` takes in different programs, where codebooks alone do not occupy the device."""
    return max(1, min(MOST_SPLITS, 2 * processors(device) // C, K // LEAST))


def scan_rows(
    rows: Rows, keys: Tensor, mask: Tensor | None, wide: bool, splits: int, fetch: tuple[Tensor, Tensor] | None
) -> None:
    """All ranks of rows; with ``fetch``, values [C, K, V] and out [B, S, C, V], the values of the nearest, too."""
    C, K, D = keys.shape
    indices, distances = rows.indices, rows.distances
    if splits > 1:
        indices = rows.indices.new_empty((rows.cells, splits), dtype=torch.int32)
        distances = rows.distances.new_empty((rows.cells, splits), dtype=torch.float64)
    values, fetched = fetch or (keys, rows.distances)
    V = values.shape[2]
    block = min(ROWS, power_of_two(rows.count))
    run(
        scan.scan,
        (ceil_div(rows.count, block) * C, splits),
        SCAN,
        **rows.arguments,
        keys=keys,
        mask=allowed(mask, keys),
        values=values,
        indices=indices,
        distances=distances,
        fetched=fetched,
        rows=rows.count,
        K=K,
        T=rows.indices.shape[3],
        splits=splits,
        per_split=multiple(ceil_div(K, splits), ELEMENTS // COLUMNS),
        V=V,
        WIDE=wide,
        MASKED=mask is not None,
        PARTIAL=splits > 1,
        FETCH=fetch is not None,
        BR=block,
        BK=ELEMENTS // COLUMNS // block,
        BD=min(COLUMNS, power_of_two(D)),
        BV=min(VALUES, power_of_two(V)),
    )
    if splits > 1:
        run(
            scan.merge,
            (ceil_div(rows.cells, MERGE_ROWS),),
            MERGE,
            part_indices=indices,
            part_distances=distances,
            indices=rows.indices,
            distances=rows.distances,
            cells=rows.cells,
            K=K,
            splits=splits,
            BR=MERGE_ROWS,
            WIDTH=MOST_SPLITS,
        )


def rescan_rows(rows: Rows, keys: Tensor, mask: Tensor | None, listed: Tensor, count: Tensor) -> None:
    """The rows that a filter listed, int32 [cells], of which the first count [1] hold something."""
    _, K, D = keys.shape
    run(
        scan.rescan,
        (min(rows.cells, RESCAN_PROGRAMS * processors(keys.device)),),
        RESCAN,
        **rows.arguments,
        keys=keys,
        mask=allowed(mask, listed),
        listed=listed,
        count=count,
        indices=rows.indices,
        distances=rows.distances,
        K=K,
        MASKED=mask is not None,
        BK=RESCAN_KEYS,
        BD=min(RESCAN_COLUMNS, power_of_two(D)),
    )
