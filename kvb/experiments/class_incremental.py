"""Class-incremental learning on fixed features: classes arrive in tasks, nothing is replayed, no task id is given.

A head has one output per class from the start, and is tested with all of them. Every head gets the same batches in the
same order. Two easier references: task-incremental, with the task known, and i.i.d. training. Domain-incremental: every
task has all classes, and shows them in another way.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5; the forgetting measure
is that of Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018 (arXiv:1801.10112).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb.experiments.heads import Budget, Head

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


# --- training and testing ---------------------------------------------------------------------------------------------


SCENARIOS = ("class-incremental", "task-incremental", "iid")
DOMAINS = "domain-incremental"  # of data that has domains: its labels name a class and a domain


class Plateau(NamedTuple):
    """Stop training on a task when the mean loss of an epoch was not ``min_delta`` lower for ``patience`` epochs."""

    patience: int
    min_delta: float = 0.0


class Score(NamedTuple):
    """Test accuracy after one task: over all classes seen so far, and on the classes of every task; and the steps."""

    seen: float
    by_task: list[float]
    steps: int = 0  # taken for this task


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


class _Area(NamedTuple):
    """A head, the classes that it predicts, and which output stands for each."""

    head: Head
    classes: Tensor
    outputs: Tensor


def _areas(heads: Head | Sequence[Head], tasks: Sequence[Tensor], scenario: str, outputs: Tensor | None) -> list[_Area]:
    if scenario not in (*SCENARIOS, DOMAINS):
        raise ValueError(f"scenario must be one of {', '.join((*SCENARIOS, DOMAINS))}, got {scenario!r}")
    if (outputs is not None) != (scenario == DOMAINS):
        raise ValueError(f"{DOMAINS} training takes outputs, and no other scenario does; got {scenario!r}")
    if isinstance(heads, Head) == (scenario == "task-incremental"):
        wanted = "one head for all classes" if scenario != "task-incremental" else "a list of one head for every task"
        raise ValueError(f"{scenario} training takes {wanted}")
    if isinstance(heads, Head):
        classes = torch.cat(list(tasks))
        return [_Area(heads, classes, classes if outputs is None else outputs[classes])]
    return [_Area(head, task, torch.arange(len(task))) for head, task in zip(heads, tasks, strict=True)]


def _outputs(areas: Sequence[_Area], labels: Tensor) -> Tensor:
    """Which output of its head stands for each label."""
    place = torch.arange(1 + max(int(part.max()) for part in (labels, *(area.classes for area in areas))))
    for _, classes, outputs in areas:
        place[classes] = outputs
    return place[labels]


@torch.no_grad()
def _test(areas: Sequence[_Area], prepared: Tensor, labels: Tensor, tasks: Sequence[Tensor], learnt: int) -> Score:
    wanted, right = _outputs(areas, labels), torch.zeros(len(labels), dtype=torch.bool)
    for head, classes, _ in areas:
        rows = torch.isin(labels, classes).nonzero()[:, 0]
        right[rows] = head(prepared[rows]).argmax(-1) == wanted[rows]
    members = [torch.isin(labels, task) for task in tasks]
    seen = torch.isin(labels, torch.cat(list(tasks[:learnt])))
    return Score(right[seen].double().mean().item(), [right[rows].double().mean().item() for rows in members])


def _steps(head: Head, sizes: Sequence[int], budget: Budget) -> int:
    """How many training steps tasks of these sizes take; a head with few passes learns all tasks together."""
    sizes = [sum(sizes)] if head.passes else sizes
    return (head.passes or budget.epochs) * sum(-(-size // budget.batch_size) for size in sizes)


def _fit(
    head: Head,
    prepared: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    steps: int,
    rate: float,
    budget: Budget,
    generator: torch.Generator,
    stop: Plateau | None,
    watch: Callable[[int], None],
) -> int:
    """Train on these rows, in a new random order in every epoch, until ``steps`` or ``stop``; the steps taken."""
    taken, best, stale = 0, float("inf"), 0
    while taken < steps:
        batches = rows[torch.randperm(len(rows), generator=generator)].split(budget.batch_size)[: steps - taken]
        losses = [head.step(prepared[batch], labels[batch], rate=rate, budget=budget) for batch in batches]
        taken += len(batches)
        watch(taken)
        if stop is not None:
            loss = float(torch.stack(losses).mean())
            best, stale = (loss, 0) if loss < best - stop.min_delta else (best, stale + 1)
            if stale >= stop.patience:
                break
    return taken


def learn(
    heads: Head | Sequence[Head],
    train: Examples,
    test: Examples,
    tasks: Sequence[Tensor],
    *,
    rate: float,
    budget: Budget,
    seed: int,
    scenario: str = "class-incremental",
    outputs: Tensor | None = None,
    stop: Plateau | None = None,
    watch: Callable[[int], None] = lambda steps: None,
) -> Iterator[Score]:
    """Train by SGD without momentum in one of four scenarios, and yield the score after every task.

    "class-incremental": one task after the other, without its name at test time. "task-incremental": the same with one
    head for each task, whose outputs are its classes in their order; at test time the task is known. "iid": all classes
    at once, shuffled, with as many steps as all tasks together; one score. "domain-incremental": as class-incremental,
    with labels that name a class and a domain; only the class has to be told.

    Args:
        heads: one head for all classes, or, task-incremental, one for every task; these prepare features alike.
        tasks: the labels of every task.
        outputs: domain-incrementally, the class that each label stands for, [labels].
        rate: the learning rate.
        seed: of the order of the batches; equal for heads that are to be compared.
        stop: ends a task early; by default, it ends with the budget's epochs.
        watch: called with the steps taken for the task, after every epoch.
    Raises:
        ValueError: an unknown scenario, or heads that do not fit it.
    """
    areas = _areas(heads, tasks, scenario, outputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prepared, prepared_test = (areas[0].head.prepare(part.features) for part in (train, test))
    wanted = _outputs(areas, train.labels)
    members = [torch.isin(train.labels, task).nonzero()[:, 0] for task in tasks]
    phases = [torch.cat(members)] if scenario == "iid" else members
    for number, rows in enumerate(phases):
        head = areas[min(number, len(areas) - 1)].head
        sizes = [len(part) for part in members] if scenario == "iid" else [len(rows)]
        taken = _fit(
            head,
            prepared,
            wanted,
            rows,
            steps=_steps(head, sizes, budget),
            rate=rate,
            budget=budget,
            generator=generator,
            stop=stop,
            watch=watch,
        )
        learnt = len(tasks) if scenario == "iid" else number + 1
        yield _test(areas, prepared_test, test.labels, tasks, learnt)._replace(steps=taken)


def choose_rate(
    build: Callable[[Tensor], Head | Sequence[Head]],
    fit: Examples,
    validation: Examples,
    tasks: Sequence[Tensor],
    *,
    rates: Sequence[float],
    budget: Budget,
    seed: int,
    scenario: str = "class-incremental",
    outputs: Tensor | None = None,
    stop: Plateau | None = None,
) -> tuple[float, list[float]]:
    """The learning rate with the best accuracy over all classes at the end of the whole protocol.

    Args:
        build: makes a new head, or one for every task, given the training features.
        rates: to try; of equally good ones the largest is taken.
    Returns:
        the best rate, and the final validation accuracy of each.
    """
    finals = []
    for rate in rates:
        heads = build(fit.features)
        options: dict[str, Any] = {"budget": budget, "seed": seed, "scenario": scenario, "outputs": outputs}
        *_, last = learn(heads, fit, validation, tasks, rate=rate, stop=stop, **options)
        finals.append(last.seen)
    return max(zip(finals, rates, strict=True))[1], finals
