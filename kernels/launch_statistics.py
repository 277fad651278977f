"""Launches what learning keys needs to know of a batch: ``accumulate`` and ``count``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.kernels import statistics
from kvb.kernels.device import ceil_div, require
from kvb.kernels.launch_shared import (
    COUNT,
    FLAT,
    Source,
    accumulator,
    find_rows,
    require_codes,
    require_rows,
    tile_of,
)
from kvb.kernels.launcher import run


def accumulate(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Hits int64 [C, K] and sums [C, K, D] of the finite queries assigned to every pair by indices [B, S, C].

    The sums are rounded once, and the same whatever the order of the queries.
    """
    source = _source(queries, indices, K)
    dtype = accumulator(queries)
    hits = queries.new_zeros(source.table[:2], dtype=torch.int64)
    if queries.numel() == 0 or K == 0:
        find_rows(source, None, hits, None)
        return hits, queries.new_zeros(source.table, dtype=dtype)
    rows = source.no_rows()
    peaks = queries.new_zeros(source.table, dtype=torch.int64 if dtype == torch.float64 else torch.int32)
    find_rows(source, rows, hits, peaks)
    parts = queries.new_zeros((2, *source.table), dtype=torch.float64)
    _, K, V = source.table
    block, columns = tile_of(COUNT, V)
    run(
        statistics.add_queries,
        (ceil_div(source.count, block), ceil_div(V, columns)),
        **source.rows,
        rows=rows,
        hits=hits,
        peaks=peaks,
        parts=parts,
        count=source.count,
        S=queries.shape[1],
        C=queries.shape[2],
        K=K,
        BLOCK_R=block,
        BLOCK_V=columns,
    )
    sums = queries.new_empty(source.table, dtype=dtype)
    run(
        statistics.round_sums,
        (ceil_div(sums.numel(), FLAT),),
        parts=parts,
        peaks=peaks,
        sums=sums,
        SIZE=sums.numel(),
        BLOCK=FLAT,
    )
    return hits, sums


def count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    """Hits int64 [C, K] of the finite queries assigned to every pair by indices [B, S, C]."""
    source = _source(queries, indices, K)
    hits = queries.new_zeros(source.table[:2], dtype=torch.int64)
    find_rows(source, None, hits, None)
    return hits


def _source(queries: Tensor, indices: Tensor, K: int) -> Source:
    require_rows(queries, "queries", "B, S, C, D", -1, -1, -1, -1)
    require_codes(indices, queries.shape[2], K, queries)
    require(
        indices.shape == queries.shape[:3],
        lambda: (
            f"expected indices {tuple(queries.shape[:3])} for queries {tuple(queries.shape)}, "
            f"got {tuple(indices.shape)}"
        ),
    )
    return Source(queries, indices, K)
