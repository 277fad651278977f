"""k-means++ in blocks: the textbook's seeds in their very distribution, and far fewer passes over the rows.

With the squared distances to the seeds so far as weights w, the textbook draws one row, updates all distances, and
draws again. Here a block of candidates is drawn from w, and each in turn is accepted with probability w'/w, where w' is
its squared distance to all seeds, those accepted before it in the block included. As 0 <= w' <= w this is rejection
sampling: given the seeds before it, an accepted candidate is distributed as w', which is the textbook's rule. Then one
search shows all accepted seeds to all rows.

Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007; von Neumann, Various
techniques used in connection with random digits, 1951, for the rejection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvb import (
    ops,  # noqa: F401  (importing ops registers the operators)
)
from kvb.modules.samples import draw

FEWEST, MOST = 8, 512  # candidates of a block
ROWS = 1 << 22  # of all codebooks that are seeded at a time
_WHOLE = 62  # bits of the sum of all weights as whole numbers


def spread_out(
    rows: Tensor,
    filled: Tensor,
    K: int,
    generator: torch.Generator | None,
    tell: Callable[[int], object] = lambda seeds: None,
) -> tuple[Tensor, Tensor]:
    """Rows [C, R, D] -> seeds [C, K, D], and which of them [C, K] there are: fewer where no other row is left.

    Every next seed is drawn with probability proportional to the squared distance to the seeds so far, the first one
    uniformly. A row that repeats a seed is never drawn.

    Args:
        filled: [C, R], the rows that may be drawn. tell: learns how many seeds were found since it was last called.
    """
    books = max(1, ROWS // max(1, rows.shape[1]))
    parts = zip(rows.split(books), filled.split(books), strict=True)
    seeds, found = zip(*(_of_books(*part, K, generator, tell) for part in parts), strict=True)
    return torch.cat(seeds), torch.cat(found)


def _of_books(
    rows: Tensor, filled: Tensor, K: int, generator: torch.Generator | None, tell: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    C, _, D = rows.shape
    seeds = rows.new_zeros((C, K + 1, D))  # the last place is for those that are no seeds
    count = torch.zeros((C, 1), dtype=torch.int64, device=rows.device)
    gap = filled.to(rows.dtype) * torch.finfo(rows.dtype).max  # at first equal for all, as no seed is near
    total, size = 0, 1
    while True:
        places = _drawn(gap, size, generator)
        candidates = rows.gather(1, places[..., None].expand(-1, -1, D))
        accepted = _accepted(candidates, gap.gather(1, places), generator)
        order = torch.where(accepted, count + accepted.cumsum(1) - 1, K).clamp(max=K)
        seeds.scatter_(1, order[..., None].expand_as(candidates), candidates)
        count = (count + accepted.sum(1, keepdim=True)).clamp(max=K)
        before, total, fewest = total, int(count.sum()), int(count.min())
        tell(total - before)
        if total == before or fewest == K:
            return seeds[:, :K], torch.arange(K, device=rows.device) < count
        packed = torch.ops.kvb.pack_keys(candidates)
        _, apart = torch.ops.kvb.nearest(rows.transpose(0, 1)[:, None], candidates, packed, accepted, 1)
        gap = torch.minimum(gap, apart[:, 0, :, 0].T)
        # As large as blocks can be of which half is accepted.
        size = min(max(FEWEST, 2 * (total - before) // C), MOST, FEWEST + 2 * (K - fewest))


def _drawn(gap: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Places [C, size] of rows, drawn in proportion to their gaps [C, R], with replacement."""
    R = gap.shape[1]
    # Whole numbers have the same sums on every device, in whatever order.
    share = gap / gap.amax(1, keepdim=True).clamp(min=torch.finfo(gap.dtype).tiny)
    sums = (share * 2.0 ** (_WHOLE - R.bit_length())).to(torch.int64).cumsum(1)
    chance = draw((len(gap), size), gap, generator, torch.float64)
    return torch.searchsorted(sums, (chance * sums[:, -1:]).to(torch.int64), right=True).clamp(max=R - 1)


def _accepted(candidates: Tensor, gap: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which candidates [C, M, D], one after the other, become seeds: bool [C, M], of the gaps when they were drawn."""
    apart = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist").square()
    bar = draw(gap.shape, gap, generator) * gap
    left, accepted = gap.clone(), torch.zeros_like(gap, dtype=torch.bool)
    for m in range(gap.shape[1]):
        taken = accepted[:, m] = bar[:, m] < left[:, m]
        near = apart[:, m, m + 1 :].masked_fill(~taken[:, None], torch.inf)
        torch.minimum(left[:, m + 1 :], near, out=left[:, m + 1 :])
    return accepted
