"""``key_value_bottleneck.core`` as the authors published it last: what goes in, what comes out, what is saved.

Built on the same operators as the rest of kvb, so the nearest key is the true one. What the published code does wrong
is off; a name of ``BUGS`` turns one of them on again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from kvb import checkpoints, splitters, validation
from kvb.modules import bottleneck, encoders, key_learning, pretrained, streams

# What each name in ``bugs`` does.
BUGS = {
    "learns_in_eval": "keys learn, and hits are counted, on every forward: in eval mode and under no_grad too",
    "starts_at_zero": "cluster_size starts at 0, so that keys without a hit explode unless dead codes are replaced",
    "kmeans_forgets_statistics": "after k-means keys_avg is 0, so that the next update shrinks all keys twentyfold",
    "replaces_keys_only": "a replaced key keeps its old statistics, so that the next update takes it back",
}
VALID_SPLITTING_MODES = set(splitters.MODES)
_Bottleneck = TypeVar("_Bottleneck", bound="KeyValueBottleneck")
_Encoder = TypeVar("_Encoder", bound="BottleneckedEncoder")


class KeyValueBottleneck(bottleneck.KeyValueBottleneck):
    """The published class: x [b, C, n, D] float32 in, always a tuple out.

    ``(values,)``, or with ``return_values_only=False`` ``(values, keys, indices, distances, counts)``:
    [b, C, T, n, V], [b, C, T, n, D], then [b, C, T, n, 1] each; T is ``topk`` with frozen keys, and 1 while they learn.
    Distances are negative squared L2. Counts are those of the fetched pairs before this batch.

    Keys that wait for data take the first batch, in every mode. Pairs without a hit are rescaled with their
    statistics. A state_dict holds the six published names, and not whether keys are frozen.

    Args:
        bugs: names of ``BUGS`` to have back; the others are those of ``kvb.KeyValueBottleneck``.
    Raises:
        ValueError: x is not [b, C, n, D]; an unknown bug.
    """

    def __init__(
        self,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int,
        dim_values: int,
        init_mode: str = "random",
        kmeans_iters: int = 10,
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        *,
        bugs: Collection[str] = (),
    ) -> None:
        super().__init__(
            num_codebooks,
            key_value_pairs_per_codebook,
            dim_keys,
            dim_values,
            init_mode,
            kmeans_iters,
            decay,
            eps,
            threshold_ema_dead_code,
            sample_codebook_temperature,
            return_values_only,
            topk,
        )
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
        if self._learning:
            indices, distances = indices[..., :1], distances[..., :1]
        output: tuple[Tensor, ...] = (self._ranked(self.values, indices),)
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
        return torch.ops.kvb.gather(table, positions, "none", "bcsv").view(b, C, T, n, table.shape[-1])

    def _learn(self, queries: Tensor, indices: Tensor) -> None:
        self._packed.forget()
        statistics = torch.ops.kvb.accumulate(queries, indices, self.key_value_pairs_per_codebook)
        state = self._moving()
        apart = "replaces_keys_only" in self.bugs
        threshold = self.threshold_ema_dead_code
        key_learning.update(
            *(*state, *key_learning.sync_statistics(*statistics), queries),
            decay=self.decay,
            eps=self.eps,
            threshold=0.0 if apart else threshold,
            rescale_all=True,
        )
        if apart and threshold > 0:
            forgotten = self.keys_avg.clone(), self.cluster_size.clone()
            key_learning.replace_dead(state[0], *forgotten, queries, threshold=threshold)

    def _initialise_from(self, batch: Tensor) -> None:
        if batch.numel() == 0:
            return
        frozen = not self.update_keys
        self.update_keys = True
        try:
            self.init_keys(batch.detach(), epochs=0, progress=False)
        finally:
            self.update_keys = not frozen
        if "kmeans_forgets_statistics" in self.bugs:
            queries = self._queries(batch.detach())
            indices = torch.ops.kvb.nearest(queries, *self._packed_keys(), None, 1)[0][..., 0]
            self.cluster_size.copy_(torch.ops.kvb.count(queries, indices, self.key_value_pairs_per_codebook))
            self.keys_avg.zero_()

    def get_cluster_size(self, keys_ind: Tensor) -> Tensor:
        """How often each pair stands in keys_ind [b, C, T, n, 1]: int64 [C, K]."""
        validation.integer("get_cluster_size", "keys_ind", keys_ind)
        validation.codes(keys_ind, self.num_codebooks)
        flat = keys_ind.transpose(0, 1).flatten(1).long()
        return flat.new_zeros(self.num_codebooks, self.key_value_pairs_per_codebook).scatter_add_(
            1, flat, torch.ones_like(flat)
        )

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


class BottleneckedEncoder(encoders.BottleneckedEncoder):
    """The published class: always a tuple out, ``(values, [keys, indices, distances, counts,] heads, features)``.

    The middle four come with ``return_values_only=False``. Channel-first features [b, d, *spatial] give values
    [b, C, T, V, *spatial], and the other four alike with D or 1 instead of V; channel-last ones [b, C, T, n, V], with n
    positions; embeddings [b, d] [b, C, T, V]. heads are [b, C, n, D], features what the encoder returned.
    ``concat_values_from_all_codebooks``, at which the published code crashes, joins C and V: [b, T, C·V, *spatial] and
    so on.

    Args:
        bugs: as for ``KeyValueBottleneck``; the others are those of ``kvb.BottleneckedEncoder``.
    """

    bottleneck: KeyValueBottleneck

    def __init__(self, *arguments: Any, bugs: Collection[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        own = self.bottleneck
        self.bottleneck = KeyValueBottleneck(
            own.num_codebooks,
            own.key_value_pairs_per_codebook,
            own.dim_keys,
            own.dim_values,
            own.init_mode,
            own.kmeans_iters,
            own.decay,
            own.eps,
            own.threshold_ema_dead_code,
            own.sample_codebook_temperature,
            own.return_values_only,
            own.topk,
            bugs=bugs,
        )

    def forward(self, x: Any, **encoder_options: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """x, as the encoder wants it, -> the tuple described above."""
        features = self.forward_encoder(x, **encoder_options)
        heads = self._flat_heads(features)
        values, *others = self.bottleneck(heads)
        if self.concat_values_from_all_codebooks:
            values = values.movedim(1, 3).flatten(-2)
        first = not self.encoder_is_channel_last
        unfold = first or features.dim() == 2
        parts = [self._unfolded(part, features.shape[1:-1]) if unfold else part for part in (values, *others)]
        return (*parts, heads, features.movedim(-1, 1) if first else features)

    def forward_splitter(self, x: Any, **encoder_options: Any) -> Tensor:
        """x -> heads [b, C, n, D], what the keys are compared with."""
        return self._flat_heads(self.forward_encoder(x, **encoder_options))

    def _flat_heads(self, features: Tensor) -> Tensor:
        heads = self._split(features)
        return heads[:, :, None] if heads.dim() == 3 else heads.flatten(2, -2)

    def _unfolded(self, part: Tensor, spatial: Iterable[int]) -> Tensor:
        """[..., n, V] -> [..., V, *spatial]."""
        return part.transpose(-1, -2).reshape(*part.shape[:-2], part.shape[-1], *spatial)

    def initialize_keys(  # type: ignore[override]
        self: _Encoder,
        loader: Iterable[Any],
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        *,
        progress: bool = True,
    ) -> _Encoder:
        """Let the keys learn for ``epochs`` passes over a loader of (inputs, ...) items; nothing at all for 0."""
        extract = inputs_extractor or streams.first
        training = self.bottleneck.training
        self.bottleneck.train()
        try:
            for epoch in range(epochs):
                title = f"keys: pass {epoch + 1} of {epochs}"
                for item in tqdm(loader, desc=title, disable=not progress, leave=False, delay=streams.PATIENCE):
                    with torch.no_grad():
                        self(self._moved(extract(item)))
        finally:
            self.bottleneck.train(training)
        return self

    def prepare(  # type: ignore[override]
        self: _Encoder,
        loader: Iterable[Any],
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        *,
        progress: bool = True,
    ) -> _Encoder:
        """Equivalent to ``freeze_encoder().freeze_splitter().initialize_keys(loader, epochs).freeze_keys()``."""
        self.freeze_encoder().freeze_splitter()
        return self.initialize_keys(loader, epochs, inputs_extractor, progress=progress).freeze_keys()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``{"bottleneck": state_dict, "splitter": state_dict}`` with ``torch.save``."""
        torch.save({name: part.state_dict() for name, part in self._learnt().items()}, path)


