"""The nearest keys: by a filter, and a rescore of what the filter leaves.

A *filter* scores every key with a matrix product on data centred on the codebook's mean key; every key whose score lies
within a proven bound of the best is then *rescored* by direct difference in float64. The filter never decides: ranking
and returned distances come from the rescore alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvb.reference import shared
from kvb.reference.arithmetic import Parts, exponent, scaled, squared_distances, value, widest
from kvb.reference.packing import LANES, Packed, layout_of, pack_keys, require_packed, unpack
from kvb.reference.shared import (
    Tile,
    accumulator,
    finite_rows,
    require,
    require_floating,
    require_keys,
    require_shape,
    require_tensors,
    tiles,
)
from kvb.reference.values import gather


class _Search(NamedTuple):
    """What every tile of one search shares."""

    keys: Tensor  # [C, K, D]
    packed: Packed
    usable: Tensor  # [C, Kp] bool: finite, no padding, and not masked
    masked: bool
    scratch: Tensor  # the scores of one tile: fresh memory for each would cost more than the matrix product
    exact: torch.dtype  # of the distances returned


def _matmul_is_exact(device: torch.device) -> bool:
    """Whether float32 matrix products keep float32 precision: the user may allow TF32 or bfloat16."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    return backend is None or backend.matmul.fp32_precision in ("none", "ieee")


def _begin(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None) -> _Search:
    require_keys(keys)
    require_tensors(queries=queries, keys=keys, packed=packed, mask=mask)
    require_floating(queries=queries)
    C, K, D = keys.shape
    require_shape("queries", queries, "B", "S", C, D)
    layout = layout_of(K, D, keys.dtype)
    require_packed(packed, layout, C)
    view = unpack(packed, layout)
    usable = view.rows[..., D] != torch.inf
    usable[:, K:] = False
    if mask is not None:
        require(
            mask.dtype == torch.bool and mask.shape == (C, K),
            f"expected mask torch.bool {(C, K)}, got {mask.dtype} {tuple(mask.shape)}",
        )
        usable[:, :K] &= mask
    width = usable.shape[1]
    scratch = view.rows.new_empty(
        min(queries.shape[:3].numel() * width, max(shared.TILE, width)),
        dtype=layout.dtype if _matmul_is_exact(keys.device) else torch.float64,
    )
    exact = accumulator(torch.promote_types(queries.dtype, keys.dtype))
    return _Search(keys, view, usable, mask is not None, scratch, exact)


def _tile_queries(queries: Tensor, tile: Tile) -> Tensor:
    """[c, n, D]: the queries of one tile, codebook first."""
    rows = queries[tile].permute(2, 0, 1, 3)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _to_tile(flat: Tensor, out: Tensor) -> Tensor:
    """Turn [c, n, T] back into the [b, s, c, T] of ``out``."""
    b, s, c, T = out.shape
    return flat.view(c, b, s, T).permute(1, 2, 0, 3)


