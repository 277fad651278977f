"""Data as batches of queries: tensors are cut, loaders are read once per pass.

Everything here works on items of a loader; the caller says what a query is, and what an encoder makes of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb import bars, collectives, validation
from kvb.collectives import Group
from kvb.modules.samples import Share


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
        lasting: the items stay as they are, as parts of a tensor do, while a loader may write to what it gave.
        dear: making queries costs an encoder's time.
        passes: how often ``batches`` will be read; shown by ``progress``.
        group: the processes whose streams end together: if one of them raises, all do.
        device: where they tell one another, and where queries are.
    Raises:
        TypeError: batches that cannot be iterated. ValueError: a one-shot iterator, and more than one pass.
    """

    batches: Iterable[Any]
    features: Callable[[Any], Part]
    make_queries: Callable[[Part], Tensor]
    passes: int
    progress: bool
    lasting: bool
    dear: bool
    device: torch.device | None

    def __init__(
        self,
        batches: Iterable[Any],
        features: Callable[[Any], Part],
        queries: Callable[[Part], Tensor],
        *,
        lasting: bool = False,
        dear: bool = False,
        passes: int,
        progress: bool,
        group: collectives.Group = False,
        device: torch.device | None = None,
    ) -> None:
        validation.batches(batches)
        if isinstance(batches, Iterator) and passes > 1:
            raise ValueError(
                f"data can be iterated only once, but {passes} passes are needed: give a DataLoader, a list or a tensor"
            )
        self.batches, self.features, self.make_queries = batches, features, queries
        self.passes, self.progress, self.lasting, self.dear = passes, progress, lasting, dear
        self.group, self.device = group, device
        self._begun, self._masked = 0, False

    def queries(self, label: str) -> Iterator[Tensor]:
        """One pass over the data."""
        with collectives.FailingTogether(self.group, self.device) as status:
            for queries in self._read(label):
                status.count += queries.shape[0] * queries.shape[1]
                yield queries
        self._require(status.count)

    def in_step(self, label: str, empty: Tensor) -> Iterator[Tensor]:
        """The same, batch by batch with the other processes: ``empty`` queries [0, S, C, D] where this one has none."""
        rows = 0
        for queries in collectives.in_step(self._read(label), self.group, self.device):
            rows += 0 if queries is None else queries.shape[0] * queries.shape[1]
            yield empty if queries is None else queries
        with collectives.FailingTogether(self.group, self.device) as status:
            status.count = rows
        self._require(status.count)

    def share(self, rows: int, generator: torch.Generator | None) -> Sample:
        """A random sample of so many rows per codebook of the data, in one pass; of each process its share of them."""
        share = Share(-(-rows // collectives.world(self.group)), lasting=self.lasting)
        for queries in self.queries("sampling"):
            share.add(queries, generator)
        return Sample(self, share)

    def _read(self, label: str) -> Iterator[Tensor]:
        self._begun += 1
        title = f"keys: {label} (pass {self._begun} of {self.passes})"
        for item in bars.of(self.batches, title, shown=self.progress):
            part = self.features(item)
            self._masked |= part.mask is not None
            yield self.make_queries(part)

    def _require(self, rows: int) -> None:
        if rows == 0:
            raise ValueError(
                "data yielded no rows" + (": its mask is False everywhere, and True counts" if self._masked else "")
            )


class Sample:
    """A random sample of a stream, which is read as often as one likes.

    Args:
        stream: whose it is. share: of this process.
    """

    group: Group
    progress: bool

    def __init__(self, stream: Stream, share: Share) -> None:
        self.group, self.progress, self._device, self._share = stream.group, stream.progress, stream.device, share

    def queries(self, label: str) -> Iterator[Tensor]:
        """One pass over the sample; if one of the processes raises, all do."""
        device, batches = self._device, self._share.batches()
        with collectives.FailingTogether(self.group, device):
            for batch in bars.of(batches, f"keys: {label}", shown=self.progress):
                yield batch if device is None else batch.to(device)
