"""The modes of a bottleneck: whether keys learn and hits are counted; and what the counts say."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from kvb.modules.state import BottleneckState

_Self = TypeVar("_Self", bound="Modes")


class Modes(BottleneckState):
    """The switches of a ``KeyValueBottleneck``, each of which returns self, and the statistics of its hits."""

    def _require_keys(self) -> None:
        self._look()
        if not self._initialised:
            raise RuntimeError("keys are not initialised: call init_keys(...) or run one batch in training mode")

    def freeze_keys(self: _Self) -> _Self:
        """Keys stop learning, and forwards in training mode count hits instead.

        Raises:
            RuntimeError: the keys still await their initialisation from data.
        Examples:
            >>> kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys().keys_frozen
            True
        """
        self._require_keys()
        self._set_flags(learning=False)
        self._packed_keys()
        return self

    def unfreeze_keys(self: _Self) -> _Self:
        """Keys learn again on forwards in training mode."""
        self._set_flags(learning=True)
        return self

    def enable_update_keys(self: _Self) -> _Self:
        """The published name of ``unfreeze_keys``."""
        return self.unfreeze_keys()

    def disable_update_keys(self: _Self) -> _Self:
        """The published name of ``freeze_keys``."""
        return self.freeze_keys()

    def activate_counts(self: _Self) -> _Self:
        """Count fetched pairs on forwards in training mode with frozen keys; every pair may be fetched."""
        self._set_flags(counting=True)
        return self

    def deactivate_counts(self: _Self) -> _Self:
        """Stop counting, and restrict the search with frozen keys to pairs counted so far.

        Raises:
            RuntimeError: nothing was counted yet, so that nothing could be fetched.
        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> _ = bottleneck.train()(torch.randn(1, 4, 8))  # counts one pair of each codebook
            >>> bottleneck.deactivate_counts().encode(torch.randn(100, 4, 8)).unique(dim=0).shape
            torch.Size([1, 4])
        """
        if not bool((self.cluster_size_counter > 0).any()):
            raise RuntimeError(
                "no pair was counted yet, so deactivate_counts() would leave nothing to fetch: "
                "run batches in training mode with frozen keys first"
            )
        self._set_flags(counting=False)
        return self

    def reset_cluster_size_counter(self: _Self) -> _Self:
        """Forget all counts, and count again."""
        self._write("cluster_size_counter", torch.zeros((), dtype=torch.int64, device="cpu"))
        return self.activate_counts()

    # --- what was used ------------------------------------------------------------------------------------------------

    def fraction_of_unused_keys(self) -> Tensor:
        """The share of all pairs that were never counted.

        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> _ = bottleneck.train()(torch.randn(1, 4, 8))
            >>> bottleneck.fraction_of_unused_keys()  # 15 of 16
            tensor(0.9375)
        """
        return (self.cluster_size_counter == 0).sum() / self.cluster_size_counter.numel()

    def usage(self) -> Tensor:
        """The share [C, K] of a codebook's hits that each pair got; zeros for a codebook without any.

        Hits are those counted with frozen keys (``cluster_size_counter``). While keys learn and none was counted, they
        are the moving averages ``cluster_size``, which start at 1 for every pair: with ``decay`` g, the last
        1 / (1 - g) batches or so. Zeros while keys wait for data.

        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> _ = bottleneck.train()(torch.randn(1, 4, 8))
            >>> bottleneck.usage().sum(-1), bottleneck.usage().max()
            (tensor([1., 1., 1., 1.]), tensor(1.))
        """
        hits = self._hits_so_far()
        total = hits.sum(-1, keepdim=True)
        return hits / total.masked_fill(total == 0, 1)

    def _hits_so_far(self) -> Tensor:
        """What ``usage`` gives shares of, [C, K]."""
        self._look()
        counted: Tensor = self.cluster_size_counter
        if not (self._learning and self._initialised):
            return counted
        return torch.where(self._any_counted(counted), counted, self.cluster_size)

    def _any_counted(self, counts: Tensor) -> Tensor:
        return (counts > 0).any()

    def perplexity(self) -> Tensor:
        """exp(entropy of ``usage``) [C]: the number of pairs in effective use, 1 to K; 0 without hits.

        While keys learn it starts at K, with ``cluster_size``, and comes down to the truth within 1 / (1 - decay)
        batches or so.

        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> _ = bottleneck.train()(torch.randn(1, 4, 8))
            >>> bottleneck.perplexity()  # one pair is all that was fetched
            tensor([1., 1., 1., 1.])
        """
        usage = self.usage()
        entropy = -torch.special.xlogy(usage, usage).sum(-1)
        return torch.where(usage.sum(-1) > 0, entropy.exp(), 0)
