"""A table split over pairs: for codebooks that do not fit in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb import collectives, ops
from kvb.distributed import exchange
from kvb.distributed.sharding import Sharded
from kvb.functional import Pool
from kvb.modules import positions
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.key_report import KeyReport
from kvb.modules.streams import Stream
from kvb.reference.search import lowest_unused
from kvb.reference.statistics import moved_keys, pair_step

AT_ONCE = 1024  # candidates that are compared with one another


class ByPairs(Sharded):
    """K/n pairs of every codebook in each of n processes.

    Each process finds the nearest of its pairs; the search itself then finds the nearest of those that all processes
    found, by the same exact distances. The owner gives the row.
    """

    @staticmethod
    def require(bottleneck: KeyValueBottleneck) -> None:
        """Refuse what needs all pairs of a codebook in one process."""
        for option, remedy in (
            ("sample_codebook_temperature", "draw the nearest pairs instead, with 0"),
            ("threshold_ema_dead_code", "replace dead codes before, and set it to 0"),
        ):
            if getattr(bottleneck, option) > 0:
                raise NotImplementedError(
                    f"{option} = {getattr(bottleneck, option)} needs all pairs of a codebook in one process: {remedy}, "
                    "or split over codebooks"
                )

    # --- search -------------------------------------------------------------------------------------------------------

    def _in_one_pass(self, pool: Pool, axes: int) -> bool:
        return False

    def _search(self, queries: Tensor, keys: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        self.require(self)
        places, rows = self._candidates(queries.detach(), keys, packed)
        size = max(1, AT_ONCE // places.shape[-1])
        parts = zip(queries.flatten(0, 1)[:, None].split(size), places.split(size), rows.split(size), strict=True)
        found = [_nearest_of(*one, topk=self.topk) for one in parts]
        indices, distances = (torch.cat(each).view(*queries.shape[:3], self.topk) for each in zip(*found, strict=True))
        return indices, distances

    @torch.no_grad()
    def _candidates(self, queries: Tensor, keys: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        """What each process found: indices [N, C, n*T], -1 for none, and keys [N, C, n*T, D]; one ``all_gather``."""
        topk = min(self.topk, keys.shape[1])
        found, _ = torch.ops.kvb.nearest(queries, keys, packed, self._usable, topk)
        ranks = found.unbind(-1)
        rows = torch.stack([torch.ops.kvb.gather(keys, one, "none", "bscv") for one in ranks], -2)
        usable = rows.isfinite().all(-1)
        if self._usable is not None:
            usable &= torch.stack([_picked(self._usable, one) for one in ranks], -1)
        places = torch.where(usable, found + self._layout.begin, -1)
        missing = self.topk - topk
        places = torch.nn.functional.pad(places, (0, missing), value=-1)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        both = torch.cat([places[..., None].view(torch.uint8), rows.contiguous().view(torch.uint8)], -1)
        every = torch.stack(collectives.gathered(both, self._layout.shards), -3)  # [B, S, C, n, T, bytes]
        every = every.flatten(3, 4).flatten(0, 1)
        width = places.element_size()
        found = every[..., :width].contiguous().view(torch.int64)[..., 0]
        return found, every[..., width:].contiguous().view(rows.dtype)

    # --- rows: the owner has them -------------------------------------------------------------------------------------

    def _own(self, indices: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which indices [B, S, C] name pairs of this process that are allowed, and their places here, or 0."""
        here = self._layout.here
        own = (indices >= here.start) & (indices < here.stop)
        place = torch.where(own, indices - here.start, 0)
        return (own if allowed is None else own & _picked(allowed, place)), place

    def _rows(
        self, flat: Tensor, indices: Tensor, pool: Pool, allowed: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """Rows at indices [B, S, C]: [B, C, S, *], or pooled [B, S, *]. One ``all_reduce``.

        Args:
            flat: this process's table as [1, C*k, *].
            allowed: [C, k], of this process's pairs. counted: [B, S]. Rows are zero where these are not.
        """
        (B, S, C), width = indices.shape, flat.shape[-1]
        own, place = self._own(indices, allowed)
        own = own if counted is None else own & counted[..., None]
        sample, position, book = own.nonzero(as_tuple=True)
        row = book * (flat.shape[1] // C) + place[own]
        fetch = ops.gather_row_grad if self.sparse_grad else torch.ops.kvb.gather
        rows = fetch(flat, row[:, None, None], "none", "bscv")[:, 0, 0]
        shape = (B, C, S) if pool == "none" else (B, S)
        target = (sample * C + book) * S + position if pool == "none" else sample * S + position
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        part = wide.new_zeros((torch.Size(shape).numel(), width)).index_add(0, target, wide)
        total = exchange.summed(part, self._layout.shards)
        return (total / C if pool == "mean" else total).to(flat.dtype).view(*shape, width)

    def _values_at(self, indices: Tensor, pool: Pool, allowed: Tensor | None, counted: Tensor | None) -> Tensor:
        return self._rows(exchange.local_rows(self.values, self._layout.data), indices, pool, allowed, counted)

    def _fetch_values(
        self,
        indices: Tensor,
        shape: torch.Size,
        pool: Pool,
        counted: Tensor | None,
        sent: list[Tensor] | None,
    ) -> Tensor:
        """As there. A masked pair is found where no other is left: its value is zero."""
        B, S, C, T = indices.shape
        flat = indices.permute(0, 3, 1, 2).reshape(B, T * S, C)
        counted = None if counted is None else positions.per_rank(counted, T)
        fetched = self._values_at(flat, pool, self._usable, counted)
        return fetched.view(B, *((C,) if pool == "none" else ()), *self._ranks(), *shape, self.dim_values)

    def _gather(
        self,
        table: Tensor,
        indices: Tensor,
        pool: Pool,
        counted: Tensor | None = None,
        sent: list[Tensor] | None = None,
    ) -> Tensor:
        return self._rows(table.reshape(1, -1, table.shape[-1]), indices, pool, counted=counted)

    def decode(self, indices: Tensor, pool: Pool | None = None, *, mask: Tensor | None = None) -> Tensor:
        """As there; one ``all_reduce``, and with ``topk`` > 1 one of C numbers more."""
        pool = self._pooled(pool)
        flat = self._flat_codes(indices).to(torch.int64)
        counted = None if mask is None else self._counted_codes(indices, mask)
        shape, usable = indices.shape[2:], self._search_mask()
        out = self._values_at(flat, pool, usable if self._too_few(usable) else None, counted)
        return out.view(*(indices.shape if pool == "none" else (indices.shape[0], *shape)), out.shape[-1])

    def _too_few(self, usable: Tensor | None) -> bool:
        """Whether a search for ``topk`` > 1 would not find as many; asked by every process, whatever its mask."""
        if self.topk == 1:
            return False
        counter = self._taken_quietly("cluster_size_counter")
        here = torch.full_like(counter[:, 0], counter.shape[1]) if usable is None else usable.sum(-1)
        return int(self._total(here).min()) < self.topk

    # --- counting and learning ----------------------------------------------------------------------------------------

    def _codes_of_all(self, queries: Tensor, indices: Tensor, counted: Tensor | None) -> None:
        """None: hits of this process's pairs alone are sent."""

    def _hits(self, queries: Tensor, indices: Tensor) -> Tensor:
        """How often every pair here [C, k] was fetched by finite queries, in all data-parallel processes."""
        total = torch.zeros_like(self._taken_quietly("cluster_size_counter"))
        for rank in indices.unbind(-1):
            bins, k = self._bins(rank)
            total += torch.ops.kvb.count(queries, bins, k + 1)[:, :k]
        return collectives.total((total,), self._layout.data)[0]

    def _bins(self, indices: Tensor) -> tuple[Tensor, int]:
        """Indices [B, S, C] as places in this process's part, and what takes none in one more bin behind them."""
        own, place = self._own(indices, self._usable)
        size = self._taken_quietly("cluster_size").shape[1]
        return torch.where(own, place, size), size

    @torch.no_grad()
    def _learn(self, queries: Tensor, indices: Tensor, counted: Tensor | None = None) -> None:
        """As ``reference.update_keys_``, whose smoothing knows the sizes of all pairs of a codebook."""
        self._packed.release()
        bins, k = self._bins(indices)
        hits, sums = (part[:, :k] for part in torch.ops.kvb.accumulate(queries, bins, k + 1))
        keys, keys_avg, cluster_size = self._moving()
        hits, sums = collectives.total((hits.to(keys.dtype), sums.to(keys.dtype)), self._layout.data)
        step = pair_step(
            cluster_size,
            hits,
            spare=None,
            usable=None,
            decay=self.decay,
            eps=self.eps,
            threshold=0.0,
            start=1.0,
            rescale_all=False,
            whole=self._total,
        )
        moved, average = moved_keys(step, keys, keys_avg, sums)
        for part, new in ((keys, moved), (keys_avg, average), (cluster_size, step.size)):
            part.copy_(new)
        self._packed.forget()

    def _initialise(self, stream: Stream, method: str, epochs: int, generator: torch.Generator | None) -> KeyReport:
        raise NotImplementedError(
            "init_keys(...) needs all pairs of a codebook in one process: call it before parallelize(..., pairs=), or "
            "load keys, or call reset_parameters() for random ones and let them move on forwards in training mode"
        )

    def perplexity(self) -> Tensor:
        """As there, [C]; every process calls it."""
        usage = self.usage()
        entropy = self._total(-torch.special.xlogy(usage, usage).sum(-1))
        return torch.where(self._total(usage.sum(-1)) > 0, entropy.exp(), 0)

    def usage(self) -> Tensor:
        """As there, of this process's pairs [C, k]; every process calls it."""
        hits = self._hits_so_far()
        total = self._total(hits.sum(-1, keepdim=True))
        return hits / total.masked_fill(total == 0, 1)

    def _any_counted(self, counts: Tensor) -> Tensor:
        return self._total((counts > 0).sum()) > 0


def _picked(mask: Tensor, place: Tensor) -> Tensor:
    """mask [C, k] at place [B, S, C]."""
    return mask[torch.arange(mask.shape[0], device=mask.device), place]


def _nearest_of(queries: Tensor, places: Tensor, keys: Tensor, *, topk: int) -> tuple[Tensor, Tensor]:
    """The nearest of all candidates of some queries, among which are each query's own: no other can be nearer.

    Args:
        queries: [n, 1, C, D]. places: [n, C, M], -1 for no candidate. keys: [n, C, M, D].
    Returns:
        indices and distances [n, 1, C, topk], as ``nearest`` over all keys gives them.
    """
    n, C, M = places.shape
    places, order = places.transpose(0, 1).reshape(C, n * M).sort(-1)  # so that the first of equals is the lowest index
    keys = keys.transpose(0, 1).reshape(C, n * M, keys.shape[-1])
    keys = keys.gather(1, order[..., None].expand_as(keys))
    usable = places >= 0
    usable[:, 1:] &= places[:, 1:] != places[:, :-1]
    lacking = topk - n * M
    if lacking > 0:  # no more candidates than that: ``nearest`` wants at least ``topk`` keys
        keys = torch.nn.functional.pad(keys, (0, 0, 0, lacking))
        places, usable = (torch.nn.functional.pad(part, (0, lacking)) for part in (places, usable))
    chosen, distances = torch.ops.kvb.nearest(queries, keys, torch.ops.kvb.pack_keys(keys), usable, topk)
    ranks = [_picked(places, rank) for rank in chosen.unbind(-1)]
    found = [_picked(usable, rank) for rank in chosen.unbind(-1)]
    indices = torch.empty_like(chosen)
    for t in range(topk):
        filling = lowest_unused(indices[..., :t].flatten(0, 2)).view_as(ranks[t]) if t else torch.zeros_like(ranks[t])
        indices[..., t] = torch.where(found[t], ranks[t], filling)
    return torch.where(distances.isnan(), torch.arange(topk, device=chosen.device), indices), distances
