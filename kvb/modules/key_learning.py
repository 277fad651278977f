"""Learning the keys: sampling, k-means, moving averages, dead-code replacement.

Everything here works on tensors and streams of queries [B, S, C, D]; the module owns the state. A query with NaN or
Inf never enters a key. Nothing done for each batch makes the host wait for the device, but for k-means, whose sample
lies in the host's memory. Everything that may fail comes before the first write, so that a failure leaves the state as
it was.

Source: Träuble et al., ICML 2023 (arXiv:2207.11240), section 3; van den Oord et al., Neural Discrete Representation
Learning (arXiv:1711.00937), appendix A.1, for the moving averages.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kvb import (
    bars,
    collectives,
    ops,  # noqa: F401  (importing ops registers the operators)
)
from kvb.collectives import Chance, Group
from kvb.modules import positions
from kvb.modules.key_report import KeyReport
from kvb.modules.samples import Reservoir, draw, fill, rows_of
from kvb.modules.seeding import spread_out
from kvb.modules.streams import Sample, Stream

ROWS_PER_KEY = 64  # k-means looks at 64*K random rows: more hardly move a mean
SEEDS_PER_KEY = 8  # k-means++ chooses K seeds from a sample of 8*K rows
Method = Literal["random", "sample", "kmeans", "kmeans++"]
METHODS: tuple[Method, ...] = get_args(Method)


class Rates(NamedTuple):
    """How keys move: the options of ``update`` that a module has."""

    decay: float
    eps: float
    threshold: float


# --- per batch: no host synchronisation -------------------------------------------------------------------------------


def codes_of_all(
    queries: Tensor, indices: Tensor, present: Tensor | None, K: int, counted: Tensor | None, group: Group
) -> list[Tensor]:
    """What every process fetched, codes [M, C] in the order of ``gather``: ``~code`` where that is no hit.

    Two collectives; the host waits for the sizes.

    Args:
        queries: [B, S, C, D]. indices: [B, S, C, T]. present: [C, T], ranks of a search that found a pair; the others
            fetch that of the first. counted: [B, S], positions that fetch something; None for all.
    """
    hit = queries.isfinite().all(-1)[..., None]
    if present is not None:
        hit, indices = hit & present, torch.where(present, indices, indices[..., :1])
    codes = torch.where(hit, indices, ~indices).permute(0, 3, 1, 2).flatten(0, 2)
    if counted is not None:
        codes = codes[positions.per_rank(counted, indices.shape[-1]).flatten()]
    return collectives.parts((collectives.as_codes(codes, K),), group)[0]


def hits_of(codes: Tensor, K: int) -> Tensor:
    """How often every pair was hit: int64 [C, K], of codes [M, C], of which the negative are no hits."""
    C = codes.shape[1]
    places = codes.to(torch.int64) + torch.arange(C, device=codes.device) * K
    return torch.where(codes < 0, C * K, places).flatten().bincount(minlength=C * K + 1)[:-1].view(C, K)


def spare_rows(
    queries: Tensor,
    K: int,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    counted: Tensor | None = None,
    group: Group = False,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Random queries [C, R, D] that may replace dead pairs, and how many of each codebook may: the first, all finite.

    Different pairs get different queries while there are enough. An empty batch has none to give.

    Args:
        queries: [B, S, C, D]. counted: [B, S] bool, the positions to draw from; None for all.
        group: the processes that all get the same rows of all their queries.
    """
    B, S, _, D = queries.shape
    alone = collectives.world(group) == 1
    if alone and B * S == 0:
        return None, None
    # A random subset first: drawing K rows from 4*K is as random, and far cheaper than permuting all rows C times.
    if counted is not None:
        chance = torch.where(counted.flatten(), draw((B * S,), queries, generator), -1)
        some = chance.topk(min(4 * K, B * S)).indices
    elif generator is None:
        some = torch.randperm(B * S, device=queries.device)[: 4 * K]
    else:
        some = torch.randperm(B * S, device=generator.device, generator=generator)[: 4 * K].to(queries.device)
    rows = queries[some // S, some % S].transpose(0, 1).to(dtype)
    priority = draw(rows.shape[:2], rows, generator)
    priority = torch.where(rows.isfinite().all(-1), priority, -1)
    priority, places = priority.topk(min(K, rows.shape[1]))
    rows = rows.gather(1, places[..., None].expand(-1, -1, D))
    if not alone:  # so many from each, whatever its batch: no size has to be agreed on
        missing = K - rows.shape[1]
        rows, priority = (
            nn.functional.pad(rows, (0, 0, 0, missing)),
            nn.functional.pad(priority, (0, missing), value=-1),
        )
        rows, priority = collectives.best(rows, priority, group)
    return rows, (priority >= 0).sum(-1)


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
    group: Group = False,
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
        group: the processes whose queries may replace pairs; their other arguments are the same.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    state = keys, keys_avg, cluster_size
    K, dtype = keys.shape[1], keys.dtype
    spare, usable = spare_rows(queries, K, dtype, generator, counted, group) if threshold > 0 else (None, None)
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
    group: Group = False,
) -> Tensor:
    """``update`` with the statistics of the batches of all processes; the new keys, packed.

    Args:
        moving: keys, keys_avg, cluster_size. queries: [B, S, C, D], NaN where ``counted`` [B, S] is False.
        indices: [B, S, C], of the search with ``mask`` [C, K].
    """
    hits, sums = torch.ops.kvb.accumulate(queries, indices, moving[0].shape[1])
    if mask is not None:  # a codebook in which nothing may be found learns nothing
        found = mask.any(-1, keepdim=True)
        hits, sums = hits * found, sums * found[..., None]
    hits, sums = collectives.total((hits.to(sums.dtype), sums), group)
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
        group=group,
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


