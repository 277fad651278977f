"""Splitters turn features [B, *shape, channels] into one head per codebook, [B, C, *shape, D].

Source: Träuble et al., ICML 2023 (arXiv:2207.11240), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvb import checks


def _check_features(owner: str, x: Tensor, channels: int) -> None:
    checks.floating(owner, "x", x)
    if x.dim() < 2 or x.shape[-1] != channels:
        raise ValueError(f"expected x of shape (B, *shape, channels) = (B, *shape, {channels}), got {tuple(x.shape)}")


class Chunk(nn.Module):
    """Cut the channels into C consecutive heads of D.

    Equivalent to ``x.unflatten(-1, (C, D)).movedim(-2, 1)``; a view, no copy.

    Args:
        num_channels: size of the last axis of the features; a multiple of ``num_codebooks``.
        num_codebooks: C.
    Raises:
        ValueError: the channels do not divide evenly.
    """

    def __init__(self, num_channels: int, num_codebooks: int) -> None:
        super().__init__()
        self.num_channels = checks.positive_int("num_channels", num_channels)
        self.num_codebooks = checks.positive_int("num_codebooks", num_codebooks)
        self.dim_keys, rest = divmod(num_channels, num_codebooks)
        if rest:
            raise ValueError(f"num_channels ({num_channels}) must be divisible by num_codebooks ({num_codebooks})")

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *shape, channels] -> [B, C, *shape, D]."""
        _check_features("Chunk", x, self.num_channels)
        return x.unflatten(-1, (self.num_codebooks, self.dim_keys)).movedim(-2, 1)

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels -> {self.num_codebooks} heads of {self.dim_keys}"


class RandomProjection(nn.Module):
    """Project the features once per codebook with a fixed random matrix of unit columns.

    Equivalent to ``torch.einsum("b...d,cdk->bc...k", x, rand_proj)``. The matrix is a buffer and never learns.

    Args:
        num_channels: size of the last axis of the features.
        num_codebooks: C.
        dim_keys: D.
        generator: draws the matrix; PyTorch's default otherwise.
    State:
        rand_proj: [C, channels, D], the published name.
    """

    rand_proj: Tensor

    def __init__(
        self, num_channels: int, num_codebooks: int, dim_keys: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.num_channels = checks.positive_int("num_channels", num_channels)
        self.num_codebooks = checks.positive_int("num_codebooks", num_codebooks)
        self.dim_keys = checks.positive_int("dim_keys", dim_keys)
        matrix = torch.randn(num_codebooks, num_channels, dim_keys, generator=generator)
        self.register_buffer("rand_proj", nn.functional.normalize(matrix, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *shape, channels] -> [B, C, *shape, D]; one matrix product, heads moved as a view."""
        _check_features("RandomProjection", x, self.num_channels)
        checks.same_device("x", x, "the projections", self.rand_proj)
        heads = x @ self.rand_proj.to(x.dtype).transpose(0, 1).flatten(1)
        return heads.unflatten(-1, (self.num_codebooks, self.dim_keys)).movedim(-2, 1)

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels -> {self.num_codebooks} heads of {self.dim_keys}"
