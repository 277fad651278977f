"""How a bottleneck learns its keys and counts its hits: batch by batch, together with other processes.

After any number of steps all processes hold bitwise the same keys, statistics and counts, and these are what one
process would have on all their batches, up to the rounding of sums.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kvb import collectives
from kvb.collectives import Group, Members
from kvb.modules import key_learning, key_report, recomputation
from kvb.modules.key_report import KeyReport
from kvb.modules.modes import Modes
from kvb.modules.streams import Stream

_MODES = {0: "keys wait for data", 1: "keys learn", 2: "hits are counted", 3: "hits are counted by codes"}


class LearnsKeys(Modes):
    """The part of a ``KeyValueBottleneck`` that changes its buffers on forwards in training mode."""

    decay: float
    eps: float
    threshold_ema_dead_code: float
    kmeans_iters: int
    sparse_grad: bool
    init_keys: Any
    _present: Any
    _members = Members()
    _warned_of_keys = False
    _shares_values: Members | None = None  # with whom ``kvb.distributed.sync_values`` shares the values' gradient
    _agreed: int | None = None  # what all processes did when that was last looked at

    # --- with whom ----------------------------------------------------------------------------------------------------

    @property
    def process_group(self) -> Group:
        """The processes that learn the keys together: None for all, or for those of the DDP around; False for none."""
        return self._members.group

    @process_group.setter
    def process_group(self, group: Group) -> None:
        self._members, self._agreed = Members(group), None

    @property
    def shares_values(self) -> bool:
        """Whether the gradient of the values is that of all processes, by ``kvb.distributed.sync_values``."""
        return self._shares_values is not None and collectives.world(self._shares_values.group) > 1

    def _processes(self) -> Group:
        """The group that this call learns with; False where there is no other process."""
        return collectives.current(self._members.group)

    def _meet(self, queries: Tensor) -> None:
        """See that all processes are about to do the same: before anything is sent whose size depends on it.

        The host waits for the device only when this process does something else than before.
        """
        if recomputation.in_backward() or torch.compiler.is_compiling() or not (self._learning or self._counting):
            return
        group = self._processes()
        if group is False:
            return
        mode = int(self._initialised) if self._learning else 2 + int(self._counts_codes)
        rows, device = queries.shape[0] * queries.shape[1], queries.device
        collectives.agree(_MODES, mode, rows, group, device, wait=device.type == "cpu" or mode != self._agreed)
        self._agreed = mode

    # --- batch by batch -----------------------------------------------------------------------------------------------

    @property
    def _counts_codes(self) -> bool:
        """Whether processes send codes instead of hits [C, K]: where the table is large, or codes are needed anyway."""
        return self.sparse_grad or self.shares_values

    def _codes_of_all(self, queries: Tensor, indices: Tensor, counted: Tensor | None) -> list[Tensor] | None:
        """What every process fetched in a forward that counts hits, if they send codes; None otherwise."""
        counts = self.training and self._counting and not self._learning and not recomputation.in_backward()
        group = self._processes() if counts and self._counts_codes else False
        if group is False:
            return None
        K = self.key_value_pairs_per_codebook
        return key_learning.codes_of_all(queries.detach(), indices, self._present(), K, counted, group)

    def _observe(
        self, queries: Tensor, indices: Tensor, counted: Tensor | None = None, sent: list[Tensor] | None = None
    ) -> None:
        """Learn the keys or count the hits of one batch in training mode.

        Args:
            indices: [B, S, C, T]. counted: [B, S]. sent: ``_codes_of_all``, if it has been called.
        """
        if recomputation.in_backward():
            return  # the forward that runs again has been observed
        if self._learning:
            self._learn(queries.detach(), indices[..., 0], counted)
        elif self._counting:
            sent = self._codes_of_all(queries, indices, counted) if sent is None else sent
            K = self.key_value_pairs_per_codebook
            hits = self._hits(queries.detach(), indices) if sent is None else key_learning.hits_of(torch.cat(sent), K)
            self._taken_quietly("cluster_size_counter").add_(hits)

    def _learn(self, queries: Tensor, indices: Tensor, counted: Tensor | None = None) -> None:
        """One step of the moving averages, taken by every process, also by one with an empty batch."""
        self._packed.release()  # before the statistics need memory
        packed = key_learning.step(
            self._moving(),
            queries,
            indices,
            mask=self._usable,
            rates=self._rates(),
            counted=counted,
            group=self._processes(),
        )
        self._keep_packed(packed)

    def _hits(self, queries: Tensor, indices: Tensor) -> Tensor:
        """How often every pair [C, K] was fetched by finite queries, in all processes."""
        group, present, K = self._processes(), self._present(), self.key_value_pairs_per_codebook
        hits = [torch.ops.kvb.count(queries, each, K) for each in indices.unbind(-1)]
        if present is not None:
            hits = [each * present[:, t, None] for t, each in enumerate(hits)]
        found = hits[0] if len(hits) == 1 else torch.stack(hits).sum(0)
        return found if group is False else collectives.total((found.to(torch.int32),), group)[0]

    def _moving(self) -> tuple[Tensor, Tensor, Tensor]:
        """What moves: keys, keys_avg, cluster_size."""
        keys, keys_avg, cluster_size = map(self._taken_quietly, ("keys", "keys_avg", "cluster_size"))
        return keys, keys_avg, cluster_size

    def _rates(self) -> key_learning.Rates:
        return key_learning.Rates(self.decay, self.eps, self.threshold_ema_dead_code)

    # --- from data ----------------------------------------------------------------------------------------------------

    def _initialise_from(self, batch: Tensor, mask: Tensor | None = None) -> None:
        """The first batch in training mode initialises keys that wait for data: the batches of all processes."""
        if not (self.training and self._learning):
            self._require_keys()
        group, numbers = self._processes(), batch.numel() if mask is None else batch.numel() * int(mask.any())
        if group is not False:
            numbers = int(collectives.total((torch.tensor([numbers], device=batch.device),), group)[0])
        if numbers > 0:
            self.init_keys(batch.detach(), epochs=0, mask=mask, progress=False)

    @torch.no_grad()
    def _initialise(
        self, stream: Stream, method: key_learning.Method, epochs: int, generator: torch.Generator | None
    ) -> KeyReport:
        """``init_keys`` on copies, which become the state when all went well."""
        keys, keys_avg, cluster_size = (part.clone() for part in self._moving())
        moving = keys, keys_avg, cluster_size
        report = key_learning.initialise(
            moving,
            stream,
            method,
            fresh=not self._initialised,
            kmeans_iters=self.kmeans_iters,
            epochs=epochs,
            mask=self._usable,
            rates=self._rates(),
            generator=generator,
        )
        self._commit(*moving)
        return report

    def _warn_of(self, report: KeyReport) -> None:
        """Say once that keys are of no use; called by ``init_keys``."""
        message = key_report.concern(report, self._taken_quietly("cluster_size"))
        if message is not None and not self._warned_of_keys:
            self._warned_of_keys = True
            warnings.warn(message, stacklevel=3)
