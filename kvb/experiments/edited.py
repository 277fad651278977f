"""Models that are edited sample by sample: class counts, the values of a bottleneck, and a linear head to compare with.

An edit says which label samples shall have. It takes steps on these samples alone until all have it, or ``MOST``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvb import functional, training
from kvb.classifier import KeyValueClassifier
from kvb.counting import ClassCounts
from kvb.experiments import demo
from kvb.experiments.class_incremental import Examples
from kvb.experiments.heads import BottleneckHead, Budget
from kvb.experiments.studies import Study

MOST = 50  # steps of an edit
EPOCHS, BATCH = 10, 32  # of the models that learn by steps
LINEAR_RATE = 0.1  # of .01, .03, .1 and .3 the one with which most edits hold
VALUES_RATE = 0.03  # of an edit, as a share of the codebooks, each of which has 1/C of the vote: one step is enough
UNBOUNDED = 1e9  # an edit is not clipped


class Edited:
    """A trained model and the numbers behind its answers.

    name: in tables. state: the tensors that learning writes to, [C, K, V] where the model has rows.
    """

    name: str
    train: Examples  # prepared: codes, or features
    test: Examples

    def __init__(self, study: Study, train: Examples, test: Examples, seed: int) -> None:
        raise NotImplementedError

    @property
    def state(self) -> list[Tensor]:
        raise NotImplementedError

    def scores(self, prepared: Tensor) -> Tensor:
        """[N, ...] -> [N, V]."""
        raise NotImplementedError

    def step(self, prepared: Tensor, old: Tensor | None, new: Tensor, *, first: bool) -> None:
        """Move towards the labels ``new``; the first step leaves the labels ``old``, if the samples had any."""
        raise NotImplementedError

    def edit(self, prepared: Tensor, old: Tensor | None, new: Tensor, *, most: int = MOST) -> int:
        """Steps until all samples have their new labels; at least one, and at most so many."""
        for steps in range(1, most + 1):
            self.step(prepared, old, new, first=steps == 1)
            if steps < most and bool((self.scores(prepared).argmax(-1) == new).all()):
                break
        return steps

    def revert(self, prepared: Tensor, old: Tensor | None, new: Tensor, steps: int, before: list[Tensor]) -> None:
        """Take an edit back: by default from a copy of the rows that it touched."""
        for now, then in zip(self.state, before, strict=True):
            now.copy_(then)

    def copy(self) -> list[Tensor]:
        return [part.clone() for part in self.state]

    def same(self, before: list[Tensor]) -> bool:
        """Bit for bit."""
        return all(torch.equal(now, then) for now, then in zip(self.state, before, strict=True))

    def touched(self, prepared: Tensor) -> Tensor | None:
        """Which rows these samples fetch, bool [C, K]; None where there are no rows."""
        return None

    def promised(self, prepared: Tensor, old: Tensor | None, new: Tensor, others: Tensor) -> Tensor:
        """Which scores [N, V] of others no edit of these samples may change a bit of: none."""
        return torch.zeros(1, dtype=torch.bool).expand_as(self.scores(others))

    def accuracy(self) -> float:
        return (self.scores(self.test.features).argmax(-1) == self.test.labels).double().mean().item()


def _rows(codes: Tensor, pairs: int) -> Tensor:
    """Which rows codes [N, C] or [N, C, T] name, bool [C, pairs]."""
    found = torch.zeros(codes.shape[1], pairs, dtype=torch.bool)
    return found.scatter_(1, codes.long().transpose(0, 1).flatten(1), True)


class Counts(Edited):
    """``KeyValueClassifier`` with its defaults: an edit subtracts a sample, and adds it with its new label."""

    name = "counts"

    def __init__(self, study: Study, train: Examples, test: Examples, seed: int) -> None:
        model = KeyValueClassifier(random_state=seed).fit_keys(train.features)
        self.counts: ClassCounts = model.new_counts(len(study.classes))
        self.train, self.test = (part._replace(features=model.coder_(part.features)) for part in (train, test))
        self.counts.add(self.train.features, train.labels)

    def empty(self) -> ClassCounts:
        """Counts of the same sizes that have counted nothing."""
        own = self.counts
        ranks = own.rank_weights
        return ClassCounts(*own.counts.shape, smoothing=own.smoothing, rank_weights=ranks)

    @property
    def state(self) -> list[Tensor]:
        return [self.counts.counts, self.counts.totals]

    def scores(self, prepared: Tensor) -> Tensor:
        found: Tensor = self.counts(prepared)
        return found

    def step(self, prepared: Tensor, old: Tensor | None, new: Tensor, *, first: bool) -> None:
        if first and old is not None:
            self.counts.remove(prepared, old)
        self.counts.add(prepared, new)

    def revert(self, prepared: Tensor, old: Tensor | None, new: Tensor, steps: int, before: list[Tensor]) -> None:
        """By counting backwards: no copy is needed."""
        for _ in range(steps):
            self.counts.remove(prepared, new)
        if old is not None:
            self.counts.add(prepared, old)

    def touched(self, prepared: Tensor) -> Tensor:
        return _rows(prepared, self.counts.counts.shape[1])

    def promised(self, prepared: Tensor, old: Tensor | None, new: Tensor, others: Tensor) -> Tensor:
        """Those of all classes but the old and the new ones."""
        edited = torch.cat([new, new if old is None else old])
        kept = ~torch.isin(torch.arange(self.counts.num_classes), edited)
        return kept.expand(len(others), -1)


class Values(Edited):
    """A bottleneck with frozen keys: an edit is steps of SGD on the values that its samples fetch."""

    name = "values"

    def __init__(self, study: Study, train: Examples, test: Examples, seed: int) -> None:
        head = demo.build(study, "bottleneck", seed, train.features)
        if not isinstance(head, BottleneckHead):
            raise TypeError(f"expected a BottleneckHead, got {type(head).__name__}")
        self.table: Tensor = head.values.detach()
        self.train, self.test = (part._replace(features=head.prepare(part.features)) for part in (train, test))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train.labels), generator=generator).split(BATCH):
                training.sgd_step(self.table, self.train.features[rows], train.labels[rows])

    @property
    def state(self) -> list[Tensor]:
        return [self.table]

    def scores(self, prepared: Tensor) -> Tensor:
        return functional.gather(self.table, prepared[:, None], pool="mean")[:, 0]

    def step(self, prepared: Tensor, old: Tensor | None, new: Tensor, *, first: bool) -> None:
        training.sgd_step(self.table, prepared, new, lr=VALUES_RATE * len(self.table), max_norm=None)

    def touched(self, prepared: Tensor) -> Tensor:
        return _rows(prepared, self.table.shape[1])

    def promised(self, prepared: Tensor, old: Tensor | None, new: Tensor, others: Tensor) -> Tensor:
        """Those of samples that share no row with the edited ones."""
        rows, books = self.touched(prepared), torch.arange(len(self.table))
        apart = ~rows[books, others.long()].any(-1)
        return apart[:, None].expand(-1, self.table.shape[2])


class Linear(Edited):
    """A linear head: an edit is steps of SGD on all of its weights."""

    name = "linear"

    def __init__(self, study: Study, train: Examples, test: Examples, seed: int) -> None:
        self.head = demo.build(study, "linear", seed, train.features)
        self.train, self.test = train, test
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train.labels), generator=generator).split(BATCH):
                self._descend(train.features[rows], train.labels[rows])

    def _descend(self, features: Tensor, labels: Tensor) -> None:
        budget = Budget(epochs=1, batch_size=BATCH, label_smoothing=0.1, clip_norm=UNBOUNDED)
        self.head.step(features, labels, rate=LINEAR_RATE, budget=budget)

    @property
    def state(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.head.parameters()]

    @torch.no_grad()
    def scores(self, prepared: Tensor) -> Tensor:
        found: Tensor = self.head(prepared)
        return found

    def step(self, prepared: Tensor, old: Tensor | None, new: Tensor, *, first: bool) -> None:
        self._descend(prepared, new)


MODELS: tuple[type[Edited], ...] = (Counts, Values, Linear)
