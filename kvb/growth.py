"""Growth where no key is near: say for which queries that is so, and give them pairs of their own.

A query farther than a threshold from every key is like nothing that the keys were made for. The value of its nearest
pair is a guess then: abstain from it, or add a pair there, which takes nothing away from pairs that exist. ::

    threshold = kvb.growth.distance_threshold(bottleneck, known)  # [C]: 99 of 100 known queries are nearer
    values = bottleneck(x).masked_fill(kvb.growth.none_near(bottleneck, x, threshold)[..., None], 0)  # abstain, or
    kvb.growth.add_pairs(bottleneck, x, threshold)  # have pairs to learn with

Source: Hartvigsen et al., Aging with GRACE: Lifelong model editing with discrete key-value adaptors, NeurIPS 2023
(arXiv:2211.11031): a new key where an edit is outside of every radius; one threshold in place of a radius per key.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvb import validation
from kvb.modules.bottleneck import KeyValueBottleneck


@torch.no_grad()
def distance_threshold(
    bottleneck: KeyValueBottleneck, x: Tensor, *, share: float = 0.99, mask: Tensor | None = None
) -> Tensor:
    """The squared distance within which ``share`` of known queries find a key, for each codebook.

    Equivalent to ``nearest(x, keys)[1].quantile(share, dim=0)``, without interpolation: some query's distance.

    Args:
        bottleneck: of C codebooks.
        x: [B, C, *shape, D], such as the keys are for, but not the very rows that became keys.
        share: in (0, 1].
        mask: bool [B, *shape], True where a position counts.
    Returns:
        [C] float32 (float64 for float64 queries); 0 for a codebook without a finite query.
    Raises:
        TypeError, ValueError: as ``bottleneck(x)``, or no share in (0, 1]. RuntimeError: keys wait for data.
        NotImplementedError: tables that are split over processes.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> threshold = kvb.growth.distance_threshold(bottleneck, torch.randn(100, 4, 8))
        >>> threshold.shape
        torch.Size([4])
    """
    if validation.number("share", share, 0.0, math.inf, open_low=True) > 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    found = _distances("distance_threshold", bottleneck, x, mask)
    rows = found.movedim(-1, 0).flatten(1).sort(-1).values  # NaN comes last
    known = rows.isfinite().sum(-1)
    place = (known * share).ceil().long().clamp(min=1) - 1
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    return torch.where(known > 0, rows.gather(1, place[:, None])[:, 0], 0)


@torch.no_grad()
def none_near(
    bottleneck: KeyValueBottleneck, x: Tensor, threshold: float | Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Where no key that may be fetched is within the threshold: bool [B, C, *shape].

    Equivalent to ``nearest(x, keys)[1] > threshold``. False where the query holds NaN or Inf, or the mask False: there
    is nothing to be near to.

    Args:
        bottleneck, x, mask: as for ``distance_threshold``.
        threshold: squared distance >= 0, one or [C].
    Raises:
        as ``distance_threshold``; TypeError, ValueError: a threshold that is no number >= 0, or another shape.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> threshold = kvb.growth.distance_threshold(bottleneck, torch.randn(100, 4, 8))
        >>> bool(kvb.growth.none_near(bottleneck, torch.randn(5, 4, 8) + 100, threshold).all())
        True
    """
    found = _distances("none_near", bottleneck, x, mask)
    limit = _limits("none_near", bottleneck, threshold).to(found)
    far = (found > limit).transpose(1, 2)  # [B, C, S]
    return far.reshape(*x.shape[:2], *x.shape[2:-1])


