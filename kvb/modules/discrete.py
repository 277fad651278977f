"""``DiscreteKeyValueBottleneck``: embeddings in, memories out; a random projection and a bottleneck in one module."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from kvb import splitters, validation
from kvb.functional import Pool
from kvb.modules import key_learning
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.outputs import BottleneckOutput, Intermediates, Recall
from kvb.modules.tables import ValuesStart
from kvb.modules.wrapping import BottleneckOptions, BottleneckWrapper

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
        splitter: a module that makes heads [B, C, *shape, D] of embeddings; a ``RandomProjection`` by default.
        others: the options of ``KeyValueBottleneck``, but for ``return_values_only``, with ``decay`` as published.
    Raises:
        TypeError, ValueError: a size that is no positive integer. TypeError: an encoder or splitter that is no module.
    Examples:
        >>> config = kvb.DiscreteKeyValueBottleneckConfig(dim=8, dim_embed=64, num_memories=16, num_memory_codebooks=4)
        >>> kvb.DiscreteKeyValueBottleneck(config)(torch.randn(5, 64)).shape
        torch.Size([5, 8])
    """

    dim: int
    num_memories: int
    dim_embed: int | None = None
    num_memory_codebooks: int = 1
    dim_memory: int | None = None
    average_pool_memories: bool = True
    encoder: nn.Module | None = None
    codebook_dim: int | None = None
    splitter: nn.Module | None = None
    init_mode: key_learning.Method = "random"
    kmeans_iters: int = 10
    decay: float = 0.8
    eps: float = 1e-5
    threshold_ema_dead_code: float = 0.0
    sample_codebook_temperature: float = 0.0
    topk: int = 1
    init_values: ValuesStart = "random"
    sparse_grad: bool = False
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "num_memories", "num_memory_codebooks"):
            validation.positive_int(name, getattr(self, name))
        for name in ("dim_embed", "dim_memory", "codebook_dim"):
            if getattr(self, name) is not None:
                validation.positive_int(name, getattr(self, name))
        for name in ("encoder", "splitter"):
            if not isinstance(module := getattr(self, name), nn.Module | None):
                raise TypeError(f"{name} must be a torch.nn.Module or None, got {type(module).__name__}")

    def bottleneck_options(self) -> BottleneckOptions:
        """The fields that are options of ``KeyValueBottleneck``."""
        names = BottleneckOptions.__optional_keys__ - {"return_values_only", "pool"}
        return BottleneckOptions(**{name: getattr(self, name) for name in names})  # type: ignore[typeddict-item]


class DiscreteKeyValueBottleneck(BottleneckWrapper):
    """Project embeddings to C codebooks of K key-value pairs, fetch the nearest pair's memory in each, average them.

    Equivalent to ``bottleneck(splitter(encoder(x))).mean(1)``. Only the memories, ``bottleneck.values``, are a
    parameter (besides an encoder's); nothing else is projected or learned by gradient. Keys learn on forwards in
    training mode until ``freeze_keys()``.

    Args:
        config: a ``DiscreteKeyValueBottleneckConfig``, or ``dim``, or nothing where all comes by keyword.
        device, dtype: of the projection and the bottleneck; of the memories. No field of the config, which files hold.
        options: the fields of the config by keyword; they win over ``config``.
    Shape:
        x [B, *shape, dim_embed], any number of axes -> [B, *shape, V]; not pooled: [B, C, *shape, V]. A topk axis comes
        after C, or after B where there is no C.
    State:
        ``splitter.rand_proj`` [C, dim_embed, D], and ``bottleneck.*`` as ``KeyValueBottleneck`` has it.
    Raises:
        as the config and ``KeyValueBottleneck``.
    Methods:
        those of ``KeyValueBottleneck``, which take what ``forward`` takes.
    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    Examples:
        >>> memory = kvb.DiscreteKeyValueBottleneck(dim=64, num_memories=16, num_memory_codebooks=4)
        >>> memory(torch.randn(2, 7, 64)).shape
        torch.Size([2, 7, 64])
    """

    __call__: Recall[Intermediates]
    config: DiscreteKeyValueBottleneckConfig
    average_pool_memories: bool
    dim_embed: int
    encoder: nn.Module | None
    splitter: nn.Module
    bottleneck: KeyValueBottleneck

    def __init__(
        self,
        config: DiscreteKeyValueBottleneckConfig | int | None = None,
        *,
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
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
        V = config.dim_memory or config.dim
        self.splitter = config.splitter or splitters.RandomProjection(self.dim_embed, C, D, device=device)
        self.bottleneck = KeyValueBottleneck(
            C, config.num_memories, D, V, **config.bottleneck_options(), device=device, dtype=dtype
        )
        self.train()

    def _arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}

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
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        **encoder_arguments: Any,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """x [B, *shape, dim_embed], or what the encoder takes -> memories [B, *shape, V].

        Gradients reach the memories; ``x`` gets one through ``commit_loss`` only.

        Args:
            return_intermediates: return ``(memories, Intermediates)``.
            average_pool_memories: overrides the module's for this call; False gives [B, C, *shape, V].
            mask: bool [B, *shape], True where a position counts; see ``KeyValueBottleneck.forward``. By default the
                ``attention_mask`` among encoder_arguments, unless the encoder makes one embedding per sample.
            pool: "none", "mean" or "sum" over codebooks; None leaves it to ``average_pool_memories``.
            encoder_arguments: go to the encoder.
        Raises:
            TypeError: not a floating-point tensor, or arguments for an encoder that is not there. ValueError: the
            shape does not fit. RuntimeError: another device, or keys that still wait for data in eval mode.
        """
        if isinstance(x, Proxy):
            options = {"mask": mask, "pool": pool}
            return self._call_of(x, return_intermediates, average_pool_memories, more=encoder_arguments, **options)
        heads, mask = self._prepared(x, mask, encoder_arguments)
        if pool is None and average_pool_memories is not None:
            pool = "mean" if average_pool_memories else "none"
        found = self.bottleneck(heads, mask=mask, pool=self._pool(pool), return_values_only=not return_intermediates)
        return (found.values, self._intermediates(found)) if isinstance(found, BottleneckOutput) else found

    def _intermediates(self, found: BottleneckOutput) -> Intermediates:
        distances = found.distances
        commit_loss = distances.new_zeros(())
        if self.training:
            finite = distances.isfinite()  # a row with NaN or Inf has no nearest key
            commit_loss = torch.where(finite, distances, 0).sum() / (finite.sum() * found.keys.shape[-1]).clamp(min=1)
        return Intermediates(found.keys.movedim(1, -2).flatten(-2), found.indices, commit_loss)

    def _pool(self, pool: Pool | None) -> Pool:
        return pool or ("mean" if self.average_pool_memories else "none")

    def _resized(self: _Self) -> _Self:
        own = self.bottleneck
        self.config = dataclasses.replace(
            self.config,
            num_memory_codebooks=own.num_codebooks,
            num_memories=own.key_value_pairs_per_codebook,
            dim_memory=own.dim_values,
        )
        return self

    def forward_encoder(self, x: Any, **encoder_arguments: Any) -> Tensor:
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

    def extra_repr(self) -> str:
        return f"{self.dim_embed}-d embeddings, memories {'averaged' if self.average_pool_memories else 'by codebook'}"
