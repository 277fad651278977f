"""A small transformer on bytes, whose feed-forward blocks are dense or a memory; low-rank adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvb.memory import ProductKeyMemory

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """Of the model and its batches."""

    dim: int = 96
    heads: int = 4
    layers: int = 2
    context: int = 64
    batch: int = 16
    num_keys: int = 128  # of the memory: 16,384 rows
    topk: int = 16
    memory_heads: int = 2

    def memory(self) -> ProductKeyMemory:
        options = {"topk": self.topk, "heads": self.memory_heads, "dim_key": self.dim // 2}
        memory = ProductKeyMemory(self.dim, self.num_keys, **options, query_norm="layer", gated=True, sparse_grad=True)  # type: ignore[arg-type]
        return memory

    def memory_products(self) -> int:
        """Multiplications of a memory block for one position."""
        H, dim_key = self.memory_heads, self.dim // 2
        return self.dim * H * dim_key + H * self.num_keys * dim_key + H * self.topk * self.dim + 2 * self.dim**2

    def dense(self) -> nn.Module:
        """A block of as many multiplications."""
        hidden = round(self.memory_products() / (2 * self.dim))
        return nn.Sequential(nn.Linear(self.dim, hidden), nn.GELU(), nn.Linear(hidden, self.dim))


class _Block(nn.Module):
    def __init__(self, shape: Shape, feed: nn.Module) -> None:
        super().__init__()
        self.heads = shape.heads
        self.before, self.between = nn.LayerNorm(shape.dim), nn.LayerNorm(shape.dim)
        self.qkv, self.out = nn.Linear(shape.dim, 3 * shape.dim), nn.Linear(shape.dim, shape.dim)
        self.feed = feed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.feed(self.between(x))


class LanguageModel(nn.Module):
    """Logits [B, L, 256] of the byte after each of [B, L]; ``feed`` makes the last layer's block, others are dense."""

    def __init__(self, shape: Shape, feed: Callable[[Shape], nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        self.bytes, self.places = nn.Embedding(BYTES, shape.dim), nn.Embedding(shape.context, shape.dim)
        feeds = [shape.dense() for _ in range(shape.layers - 1)]
        self.blocks = nn.Sequential(*[_Block(shape, one) for one in feeds], _Block(shape, feed(shape)))
        self.after, self.head = nn.LayerNorm(shape.dim), nn.Linear(shape.dim, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.places.weight[: x.shape[1]]
        logits: Tensor = self.head(self.after(self.blocks(x)))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """The mean cross entropy of windows [B, L + 1], in bits per byte."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / torch.tensor(2.0).log()

    @property
    def memory(self) -> ProductKeyMemory:
        found = self.blocks[-1].feed
        if not isinstance(found, ProductKeyMemory):
            raise TypeError(f"expected a memory in the last block, got {type(found).__name__}")
        return found


class LowRank(nn.Module):
    """A linear layer that stays, and a product of two thin matrices that learns (LoRA).

    Source: Hu et al., LoRA, ICLR 2022 (arXiv:2106.09685).
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.layer(x) + self.up(self.down(x))
        return moved


def adapt(model: nn.Module, rank: int) -> list[Tensor]:
    """Put ``LowRank`` around every linear layer; the parameters that learn."""
    model.requires_grad_(False)
    learning: list[Tensor] = []
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(module, LowRank):
                thin = LowRank(layer, rank)
                setattr(module, name, thin)
                learning += [thin.down.weight, thin.up.weight]
    return learning
