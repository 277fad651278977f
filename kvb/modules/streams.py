"""Data as batches of queries: tensors are cut, loaders are read once per pass.

Everything here works on items of a loader; the caller says what a query is, and what an encoder makes of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from kvb import collectives

BATCH = 1 << 22  # elements of one batch cut from a tensor
PATIENCE = 1.0  # seconds until a pass shows its progress


def cut(data: Tensor) -> tuple[Tensor, ...]:
    """A tensor in batches that fit in memory together with what is computed from them."""
    return data.split(max(1, BATCH // max(1, data[:1].numel()))) if data.dim() else (data,)


class Part(NamedTuple):
    """What was made of one batch, and which of its positions count, [B, *shape]; None for all."""

    made: Any
    mask: Tensor | None


class Stream:
    """Passes over data as queries [B, S, C, D].

    Args:
        batches: an iterable of items, read once per pass.
        features: makes features [B, *shape, d], and their mask, of an item; where an encoder runs, if there is one.
        queries: makes queries [B, S, C, D] of features and mask: of the positions that count.
        replay: keep the features of the first limited pass on the host, and make all limited passes from them, so that
            an encoder sees them once.
        passes: how often ``batches`` will be read; shown by ``progress``.
        group: the processes whose streams end together: if one of them raises, all do.
        device: where they tell one another.
    Raises:
        TypeError: batches that cannot be iterated. ValueError: a one-shot iterator, and more than one pass.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        features: Callable[[Any], Part],
        queries: Callable[[Part], Tensor],
        *,
        replay: bool = False,
        passes: int,
        progress: bool,
        group: collectives.Group = False,
        device: torch.device | None = None,
    ) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(f"data must be a Tensor or an iterable of batches, not {type(batches).__name__}")
        if isinstance(batches, Iterator) and passes > 1:
            raise ValueError(
                f"data can be iterated only once, but {passes} passes are needed: give a DataLoader, a list or a tensor"
            )
        self.batches, self.features, self.make_queries = batches, features, queries
        self.passes, self.progress, self.replay = passes, progress, replay
        self.group, self.device = group, device
        self._kept: list[Part] | None = None
        self._begun = 0

    def queries(self, label: str, limit: int | None = None) -> Iterator[Tensor]:
        """One pass; ``limit`` is the number of rows per codebook that end it, rounded up to whole samples: with other
        processes each reads its share of them.
        """
        with collectives.FailingTogether(self.group, self.device) as status:
            for queries in self._limited(label, limit):
                status.count += queries.shape[0] * queries.shape[1]
                yield queries
        if status.count == 0:
            raise ValueError("data yielded no rows")

    def _limited(self, label: str, limit: int | None) -> Iterator[Tensor]:
        replayed = self.replay and limit is not None
        share = None if limit is None else -(-limit // collectives.world(self.group))
        kept: list[Part] = []
        rows = 0
        for features in self._read(label) if self._kept is None or not replayed else self._kept:
            queries = self.make_queries(features)
            if replayed and self._kept is None:
                kept.append(features._replace(made=features.made.cpu()))
            if share is not None:
                queries = queries[: -(-(share - rows) // max(1, queries.shape[1]))]
            rows += queries.shape[0] * queries.shape[1]
            yield queries
            if share is not None and rows >= share:
                break
        if replayed and self._kept is None:
            self._kept = kept

    def in_step(self, label: str, empty: Tensor, limit: int | None = None) -> Iterator[Tensor]:
        """The same, batch by batch with the other processes: ``empty`` queries [0, S, C, D] where this one has none."""
        rows = 0
        for queries in collectives.in_step(self._limited(label, limit), self.group, self.device):
            rows += 0 if queries is None else queries.shape[0] * queries.shape[1]
            yield empty if queries is None else queries
        with collectives.FailingTogether(self.group, self.device) as status:
            status.count = rows
        if status.count == 0:
            raise ValueError("data yielded no rows")

    def _read(self, label: str) -> Iterator[Part]:
        self._begun += 1
        title = f"keys: {label} (pass {self._begun} of {self.passes})"
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        shown = tqdm(self.batches, title, total, disable=not self.progress, leave=False, delay=PATIENCE)
        return map(self.features, shown)
