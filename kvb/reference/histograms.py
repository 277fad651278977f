"""Class histograms in the rows of a table that indices name."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.reference.shared import (
    flat_rows,
    require,
    require_apart,
    require_classes,
    require_codes,
    require_shape,
    require_tensors,
    tiles,
)

COUNTERS = (torch.int32, torch.int64, torch.float32, torch.float64)


def tally_(counts: Tensor, indices: Tensor, targets: Tensor, weights: Tensor | None, remove: bool) -> Tensor:
    """Count the classes targets [B] in the rows of counts [C, K, V] that indices [B, S, C] name, in place.

    ``counts[c, indices[b, s, c], targets[b]] += weights[b, s, c]``, or -= with ``remove``; one without weights, which
    have the dtype of the counts. Integers wrap around. A counter is summed in batch order.

    Returns the lowest counter that a removal left in its place, []: below zero where more was removed than ever added.
    Zero where nothing is removed.
    """
    require_tensors(counts=counts, indices=indices, targets=targets, weights=weights)
    require(counts.dtype in COUNTERS, f"expected counts int32, int64, float32 or float64, got {counts.dtype}")
    require_shape("counts", counts, "C", "K", "V")
    require(counts.is_contiguous(), f"expected contiguous counts, got strides {counts.stride()}")
    require_apart({"counts": counts}, indices=indices, targets=targets, weights=weights)
    C, K, V = counts.shape
    require_codes(indices, C, K)
    B, S, _ = indices.shape
    require(
        targets.shape == (B,) and targets.dtype == torch.int64,
        f"expected targets torch.int64 {(B,)}, got {targets.dtype} {tuple(targets.shape)}",
    )
    if weights is not None:
        require_shape("weights", weights, B, S, C)
        require(weights.dtype == counts.dtype, f"expected weights {counts.dtype} as counts, got {weights.dtype}")
    require_classes(targets, V)
    table = counts.view(-1)
    lowest: list[Tensor] = []
    for passed in (False, True) if remove else (False,):
        for b, s, c in tiles(B, S, C, 1):
            places = flat_rows(indices[b, s, c], K, c.start).mul_(V).add_(targets[b, None, None]).flatten()
            if passed:
                lowest.append(table.index_select(0, places).amin())
            else:
                part = counts.new_ones(()).expand(len(places)) if weights is None else weights[b, s, c].flatten()
                table.index_add_(0, places, part, alpha=-1 if remove else 1)
    return torch.stack(lowest).amin() if lowest else counts.new_zeros(())