@torch.no_grad()
def add_pairs(
    bottleneck: KeyValueBottleneck, x: Tensor, threshold: float | Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Add a pair in each codebook at every query to which none is near, and none that was just added; how many, [C].

    Equivalent to, per codebook, ``for q in x: if all(|q - keys|**2 > threshold): keys.append(q)``, and a table that is
    as long as the codebook with the most new pairs needs: in the others the last rows are masked (``mask_pairs``), and
    no query fetches them. New values start as ``init_values`` of the bottleneck says. Old pairs keep index, key and
    value bit for bit; of old queries only those change their pair that a new key is nearer to.

    ``values`` is another parameter afterwards: ``kvb.optim.grow`` brings an optimizer along.

    Args:
        bottleneck, x, threshold, mask: as for ``none_near``.
    Returns:
        [C] int64; all zero where every query has a key near, and then nothing changes.
    Raises:
        as ``none_near``.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> threshold = kvb.growth.distance_threshold(bottleneck, torch.randn(100, 4, 8))
        >>> kvb.growth.add_pairs(bottleneck, torch.full((5, 4, 8), 100.0), threshold)  # equal queries need one
        tensor([1, 1, 1, 1])
        >>> bottleneck.values.shape
        torch.Size([4, 17, 10])
    """
    far = none_near(bottleneck, x, threshold, mask=mask)
    C, D = bottleneck.num_codebooks, bottleneck.dim_keys
    queries = x.detach().to(bottleneck.keys.dtype).movedim(1, 0).reshape(C, -1, D)  # [C, B * S, D]
    limit = _limits("add_pairs", bottleneck, threshold).to(queries.device)
    chosen = _apart(queries, far.movedim(1, 0).reshape(C, -1), limit)
    added = torch.tensor([len(rows) for rows in chosen])
    most = int(added.max())
    if not most:
        return added
    keys = torch.stack(
        [torch.cat([queries[c, rows], queries.new_zeros(most - len(rows), D)]) for c, rows in enumerate(chosen)]
    )
    before, K = bottleneck.pair_mask, bottleneck.key_value_pairs_per_codebook
    bottleneck.expand_pairs(K + most, keys)
    if before is not None or bool((added < most).any()):
        old = torch.ones(C, K, dtype=torch.bool) if before is None else before.cpu()
        bottleneck.mask_pairs(torch.cat([old, torch.arange(most) < added[:, None]], 1).to(bottleneck.keys.device))
    return added


def _apart(queries: Tensor, far: Tensor, limit: Tensor) -> list[Tensor]:
    """Rows of queries [C, N, D] that are far, each farther than the limit from those before it, for each codebook."""
    open_, books = far.clone(), torch.arange(len(queries), device=queries.device)
    chosen: list[list[Tensor]] = [[] for _ in books]
    while bool(open_.any()):
        first, busy = open_.int().argmax(-1), open_.any(-1)
        for c in busy.nonzero()[:, 0].tolist():
            chosen[c].append(first[c])
        gaps = (queries - queries[books, first][:, None]).square().sum(-1)
        open_ &= (gaps > limit[:, None]) | ~busy[:, None]
    return [torch.stack(rows) if rows else books[:0] for rows in chosen]


def _distances(owner: str, bottleneck: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Squared distances [B, S, C] to the nearest key that may be fetched; NaN for what does not count."""
    if not isinstance(bottleneck, KeyValueBottleneck):
        inside = isinstance(getattr(bottleneck, "bottleneck", None), KeyValueBottleneck)
        hint = "; give its attribute bottleneck, and the heads that it gets" if inside else ""
        raise TypeError(f"{owner}(): expected a KeyValueBottleneck, got {type(bottleneck).__name__}{hint}")
    if hasattr(bottleneck.values, "placements"):
        raise NotImplementedError(f"{owner}() needs whole tables, and these are split over processes: grow before")
    bottleneck._require_keys()
    keys, packed = bottleneck._packed_keys()
    queries = bottleneck._queries(x, mask)
    found: Tensor = torch.ops.kvb.nearest(queries, keys, packed, bottleneck._search_mask(), 1)[1][..., 0]
    return found


def _limits(owner: str, bottleneck: KeyValueBottleneck, threshold: float | Tensor) -> Tensor:
    """[C]"""
    C = bottleneck.num_codebooks
    if not isinstance(threshold, Tensor):
        return torch.full((C,), validation.number("threshold", threshold, 0.0, math.inf))
    validation.floating(owner, "threshold", threshold)
    validation.shape("threshold", threshold, "C", (C,))
    if not bool((threshold >= 0).all()):
        raise ValueError(f"threshold must be >= 0, got {threshold.min().item()}")
    return threshold
