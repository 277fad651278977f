"""What learning keys needs to know of a batch, and one step of the keys' moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvb.reference.arithmetic import RowSums
from kvb.reference.packing import pack_keys
from kvb.reference.shared import (
    accumulator,
    finite_rows,
    flat_rows,
    require_codes,
    require_floating,
    require_shape,
    require_statistics,
    require_tensors,
    tiles,
)


def _require_queries(queries: Tensor, indices: Tensor, K: int) -> None:
    require_tensors(queries=queries, indices=indices)
    require_floating(queries=queries)
    require_shape("queries", queries, "B", "S", "C", "D")
    require_codes(indices, queries.shape[2], K)
    require_shape("indices", indices, *queries.shape[:3])


def accumulate(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Hits int64 [C, K] and sums [C, K, D] of the finite queries assigned to every pair by indices [B, S, C].

    The sums are rounded once, however many queries there are.
    """
    hits = count(queries, indices, K)
    B, S, C, D = queries.shape
    sums = RowSums(C * K, D, accumulator(queries.dtype), queries.device)
    for tile in tiles(B, S, C, D):
        part = torch.where(finite_rows(queries[tile])[..., None], queries[tile], 0).flatten(0, 2)
        sums.add(flat_rows(indices[tile], K, tile[2].start).flatten(), part)
    return hits, sums.rounded().view(C, K, D)


def count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    """Hits int64 [C, K] of the finite queries assigned to every pair by indices [B, S, C]."""
    _require_queries(queries, indices, K)
    B, S, C, D = queries.shape
    hits = torch.zeros(C * K, dtype=torch.int64, device=queries.device)
    for tile in tiles(B, S, C, D):
        rows = flat_rows(indices[tile], K, tile[2].start).flatten()
        hits.scatter_add_(0, rows, finite_rows(queries[tile]).flatten().to(torch.int64))
    return hits.view(C, K)


class PairStep(NamedTuple):
    """What one step of the moving averages decides for whole pairs [C, K]."""

    keep: Tensor  # []: the share that the past keeps; 1 where no query was finite
    size: Tensor  # the new cluster sizes
    smoothed: Tensor  # by what averages are divided
    moving: Tensor  # bool: which keys become their average
    places: Tensor | None  # the spare row that a dead pair takes; -1 for every other


def pair_step(
    cluster_size: Tensor,
    hits: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
    decay: float,
    eps: float,
    threshold: float,
    start: float,
    rescale_all: bool,
    whole: Callable[[Tensor], Tensor] = lambda part: part,
) -> PairStep:
    """The part of ``update_keys_`` without the keys: arguments as there, cluster sizes in the dtype of the hits.

    Where these are a part of the pairs of each codebook, ``whole`` adds up sums over the parts.
    """
    hit = whole((hits > 0).sum()) > 0
    keep = hits.new_full((), decay).masked_fill_(~hit, 1.0)
    size = torch.lerp(hits, cluster_size, keep)
    total = whole(size.sum(-1, keepdim=True))
    smoothed = (size + eps) / (total + whole(hits.new_tensor(size.shape[-1])) * eps) * total
    moving = hit.expand_as(hits) if rescale_all else hits > 0
    places = None
    if spare is not None and usable is not None:
        dead = (size < threshold) & (usable > 0)[:, None]
        taken = (dead.cumsum(-1) - 1) % usable.clamp(1, spare.shape[1])[:, None]
        places = torch.where(dead, taken, -1)
        size = torch.where(dead, start, size)
    return PairStep(keep, size, smoothed, moving, places)


def moved_keys(step: PairStep, keys: Tensor, keys_avg: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and the averages [C, K, D] after a step, dead pairs aside."""
    average = torch.lerp(sums, keys_avg, step.keep)
    return torch.where(step.moving[..., None], average / step.smoothed[..., None], keys), average


def update_keys_(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
    decay: float,
    eps: float,
    threshold: float,
    start: float,
    rescale_all: bool,
) -> Tensor:
    """One step of the moving averages of keys [C, K, D], in place, with dead pairs replaced; the new keys, packed.

    With g the decay: ``cluster_size = g*cluster_size + (1-g)*hits``, ``keys_avg = g*keys_avg + (1-g)*sums``, and
    ``keys = where(hits > 0, keys_avg / smoothed(cluster_size), keys)``, the Laplace smoothing ``smoothed(n) =
    (n + eps) / (n.sum(-1) + K*eps) * n.sum(-1)``; with ``rescale_all``, pairs without a hit are divided, too. Without
    any hit in any codebook nothing of that happens.

    Given spare rows [C, R, D], of which the first ``usable`` [C] may be taken, pairs whose cluster size is now below
    ``threshold`` take one each, in turn: ``keys = row, cluster_size = start, keys_avg = row * start``.
    """
    exact = require_statistics(keys, keys_avg, cluster_size, hits, sums, spare, usable)
    step = pair_step(cluster_size.to(exact), hits, spare, usable, decay, eps, threshold, start, rescale_all)
    moved, average = moved_keys(step, keys.to(exact), keys_avg.to(exact), sums)
    if spare is not None and step.places is not None:
        dead = (step.places >= 0)[..., None]
        fresh = spare.gather(1, step.places.clamp(min=0)[..., None].expand_as(keys)).to(exact)
        moved = torch.where(dead, fresh, moved)
        average = torch.where(dead, fresh.mul_(start), average)
    moved = moved.to(keys.dtype)
    packed = pack_keys(moved)
    keys.copy_(moved)
    keys_avg.copy_(average)
    cluster_size.copy_(step.size)
    return packed
