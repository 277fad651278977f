"""``discrete_key_value_bottleneck``: the same class behind a configuration, as seed users publish it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from kvb.compat import discrete_key_value_bottleneck_pytorch as plain


@dataclasses.dataclass(kw_only=True)
class DiscreteKeyValueBottleneckConfig:
    """The published parameters, with their defaults.

    Raises:
        ValueError: ``dim``, ``num_memories`` or ``num_memory_codebooks`` is not positive.
    """

    dim: int
    num_memories: int
    dim_embed: int | None = None
    num_memory_codebooks: int = 1
    dim_memory: int | None = None
    average_pool_memories: bool = True
    encoder: nn.Module | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "num_memories", "num_memory_codebooks"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: Value must be positive, got {getattr(self, name)}")


class DiscreteKeyValueBottleneck(plain.DiscreteKeyValueBottleneck):
    """The class of ``discrete_key_value_bottleneck_pytorch``, made from a config.

    With ``return_intermediates`` the indices are those that gather the memories: [b, C, n, dim_memory].

    Args:
        config: a ``DiscreteKeyValueBottleneckConfig``.
        options: of ``VectorQuantize``.
    """

    def __init__(self, config: DiscreteKeyValueBottleneckConfig, **options: Any) -> None:
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        super().__init__(**fields, **options)
        self.config = config

    def forward(
        self,
        x: Any,
        return_intermediates: bool = False,
        average_pool_memories: bool | None = None,
        **encoder_arguments: Any,
    ) -> Any:
        """As ``discrete_key_value_bottleneck_pytorch``, but for the indices."""
        memories, (quantized, indices, loss) = self._recall(x, average_pool_memories, encoder_arguments)
        if not return_intermediates:
            return memories
        books, size = self.values.shape[0], self.values.shape[-1]
        expanded = indices.view(*indices.shape[:2], books).transpose(1, 2)[..., None].expand(-1, -1, -1, size)
        return memories, (quantized, expanded, loss)
