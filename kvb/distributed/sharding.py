"""A bottleneck whose table is split over processes: what the ways to split it share.

A process holds keys, values, statistics and optimizer state of its part alone. ``values`` is a DTensor; the buffers
are plain tensors of the part, which a state_dict shows as DTensors. What goes in and comes out of a module is whole,
and the same in all processes that share a table: they must be given the same batch.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor

from kvb import collectives, validation
from kvb.distributed import exchange
from kvb.distributed.layout import CODEBOOKS, Layout
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.reference.shared import require_codes

SPLIT = ("cluster_size", "cluster_size_counter", "keys_avg", "keys", "kvb_mask")  # buffers [C, K, ...]
_Self = TypeVar("_Self", bound="Sharded")


class Sharded(KeyValueBottleneck):
    """What both ways to split a table share: ``parallelize`` makes it of a ``KeyValueBottleneck``.

    ``usage()``, ``pair_mask`` and the buffers are those of this process's part; all else is as in the module before.
    """

    values: Any
    _layout: Layout

    @staticmethod
    def require(bottleneck: KeyValueBottleneck) -> None:
        """Raise where a bottleneck has an option that goes with no such split."""

    def place(self, layout: Layout) -> None:
        """Keep this process's part of every table, of the module that the first process has."""
        self._layout, self.process_group = layout, layout.data
        values = distribute_tensor(self.values.detach(), layout.mesh, layout.placements)
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
        same = [Replicate()] * layout.mesh.ndim
        for name in (*SPLIT, "initted", "kvb_flags"):
            placements = layout.placements if name in SPLIT else same
            part = exchange.part_of(distribute_tensor(self._taken_quietly(name), layout.mesh, placements))
            setattr(self, name, part.clone() if _borrows(part) else part)
        self.refresh_keys()
        self._look()

    @property
    def num_codebooks(self) -> int:
        """C, in all processes together."""
        return int(self.values.shape[0])

    @property
    def key_value_pairs_per_codebook(self) -> int:
        """K, in all processes together."""
        return int(self.values.shape[1])

    def _table(self) -> Tensor:
        return exchange.local(self.values, self._layout.data)

    def _part(self, whole: Tensor) -> Tensor:
        return self._layout.part(whole)

    def _flat_codes(self, indices: Tensor) -> Tensor:
        """Codes [B, C, *shape] as [B, S, C]: all checked by every process, so that all raise or none."""
        validation.integer("decode", "indices", indices)
        validation.codes(indices, self.num_codebooks)
        validation.same_device("indices", indices, "values", self.values)
        flat = indices.reshape(*indices.shape[:2], indices.shape[2:].numel()).mT
        require_codes(flat, self.num_codebooks, self.key_value_pairs_per_codebook)
        return flat

    # --- what only some processes may know ----------------------------------------------------------------------------

    def deactivate_counts(self: _Self) -> _Self:
        """As there; every process calls it."""
        if not self._total((self.cluster_size_counter > 0).sum()):
            return super().deactivate_counts()  # which raises
        self._set_flags(counting=False)
        return self

    def fraction_of_unused_keys(self) -> Tensor:
        """As there, of all pairs; every process calls it."""
        counter = self.cluster_size_counter
        return self._total((counter == 0).sum()) / (self.num_codebooks * self.key_value_pairs_per_codebook)

    def _total(self, number: Tensor) -> Tensor:
        """The sum of a number over the parts of the table."""
        return collectives.total((number,), self._layout.shards)[0]

    # --- a new start --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As there, drawn for each part by itself; every process calls it. For a module that was on the meta device."""
        layout, device = self._layout, self._device
        seed = collectives.shared_seed(layout.shards, generator, device)
        own = torch.Generator(device).manual_seed(seed + layout.begin)
        # The processes that have the same part begin with the same numbers.
        seed = collectives.shared_seed(layout.data, own, device)
        super().reset_parameters(own.manual_seed(seed))

    # --- state --------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in SPLIT:
            destination[prefix + name] = self._layout.whole(destination[prefix + name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Of whole tensors, or DTensors, each process takes its part."""
        whole = self.values.shape[:2]
        for name in (*SPLIT, "values"):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape[:2] == whole:
                part = self._layout.part(given)
                state_dict[prefix + name] = part if name in SPLIT else self._layout.whole(part)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        layout = self._layout
        what = f"{'codebooks' if layout.axis == CODEBOOKS else 'pairs'} {layout.here.start} to {layout.here.stop - 1}"
        return f"{super().extra_repr()}, {what} of {layout.size} here"


def _borrows(part: Tensor) -> bool:
    """Whether a part keeps the memory of more than itself."""
    return not part.is_meta and part.untyped_storage().nbytes() > part.numel() * part.element_size()