class DinoBottleneckedEncoder(BottleneckedEncoder, pretrained.DinoBottleneckedEncoder):
    """``BottleneckedEncoder`` over DINO; arguments as for ``kvb.DinoBottleneckedEncoder``."""


class SwavBottleneckedEncoder(BottleneckedEncoder, pretrained.SwavBottleneckedEncoder):
    """``BottleneckedEncoder`` over SwAV; arguments as for ``kvb.SwavBottleneckedEncoder``."""


class VICRegBottleneckedEncoder(BottleneckedEncoder, pretrained.VICRegBottleneckedEncoder):
    """``BottleneckedEncoder`` over VICReg; arguments as for ``kvb.VICRegBottleneckedEncoder``."""


class SLPretrainedBottleneckedEncoder(BottleneckedEncoder, pretrained.SLPretrainedBottleneckedEncoder):
    """``BottleneckedEncoder`` over supervised ResNets; arguments as in kvb."""


class CLIPBottleneckedEncoder(BottleneckedEncoder, pretrained.CLIPBottleneckedEncoder):
    """``BottleneckedEncoder`` over CLIP; arguments as for ``kvb.CLIPBottleneckedEncoder``."""


class ConvMixerBottleneckedEncoder(BottleneckedEncoder, pretrained.ConvMixerBottleneckedEncoder):
    """``BottleneckedEncoder`` over embeddings of a ConvMixer; arguments as in kvb."""
