"""``DiscreteKeyValueBottleneck``: embeddings in, memories out; a random projection and a bottleneck in one module."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kvb import splitters, validation
from kvb._torch import register_namedtuple
from kvb.data import CodeDataset, encode
from kvb.modules import key_learning
from kvb.modules.bottleneck import BottleneckOutput, KeyValueBottleneck

_Self = TypeVar("_Self", bound="DiscreteKeyValueBottleneck")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteKeyValueBottleneckConfig:
    """The parameters of ``DiscreteKeyValueBottleneck``.

    Args:
        dim: D of the keys, and the default of the next three ``dim_``s.
        num_memories: K, key-value pairs of a codebook.
        dim_embed: size of the last axis of the embeddings.
        num_memory_codebooks: C.
        dim_memory: V.
        average_pool_memories: return the mean over codebooks.
        encoder: a module that makes the embeddings; always in eval mode, and never gets a gradient.
        codebook_dim: D, where keys shall have another size than ``dim``.
        init_mode, kmeans_iters, decay, eps, threshold_ema_dead_code, check_finite: as for ``KeyValueBottleneck``.
    Raises:
        TypeError, ValueError: a size that is no positive integer. TypeError: an encoder that is no module.
    """

    dim: int
    num_memories: int
    dim_embed: int | None = None
    num_memory_codebooks: int = 1
    dim_memory: int | None = None
    average_pool_memories: bool = True
    encoder: nn.Module | None = None
    codebook_dim: int | None = None
    init_mode: str = "random"
    kmeans_iters: int = 10
    decay: float = 0.8
    eps: float = 1e-5
    threshold_ema_dead_code: float = 0.0
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "num_memories", "num_memory_codebooks"):
            validation.positive_int(name, getattr(self, name))
        for name in ("dim_embed", "dim_memory", "codebook_dim"):
            if getattr(self, name) is not None:
                validation.positive_int(name, getattr(self, name))
        if not (self.encoder is None or isinstance(self.encoder, nn.Module)):
            raise TypeError(f"encoder must be a torch.nn.Module or None, got {type(self.encoder).__name__}")


class Intermediates(NamedTuple):
    """What ``DiscreteKeyValueBottleneck`` adds with ``return_intermediates=True``."""

    quantized: Tensor  # [B, *shape, C*D]: the keys found, without a gradient
    memory_indices: Tensor  # [B, C, *shape] int64, for bottleneck.decode
    commit_loss: Tensor  # []: mean squared distance to the keys in training mode, 0 in eval mode


# torch.export.save needs a name for the output type.
register_namedtuple(Intermediates, serialized_type_name="kvb.Intermediates")


class DiscreteKeyValueBottleneck(nn.Module):
    """Project embeddings to C codebooks of K key-value pairs, fetch the nearest pair's memory in each, average them.

    Equivalent to ``bottleneck(splitter(encoder(x))).mean(1)``. Only the memories, ``bottleneck.values``, are a
    parameter (besides an encoder's); nothing else is projected or learned by gradient. Keys learn on forwards in
    training mode until ``freeze_keys()``.

    Args:
        config: a ``DiscreteKeyValueBottleneckConfig``, or ``dim``, or nothing where all comes by keyword.
        options: the fields of the config by keyword; they win over ``config``.
    Shape:
        x [B, *shape, dim_embed], any number of axes -> [B, *shape, V]; not pooled: [B, C, *shape, V].
    State:
        ``splitter.rand_proj`` [C, dim_embed, D], and ``bottleneck.*`` as ``KeyValueBottleneck`` has it.
    Raises:
        as the config and ``KeyValueBottleneck``.
    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    """

    def __init__(self, config: DiscreteKeyValueBottleneckConfig | int | None = None, **options: Any) -> None:
        super().__init__()
        if isinstance(config, DiscreteKeyValueBottleneckConfig):
            config = dataclasses.replace(config, **options)
        elif config is None or isinstance(config, int):
            options |= {} if config is None else {"dim": config}
            config = DiscreteKeyValueBottleneckConfig(**options)
        else:
            raise TypeError(f"config must be a DiscreteKeyValueBottleneckConfig, got {type(config).__name__}")
        self.config = config
        self.average_pool_memories = config.average_pool_memories
        self.dim_embed = config.dim_embed or config.dim
        C, D = config.num_memory_codebooks, config.codebook_dim or config.dim
        self.encoder = config.encoder
        self.splitter: nn.Module = splitters.RandomProjection(self.dim_embed, C, D)
        self.bottleneck = KeyValueBottleneck(
            C,
            config.num_memories,
            D,
            config.dim_memory or config.dim,
            init_mode=config.init_mode,
            kmeans_iters=config.kmeans_iters,
            decay=config.decay,
            eps=config.eps,
            threshold_ema_dead_code=config.threshold_ema_dead_code,
            check_finite=config.check_finite,
        )
        self.train()

    @property
    def values(self) -> nn.Parameter:
        """[C, K, V], ``bottleneck.values``."""
        return self.bottleneck.values

    @property
    def rand_proj(self) -> Tensor:
        """[C, dim_embed, D], ``splitter.rand_proj``."""
        return self.splitter.get_buffer("rand_proj")

    # --- lookup -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Any,
        return_intermediates: bool = False,
        average_pool_memories: bool | None = None,
        **encoder_arguments: Any,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """x [B, *shape, dim_embed], or what the encoder takes -> memories [B, *shape, V].

        Gradients reach the memories; ``x`` gets one through ``commit_loss`` only.

        Args:
            return_intermediates: return ``(memories, Intermediates)``.
            average_pool_memories: overrides the module's for this call; False gives [B, C, *shape, V].
            encoder_arguments: go to the encoder.
        Raises:
            TypeError: not a floating-point tensor, or arguments for an encoder that is not there. ValueError: the
            shape does not fit. RuntimeError: another device, or keys that still wait for data in eval mode.
        """
        heads = self._heads(x, encoder_arguments)
        pooled = self.average_pool_memories if average_pool_memories is None else average_pool_memories
        pool = "mean" if pooled else "none"
        found = self.bottleneck(heads, pool=pool, return_values_only=not return_intermediates)
        return (found.values, self._intermediates(found)) if isinstance(found, BottleneckOutput) else found

    def _intermediates(self, found: BottleneckOutput) -> Intermediates:
        distances = found.distances
        commit_loss = distances.new_zeros(())
        if self.training:
            finite = distances.isfinite()  # a row with NaN or Inf has no nearest key
            commit_loss = torch.where(finite, distances, 0).sum() / (finite.sum() * found.keys.shape[-1]).clamp(min=1)
        return Intermediates(found.keys.movedim(1, -2).flatten(-2), found.indices, commit_loss)

    def encode(self, x: Any, *, dtype: torch.dtype | str = torch.int64, **encoder_arguments: Any) -> Tensor:
        """The indices [B, C, *shape] that ``forward`` would fetch; see ``KeyValueBottleneck.encode``.

        ``bottleneck.decode(indices, "mean")`` gives the pooled memories back, as often as you train on them.
        """
        return self.bottleneck.encode(self._heads(x, encoder_arguments), dtype=dtype)

    def encode_dataset(
        self,
        data: Tensor | Iterable[Any],
        *,
        dtype: torch.dtype | str = "auto",
        out: str | os.PathLike[str] | None = None,
        inputs_extractor: Callable[[Any], Any] | None = None,
        progress: bool = True,
    ) -> CodeDataset:
        """The codes of a whole data set: an encoder, the projection and the search run once for every sample.

        Equivalent to ``CodeDataset(torch.cat([encode(x, dtype=dtype) for x, y in data]), torch.cat([y ...]))``.

        Args:
            data: a tensor such as ``forward`` takes, or an iterable (a DataLoader, say) of inputs or of
                (inputs, labels, ...) items, read once.
            dtype, out, inputs_extractor, progress: as for ``KeyValueBottleneck.encode_dataset``.
        Returns:
            a ``CodeDataset``: codes [N, C, *shape], labels [N, ...] or None.
        Raises:
            as ``forward`` and ``KeyValueBottleneck.encode_dataset``.
        """
        storage = validation.code_dtype(dtype, self.bottleneck.key_value_pairs_per_codebook)
        device = self.bottleneck.keys.device

        def search(x: Any) -> Tensor:
            return self.encode(x.to(device) if isinstance(x, Tensor) else x, dtype=storage)

        return encode(data, search, cut=key_learning.cut, out=out, inputs_extractor=inputs_extractor, progress=progress)

    def _heads(self, x: Any, encoder_arguments: dict[str, Any]) -> Tensor:
        """The projected embeddings of x, one head a codebook: [B, C, *shape, D]."""
        heads: Tensor = self.splitter(self._embeddings(x, encoder_arguments))
        return heads

    def _embeddings(self, x: Any, encoder_arguments: dict[str, Any]) -> Tensor:
        """x itself, or what the encoder makes of it: [B, *shape, dim_embed]."""
        owner, what = type(self).__name__, "x"
        if self.encoder is not None:
            what = "output of the encoder"
            self.encoder.eval()
            with torch.no_grad():
                x = self.encoder(x, **encoder_arguments)
        elif encoder_arguments:
            names = ", ".join(map(repr, encoder_arguments))
            raise TypeError(f"{owner}(): {names} would go to the encoder, but there is none")
        validation.floating(owner, what, x)
        if x.dim() < 2 or x.shape[-1] != self.dim_embed:
            raise ValueError(
                f"expected {what} of shape (B, *shape, dim_embed) = (B, *shape, {self.dim_embed}), "
                f"got {tuple(x.shape)}; dim_embed defaults to dim"
            )
        return x if self.encoder is None else x.detach()

    # --- keys ---------------------------------------------------------------------------------------------------------

    def init_keys(
        self,
        data: Tensor | Iterable[Any],
        method: str | None = None,
        *,
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> key_learning.KeyReport:
        """Initialise the keys from unlabelled data, such as ``forward`` takes; see ``KeyValueBottleneck.init_keys``.

        Args:
            data: a tensor, or an iterable (a DataLoader, say) of inputs or of (inputs, ...) items.
            method, epochs, generator, progress: as there.
            inputs_extractor: takes the inputs out of an item of ``data``; its first element by default.
        Returns:
            a ``KeyReport``.
        Raises:
            as there.
        """
        if isinstance(data, Tensor):
            data = key_learning.cut(data)
            inputs_extractor = None
        extract, bottleneck = inputs_extractor or key_learning.first, self.bottleneck
        device = bottleneck.keys.device

        def embedded(item: Any) -> Tensor:
            inputs = extract(item)
            return self._embeddings(inputs.to(device) if isinstance(inputs, Tensor) else inputs, {})

        def initialise(source: Iterable[Any], take: Callable[[Any], Tensor], how: str, passes: int) -> Any:
            return bottleneck.init_keys(
                source, how, epochs=passes, inputs_extractor=take, generator=generator, progress=progress
            )

        method = method or bottleneck.init_mode
        if method not in ("kmeans", "kmeans++"):
            return initialise(data, lambda item: self.splitter(embedded(item)), method, epochs)
        # k-means passes many times over its rows: the encoder sees them once.
        rows = key_learning.ROWS_PER_KEY * bottleneck.key_value_pairs_per_codebook
        kept = key_learning.first_rows(data, embedded, rows, progress=progress, passes=1 + epochs)
        report = initialise(kept, lambda embeddings: self.splitter(embeddings.to(device)), method, 0)
        if epochs == 0:
            return report
        learnt = initialise(
            data, lambda item: self.splitter(embedded(item)), "random", epochs
        )  # from the keys there are
        return learnt._replace(method=method)

    def freeze_keys(self: _Self) -> _Self:
        """Keys stop learning; see ``KeyValueBottleneck.freeze_keys``. Returns self."""
        self.bottleneck.freeze_keys()
        return self

    def unfreeze_keys(self: _Self) -> _Self:
        """Keys learn again on forwards in training mode. Returns self."""
        self.bottleneck.unfreeze_keys()
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """As ``torch.nn.Module.train``, but the encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def extra_repr(self) -> str:
        return f"{self.dim_embed}-d embeddings, memories {'averaged' if self.average_pool_memories else 'by codebook'}"
