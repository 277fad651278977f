"""``nearest`` and ``lookup``: checks, allocation, and which kernels search.

    ``scan``: float64; more than one neighbour; few queries per codebook, where reading the keys is all there is to do;
        keys of one or two coordinates that lie too close together for a filter; GPUs without matrix units
    ``resident``, ``refine``, ``rescan``: small codebooks, whose packed keys stay on the chip
    ``prepare``, ``search``, ``settle``, ``rescan``: everything else
``rescan`` runs through the rows that the filter is not sure of. How many they are, only the device knows: it never
makes the host wait, nor does anything else here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.kernels.device import require, target
from kvb.kernels.launch_filter import RESIDENT_K, filter_rows, resident_rows
from kvb.kernels.launch_pack import packed as packed_for
from kvb.kernels.launch_scan import rescan_rows, scan_rows, splits
from kvb.kernels.launch_table import SEARCH
from kvb.kernels.launch_values import gather
from kvb.kernels.layout import layout, packed_nbytes
from kvb.kernels.rows import chunks

FEW = 2  # queries per codebook up to which ``scan`` has no rival

Fetch = tuple[Tensor, Tensor]  # values [C, K, V], and [B, S, C, V] for those of the nearest keys


def nearest(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` nearest keys of every query and codebook: indices and squared distances, both [B, S, C, T]."""
    _require_search(queries, keys, packed, mask, topk)
    return _nearest(queries, keys, packed, mask, topk, None)


def lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """Search and gather: values [B, S, C, V] (pooled [B, S, V]) and indices [B, S, C]; one kernel for few queries."""
    if queries.dim() == 3:  # of one position a sample
        out, indices = lookup(queries.unsqueeze(1), keys, packed, values, mask, pool)
        return out.squeeze(1), indices.squeeze(1)
    _require_search(queries, keys, packed, mask, 1)
    C, K, _ = keys.shape
    if pool == "none" and _few(queries) and splits(C, K, keys.device) == 1:
        fetched = values.new_empty((*queries.shape[:3], values.shape[2]))
        indices, _ = _nearest(queries, keys, packed, mask, 1, (values.contiguous(), fetched))
        return fetched, indices[..., 0]
    indices = _nearest(queries, keys, packed, mask, 1, None)[0][..., 0]
    return gather(values, indices, pool, "bscv"), indices


def _nearest(
    queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int, fetch: Fetch | None
) -> tuple[Tensor, Tensor]:
    (B, S, C, D), K = queries.shape, keys.shape[1]
    wide = torch.float64 in (queries.dtype, keys.dtype)
    indices = queries.new_empty((B, S, C, topk), dtype=torch.int64)
    distances = queries.new_empty((B, S, C, topk), dtype=torch.float64 if wide else torch.float32)
    if B * S * C == 0:
        return indices, distances
    keys = keys.contiguous()
    if queries.stride(3) != 1:
        queries = queries.contiguous()
    few, column = _few(queries), SEARCH[target(keys.device)]
    small = K <= RESIDENT_K and column.resident >= D
    if wide or topk > 1 or few or (not small and (_crowded(K, D) or not column.filters)):
        shares = splits(C, K, keys.device) if few and topk == 1 and not wide else 1
        for rows in chunks(queries, indices, distances, 1):
            scan_rows(rows, keys, mask, wide, shares, fetch)
        return indices, distances
    packed = packed if mask is None else packed_for(keys, mask)
    facts = layout(K, D)
    # What is kept of a row of a codebook: its candidates where it stays open, or its parts, t, error and group.
    for rows in chunks(queries, indices, distances, 24 if small else 16 + 4 * facts.DP):
        listed = indices.new_empty(rows.cells, dtype=torch.int32)
        if small:
            count = resident_rows(rows, keys, packed, facts, column.group, listed)
        else:
            count = filter_rows(rows, keys, packed, facts, column, listed)
        rescan_rows(rows, keys, mask, listed, count)
    return indices, distances


def _few(queries: Tensor) -> bool:
    return queries.shape[0] * queries.shape[1] <= FEW


def _crowded(K: int, D: int) -> bool:
    """Whether the filter would leave more than about a quarter of the rows to ``rescan``.

    The keys next to a query are about K^(-1/D) apart, so their scores by the square of that; normal and uniform keys
    were counted: it leaves about 16 times the error of a score over that. For a row left over, ``rescan`` costs about
    four times what ``scan`` does, and ``scan`` many times what the filter does.
    """
    error = (layout(K, D).depth + 9) * 2.0**-23  # as ``score_error`` in scores.py, of a score of about 1
    return 16 * error * K ** (2 / D) > 1 / 4


def _require_search(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> None:
    C, K, D = keys.shape
    require(
        queries.dim() == 4 and queries.shape[2:] == (C, D),
        lambda: f"expected queries [B, S, {C}, {D}] for keys {tuple(keys.shape)}, got {tuple(queries.shape)}",
    )
    require(
        queries.device == keys.device == packed.device,
        lambda: (
            f"expected queries, keys and packed on one device, got {queries.device}, {keys.device} and {packed.device}"
        ),
    )
    nbytes = packed_nbytes(K, D, keys.dtype)
    require(
        packed.dtype == torch.uint8 and packed.shape == (C, nbytes),
        lambda: (
            f"packed keys do not match: expected {nbytes} bytes for each of {C} codebooks (K={K} D={D} {keys.dtype}), "
            f"got {packed.dtype} {tuple(packed.shape)}; pack the keys again with pack_keys(keys)"
        ),
    )
    if mask is not None:
        require(
            mask.dtype == torch.bool and mask.shape == (C, K) and mask.device == keys.device,
            lambda: (
                f"expected mask torch.bool {(C, K)} on {keys.device}, "
                f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
            ),
        )
    require(1 <= topk <= K, lambda: f"expected topk between 1 and {K}, got {topk}")
