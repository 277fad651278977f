"""What learning keys needs to know of a batch, and one step of the keys' moving averages."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.reference.arithmetic import RowSums
from kvb.reference.packing import pack_keys, require_keys
from kvb.reference.shared import (
    accumulator,
    finite_rows,
    flat_rows,
    require,
    require_apart,
    require_codes,
    require_floating,
    require_shape,
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
    exact = _require_statistics(keys, keys_avg, cluster_size, hits, sums, spare, usable)
    keep = hits.new_full((), decay).masked_fill_(~hits.any(), 1.0)
    size = torch.lerp(hits, cluster_size.to(exact), keep)
    average = torch.lerp(sums, keys_avg.to(exact), keep)
    total = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (total + size.shape[-1] * eps) * total
    moving = hits.any() if rescale_all else (hits > 0)[..., None]
    moved = torch.where(moving, average / smoothed[..., None], keys.to(exact))
    if spare is not None and usable is not None:
        dead = (size < threshold) & (usable > 0)[:, None]
        place = (dead.cumsum(-1) - 1) % usable.clamp(1, spare.shape[1])[:, None]
        fresh = spare.gather(1, place[..., None].expand_as(keys)).to(exact)
        moved = torch.where(dead[..., None], fresh, moved)
        average = torch.where(dead[..., None], fresh.mul_(start), average)
        size = torch.where(dead, start, size)
    moved = moved.to(keys.dtype)
    packed = pack_keys(moved)
    keys.copy_(moved)
    keys_avg.copy_(average)
    cluster_size.copy_(size)
    return packed


def _require_statistics(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
) -> torch.dtype:
    """Shapes and dtypes of ``update_keys_``; returns the dtype that it computes in."""
    require_tensors(
        keys=keys, keys_avg=keys_avg, cluster_size=cluster_size, hits=hits, sums=sums, spare=spare, usable=usable
    )
    require_keys(keys)
    C, K, D = keys.shape
    exact = accumulator(keys.dtype)
    wanted = {
        "keys": (keys, keys.dtype, (C, K, D)),
        "keys_avg": (keys_avg, keys.dtype, (C, K, D)),
        "cluster_size": (cluster_size, keys.dtype, (C, K)),
        "hits": (hits, exact, (C, K)),
        "sums": (sums, exact, (C, K, D)),
    }
    require((spare is None) == (usable is None), "expected spare rows and how many are usable, or neither")
    if spare is not None and usable is not None:
        require_shape("spare", spare, C, "R", D)
        require_shape("usable", usable, C)
        require(spare.shape[1] > 0, "expected at least one spare row for each codebook")
        # Elsewhere the host would have to wait; ``update_keys_`` clamps.
        within = spare.device.type != "cpu" or bool(((usable >= 0) & (usable <= spare.shape[1])).all())
        require(within, f"expected usable between 0 and the {spare.shape[1]} spare rows")
        wanted["spare"] = spare, keys.dtype, (C, max(1, spare.shape[1]), D)
        wanted["usable"] = usable, torch.int64, (C,)
    for name, (tensor, dtype, shape) in wanted.items():
        require(
            tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device == keys.device,
            f"expected contiguous {name} {dtype} {shape} on {keys.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}",
        )
    state = {"keys": keys, "keys_avg": keys_avg, "cluster_size": cluster_size}
    require_apart(state, hits=hits, sums=sums, spare=spare, usable=usable)
    return exact
