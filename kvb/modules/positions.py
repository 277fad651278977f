"""Masks of positions: padding finds nothing, learns nothing and counts nothing.

A query that does not count becomes NaN, which the operators keep out of keys and counts, at index 0 and distance NaN.
What was fetched for it becomes zero, which also keeps the gradient away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvb import validation
from kvb._torch import saveable


def checked(owner: str, mask: Any, sizes: Sequence[int], like_name: str, like: Tensor) -> Tensor:
    """A mask of these sizes (B, *shape), on the device of ``like``.

    Raises:
        TypeError: not a bool tensor. ValueError: another shape. RuntimeError: another device.
    """
    validation.positions(owner, mask, sizes)
    validation.same_device("mask", mask, like_name, like)
    checked_mask: Tensor = mask
    return checked_mask


def hidden(queries: Tensor, counted: Tensor) -> Tensor:
    """Queries [B, S, C, D], NaN where ``counted`` [B, S] is False."""
    return torch.where(saveable(counted)[..., None, None], queries, torch.nan)


def cleared(part: Tensor, counted: Tensor | None, axis: int = 1) -> Tensor:
    """Part [B, ..., S, ...] with positions at ``axis``: zero where ``counted`` [B, S] is False."""
    if counted is None:
        return part
    B, S = counted.shape
    rows = saveable(counted).contiguous().view(B, *(1,) * (axis - 1), S, *(1,) * (part.dim() - axis - 1))
    return torch.where(rows, part, 0)  # takes over the strides of the condition


def per_rank(counted: Tensor, ranks: int) -> Tensor:
    """``counted`` [B, S] for positions that are repeated rank by rank, [B, T*S]."""
    return counted if ranks == 1 else counted.repeat(1, ranks)
