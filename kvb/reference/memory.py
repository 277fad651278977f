"""Product keys and weighted rows: what memory layers look up, and the weighted sum of the rows that they find.

Source: Lample et al., Large memory layers with product keys, NeurIPS 2019 (arXiv:1907.05242), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.reference.shared import (
    TILE,
    accumulator,
    require,
    require_floating,
    require_in_table,
    require_shape,
    require_tensors,
)
from kvb.reference.values import gather_backward_rows


def product_nearest(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """For queries [N, C, D] the best of K * K pairs of half keys [C, 2, K, D / 2]: indices and scores [N, C, T].

    Pair (i, j) has index i * K + j, and scores ``q[:D/2] @ keys[c, 0, i] + q[D/2:] @ keys[c, 1, j]``: both half scores
    as ``torch.matmul`` rounds them, NaN as -Inf; the best are those of the highest exact sum, and of equal ones those
    of the lowest index. Sums come back in float32 (float64 for float64 queries).
    """
    require_tensors(queries=queries, keys=keys)
    require_floating(queries=queries, keys=keys)
    require(keys.dtype == queries.dtype, f"expected keys {queries.dtype} as queries, got {keys.dtype}")
    require_shape("keys", keys, "C", 2, "K", "D / 2")
    C, _, K, half = keys.shape
    require_shape("queries", queries, "N", C, 2 * half)
    require(K <= 1 << 16, f"expected at most {1 << 16} keys of a half, got {K}")
    require(1 <= topk <= K * K, f"expected topk from 1 to K * K = {K * K}, got {topk}")
    N = len(queries)
    indices = torch.empty((N, C, topk), dtype=torch.int64, device=queries.device)
    scores = torch.empty((N, C, topk), dtype=accumulator(queries.dtype), device=queries.device)
    step = max(1, TILE // max(1, C * max(2 * K, 8 * topk)))
    for n in range(0, N, step):
        rows = slice(n, n + step)
        indices[rows], scores[rows] = _best_pairs(queries[rows], keys, topk)
    return indices, scores


def _best_pairs(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    K, half = keys.shape[2:]
    halves = queries.unflatten(-1, (2, half)).permute(1, 2, 0, 3) @ keys.transpose(-1, -2)  # [C, 2, N, K]
    halves = halves.to(accumulator(queries.dtype)).permute(2, 0, 1, 3)
    best, places = halves.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=-1, descending=True, stable=True)
    ranks = min(K, topk)
    # (i + 1) * (j + 1) - 1 pairs are no worse than the pair of ranks i and j.
    counts = torch.arange(1, ranks + 1, device=queries.device)
    i, j = (counts[:, None] * counts <= topk).nonzero().unbind(-1)
    first, second, indices = best[..., 0, :][..., i], best[..., 1, :][..., j], places[..., 0, :][..., i] * K
    indices = indices + places[..., 1, :][..., j]
    order = _descending(first, second, indices)[..., :topk]
    indices = indices.gather(-1, order)
    pair = torch.stack([indices // K, indices % K], -2)
    return indices, halves.gather(-1, pair).sum(-2)


def _descending(first: Tensor, second: Tensor, indices: Tensor) -> Tensor:
    """The order of the exact sums of first and second, greatest first; of equal ones by ascending index."""
    sums = first + second
    of_second = sums - first
    lost = (first - (sums - of_second)) + (second - of_second)  # what rounding took from the sums
    order = indices.argsort(dim=-1, stable=True)
    for by in (lost.nan_to_num(0.0, 0.0, 0.0), sums.nan_to_num(-torch.inf, torch.inf, -torch.inf)):
        order = order.gather(-1, by.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return order


def _require_fetch(values: Tensor, indices: Tensor, **other: Tensor) -> None:
    ((name, given),) = other.items()
    require_tensors(values=values, indices=indices, **other)
    require_floating(values=values, **other)
    require_shape("values", values, "K", "V")
    require_shape("indices", indices, "N", "T")
    require(indices.dtype == torch.int64, f"expected indices torch.int64, got {indices.dtype}")
    require_shape(name, given, len(indices), (indices if name == "weights" else values).shape[1])
    require(given.dtype == values.dtype, f"expected {name} {values.dtype} as values, got {given.dtype}")
    require_in_table(indices, len(values))


def gather_weighted(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The sum over T of ``weights[n, t] * values[indices[n, t]]``, for values [K, V] and weights [N, T]: [N, V]."""
    _require_fetch(values, indices, weights=weights)
    (N, T), V, dtype = indices.shape, values.shape[1], accumulator(values.dtype)
    out = values.new_empty((N, V))
    for part, rows, each in zip(*(one.split(_samples(T, V)) for one in (out, indices, weights)), strict=True):
        fetched = values.index_select(0, rows.flatten()).view(*rows.shape, V).to(dtype)
        part.copy_((fetched * each.to(dtype)[..., None]).sum(1))
    return out


def gather_dot(values: Tensor, indices: Tensor, vectors: Tensor) -> Tensor:
    """The inner products of vectors [N, V] with each of their rows ``values[indices]``, for values [K, V]: [N, T]."""
    _require_fetch(values, indices, vectors=vectors)
    (N, T), V, dtype = indices.shape, values.shape[1], accumulator(values.dtype)
    out = values.new_empty((N, T))
    for part, rows, each in zip(*(one.split(_samples(T, V)) for one in (out, indices, vectors)), strict=True):
        fetched = values.index_select(0, rows.flatten()).view(*rows.shape, V).to(dtype)
        part.copy_((fetched * each.to(dtype)[:, None]).sum(-1))
    return out


def scatter_weighted_rows(vectors: Tensor, indices: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``gather_weighted`` for its table [K, V], as merged rows; vectors [N, V] are that of its result.

    Ascending rows [M] (tail -1), their gradients [M, V], and how many there are, [1]; M is N * T, or K if that is less.
    """
    require_tensors(vectors=vectors, indices=indices, weights=weights)
    require_floating(vectors=vectors, weights=weights)
    require_shape("indices", indices, "N", "T")
    require_shape("vectors", vectors, len(indices), "V")
    require_shape("weights", weights, *indices.shape)
    require(indices.dtype == torch.int64, f"expected indices torch.int64, got {indices.dtype}")
    require(weights.dtype == vectors.dtype, f"expected weights {vectors.dtype} as vectors, got {weights.dtype}")
    require_in_table(indices, K)
    dtype, width = accumulator(vectors.dtype), _samples(1, indices.numel())
    scaled, codes = weights.to(dtype)[..., None, None], indices[..., None]
    parts = []
    for block in vectors.split(width, -1):  # a few columns at a time
        rows, grads, count = gather_backward_rows(scaled * block.to(dtype)[:, None, None], codes, K, "none")
        parts.append(grads)
    return rows, torch.cat(parts, -1).to(vectors.dtype), count


def _samples(T: int, V: int) -> int:
    return max(1, TILE // max(1, T * V))