# --- initialisation from data -----------------------------------------------------------------------------------------


@torch.no_grad()
def sample_keys(stream: Stream | Sample, K: int, like: Tensor, chance: Chance) -> Tensor:
    """K random finite rows of the data for every codebook, without replacement while there are enough."""
    return fill(_rows(stream, K, like, chance), K, chance.shared)


def _rows(stream: Stream | Sample, size: int, like: Tensor, chance: Chance) -> Reservoir:
    reservoir = Reservoir(size, like)
    for queries in stream.queries("sampling"):
        rows = rows_of(queries)
        reservoir.add(rows, rows.new_ones(rows.shape[:2]), chance.own)
    reservoir.merge(stream.group)
    return reservoir


def _seed(sample: Sample, K: int, like: Tensor, plus: bool, chance: Chance) -> Tensor:
    if not plus:
        return sample_keys(sample, K, like, chance)
    some = _rows(sample, SEEDS_PER_KEY * K, like, chance)
    with bars.new("keys: seeding", like.shape[0] * K, shown=sample.progress) as bar:
        seeds, found = spread_out(some.rows, some.filled, K, chance.shared, bar.update)
    chosen = Reservoir(K, like)
    chosen.add(seeds, found.to(like.dtype), chance.shared)
    return fill(chosen, K, chance.shared)


