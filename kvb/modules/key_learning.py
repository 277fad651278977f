"""Learning the keys: sampling, k-means, moving averages, dead-code replacement.

Everything here works on tensors and streams of queries [B, S, C, D]; the module owns the state. A query with NaN or
Inf never enters a key. Nothing done for each batch makes the host wait for the device, and everything that may fail
comes before the first write, so that a failure leaves the state as it was.

Source: Träuble et al., ICML 2023 (arXiv:2207.11240), section 3; van den Oord et al., Neural Discrete Representation
Learning (arXiv:1711.00937), appendix A.1, for the moving averages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kvb import ops  # noqa: F401  (importing ops registers the operators)
from kvb.modules.streams import BATCH, Stream

ROWS_PER_KEY = 64  # k-means looks at the first 64*K rows: more hardly move a mean
SEEDS_PER_KEY = 8  # k-means++ chooses K seeds from a sample of 8*K rows
JITTER = 1e-3  # of the data's spread: keeps keys apart that were filled from the same row
Method = Literal["random", "sample", "kmeans", "kmeans++"]
METHODS: tuple[Method, ...] = get_args(Method)


class Rates(NamedTuple):
    """How keys move: the options of ``update`` that a module has."""

    decay: float
    eps: float
    threshold: float


class KeyReport(NamedTuple):
    """What ``init_keys`` did, measured on its last pass over the data.

    rows: queries per codebook in that pass; skipped: (query, codebook) pairs with NaN or Inf;
    inertia: mean squared distance of a finite query to its key; dead_codes: pairs that no query hit, of C*K.
    """

    method: str
    rows: int
    skipped: int
    inertia: float
    dead_codes: int
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.rows} rows per codebook ({self.skipped} skipped), inertia {self.inertia:.6g}, "
            f"{self.dead_codes} of {self.pairs} codes dead"
        )


# --- per batch: no host synchronisation -------------------------------------------------------------------------------


def sync_statistics(hits: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add the statistics of all processes, in place, whole numbers as such."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return hits, sums
    dist.all_reduce(hits)
    dist.all_reduce(sums)
    return hits, sums


def spare_rows(
    queries: Tensor,
    K: int,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Random queries [C, R, D] that may replace dead pairs, and how many of each codebook may: the first, all finite.

    Different pairs get different queries while there are enough. An empty batch has none to give.

    Args:
        queries: [B, S, C, D]. counted: [B, S] bool, the positions to draw from; None for all.
    """
    B, S, _, D = queries.shape
    if B * S == 0:
        return None, None
    # A random subset first: drawing K rows from 4*K is as random, and far cheaper than permuting all rows C times.
    if counted is not None:
        chance = torch.where(counted.flatten(), _draw((B * S,), queries, generator), -1)
        some = chance.topk(min(4 * K, B * S)).indices
    elif generator is None:
        some = torch.randperm(B * S, device=queries.device)[: 4 * K]
    else:
        some = torch.randperm(B * S, device=generator.device, generator=generator)[: 4 * K].to(queries.device)
    rows = queries[some // S, some % S].transpose(0, 1).to(dtype)
    priority = _draw(rows.shape[:2], rows, generator)
    priority = torch.where(rows.isfinite().all(-1), priority, -1)
    drawn = priority.topk(min(K, rows.shape[1]))
    return rows.gather(1, drawn.indices[..., None].expand(-1, -1, D)), (drawn.values >= 0).sum(-1)


@torch.no_grad()
def update(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    queries: Tensor,
    *,
    decay: float,
    eps: float,
    threshold: float,
    start: float | None = None,
    rescale_all: bool = False,
    generator: torch.Generator | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Move every hit key towards the mean of its queries, then replace dead pairs, in place; the new keys, packed.

    Equivalent to ``reference.update_keys_``. A pair without a hit keeps its key bit for bit (``rescale_all``: it sinks
    towards the origin, as published), and a batch without any hit moves nothing. Pairs whose ``cluster_size`` is then
    below ``threshold`` become random finite queries of the batch. Their statistics restart with them, so that the next
    update cannot undo the replacement: ``cluster_size = start`` (by default 1, or the threshold, if larger) and
    ``keys_avg = keys * cluster_size``. A codebook without a finite query is left alone.

    Args:
        keys, keys_avg: [C, K, D]. cluster_size, hits: [C, K]. sums: [C, K, D]. queries: [B, S, C, D].
        counted: [B, S] bool, the positions of queries that may replace a pair; None for all.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    state = keys, keys_avg, cluster_size
    K, dtype = keys.shape[1], keys.dtype
    spare, usable = spare_rows(queries, K, dtype, generator, counted) if threshold > 0 else (None, None)
    moved = tuple(part.contiguous() for part in state)
    packed = torch.ops.kvb.update_keys_(
        keys=moved[0],
        keys_avg=moved[1],
        cluster_size=moved[2],
        hits=hits.to(exact).contiguous(),
        sums=sums.to(exact).contiguous(),
        spare=spare,
        usable=usable,
        decay=decay,
        eps=eps,
        threshold=threshold,
        start=max(1.0, threshold) if start is None else start,
        rescale_all=rescale_all,
    )
    for part, new in zip(state, moved, strict=True):
        if new is not part:
            part.copy_(new)
    return packed


def step(
    moving: tuple[Tensor, Tensor, Tensor],
    queries: Tensor,
    indices: Tensor,
    *,
    mask: Tensor | None,
    rates: Rates,
    generator: torch.Generator | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """``update`` with the statistics of one batch, in all processes together; the new keys, packed.

    Args:
        moving: keys, keys_avg, cluster_size. queries: [B, S, C, D], NaN where ``counted`` [B, S] is False.
        indices: [B, S, C], of the search with ``mask`` [C, K].
    """
    hits, sums = torch.ops.kvb.accumulate(queries, indices, moving[0].shape[1])
    if mask is not None:  # a codebook in which nothing may be found learns nothing
        found = mask.any(-1, keepdim=True)
        hits, sums = hits * found, sums * found[..., None]
    hits, sums = sync_statistics(hits, sums)
    keys, keys_avg, cluster_size = moving
    return update(
        keys=keys,
        keys_avg=keys_avg,
        cluster_size=cluster_size,
        hits=hits,
        sums=sums,
        queries=queries,
        decay=rates.decay,
        eps=rates.eps,
        threshold=rates.threshold,
        generator=generator,
        counted=counted,
    )


def replace_dead(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    queries: Tensor,
    *,
    threshold: float,
    start: float | None = None,
) -> None:
    """Replace dead pairs as ``update`` does, without moving any other key."""
    update(
        keys=keys,
        keys_avg=keys_avg,
        cluster_size=cluster_size,
        hits=torch.zeros_like(cluster_size),
        sums=torch.zeros_like(keys),
        queries=queries,
        decay=1.0,
        eps=1.0,
        threshold=threshold,
        start=start,
    )


# --- samples of rows --------------------------------------------------------------------------------------------------


def _rows(queries: Tensor) -> Tensor:
    """[B, S, C, D] -> [C, B*S, D]."""
    return queries.permute(2, 0, 1, 3).flatten(1, 2)


def _draw(shape: Iterable[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers on the device of ``like``, drawn where the generator lives."""
    if generator is None:  # without the argument: graphs with dynamic sizes do not accept generator=None
        return torch.rand(tuple(shape), device=like.device)
    return torch.rand(tuple(shape), generator=generator, device=generator.device).to(like.device)


class Reservoir:
    """A weighted random sample of ``size`` rows per codebook, without replacement, in one pass.

    Every row gets the priority log(u) / weight; the highest stay (Efraimidis and Spirakis, Weighted random sampling
    with a reservoir, Information Processing Letters 97, 2006). Rows of weight 0 are never taken.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        C, _, D = like.shape
        self.rows = like.new_zeros((C, size, D))
        self.priority = like.new_full((C, size), -torch.inf)

    def add(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> None:
        """rows [C, N, D], weights [C, N] >= 0; rows that are not finite count as weight 0."""
        size = self.rows.shape[1]
        positive = (weights > 0) & rows.isfinite().all(-1)
        chance = _draw(weights.shape, weights, generator).clamp(min=torch.finfo(torch.float32).tiny).log()
        priority = torch.where(positive, chance / torch.where(positive, weights, 1), -torch.inf)
        merged = torch.cat([self.priority, priority.to(self.priority.dtype)], 1).topk(size)
        both = torch.cat([self.rows, rows.to(self.rows.dtype)], 1)
        self.rows = both.gather(1, merged.indices[..., None].expand(-1, -1, both.shape[-1]))
        self.priority = merged.values

    @property
    def filled(self) -> Tensor:
        """[C, size]: which places hold a row; the full ones come first."""
        return self.priority > -torch.inf


def _fill(reservoir: Reservoir, K: int, generator: torch.Generator | None) -> Tensor:
    """K rows per codebook; where there are too few, repeats rows with jitter. Warns with numbers."""
    rows, filled = reservoir.rows[:, :K], reservoir.filled[:, :K]
    found = filled.sum(-1, keepdim=True)
    fewest = int(found.min())
    if fewest == 0:
        raise ValueError("data holds a codebook without a single finite row: the keys cannot be initialised")
    if fewest == K:
        return rows
    warnings.warn(
        f"only {fewest} finite rows for {K} keys in a codebook: the other {K - fewest} keys are copies with jitter",
        stacklevel=4,
    )
    again = (_draw(filled.shape, rows, generator) * found).long().clamp(max=K - 1)
    copies = rows.gather(1, again[..., None].expand_as(rows))
    mean = rows.sum(1, keepdim=True) / found[..., None]
    spread = (
        torch.where(filled[..., None], rows - mean, 0).square().sum((1, 2), keepdim=True) / found[..., None]
    ).sqrt()
    noise = (_draw(rows.shape, rows, generator) - 0.5) * JITTER * torch.where(spread > 0, spread, 1)
    return torch.where(filled[..., None], rows, copies + noise)


# --- initialisation from data -----------------------------------------------------------------------------------------


@torch.no_grad()
def sample_keys(
    stream: Stream, K: int, like: Tensor, generator: torch.Generator | None, limit: int | None = None
) -> Tensor:
    """K random finite rows of the data for every codebook, without replacement while there are enough."""
    return _fill(_sample(stream, K, like, generator, limit), K, generator)


def _sample(stream: Stream, size: int, like: Tensor, generator: torch.Generator | None, limit: int | None) -> Reservoir:
    reservoir = Reservoir(size, like)
    for queries in stream.queries("sampling", limit):
        rows = _rows(queries)
        reservoir.add(rows, rows.new_ones(rows.shape[:2]), generator)
    return reservoir


def _spread_out(rows: Tensor, filled: Tensor, K: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Rows [C, R, D] -> seeds [C, K, D], and which of them are no repetition.

    Every next seed is drawn with probability proportional to the squared distance to the seeds so far (Arthur and
    Vassilvitskii, k-means++, SODA 2007).
    """
    C, _, D = rows.shape
    seeds, new = rows.new_zeros((C, K, D)), torch.zeros((C, K), dtype=torch.bool, device=rows.device)
    weight = filled.to(rows.dtype)
    gap = torch.where(filled, torch.inf, 0).to(rows.dtype)
    for k in range(K):
        chance = _draw(weight.shape, weight, generator).clamp(min=torch.finfo(torch.float32).tiny).log()
        pick = torch.where(weight > 0, chance / weight, -torch.inf).argmax(-1, keepdim=True)
        new[:, k] = weight.gather(1, pick)[:, 0] > 0
        seeds[:, k] = rows.gather(1, pick[..., None].expand(-1, -1, D))[:, 0]
        gap = torch.minimum(gap, (rows - seeds[:, k, None]).square().sum(-1))
        weight = gap
    return seeds, new


def _seed(stream: Stream, K: int, like: Tensor, plus: bool, generator: torch.Generator | None, limit: int) -> Tensor:
    if not plus:
        return sample_keys(stream, K, like, generator, limit)
    sample = _sample(stream, SEEDS_PER_KEY * K, like, generator, limit)
    books = max(1, BATCH // sample.rows[0].numel())
    parts = zip(sample.rows.split(books), sample.filled.split(books), strict=True)
    seeds, new = zip(*(_spread_out(rows, filled, K, generator) for rows, filled in parts), strict=True)
    chosen = Reservoir(K, like)
    # A seed that repeats an earlier one has weight 0 here, and its place is filled like any other shortage.
    chosen.add(torch.cat(seeds), torch.cat(new).to(like.dtype), generator)
    return _fill(chosen, K, generator)


@torch.no_grad()
def kmeans(
    stream: Stream, K: int, like: Tensor, *, iters: int, plus: bool, generator: torch.Generator | None
) -> Tensor:
    """Lloyd's algorithm on the first 64*K rows of the data, streamed: keys [C, K, D] like ``like``.

    A cluster that loses all its rows restarts at a row drawn in proportion to its squared distance from its key.
    """
    limit = ROWS_PER_KEY * K
    keys = _seed(stream, K, like, plus, generator, limit)
    for _ in range(iters):
        hits = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
        sums = torch.zeros_like(keys, dtype=torch.float64)
        spare = Reservoir(K, like)
        packed = torch.ops.kvb.pack_keys(keys)
        for queries in stream.queries("k-means", limit):
            ranked, apart = torch.ops.kvb.nearest(queries, keys, packed, mask=None, topk=1)
            indices, distances = ranked[..., 0], apart[..., 0]
            batch_hits, batch_sums = torch.ops.kvb.accumulate(queries, indices, K)
            hits += batch_hits
            sums += batch_sums
            spare.add(_rows(queries), distances.permute(2, 0, 1).flatten(1), generator)
        empty = hits == 0
        rank = (empty.cumsum(-1) - 1).clamp(min=0)
        repaired = spare.rows.gather(1, rank[..., None].expand_as(keys))
        repairable = (empty & spare.filled.gather(1, rank))[..., None]
        means = torch.where(empty[..., None], keys.double(), sums / hits.clamp(min=1)[..., None]).to(keys.dtype)
        keys = torch.where(repairable, repaired, means)
    return keys


def passes_needed(method: Method, iters: int, epochs: int, *, replay: bool = False) -> int:
    """How often ``init_keys`` reads the data: seeding, iterations, then epochs or one measuring pass.

    Args:
        replay: a ``Stream`` that reads the rows of k-means once, and measures on them where no epoch follows.
    """
    if method.startswith("kmeans"):
        return 1 + epochs if replay else 1 + iters + max(1, epochs)
    return int(method == "sample") + max(1, epochs)


@torch.no_grad()
def initialise(
    moving: tuple[Tensor, Tensor, Tensor],
    stream: Stream,
    method: Method,
    *,
    fresh: bool,
    kmeans_iters: int,
    epochs: int,
    mask: Tensor | None,
    rates: Rates,
    generator: torch.Generator | None,
) -> KeyReport:
    """Initialise keys from the data, and let them learn; all in place.

    Args:
        moving: keys, keys_avg, cluster_size. fresh: there are no keys yet. mask: [C, K], pairs that may be hit.
    """
    like, plus = moving[0], method == "kmeans++"
    K, found = like.shape[1], None
    if method == "sample":
        found = sample_keys(stream, K, like, generator)
    elif method in ("kmeans", "kmeans++"):
        found = kmeans(stream, K, like, iters=kmeans_iters, plus=plus, generator=generator)
    elif fresh:
        device = like.device if generator is None else generator.device
        found = torch.randn(like.shape, generator=generator, device=device)
    if found is not None:
        for part, start in zip(moving, (found, found, torch.ones((), device="cpu")), strict=True):
            part.copy_(start)
    packed = torch.ops.kvb.pack_keys(moving[0])
    for epoch in range(max(1, epochs)):
        meter = Meter(like)
        learns = epoch < epochs
        # Without epochs, what k-means looked at is measured where reading more would cost an encoder's time.
        limit = ROWS_PER_KEY * K if stream.replay and not learns and method.startswith("kmeans") else None
        for queries in stream.queries("moving averages" if learns else "measuring", limit):
            indices, distances = torch.ops.kvb.nearest(queries, moving[0], packed, mask, 1)
            meter.add(indices[..., 0], distances[..., 0], queries)
            if learns:
                packed = step(moving, queries, indices[..., 0], mask=mask, rates=rates, generator=generator)
    return meter.report(method)


class Meter:
    """Sums what ``KeyReport`` says, on the device; one read at the end."""

    def __init__(self, like: Tensor) -> None:
        self.hits = torch.zeros(like.shape[:2], dtype=torch.int64, device=like.device)
        self.inertia = torch.zeros((), dtype=torch.float64, device=like.device)
        self.finite = torch.zeros((), dtype=torch.int64, device=like.device)
        self.queries = 0

    def add(self, indices: Tensor, distances: Tensor, queries: Tensor) -> None:
        finite = distances.isfinite()
        self.hits += torch.ops.kvb.count(queries, indices, self.hits.shape[1])
        self.inertia += torch.where(finite, distances, 0).sum(dtype=torch.float64)
        self.finite += finite.sum()
        self.queries += indices.numel()

    def report(self, method: str) -> KeyReport:
        C, K = self.hits.shape
        finite = int(self.finite)
        return KeyReport(
            method,
            rows=self.queries // C,
            skipped=self.queries - finite,
            inertia=float(self.inertia) / max(1, finite),
            dead_codes=int((self.hits == 0).sum()),
            pairs=C * K,
        )
