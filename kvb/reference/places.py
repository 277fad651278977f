"""Rows of a table: their places, an index along each axis but the last, and what is done to merged ones.

Where a table has codebooks, [C, K, V], a place is a codebook and a pair, and rows are counted over all codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.reference.arithmetic import widest
from kvb.reference.shared import (
    accumulator,
    require,
    require_apart,
    require_floating,
    require_in_order,
    require_shape,
    require_tensors,
)


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


def clip_rows_(grads: Tensor, places: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale merged rows [M, V] by ``min(1, max_norm / (norm + 1e-6))``, in place.

    Returns:
        their norm, [], and whether places [A, M] ascend without repetition, []. Where they do not, rows are no sums
        yet, and nothing is written.
    """
    require_tensors(grads=grads, places=places)
    require_floating(grads=grads)
    require_shape("grads", grads, "M", "V")
    require(grads.is_contiguous(), f"expected contiguous grads, got strides {grads.stride()}")
    require(places.dtype == torch.int64, f"expected places torch.int64, got {places.dtype}")
    require_shape("places", places, "A", len(grads))
    require_apart({"grads": grads}, places=places)
    norm = torch.linalg.vector_norm(grads, dtype=widest(grads.device)).to(accumulator(grads.dtype))
    ascending = ascend(places)
    factor = torch.where(ascending, max_norm / (norm + 1e-6), 1)
    grads.copy_(torch.where(factor >= 1, grads, (grads * factor).to(grads.dtype)))
    return norm, ascending


def ascend(places: Tensor) -> Tensor:
    """Whether places [A, M] come in order, each once: a bool []."""
    before, after = places[:, :-1], places[:, 1:]
    less, same = before < after, before == after
    found = torch.zeros_like(less[0]) if len(places) else less.new_zeros(less.shape[1:])
    for axis in reversed(range(len(places))):
        found = less[axis] | (same[axis] & found)
    return found.all()


def move_rows_(values: Tensor, places: Tensor, grads: Tensor, step: float) -> None:
    """``values[tuple(places)] -= step * grads``, in place: for values [*, V], places [A, M] in order, grads [M, V]."""
    require_tensors(values=values, places=places, grads=grads)
    require_floating(values=values)
    require(values.dim() > 1, f"expected values [*, V], got {tuple(values.shape)}")
    require(values.is_contiguous(), f"expected contiguous values, got strides {values.stride()}")
    require(places.dtype == torch.int64, f"expected places torch.int64, got {places.dtype}")
    require_shape("places", places, values.dim() - 1, "M")
    require_shape("grads", grads, places.shape[1], values.shape[-1])
    require(grads.dtype == values.dtype, f"expected grads {values.dtype} as values, got {grads.dtype}")
    require_apart({"values": values}, places=places, grads=grads)
    require_in_order(places, values.shape[:-1], ascend(places))
    at = tuple(places)
    values.index_put_(at, values[at].sub_(grads * step))
