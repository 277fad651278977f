"""Class-incremental learning on fixed features: classes arrive in tasks, nothing is replayed, no task id is given.

A head has one output per class from the start, and is tested with all of them. Every head gets the same batches in the
same order.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5; the forgetting measure
is that of Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018 (arXiv:1801.10112).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvb.bottleneck import KeyValueBottleneck

# --- data and tasks ---------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Features [N, channels] and their labels [N] int64."""

    features: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> Examples:
        return Examples(self.features[rows], self.labels[rows])


def stratified_split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row numbers of the rest, and of a random ``share`` of every class."""
    rest, part = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        size = round(share * len(rows))
        part.append(rows[:size])
        rest.append(rows[size:])
    return torch.cat(rest), torch.cat(part)


def draw_tasks(num_classes: int, classes_per_task: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The classes in random order, cut into tasks.

    Raises:
        ValueError: the classes do not divide evenly.
    """
    if classes_per_task < 1 or num_classes % classes_per_task:
        raise ValueError(
            f"classes_per_task must divide the {num_classes} classes evenly, got {classes_per_task}: "
            "every task has the same number of classes"
        )
    return torch.randperm(num_classes, generator=generator).split(classes_per_task)


# --- heads ------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Features to logits in two steps: ``prepare`` is what no training changes and runs once, ``forward`` the rest."""

    def prepare(self, features: Tensor) -> Tensor:
        return features


class NetworkHead(Head):
    """An ordinary network on the features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, prepared: Tensor) -> Tensor:
        logits: Tensor = self.network(prepared)
        return logits


class BottleneckHead(Head):
    """Codebook voting on a bottleneck with frozen keys: the codes are searched once, and only the values learn.

    Equivalent to ``CodebookVoting(V)(bottleneck(splitter(features)))``.

    Args:
        splitter: features [N, channels] -> [N, C, D].
        bottleneck: its value dim is the number of classes; its values are set to zero, as in the paper.
    """

    def __init__(self, splitter: nn.Module, bottleneck: KeyValueBottleneck) -> None:
        super().__init__()
        self.splitter = splitter
        self.bottleneck = bottleneck.freeze_keys()
        nn.init.zeros_(bottleneck.values)

    def prepare(self, features: Tensor) -> Tensor:
        return self.bottleneck.encode(self.splitter(features))

    def forward(self, prepared: Tensor) -> Tensor:
        return self.bottleneck.decode(prepared, pool="mean")


# --- training and testing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What every head may spend on a task."""

    epochs: int
    batch_size: int
    label_smoothing: float
    clip_norm: float


class Score(NamedTuple):
    """Test accuracy after one task: over all classes seen so far, and on the classes of every task."""

    seen: float
    by_task: list[float]


@dataclass(frozen=True)
class Result:
    """The scores of one head after every task."""

    scores: list[Score]

    @property
    def final(self) -> float:
        """Accuracy over all classes at the end."""
        return self.scores[-1].seen

    @property
    def average(self) -> float:
        """Average incremental accuracy: the mean over the tasks of the accuracy over the classes seen so far."""
        return sum(score.seen for score in self.scores) / len(self.scores)

    @property
    def matrix(self) -> list[list[float]]:
        """Row i, column j: after task i, the accuracy on the classes of task j."""
        return [score.by_task for score in self.scores]

    @property
    def forgetting(self) -> float:
        """The mean over all tasks but the last of the best earlier accuracy minus the final one; 0 for one task."""
        *earlier, final = self.matrix
        drops = [max(column) - end for column, end in zip(zip(*earlier, strict=True), final[:-1], strict=False)]
        return sum(drops) / len(drops) if drops else 0.0


@torch.no_grad()
def _test(head: Head, prepared: Tensor, labels: Tensor, tasks: Sequence[Tensor], learnt: int) -> Score:
    right = head(prepared).argmax(-1) == labels
    members = [torch.isin(labels, task) for task in tasks]
    seen = torch.isin(labels, torch.cat(list(tasks[:learnt])))
    return Score(right[seen].double().mean().item(), [right[rows].double().mean().item() for rows in members])


def learn(
    head: Head, train: Examples, test: Examples, tasks: Sequence[Tensor], *, rate: float, budget: Budget, seed: int
) -> Iterator[Score]:
    """Train ``head`` on one task after the other by SGD without momentum, and yield its score after each.

    Args:
        tasks: the classes of every task.
        rate: the learning rate.
        seed: of the order of the batches; equal for heads that are to be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate)
    with torch.no_grad():
        prepared, prepared_test = head.prepare(train.features), head.prepare(test.features)
    for number, task in enumerate(tasks, start=1):
        rows = torch.isin(train.labels, task).nonzero()[:, 0]
        for _ in range(budget.epochs):
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(budget.batch_size):
                loss = nn.functional.cross_entropy(
                    head(prepared[batch]), train.labels[batch], label_smoothing=budget.label_smoothing
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(head.parameters(), budget.clip_norm)
                optimizer.step()
        yield _test(head, prepared_test, test.labels, tasks, number)


def choose_rate(
    build: Callable[[Tensor], Head],
    fit: Examples,
    validation: Examples,
    tasks: Sequence[Tensor],
    *,
    rates: Sequence[float],
    budget: Budget,
    seed: int,
) -> tuple[float, list[float]]:
    """The learning rate with the best accuracy over all classes at the end of the whole protocol.

    Args:
        build: makes a new head, given the training features.
        rates: to try; of equally good ones the largest is taken.
    Returns:
        the best rate, and the final validation accuracy of each.
    """
    finals = []
    for rate in rates:
        *_, last = learn(build(fit.features), fit, validation, tasks, rate=rate, budget=budget, seed=seed)
        finals.append(last.seen)
    return max(zip(finals, rates, strict=True))[1], finals