@torch.no_grad()
def kmeans(sample: Sample, K: int, like: Tensor, *, iters: int, plus: bool, chance: Chance) -> Tensor:
    """Lloyd's algorithm on a sample of the data: keys [C, K, D] like ``like``.

    Processes read their shares of the sample, and move the means together. A cluster that loses all its rows restarts
    at a row drawn in proportion to its squared distance from its key.
    """
    keys = _seed(sample, K, like, plus, chance)
    for iteration in range(1, iters + 1):
        hits = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
        sums = torch.zeros_like(keys, dtype=torch.float64)
        spare = Reservoir(K, like)
        packed = torch.ops.kvb.pack_keys(keys)
        for queries in sample.queries(f"k-means (iteration {iteration} of {iters})"):
            ranked, apart = torch.ops.kvb.nearest(queries, keys, packed, mask=None, topk=1)
            indices, distances = ranked[..., 0], apart[..., 0]
            batch_hits, batch_sums = torch.ops.kvb.accumulate(queries, indices, K)
            hits += batch_hits
            sums += batch_sums
            spare.add(rows_of(queries), distances.permute(2, 0, 1).flatten(1), chance.own)
        members, sums = collectives.total((hits.to(sums.dtype), sums), sample.group)
        spare.merge(sample.group)
        empty = members == 0
        rank = (empty.cumsum(-1) - 1).clamp(min=0)
        repaired = spare.rows.gather(1, rank[..., None].expand_as(keys))
        repairable = (empty & spare.filled.gather(1, rank))[..., None]
        means = torch.where(empty[..., None], keys.double(), sums / members.clamp(min=1)[..., None]).to(keys.dtype)
        keys = torch.where(repairable, repaired, means)
    return keys


def passes_needed(method: Method, epochs: int, *, dear: bool = False) -> int:
    """How often ``init_keys`` reads the data: to take a sample, then epochs or one measuring pass.

    Args:
        dear: of a ``Stream`` that measures on the sample of k-means where no epoch follows.
    """
    return int(method != "random") + max(int(not (dear and method.startswith("kmeans"))), epochs)


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
    """Initialise keys from the data of all processes of the stream's group, and let them learn; all in place.

    Args:
        moving: keys, keys_avg, cluster_size: those of the first process. fresh: there are no keys yet. mask: [C, K],
            pairs that may be hit.
    """
    group = stream.group
    collectives.of_the_first(moving, group)
    chance = collectives.chance(group, generator, moving[0].device)
    like, plus = moving[0], method == "kmeans++"
    K, found, sample = like.shape[1], None, None
    if method == "sample":
        found = sample_keys(stream, K, like, chance)
    elif method in ("kmeans", "kmeans++"):
        sample = stream.share(ROWS_PER_KEY * K, chance.own)
        found = kmeans(sample, K, like, iters=kmeans_iters, plus=plus, chance=chance)
    elif fresh:
        device = like.device if chance.shared is None else chance.shared.device
        found = torch.randn(like.shape, generator=chance.shared, device=device)
    if found is not None:
        for part, start in zip(moving, (found, found, torch.ones((), device="cpu")), strict=True):
            part.copy_(start)
    packed = torch.ops.kvb.pack_keys(moving[0])
    for epoch in range(max(1, epochs)):
        meter = Meter(like)
        learns = epoch < epochs
        empty = like.new_zeros(0, 1, like.shape[0], like.shape[2])
        # Without epochs, what k-means looked at is measured where reading more would cost an encoder's time.
        measured = sample if stream.dear and sample is not None else stream
        for queries in stream.in_step("moving averages", empty) if learns else measured.queries("measuring"):
            indices, distances = torch.ops.kvb.nearest(queries, moving[0], packed, mask, 1)
            meter.add(indices[..., 0], distances[..., 0], queries)
            if learns:
                codes = indices[..., 0]
                packed = step(moving, queries, codes, mask=mask, rates=rates, generator=chance.own, group=group)
    return meter.report(method, group)


class Meter:
    """Sums what ``KeyReport`` says, on the device; one read at the end."""

    hits: Tensor
    inertia: Tensor
    finite: Tensor
    queries: int

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

    def report(self, method: str, group: Group) -> KeyReport:
        """Of all processes."""
        C, K = self.hits.shape
        queries = torch.full_like(self.finite, self.queries)
        counts = collectives.total((self.hits, self.finite, queries), group)
        hits, finite, seen = counts[0], int(counts[1]), int(counts[2])
        (inertia,) = collectives.total((self.inertia,), group)
        return KeyReport(
            method,
            rows=seen // C,
            skipped=seen - finite,
            inertia=float(inertia) / max(1, finite),
            dead_codes=int((hits == 0).sum()),
            pairs=C * K,
        )
