"""Learning the keys, ``update_keys_``: whole pairs are decided in PyTorch, one pass moves the keys, another packs them.

The first surveys what it writes, so that the second is all that packing takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb.kernels import update
from kvb.kernels.device import ceil_div, power_of_two
from kvb.kernels.launch_pack import COLUMNS, Packing, slicing, unpacked
from kvb.kernels.launcher import MOST_REGISTERS, Options, run
from kvb.kernels.layout import TILE
from kvb.reference.shared import require_statistics
from kvb.reference.statistics import pair_step

UPDATE = Options(registers=MOST_REGISTERS)


def update_keys_(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
    decay: float,
    eps: float,
    threshold: float,
    start: float,
    rescale_all: bool,
) -> Tensor:
    """One step of the moving averages of keys [C, K, D], in place, with dead pairs replaced; the new keys, packed."""
    require_statistics(keys, keys_avg, cluster_size, hits, sums, spare, usable)
    C, K, D = keys.shape
    step = pair_step(cluster_size.to(hits.dtype), hits, spare, usable, decay, eps, threshold, start, rescale_all)
    packing = None if keys.dtype == torch.float64 else Packing(keys)
    columns = min(COLUMNS, power_of_two(D))
    surveyed = packing if columns >= D else None  # a program sees whole keys
    size, slices = slicing(K)
    constants: dict[str, Any] = {"D": D, "SLICES": slices, "SLOTS": 1, "BK": TILE}
    run(
        update.update,
        (C * slices, ceil_div(D, columns)),
        UPDATE,
        keys=keys,
        averages=keys_avg,
        cluster_size=cluster_size,
        sums=sums,
        keep=step.keep,
        sizes=step.size,
        divisors=torch.where(step.moving, step.smoothed, -1.0),
        places=step.places,
        spare=spare,
        surveys=None if surveyed is None else surveyed.surveys,
        table=None if surveyed is None else surveyed.table,
        K=K,
        R=0 if spare is None else spare.shape[1],
        SLICE=size,
        BD=columns,
        **(constants if packing is None else packing.constants),
    )
    if packing is None:
        return unpacked(keys)
    if surveyed is None:
        packing.survey(None)
    return packing.finish(None)
