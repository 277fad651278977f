"""The authors' ``KeyValueBottleneck`` as they published it last: what goes in, what comes out, what is saved.

Built on the same operators as the rest of kvb, so the nearest key is the true one. What the published code does wrong
is off; a name of ``BUGS`` turns one of them on again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvb import checkpoints, collectives, validation
from kvb.compat.key_value_bottleneck import utils
from kvb.modules import bottleneck, key_learning
from kvb.modules.wrapping import BottleneckOptions

# What each name in ``bugs`` does.
BUGS = {
    "learns_in_eval": "keys learn, and hits are counted, on every forward: in eval mode and under no_grad too",
    "starts_at_zero": "cluster_size starts at 0, so that keys without a hit explode unless dead codes are replaced",
    "kmeans_forgets_statistics": "after k-means keys_avg is 0, so that the next update shrinks all keys twentyfold",
    "replaces_keys_only": "a replaced key keeps its old statistics, so that the next update takes it back",
}
_Bottleneck = TypeVar("_Bottleneck", bound="KeyValueBottleneck")


class KeyValueBottleneck(bottleneck.KeyValueBottleneck):
    """The published class: x [b, C, n, D] float32 in, always a tuple out.

    ``(values,)``, or with ``return_values_only=False`` ``(values, keys, indices, distances, counts)``:
    [b, C, T, n, V], [b, C, T, n, D], then [b, C, T, n, 1] each; T is ``topk`` with frozen keys, and 1 while they learn.
    Distances are negative squared L2; a rank for which no pair is usable has -inf, and the value zero. Counts are those
    of the fetched pairs before this batch.

    Keys that wait for data take the first batch, in every mode. Pairs without a hit are rescaled with their
    statistics. A state_dict holds the six published names, all float32, and not whether keys are frozen. The rows that
    start k-means and those that replace dead keys are drawn as published; with all of ``BUGS``, so are the numbers that
    follow.

    Args:
        bugs: names of ``BUGS`` to have back; the others are those of ``kvb.KeyValueBottleneck``.
    Raises:
        ValueError: x is not [b, C, n, D]; an unknown bug.
    """

    __call__: Callable[..., tuple[Tensor, ...]]  # type: ignore[assignment]
    bugs: frozenset[str]
    values: torch.nn.Parameter

    def __init__(self, *arguments: Any, bugs: Collection[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        validation.choice("pool", self.pool, ("none",))
        self.bugs = frozenset(validation.choice("bugs", bug, tuple(BUGS)) for bug in bugs)
        if "starts_at_zero" in self.bugs:
            self.cluster_size.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """x [b, C, n, D] -> the tuple described above. Gradients reach values; x gets one through distances."""
        validation.floating(type(self).__name__, "x", x)
        validation.shape("x", x, "b C n D", (None, self.num_codebooks, None, self.dim_keys))
        x = x.float()
        queries = self._queries(x)
        self._look()
        if not self._initialised:
            self._initialise_from(x)
        observes = self.training or "learns_in_eval" in self.bugs
        keys, packed = self._keys_for(queries, learns=observes and self._learning)
        indices, distances = self._search(queries, keys, packed)
        del packed  # its memory is that of the keys' next packed form
        if self._learning:
            indices, distances = indices[..., :1], distances[..., :1]
        values = self._ranked(self.values, indices)
        if (present := self._present()) is not None:  # no pair is usable for some ranks
            values = torch.where(present[:, : indices.shape[-1], None, None], values, 0)
        output: tuple[Tensor, ...] = (values,)
        if not self.return_values_only:
            counter = self._taken_quietly("cluster_size_counter")
            counts = self._ranked(counter.float()[..., None], indices)
            found, apart = (part.permute(0, 2, 3, 1)[..., None] for part in (indices, -distances))
            output = (*output, self._ranked(keys, indices), found, apart, counts)
        if observes:
            self._observe(queries, indices)
        return output

    def _ranked(self, table: Tensor, indices: Tensor) -> Tensor:
        """Rows of table [C, K, *] at indices [b, n, C, T], as [b, C, T, n, *]."""
        b, n, C, T = indices.shape
        positions = indices.permute(0, 3, 1, 2).reshape(b, T * n, C)
        return self._gather(table, positions, "none").view(b, C, T, n, table.shape[-1])

    def _learn(self, queries: Tensor, indices: Tensor, counted: Tensor | None = None) -> None:
        self._packed.forget()
        hits, sums = torch.ops.kvb.accumulate(queries, indices, self.key_value_pairs_per_codebook)
        hits, sums = collectives.total((hits.to(sums.dtype), sums), self._processes())
        keys, keys_avg, cluster_size = self._moving()
        key_learning.update(
            keys,
            keys_avg,
            cluster_size,
            hits,
            sums,
            queries,
            decay=self.decay,
            eps=self.eps,
            threshold=0.0,
            rescale_all=True,
        )
        if self.threshold_ema_dead_code > 0:
            self._replace_dead(_by_codebook(queries))

    @torch.no_grad()
    def _replace_dead(self, samples: Tensor) -> None:
        """Rows of samples [C, N, D] in place of dead keys, drawn as published: from the same seed, the same."""
        threshold = self.threshold_ema_dead_code
        dead = self.cluster_size < threshold
        if samples.shape[1] == 0 or not dead.any():
            return
        fresh = utils.sample_vectors(samples, self.keys.shape[1])
        dead &= fresh.isfinite().all(-1)
        self.keys.copy_(torch.where(dead[..., None], fresh, self.keys))
        if "replaces_keys_only" not in self.bugs:
            start = max(1.0, threshold)
            self.cluster_size.masked_fill_(dead, start)
            self.keys_avg.copy_(torch.where(dead[..., None], fresh * start, self.keys_avg))

    @torch.no_grad()
    def _initialise_from(self, batch: Tensor, mask: Tensor | None = None) -> None:
        if batch.numel() == 0:
            return
        if self.init_mode == "kmeans":
            samples = _by_codebook(self._queries(batch.detach()))
            means, bins = utils.kmeans(samples, self.keys.shape[1], self.kmeans_iters)
            forgets = "kmeans_forgets_statistics" in self.bugs
            averages = torch.zeros_like(means) if forgets else means * bins[..., None]
            state = {"keys": means, "keys_avg": averages, "cluster_size": bins, "initted": torch.ones(1)}
            for name, part in state.items():
                self._write(name, part)
            self._packed.forget()
            self._look()
            return
        frozen = not self.update_keys
        self.update_keys = True
        try:
            self.init_keys(batch.detach(), epochs=0, progress=False)
        finally:
            self.update_keys = not frozen

    def get_cluster_size(self, keys_ind: Tensor) -> Tensor:
        """How often each pair stands in keys_ind [b, C, T, n, 1]: int64 [C, K]."""
        validation.integer("get_cluster_size", "keys_ind", keys_ind)
        validation.codes(keys_ind, self.num_codebooks)
        flat = keys_ind.transpose(0, 1).flatten(1).long()
        return flat.new_zeros(self.keys.shape[:2]).scatter_add_(1, flat, torch.ones_like(flat))

    # --- modes and state, without the safety catches of kvb's own class -----------------------------------------------

    def freeze_keys(self: _Bottleneck) -> _Bottleneck:
        """Keys stop learning; those that wait for data still get them from the first batch."""
        self.update_keys = False
        return self

    def deactivate_counts(self: _Bottleneck) -> _Bottleneck:
        """Stop counting, and restrict the search with frozen keys to counted pairs; without any, index 0 is found."""
        self.count_cluster_size = False
        return self

    def reset_cluster_size_counter(self: _Bottleneck) -> _Bottleneck:
        self.cluster_size_counter.zero_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in checkpoints.STATE_NAMES:
            destination.pop(prefix + name, None)
        destination[prefix + "cluster_size_counter"] = self.cluster_size_counter.float()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle of the published class."""
        if "bugs" in state:
            super().__setstate__(state)
            return
        tensors = {**state["_parameters"], **state["_buffers"]}
        (C, K, D), V = tensors["keys"].shape, tensors["values"].shape[-1]
        options = {name: state[name] for name in BottleneckOptions.__optional_keys__ if name in state}
        with torch.random.fork_rng(devices=[]):
            fresh = KeyValueBottleneck(C, K, D, V, **options).to(tensors["keys"].device)
        self.__dict__.update(fresh.__dict__)
        self.values = tensors["values"]
        self.load_state_dict(tensors)
        self.update_keys, self.count_cluster_size = state["update_keys"], state["count_cluster_size"]
        self.train(state["training"])


def _by_codebook(queries: Tensor) -> Tensor:
    """[B, S, C, D] -> [C, B*S, D]."""
    return queries.flatten(0, 1).transpose(0, 1)
