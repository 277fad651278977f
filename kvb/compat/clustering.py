"""Lloyd's algorithm as both published packages run it: from given means, on all samples at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvb import functional


def lloyd(samples: Tensor, means: Tensor, iters: int, *, unit: bool = False) -> tuple[Tensor, Tensor]:
    """Iterations of k-means; a mean without samples stays where it is.

    Equivalent to ``sums / bins`` of the samples nearest to each mean, without distances of size C x N x K in memory.

    Args:
        samples: [C, N, D]; those that are not finite count nowhere. means: [C, K, D].
        iters: how many; 0 counts nothing.
        unit: scale the means to length 1 after each.
    Returns:
        the means, and how many samples [C, K] int64 each of them had in the last iteration.
    """
    bins = torch.zeros(means.shape[:2], dtype=torch.int64, device=means.device)
    finite = samples.isfinite().all(-1)
    samples = torch.where(finite[..., None], samples, 0)
    means = torch.where(means.isfinite().all(-1, keepdim=True), means, 0)
    for _ in range(iters):
        nearest = functional.nearest(samples.transpose(0, 1)[None], means)[0][0].T
        bins = torch.zeros_like(bins).scatter_add_(1, nearest, finite.long())
        sums = torch.zeros_like(means).scatter_add_(1, nearest[..., None].expand_as(samples), samples)
        moved = sums / bins.clamp(min=1)[..., None]
        means = torch.where((bins > 0)[..., None], F.normalize(moved, dim=-1, eps=1e-6) if unit else moved, means)
    return means, bins
