"""What every module around a bottleneck offers: the methods of ``KeyValueBottleneck`` under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from kvb._torch import saveable
from kvb.collectives import Group
from kvb.functional import Pool
from kvb.modules import fully_sharded, key_learning, positions
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.datasets import ReadsData
from kvb.modules.hub import OnHub
from kvb.modules.samples import cut
from kvb.modules.streams import Part
from kvb.modules.tables import ValuesStart
from kvb.modules.tracing import OneNode

BATCH = 256  # samples of one batch cut from a tensor for an encoder
_Self = TypeVar("_Self", bound="BottleneckWrapper")


class KvbOptions(TypedDict, total=False):
    """Options of ``KeyValueBottleneck`` that the published classes do not have."""

    init_values: ValuesStart
    sparse_grad: bool
    check_finite: bool
    pool: Pool


class BottleneckOptions(KvbOptions, total=False):
    """The options of ``KeyValueBottleneck``, all but its sizes."""

    init_mode: key_learning.Method
    kmeans_iters: int
    decay: float
    eps: float
    threshold_ema_dead_code: float
    sample_codebook_temperature: float
    return_values_only: bool
    topk: int


class BottleneckWrapper(OnHub, ReadsData, OneNode):
    """An encoder (or None), a splitter and a bottleneck. A subclass says how they are built, and what goes in and out.

    Its inputs are whatever the encoder takes, the features themselves where there is none. Everything that is not
    described here is as in ``KeyValueBottleneck``.
    """

    encoder: nn.Module | None
    splitter: nn.Module
    bottleneck: KeyValueBottleneck
    _dear = True

    # --- what a subclass says -----------------------------------------------------------------------------------------

    def forward_encoder(self, x: Any, **encoder_options: Any) -> Tensor:
        """x -> features [B, *shape, d], channels last."""
        raise NotImplementedError

    def _split(self, features: Tensor) -> Tensor:
        """Features [B, *shape, d] -> heads [B, C, *shape, D]."""
        heads: Tensor = self.splitter(features)
        return heads

    def _pool(self, pool: Pool | None) -> Pool:
        """What None means."""
        return pool or self.bottleneck.pool

    def _arranged(self, fetched: Tensor, pool: Pool) -> Tensor:
        """Values as the bottleneck returns them, in the layout of this module's output."""
        return fetched

    # --- lookup -------------------------------------------------------------------------------------------------------

    def forward_splitter(self, x: Any, *, mask: Tensor | None = None, **encoder_options: Any) -> Tensor:
        """x -> heads [B, C, *shape, D], what the keys are compared with; the splitter gets zeros where masked."""
        return self._split(self._masked_features(x, mask, encoder_options).made)

    def _prepared(self, x: Any, mask: Tensor | None, encoder_options: Mapping[str, Any]) -> Part:
        """x -> heads [B, C, *shape, D], and the mask of their positions."""
        heads = self.forward_splitter(x, **({} if mask is None else {"mask": mask}), **encoder_options)
        return Part(heads, self._mask_of(x, mask, encoder_options, heads[:, 0]))

    def _masked_features(self, x: Any, mask: Tensor | None, encoder_options: Mapping[str, Any]) -> Part:
        """x -> features [B, *shape, d], zero where the mask is False, and that mask [B, *shape]."""
        features = self.forward_encoder(x, **encoder_options)
        mask = self._mask_of(x, mask, encoder_options, features)
        # In place of whatever an encoder makes of padding: NaN would spoil the gradient of a learned projection.
        return Part(features if mask is None else torch.where(saveable(mask)[..., None], features, 0), mask)

    def _mask_of(
        self, x: Any, mask: Tensor | None, encoder_options: Mapping[str, Any], features: Tensor
    ) -> Tensor | None:
        """The mask [B, *shape] of features [B, *shape, d]: the one given, or else that of the batch, if it has one."""
        sizes = features.shape[:-1]
        if mask is None:
            mask = self._attention(x, encoder_options, sizes)
        if mask is not None:
            positions.checked(type(self).__name__, mask, sizes, "the features", features)
        return mask

    def _attention(self, x: Any, encoder_options: Mapping[str, Any], sizes: torch.Size) -> Tensor | None:
        """The attention mask [B, L] of a batch, for features [B, L, d]; None where there is none, or no positions."""
        found = encoder_options.get("attention_mask")
        if found is None and isinstance(x, Mapping):
            found = x.get("attention_mask")
        if not isinstance(found, Tensor) or len(sizes) == 1:
            return None
        if found.shape != sizes:
            raise ValueError(
                f"expected an attention_mask of the shape of the encoder's positions (B, *shape) = {tuple(sizes)}, got "
                f"{tuple(found.shape)}; pass mask=... of that shape, True where a position counts"
            )
        return found != 0

    def encode(
        self,
        x: Any,
        *,
        mask: Tensor | None = None,
        dtype: torch.dtype | Literal["auto"] = torch.int64,
        **encoder_options: Any,
    ) -> Tensor:
        """The indices [B, C, *shape] that ``forward`` would fetch; see ``KeyValueBottleneck.encode``.

        ``decode(indices)`` gives the output of ``forward`` back, as often as you train on it; where a mask was used,
        ``decode(indices, mask=mask)``.
        """
        with torch.no_grad():
            heads, mask = self._prepared(x, mask, encoder_options)
            return self.bottleneck.encode(heads, mask=mask, dtype=dtype)

    def decode(self, indices: Tensor, pool: Pool | None = None, *, mask: Tensor | None = None) -> Tensor:
        """The values of indices [B, C, *shape], in the layout of ``forward``.

        Equivalent to ``forward`` on the inputs that the indices come from, without encoder and search; differentiable
        for the values.

        Args:
            indices: of ``encode`` or ``encode_dataset``.
            pool: "none", or "mean" or "sum" over codebooks; None as ``forward`` does it.
            mask: bool [B, *shape], as ``forward`` used it, an attention mask say: zero where it is False.
        Raises:
            as ``KeyValueBottleneck.decode``.
        """
        if fully_sharded.is_split(self.values) and fully_sharded.registered(self, "decode"):
            return self.decode(indices, pool, mask=mask)
        return self._arranged(self.bottleneck.decode(indices, self._pool(pool), mask=mask), self._pool(pool))

    def _target(self) -> KeyValueBottleneck:
        return self.bottleneck

    def _features(self, inputs: Any, mask: Tensor | None) -> Part:
        return self._masked_features(inputs, mask, {})

    def _heads(self, features: Tensor) -> Tensor:
        return self._split(self._moved(features))

    def _codes(self, inputs: Any, mask: Tensor | None, dtype: torch.dtype) -> Part:
        with torch.no_grad():
            heads, mask = self._prepared(inputs, mask, {})
            return Part(self.bottleneck.encode(heads, mask=mask, dtype=dtype), mask)

    def _cut(self, data: Tensor) -> tuple[Tensor, ...]:
        return cut(data) if self.encoder is None else data.split(BATCH)

    def _moved(self, inputs: Any) -> Any:
        """Tensors, also in a mapping, on the device of the bottleneck."""
        if isinstance(inputs, Mapping):
            return {name: self._moved(value) for name, value in inputs.items()}
        return super()._moved(inputs)

    def train(self: _Self, mode: bool = True) -> _Self:
        """As ``torch.nn.Module.train``, but the encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    # --- the bottleneck's own: see there ------------------------------------------------------------------------------

    @property
    def values(self) -> nn.Parameter:
        """[C, K, V], the parameter of the bottleneck."""
        return self.bottleneck.values

    @property
    def keys(self) -> Tensor:
        """[C, K, D]."""
        return self.bottleneck.keys

    @property
    def process_group(self) -> Group:
        return self.bottleneck.process_group

    @process_group.setter
    def process_group(self, group: Group) -> None:
        self.bottleneck.process_group = group

    @property
    def keys_initialised(self) -> bool:
        return self.bottleneck.keys_initialised

    @property
    def keys_frozen(self) -> bool:
        return self.bottleneck.keys_frozen

    def freeze_keys(self: _Self) -> _Self:
        self.bottleneck.freeze_keys()
        return self

    def unfreeze_keys(self: _Self) -> _Self:
        self.bottleneck.unfreeze_keys()
        return self

    def enable_update_keys(self: _Self) -> _Self:
        """The published name of ``unfreeze_keys``."""
        return self.unfreeze_keys()

    def disable_update_keys(self: _Self) -> _Self:
        """The published name of ``freeze_keys``."""
        return self.freeze_keys()

    def activate_counts(self: _Self) -> _Self:
        self.bottleneck.activate_counts()
        return self

    def deactivate_counts(self: _Self) -> _Self:
        self.bottleneck.deactivate_counts()
        return self

    def reset_cluster_size_counter(self: _Self) -> _Self:
        self.bottleneck.reset_cluster_size_counter()
        return self

    @property
    def pair_mask(self) -> Tensor | None:
        return self.bottleneck.pair_mask

    def mask_pairs(self: _Self, mask: Tensor | None) -> _Self:
        self.bottleneck.mask_pairs(mask)
        return self

    def refresh_keys(self: _Self) -> _Self:
        self.bottleneck.refresh_keys()
        return self

    def set_keys(self: _Self, keys: Tensor) -> _Self:
        self.bottleneck.set_keys(keys)
        return self

    def fraction_of_unused_keys(self) -> Tensor:
        return self.bottleneck.fraction_of_unused_keys()

    def usage(self) -> Tensor:
        return self.bottleneck.usage()

    def perplexity(self) -> Tensor:
        return self.bottleneck.perplexity()

    def _facts(self) -> dict[str, str]:
        return self.bottleneck._facts()

    # --- growing ------------------------------------------------------------------------------------------------------

    def expand_values(self: _Self, V: int, *, generator: torch.Generator | None = None) -> _Self:
        self.bottleneck.expand_values(V, generator=generator)
        return self._resized()

    def expand_pairs(
        self: _Self, K: int, keys: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> _Self:
        self.bottleneck.expand_pairs(K, keys, generator=generator)
        return self._resized()

    def expand_codebooks(
        self: _Self, C: int, keys: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> _Self:
        """As there; the splitter makes heads for the new codebooks by its method ``expand``, and keeps the old ones.

        Raises:
            TypeError: a splitter without that method, ``Chunk`` say, which has no channels left for more heads.
        """
        expand = getattr(self.splitter, "expand", None)
        if expand is None:
            raise TypeError(
                f"expand_codebooks(): the splitter {type(self.splitter).__name__} has no method expand(num_codebooks) "
                "that makes more heads of the features; a projection of kvb.splitters has"
            )
        self.bottleneck.expand_codebooks(C, keys, generator=generator)
        expand(C, generator=generator)
        return self._resized()

    def _resized(self: _Self) -> _Self:
        """After the bottleneck grew: what this module says about its sizes follows."""
        return self
