"""Random samples of rows: in one pass over data, of all processes together, filled up where there are too few.

Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir, Information Processing Letters 97, 2006;
Vitter, Random sampling with a reservoir, ACM Transactions on Mathematical Software 11, 1985.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvb import collectives
from kvb.collectives import Group

BATCH = 1 << 22  # elements of one batch cut from a tensor
JITTER = 1e-3  # of the data's spread: keeps keys apart that were filled from the same row


def rows_of(queries: Tensor) -> Tensor:
    """[B, S, C, D] -> [C, B*S, D]."""
    return queries.permute(2, 0, 1, 3).flatten(1, 2)


def cut(data: Tensor) -> tuple[Tensor, ...]:
    """A tensor in batches that fit in memory together with what is computed from them."""
    return data.split(max(1, BATCH // max(1, data[:1].numel()))) if data.dim() else (data,)


def draw(
    shape: Iterable[int], like: Tensor, generator: torch.Generator | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Uniform numbers on the device of ``like``, drawn where the generator lives."""
    if generator is None:  # without the argument: graphs with dynamic sizes do not accept generator=None
        return torch.rand(tuple(shape), device=like.device, dtype=dtype)
    return torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(like.device)


class Reservoir:
    """A weighted random sample of ``size`` rows per codebook, without replacement, in one pass.

    Every row gets the priority log(u) / weight; the highest stay (Efraimidis and Spirakis, Weighted random sampling
    with a reservoir, Information Processing Letters 97, 2006). Rows of weight 0 are never taken.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        C, _, D = like.shape
        # The best of all but the newest rows, and these: sorting them in for every batch would cost more than drawing.
        self._parts = [(like.new_zeros((C, size, D)), like.new_full((C, size), -torch.inf))]
        self._size, self._newest = size, 0

    def add(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> None:
        """rows [C, N, D], weights [C, N] >= 0; rows that are not finite count as weight 0."""
        positive = (weights > 0) & rows.isfinite().all(-1)
        chance = draw(weights.shape, weights, generator).clamp(min=torch.finfo(torch.float32).tiny).log()
        priority = torch.where(positive, chance / torch.where(positive, weights, 1), -torch.inf)
        best, dtype = priority.topk(min(self._size, rows.shape[1])), self._parts[0][0].dtype
        self._parts.append((_taken(rows, best.indices).to(dtype), best.values.to(dtype)))
        self._newest += best.values.shape[1]
        if self._newest >= self._size:
            self._settle()

    def _settle(self) -> tuple[Tensor, Tensor]:
        if self._newest:
            rows, priority = (torch.cat(parts, 1) for parts in zip(*self._parts, strict=True))
            best = priority.topk(self._size)
            self._parts, self._newest = [(_taken(rows, best.indices), best.values)], 0
        return self._parts[0]

    def merge(self, group: Group) -> None:
        """Become the sample of the rows of all processes."""
        self._parts = [collectives.best(*self._settle(), group)]

    @property
    def rows(self) -> Tensor:
        """[C, size, D], zeros where there is none."""
        return self._settle()[0]

    @property
    def filled(self) -> Tensor:
        """[C, size]: which places hold a row; the full ones come first."""
        return self._settle()[1] > -torch.inf


class Share:
    """A random sample of ``size`` positions of a stream of queries, all equally likely, in one pass; on the host.

    Everything while that is no more than ``size``; then the position i takes the place of a random one with probability
    size / i (Vitter, Random sampling with a reservoir, ACM Transactions on Mathematical Software 11, 1985).

    Args:
        lasting: the queries added stay as they are, and need not be copied.
    """

    def __init__(self, size: int, *, lasting: bool) -> None:
        self._size, self._lasting = size, lasting
        self._whole: list[Tensor] = []  # all queries so far, while all are taken
        self._rows: Tensor | None = None  # [size, C, D] from then on
        self._seen = 0

    def add(self, queries: Tensor, generator: torch.Generator | None) -> None:
        """queries [B, S, C, D]."""
        count = queries.shape[0] * queries.shape[1]
        free = max(0, self._size - self._seen)
        if count <= free:
            here = queries.cpu()
            self._whole.append(here.clone() if here is queries and not self._lasting else here)
        else:
            rows = queries.flatten(0, 1)
            self._begin(rows)
            number = torch.arange(self._seen + free + 1, self._seen + count + 1, device="cpu")
            place = (draw(number.shape, number, generator, torch.float64) * number).long()
            kept = (place < self._size).nonzero()[:, 0]
            # Of several for one place the last one stays.
            last = dict(zip(place[kept].tolist(), kept.tolist(), strict=True))
            chosen = torch.tensor(list(last.values()), dtype=torch.int64, device=rows.device) + free
            self._put(torch.arange(self._size - free, self._size, device="cpu"), rows[:free])
            self._put(torch.tensor(list(last), dtype=torch.int64, device="cpu"), rows[chosen])
        self._seen += count

    def _begin(self, like: Tensor) -> None:
        """Give every position so far a place."""
        if self._rows is None:
            self._rows = torch.empty((self._size, *like.shape[1:]), dtype=like.dtype, device="cpu")
            start = 0
            for part in self._whole:
                rows = part.flatten(0, 1)
                self._rows[start : start + len(rows)] = rows
                start += len(rows)
            self._whole = []

    def _put(self, places: Tensor, rows: Tensor) -> None:
        if self._rows is not None and len(places):
            self._rows[places] = rows.to(self._rows)

    def batches(self) -> Sequence[Tensor]:
        """What was taken, as queries [B, S, C, D]."""
        return self._whole if self._rows is None else cut(self._rows[:, None])


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """rows [C, R, D], places [C, M] -> [C, M, D]."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))


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
