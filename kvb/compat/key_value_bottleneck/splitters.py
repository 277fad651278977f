"""``key_value_bottleneck.splitters``: kvb's splitters under the published names, arguments in the published order."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvb import splitters


class Splitter(nn.Module):
    """What the published splitters have in common: their base class."""


class RandomDownProjection(Splitter, splitters.RandomProjection):
    """``kvb.splitters.RandomProjection``: x [b, ..., d] -> [b, C, ..., D].

    Args:
        num_codebooks: C. num_channels: d. dim_keys: D.
    State:
        rand_proj [C, d, D].
    """

    num_codebooks: int
    num_channels: int
    dim_keys: int

    def __init__(self, num_codebooks: int, num_channels: int, dim_keys: int) -> None:
        super().__init__(num_channels, num_codebooks, dim_keys)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a published pickle, which holds nothing but the matrix."""
        super().__setstate__(state)
        self.num_codebooks, self.num_channels, self.dim_keys = self.rand_proj.shape


class LearnedDownProjection(Splitter, splitters.LearnedProjection):
    """``kvb.splitters.LearnedProjection``, with all positions in one axis: x [b, ..., d] -> [b, C, n, D].

    Args:
        num_codebooks: C. num_channels: d. dim_keys: D.
    State:
        proj.weight [D*C, d].
    """

    def __init__(self, num_codebooks: int, num_channels: int, dim_keys: int) -> None:
        super().__init__(num_channels, num_codebooks, dim_keys)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, ..., d] -> [b, C, n, D]; n = 1 for embeddings [b, d]."""
        return super().forward(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(-2))


class Chunker(Splitter, splitters.Chunk):
    """``kvb.splitters.Chunk``: x [b, ..., d] -> [b, C, ..., D], a view.

    Args:
        num_codebooks: C. num_channels: d. dim_keys: D = d / C, which None stands for, too.
    Raises:
        ValueError: C does not divide d; another ``dim_keys``.
    """

    def __init__(self, num_codebooks: int, num_channels: int, dim_keys: int | None = None) -> None:
        super().__init__(num_channels, num_codebooks)
        if dim_keys is not None:
            splitters.make("chunk", num_channels, num_codebooks, dim_keys)  # which says what does not fit


__all__ = ["Chunker", "LearnedDownProjection", "RandomDownProjection", "Splitter"]
