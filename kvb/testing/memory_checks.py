"""Checks of the operators of memory layers, as ``checks.py`` has them for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb.testing.cases import Problem
from kvb.testing.expectations import UNIT, accumulator, require, require_close, require_like


def product_problem(problem: Problem) -> tuple[Tensor, Tensor]:
    """Queries [N, 2, 2 * D] and half keys [2, 2, K, D] of one dtype."""
    rows = problem.queries.reshape(-1, problem.case.D).to(problem.keys.dtype)
    queries = torch.stack([torch.cat([rows, rows.flip(0)], -1), torch.cat([rows, -rows], -1)], 1)
    first, last = problem.keys[0], problem.keys[-1]
    return queries, torch.stack([torch.stack([first, last]), torch.stack([last, first.flip(0)])])


def check_product_nearest(op: Any, problem: Problem) -> None:
    """The best pairs of half keys, against sums of the best of each half in float64."""
    queries, keys = product_problem(problem)
    (C, _, K, D), N = keys.shape, len(queries)
    T = min(max(2, problem.case.T), K * K)
    indices, scores = op.product_nearest(queries, keys, T)
    indices = require_like("indices", indices, (N, C, T), torch.int64)
    scores = require_like("scores", scores, (N, C, T), accumulator(queries.dtype)).double()
    require(((indices >= 0) & (indices < K * K)).all(), f"an index outside of [0, {K * K})")
    ordered = indices.sort(-1).values
    require((ordered[..., 1:] != ordered[..., :-1]).all(), "a pair stands twice among the best of one query")
    queries, keys = queries.cpu().double(), keys.cpu().double()
    good = queries.isfinite().all(-1)
    if not (keys.isfinite().all() and good.any()):
        return
    halves = torch.where(good[..., None], queries, 0).view(N, C, 2, D).transpose(0, 1).transpose(1, 2)
    products = halves @ keys.transpose(-1, -2)  # [C, 2, N, K]
    sizes = (halves.abs() @ keys.abs().transpose(-1, -2)).amax(-1).sum(1).T[..., None]
    allowed = (D + 8) * UNIT[problem.keys.dtype] * sizes
    tops = products.topk(min(K, T), -1).values
    best = (tops[:, 0, :, :, None] + tops[:, 1, :, None]).flatten(2).topk(T, -1).values.transpose(0, 1)
    pairs = torch.stack([indices // K, indices % K])  # [2, N, C, T]
    chosen = products.permute(1, 2, 0, 3).gather(-1, pairs).sum(0)
    allowed = allowed.expand_as(chosen)[good]
    require((chosen[good] >= best[good] - 2 * allowed).all(), "a pair was found that is not among the best")
    require_close("scores", scores[good], chosen[good], allowed)
    falls = scores[good]
    require((falls[:, 1:] <= falls[:, :-1]).all(), "scores that do not fall")


def _fetch(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [K, V], indices [N, T], weights [N, T], vectors [N, V]."""
    case, dtype = problem.case, problem.values.dtype
    indices = problem.indices.flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(indices.shape, generator=generator, dtype=torch.float64)
    vectors = torch.randn((case.B, case.V), generator=generator, dtype=torch.float64)
    weights, vectors = (one.to(indices.device, dtype) for one in (weights, vectors))
    return problem.values[0], indices, weights, vectors


def _judge(name: str, found: Tensor, products: Tensor, dim: int) -> None:
    """Sums over an axis of products [N, T, V] in float64."""
    exact, size = products.sum(dim), products.abs().sum(dim)
    found = require_like(name, found, exact.shape, found.dtype)
    rounding = (products.shape[dim] + 4) * UNIT[accumulator(found.dtype)] * size + 2 * UNIT[found.dtype] * exact.abs()
    require_close(name, found, exact, rounding + torch.finfo(found.dtype).smallest_normal)


def check_gather_weighted(op: Any, problem: Problem) -> None:
    values, indices, weights, _ = _fetch(problem)
    found = op.gather_weighted(values, indices, weights)
    require(found.dtype == values.dtype, f"expected sums {values.dtype}, got {found.dtype}")
    fetched = values.cpu().double()[indices.cpu()]
    _judge("weighted sums", found, fetched * weights.cpu().double()[..., None], 1)


def check_gather_dot(op: Any, problem: Problem) -> None:
    values, indices, _, vectors = _fetch(problem)
    found = op.gather_dot(values, indices, vectors)
    require(found.dtype == values.dtype, f"expected products {values.dtype}, got {found.dtype}")
    fetched = values.cpu().double()[indices.cpu()]
    _judge("inner products", found, fetched * vectors.cpu().double()[:, None], 2)


def check_scatter_weighted_rows(op: Any, problem: Problem) -> None:
    (K, V), (_, indices, weights, vectors) = problem.values.shape[1:], _fetch(problem)
    rows, grads, count = op.scatter_weighted_rows(vectors, indices, weights, K)
    touched, M = indices.cpu().unique(), min(indices.numel(), K)
    rows = require_like("rows", rows, (M,), torch.int64)
    grads = require_like("gradients", grads, (M, V), vectors.dtype)
    n = int(require_like("the number of rows", count, (1,), torch.int64))
    require(n == len(touched), f"expected {len(touched)} rows, got {n}")
    require(torch.equal(rows[:n], touched), "expected the touched rows, ascending")
    require((rows[n:] == -1).all() and (grads[n:] == 0).all(), "expected rows -1 and gradients 0 in the tail")
    each = weights.cpu().double()[..., None] * vectors.cpu().double()[:, None]
    flat, empty = indices.cpu().flatten(), torch.zeros(K, V, dtype=torch.float64)
    exact, size = (empty.index_add(0, flat, one.flatten(0, 1))[touched] for one in (each, each.abs()))
    rounding = (indices.numel() + 4) * UNIT[accumulator(grads.dtype)] * size + 2 * UNIT[grads.dtype] * exact.abs()
    require_close("gradients", grads[:n], exact, rounding + torch.finfo(grads.dtype).smallest_normal)
