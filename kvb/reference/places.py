"""Rows of a table of codebooks, counted over all of them, and their places: a codebook and a pair each."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.reference.shared import require, require_shape, require_tensors


def _require(name: str, numbers: Tensor, K: int) -> None:
    require_tensors(**{name: numbers})
    require(numbers.dtype == torch.int64, f"expected {name} torch.int64, got {numbers.dtype}")
    require(K > 0, f"expected at least one pair in a codebook, got {K}")


def rows_to_places(rows: Tensor, K: int) -> Tensor:
    """Rows [M] of a table [C * K, V] as codebooks and pairs, [2, M]."""
    _require("rows", rows, K)
    require_shape("rows", rows, "M")
    book = rows.div(K, rounding_mode="floor")
    return torch.stack([book, torch.sub(rows, book, alpha=K)])


def places_to_rows(places: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Codebooks and pairs [2, M] as rows [M] of a table [C * K, V]; whether they ascend without repetition, []."""
    _require("places", places, K)
    require_shape("places", places, 2, "M")
    rows = torch.add(places[1], places[0], alpha=K)
    return rows, (rows[1:] > rows[:-1]).all()