def _filter(search: _Search, tile: Tile, q: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [c, n, Kp], half the squared distance up to a constant per query, and their error [c, n].

    With u the unit roundoff, q and k centred and rounded once (relative error u each), |k| <= r, and a sum of D + 1
    terms in any order, a score |k|^2/2 - q.k is off by at most (D + 8) u (|q| r + r^2/2); products that underflow
    add at most the smallest normal number each. Without float64, |k|^2/2 is a sum of D rounded terms as well.
    """
    rows, centre, radius = (part[tile[2]] for part in search.packed)
    wide = torch.promote_types(q.dtype, rows.dtype)
    centred = torch.where(finite[..., None], centre[:, None].to(wide) - q.to(wide), 0).to(rows.dtype)
    info, D = torch.finfo(rows.dtype), q.shape[-1]
    norm = torch.linalg.vector_norm(centred, dim=-1)
    terms = D if widest(q.device) == torch.float64 else 2 * D
    error = (terms + 8) * (info.eps / 2 * radius * (norm + radius / 2) + info.tiny)
    scores = _products(search, torch.nn.functional.pad(centred, (0, 1), value=1.0), rows)
    if search.masked:
        scores.masked_fill_(~search.usable[tile[2], None], torch.inf)
    return scores, error


def _products(search: _Search, rows: Tensor, keys: Tensor) -> Tensor:
    """rows [c, n, d] times keys [c, Kp, d], in the memory of the search: [c, n, Kp]."""
    shape = (*rows.shape[:2], keys.shape[1])
    scores = search.scratch[: shape[0] * shape[1] * shape[2]].view(shape)
    return torch.bmm(rows.to(scores.dtype), keys.mT.to(scores.dtype), out=scores)


def _candidates(scores: Tensor, error: Tensor, usable: Tensor, finite: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Pairs (row of c*n, key) that may be among the ``topk`` nearest.

    The ``topk``-th smallest group minimum bounds the ``topk``-th smallest score from above; group g holds the keys g,
    g + G, g + 2G, ... Every comparison is negated so that NaN, from an overflow, always stays a candidate.
    """
    c, n, padded = scores.shape
    G = padded // LANES
    finite, error = finite.view(-1), error.view(-1)
    minima = scores.view(c * n, LANES, G).amin(1)
    if topk == 1:
        worst = minima.amin(1)
    elif topk <= G:
        worst = minima.topk(topk, largest=False).values[:, -1]
    else:
        worst = torch.full_like(error, torch.inf)
    highest = torch.finfo(scores.dtype).max
    limit = torch.where(error.isfinite(), (worst + 2 * error).clamp(max=highest), torch.nan)
    near_group = (~(minima > limit[:, None])).view(-1).nonzero()[:, 0]
    row = near_group // G
    key = (near_group % G)[:, None] + torch.arange(0, padded, G, device=scores.device)
    near = ~(scores.take(row[:, None] * padded + key) > limit[row, None])
    near &= usable.take((row // n * padded)[:, None] + key) & finite[row, None]
    pair = near.view(-1).nonzero()[:, 0]
    return row[pair // LANES], key.view(-1)[pair]


def _rescore(search: _Search, tile: Tile, q: Tensor, row: Tensor, key: Tensor) -> Parts:
    """Exact squared distances of the candidate pairs."""
    n, D = q.shape[1:]
    K = search.keys.shape[1]
    rows, table = q.reshape(-1, D), search.keys[tile[2]].reshape(-1, D)
    piece = max(1, shared.TILE // (4 * D))
    pieces = zip(row.split(piece), (row // n * K + key).split(piece), strict=True)
    found = [squared_distances(rows.index_select(0, r), table.index_select(0, k)) for r, k in pieces]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def lowest_unused(chosen: Tensor) -> Tensor:
    """The lowest index that does not yet stand in each row of ``chosen`` [rows, t]."""
    options = torch.arange(chosen.shape[1] + 1, device=chosen.device)
    return (options[:, None] != chosen[:, None]).all(-1).to(torch.uint8).argmax(-1)


def _rank(rows: int, row: Tensor, key: Tensor, distance: Parts, topk: int, K: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` smallest (distance, key) of every row; missing ones are the lowest unused keys at +inf."""
    indices: list[Tensor] = []
    distances: list[Tensor] = []
    left = torch.ones_like(row, dtype=torch.bool)
    for _ in range(topk):
        tied, best = left, []
        for part in distance:
            highest = torch.inf if part.is_floating_point() else torch.iinfo(part.dtype).max
            least = part.new_full((rows,), highest)
            least.scatter_reduce_(0, row, torch.where(tied, part, highest), "amin")
            tied = tied & (part == least[row])
            best.append(least)
        first = torch.full((rows,), K, dtype=torch.int64, device=row.device)
        first.scatter_reduce_(0, row, torch.where(tied, key, K), "amin")
        missing = first == K
        left = left & (key != first[row])
        distances.append(torch.where(missing, torch.inf, value(tuple(best))))
        if bool(missing.any()):
            chosen = torch.stack(indices, -1)[missing] if indices else first.new_empty((int(missing.sum()), 0))
            first[missing] = lowest_unused(chosen)
        indices.append(first)
    return torch.stack(indices, -1), torch.stack(distances, -1)


def nearest(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` nearest keys of every query and codebook: indices and squared distances, both [B, S, C, T]."""
    search = _begin(queries, keys, packed, mask)
    (B, S, C, _), K = queries.shape, keys.shape[1]
    require(1 <= topk <= K, f"expected topk between 1 and {K}, got {topk}")
    indices = torch.empty((B, S, C, topk), dtype=torch.int64, device=queries.device)
    distances = torch.empty((B, S, C, topk), dtype=search.exact, device=queries.device)
    for tile in tiles(B, S, C, search.usable.shape[1]):
        q = _tile_queries(queries, tile)
        finite = finite_rows(q)
        scores, error = _filter(search, tile, q, finite)
        row, key = _candidates(scores, error, search.usable[tile[2]], finite, topk)
        distance = _rescore(search, tile, q, row, key)
        best, least = _rank(finite.numel(), row, key, distance, topk, K)
        best = torch.where(finite.view(-1, 1), best, torch.arange(topk, device=q.device))
        least = torch.where(finite.view(-1, 1), least, torch.nan)
        indices[tile] = _to_tile(best, indices[tile])
        distances[tile] = _to_tile(least.to(search.exact), distances[tile])
    return indices, distances


def _scaled_scores(search: _Search, tile: Tile, q: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Half of each squared distance up to a constant per row, [c, n, Kp], in units of 2^power [c, n, 1].

    Keys and queries are scaled by powers of two, so that no square overflows or underflows.
    """
    rows, centre, _ = (part[tile[2]] for part in search.packed)
    keys = rows[..., :-1]
    wide, highest = torch.promote_types(q.dtype, rows.dtype), torch.finfo(rows.dtype).max
    centred = torch.where(finite[..., None], centre[:, None].to(wide) - q.to(wide), 0).to(rows.dtype)
    centred = centred.clamp(-highest, highest)
    of_keys = exponent(keys.abs().amax((1, 2), keepdim=True))
    of_row = torch.maximum(exponent(centred.abs().amax(-1, keepdim=True)), of_keys)
    keys = scaled(keys, -of_keys)
    halves = (keys.to(widest(q.device)).square().sum(-1, keepdim=True) / 2).to(keys.dtype)
    one = scaled(torch.ones_like(centred[..., :1]), of_keys - of_row)
    scores = _products(search, torch.cat([scaled(centred, -of_row), one], -1), torch.cat([keys, halves], -1))
    return scores.masked_fill_(~search.usable[tile[2], None], torch.inf), of_keys + of_row


def _draw(scores: Tensor, noise: Tensor, fraction: float, power: Tensor, topk: int) -> Tensor:
    """Keys [c, n, T] by logits ``noise - scores * fraction * 2^power``; an unusable one only where no other is left.

    Args:
        scores: [c, n, Kp], +inf where a key may not be drawn; overwritten.
        noise: [c, n, Kp]. power: [c, n, 1].
    """
    drawn = torch.empty((*scores.shape[:2], topk), dtype=torch.int64, device=scores.device)
    for t in range(topk):
        # Relative to the least that is left, so that a low temperature still tells the keys that are left apart.
        least = scores.amin(-1, keepdim=True)
        some = least.isfinite()
        key = (noise - scaled(fraction * scores.sub_(torch.where(some, least, 0)), power)).argmax(-1, keepdim=True)
        unused = lowest_unused(drawn[..., :t].flatten(0, 1)).view_as(key) if t else 0
        drawn[..., t : t + 1] = key = torch.where(some, key, unused)
        scores.scatter_(-1, key, torch.inf)
    return drawn


def sample(
    queries: Tensor, keys: Tensor, mask: Tensor | None, temperature: float, seed: Tensor, topk: int = 1
) -> tuple[Tensor, Tensor]:
    """``topk`` keys per query, drawn from softmax(-distance / temperature) without replacement; both [B, S, C, T].

    By the Gumbel trick, with one noise for all draws of a query: the first is what ``topk=1`` draws.

    Source: Kool, van Hoof and Welling, Stochastic Beams and Where to Find Them, ICML 2019.
    """
    search = _begin(queries, keys, pack_keys(keys), mask)
    (B, S, C, _), K = queries.shape, keys.shape[1]
    require(1 <= topk <= K, f"expected topk between 1 and {K}, got {topk}")
    fraction, power_of_two = math.frexp(2 / temperature)
    generator = torch.Generator(queries.device).manual_seed(int(seed))
    indices = torch.empty((B, S, C, topk), dtype=torch.int64, device=queries.device)
    distances = torch.empty((B, S, C, topk), dtype=search.exact, device=queries.device)
    for tile in tiles(B, S, C, search.usable.shape[1]):
        q = _tile_queries(queries, tile)
        finite = finite_rows(q)[..., None]
        scores, power = _scaled_scores(search, tile, q, finite[..., 0])
        gumbel = -torch.empty_like(scores).exponential_(generator=generator).log_()
        drawn = _draw(scores, gumbel, fraction, power + power_of_two, topk)
        key = torch.where(finite, drawn, torch.arange(topk, device=q.device))
        row = torch.arange(key.numel(), device=key.device) // topk
        distance = value(_rescore(search, tile, q, row, key.view(-1))).view_as(key)
        distance = torch.where(search.usable[tile[2]].gather(1, key.flatten(1)).view_as(key), distance, torch.inf)
        distance = torch.where(finite, distance, torch.nan)
        indices[tile] = _to_tile(key, indices[tile])
        distances[tile] = _to_tile(distance.to(search.exact), distances[tile])
    return indices, distances


def lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """Search and gather in one pass: values [B, S, C, V] (pooled [B, S, V]) and indices [B, S, C].

    Queries [B, C, D] are those of one position a sample: then nothing has an axis S.
    """
    if queries.dim() == 3:
        out, indices = lookup(queries.unsqueeze(1), keys, packed, values, mask, pool)
        return out.squeeze(1), indices.squeeze(1)
    indices = nearest(queries, keys, packed, mask, 1)[0][..., 0]
    return gather(values, indices, pool, "bscv"), indices
