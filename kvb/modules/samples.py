"""Random samples of rows: in one pass over data, of all processes together, filled up where there are too few.

Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir, Information Processing Letters 97, 2006.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from kvb import collectives
from kvb.collectives import Group

JITTER = 1e-3  # of the data's spread: keeps keys apart that were filled from the same row


def rows_of(queries: Tensor) -> Tensor:
    """[B, S, C, D] -> [C, B*S, D]."""
    return queries.permute(2, 0, 1, 3).flatten(1, 2)


def draw(shape: Iterable[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers on the device of ``like``, drawn where the generator lives."""
    if generator is None:  # without the argument: graphs with dynamic sizes do not accept generator=None
        return torch.rand(tuple(shape), device=like.device)
    return torch.rand(tuple(shape), generator=generator, device=generator.device).to(like.device)


class Reservoir:
    """A weighted random sample of ``size`` rows per codebook, without replacement, in one pass.

    Every row gets the priority log(u) / weight; the highest stay (Efraimidis and Spirakis, Weighted random sampling
    with a reservoir, Information Processing Letters 97, 2006). Rows of weight 0 are never taken.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        C, _, D = like.shape
        self.rows = like.new_zeros((C, size, D))
        self.priority = like.new_full((C, size), -torch.inf)

    def add(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> None:
        """rows [C, N, D], weights [C, N] >= 0; rows that are not finite count as weight 0."""
        size = self.rows.shape[1]
        positive = (weights > 0) & rows.isfinite().all(-1)
        chance = draw(weights.shape, weights, generator).clamp(min=torch.finfo(torch.float32).tiny).log()
        priority = torch.where(positive, chance / torch.where(positive, weights, 1), -torch.inf)
        merged = torch.cat([self.priority, priority.to(self.priority.dtype)], 1).topk(size)
        both = torch.cat([self.rows, rows.to(self.rows.dtype)], 1)
        self.rows = both.gather(1, merged.indices[..., None].expand(-1, -1, both.shape[-1]))
        self.priority = merged.values

    def merge(self, group: Group) -> None:
        """Become the sample of the rows of all processes."""
        self.rows, self.priority = collectives.best(self.rows, self.priority, group)

    @property
    def filled(self) -> Tensor:
        """[C, size]: which places hold a row; the full ones come first."""
        return self.priority > -torch.inf


def fill(reservoir: Reservoir, K: int, generator: torch.Generator | None) -> Tensor:
    """K rows per codebook; where there are too few, repeats rows with jitter. Warns with numbers."""
    rows, filled = reservoir.rows[:, :K], reservoir.filled[:, :K]
    found = filled.sum(-1, keepdim=True)
    fewest = int(found.min())
    if fewest == 0:
        raise ValueError("data holds a codebook without a single finite row: the keys cannot be initialised")
    if fewest == K:
        return rows
    rows = torch.where(filled[..., None], rows, 0)
    warnings.warn(
        f"only {fewest} finite rows for {K} keys in a codebook: the other {K - fewest} keys are copies with jitter",
        stacklevel=4,
    )
    again = (draw(filled.shape, rows, generator) * found).long().clamp(max=K - 1)
    copies = rows.gather(1, again[..., None].expand_as(rows))
    mean = rows.sum(1, keepdim=True) / found[..., None]
    spread = (
        torch.where(filled[..., None], rows - mean, 0).square().sum((1, 2), keepdim=True) / found[..., None]
    ).sqrt()
    noise = (draw(rows.shape, rows, generator) - 0.5) * JITTER * torch.where(spread > 0, spread, 1)
    return torch.where(filled[..., None], rows, copies + noise)


def spread_out(rows: Tensor, filled: Tensor, K: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Rows [C, R, D] -> seeds [C, K, D], and which of them are no repetition.

    Every next seed is drawn with probability proportional to the squared distance to the seeds so far (Arthur and
    Vassilvitskii, k-means++, SODA 2007).
    """
    C, _, D = rows.shape
    seeds, new = rows.new_zeros((C, K, D)), torch.zeros((C, K), dtype=torch.bool, device=rows.device)
    weight = filled.to(rows.dtype)
    gap = torch.where(filled, torch.inf, 0).to(rows.dtype)
    for k in range(K):
        chance = draw(weight.shape, weight, generator).clamp(min=torch.finfo(torch.float32).tiny).log()
        pick = torch.where(weight > 0, chance / weight, -torch.inf).argmax(-1, keepdim=True)
        new[:, k] = weight.gather(1, pick)[:, 0] > 0
        seeds[:, k] = rows.gather(1, pick[..., None].expand(-1, -1, D))[:, 0]
        gap = torch.minimum(gap, (rows - seeds[:, k, None]).square().sum(-1))
        weight = gap
    return seeds, new
