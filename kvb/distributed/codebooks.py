"""A table split over codebooks: all that a codebook needs is in one process."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvb import collectives
from kvb.collectives import Members
from kvb.distributed import exchange
from kvb.distributed.layout import Layout
from kvb.distributed.sharding import Sharded
from kvb.functional import Pool
from kvb.modules.outputs import BottleneckOutput


class ByCodebooks(Sharded):
    """C/n codebooks in each of n processes: search, statistics and learning stay in the process.

    Values pooled over codebooks are added up, [B, *shape, V]; what has an axis C is joined. The ``KeyReport`` of
    ``init_keys`` is that of this process's codebooks.
    """

    def place(self, layout: Layout) -> None:
        """As there. Of gradients, data-parallel processes send what they fetched, as ``sync_values`` has it."""
        super().place(layout)
        self._shares_values = Members(layout.data) if layout.data is not False else None

    def _table(self) -> Tensor:
        return exchange.local(self.values, False)  # gradients are those of all processes already

    def _queries(self, x: Tensor, mask: Tensor | None = None, *, one_position: bool = False) -> Tensor:
        queries = exchange.shared(super()._queries(x, mask, one_position=one_position), self._layout.shards)
        return queries[..., self._layout.here, :]

    def _seed(self) -> Tensor:
        """As there; other draws in other codebooks, where processes have the same generator."""
        return super()._seed() + self._layout.begin

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        return_values_only: bool | None = None,
    ) -> Tensor | BottleneckOutput:
        """As there; one ``all_reduce`` of pooled values, one ``all_gather`` of each other output."""
        pool = self._pooled(pool)
        found = super().forward(x, mask=mask, pool=_partial(pool), return_values_only=return_values_only)
        if isinstance(found, Tensor):
            return self._together(found, pool)
        return BottleneckOutput(self._together(found.values, pool), *(self._joined(part) for part in found[1:]))

    def encode(
        self, x: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype | Literal["auto"] = torch.int64
    ) -> Tensor:
        """As there; one ``all_gather``."""
        return self._joined(super().encode(x, mask=mask, dtype=dtype))

    def decode(self, indices: Tensor, pool: Pool | None = None, *, mask: Tensor | None = None) -> Tensor:
        """As there, of the codes of all codebooks."""
        pool = self._pooled(pool)
        self._flat_codes(indices)
        here = super().decode(indices[:, self._layout.here], _partial(pool), mask=mask)
        return self._together(here, pool)

    def _joined(self, part: Tensor) -> Tensor:
        return exchange.joined(part, self._layout.sizes, self._layout.shards)

    def _together(self, part: Tensor, pool: Pool) -> Tensor:
        """Values of this process's codebooks -> those of all, pooled or with the axis C."""
        if pool == "none":
            return self._joined(part)
        total = exchange.summed(part, self._layout.shards)
        return (total / self.num_codebooks if pool == "mean" else total).to(part.dtype)

    def _learn(self, queries: Tensor, indices: Tensor, counted: Tensor | None = None) -> None:
        """As there. Averages sink wherever any codebook of any process had a hit: all get to know that."""
        found = queries.isfinite().all(-1)
        found = (found if self._usable is None else found & self._usable.any(-1)).any()
        here = collectives.total((found.float(),), self._layout.data)[0] > 0
        idle = (self._total(here.float()) > 0) & ~here
        super()._learn(queries, indices, counted)
        if idle.is_cpu and not idle:
            return
        _, keys_avg, cluster_size = self._moving()
        for average in (keys_avg, cluster_size):
            average.mul_(torch.where(idle, average.new_tensor(self.decay), 1))

    def perplexity(self) -> Tensor:
        """As there, [C]; every process calls it."""
        return self._joined(super().perplexity()[None])[0]


def _partial(pool: Pool) -> Pool:
    return "none" if pool == "none" else "sum"
