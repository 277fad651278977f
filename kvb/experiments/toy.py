"""The toy of the paper's figure 2: points in the plane, two classes at a time, and the decisions of four heads drawn.

The bottlenecks learn by ``kvb.optim.RowwiseAdam``: the averages of ``torch.optim.Adam`` go on moving values
that nothing fetches any longer. The run also measures how far, and ``kvb.optim.audit`` warns of it.

The keys start at points of the square, where the paper's start standard normal: with the published update those
without a hit sink to the origin, a corner of the square; kvb's stay, so that most would never be hit.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), figure 2.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kvb
from kvb import optim
from kvb.experiments import plots
from kvb.experiments.baselines import BASELINES
from kvb.experiments.class_incremental import Examples, Result, Score
from kvb.experiments.heads import BottleneckHead, Head
from kvb.experiments.seeding import seeded
from kvb.experiments.versions import versions
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.splitters import Chunk, RandomProjection

CENTRE_MARGIN, CENTRE_GAP = 0.12, 0.2  # of the classes' centres: from the edge of the square, and from each other
HIDDEN = 32
GRID = 200  # decisions are drawn for GRID x GRID places


@dataclass(frozen=True)
class Toy:
    """The sizes of the experiment; steps: of Adam for each task; key_steps: batches of points that the keys learn."""

    name: str = "toy"
    classes: int = 8
    classes_per_task: int = 2
    samples: int = 100  # of each class, to train; and as many to test
    spread: float = 0.035
    steps: int = 1000
    rate: float = 1e-3
    key_steps: int = 1000
    key_batch: int = 100
    values_spread: float = 1e-3

    @property
    def tasks(self) -> tuple[Tensor, ...]:
        return torch.arange(self.classes).split(self.classes_per_task)


STUDY = Toy()


class Rest(NamedTuple):
    """How far values moved that only the first task fetched, in the tasks after it: the largest change of a number."""

    rows: int
    learned: float  # in the first task, for comparison
    moved: float


@dataclass(frozen=True)
class Run:
    """What one seed gave; every dictionary is by the name of the head. ``maps``: the decisions after each task."""

    seed: int
    train: Examples
    results: dict[str, Result]
    rest: dict[str, Rest]
    audit: list[str]
    maps: dict[str, list[Tensor]] = field(repr=False)  # [GRID, GRID, classes]: probabilities


# --- data and heads ---------------------------------------------------------------------------------------------------


def draw(toy: Toy, generator: torch.Generator) -> tuple[Examples, Examples]:
    """Training and test points of Gaussians whose centres lie apart in the unit square."""
    centres: list[Tensor] = []
    while len(centres) < toy.classes:
        place = CENTRE_MARGIN + (1 - 2 * CENTRE_MARGIN) * torch.rand(2, generator=generator)
        if all((place - other).norm() >= CENTRE_GAP for other in centres):
            centres.append(place)
    labels = torch.arange(toy.classes).repeat_interleave(toy.samples)

    def points() -> Examples:
        noise = torch.randn(len(labels), 2, generator=generator)
        return Examples(torch.stack(centres)[labels] + toy.spread * noise, labels)

    return points(), points()


def bottleneck_head(toy: Toy, splitter: nn.Module, codebooks: int, pairs: int) -> Head:
    bottleneck = KeyValueBottleneck(codebooks, pairs, 2, toy.classes, init_mode="sample", threshold_ema_dead_code=0.0)
    points = torch.rand(toy.key_steps * toy.key_batch, 2)
    batches = [splitter(batch) for batch in points.split(toy.key_batch)]
    bottleneck.init_keys(batches, epochs=1, progress=False)
    head = BottleneckHead(splitter, bottleneck)
    nn.init.normal_(bottleneck.values, std=toy.values_spread)
    return head


def baseline(toy: Toy, name: str) -> Head:
    (head,) = BASELINES[name](2, [toy.classes], hidden=HIDDEN, projected=0, from_zero=False)
    return head


HEADS: dict[str, Callable[[Toy], Head]] = {
    "linear": lambda toy: baseline(toy, "linear"),
    "MLP": lambda toy: baseline(toy, "MLP"),
    "1 codebook of 400": lambda toy: bottleneck_head(toy, Chunk(2, 1), 1, 400),
    "20 codebooks of 20": lambda toy: bottleneck_head(toy, RandomProjection(2, 20, 2), 20, 20),
}
OTHER = "1 codebook of 400, torch.optim.Adam"


def build(toy: Toy, name: str, seed: int) -> Head:
    with seeded(seed):
        return HEADS[name](toy)


def optimizer_of(toy: Toy, head: Head, name: str) -> torch.optim.Optimizer:
    if isinstance(head, BottleneckHead) and name != OTHER:
        return optim.RowwiseAdam(head.parameters(), lr=toy.rate)
    return torch.optim.Adam(head.parameters(), lr=toy.rate)


# --- learning ---------------------------------------------------------------------------------------------------------


def learn(toy: Toy, head: Head, optimizer: torch.optim.Optimizer, train: Examples) -> Iterator[int]:
    """One task after the other, all its points in every step; yields the number of the task just learned."""
    with torch.no_grad():
        prepared = head.prepare(train.features)
    for number, task in enumerate(toy.tasks, start=1):
        rows = torch.isin(train.labels, task)
        inputs, labels = prepared[rows], train.labels[rows]
        for _ in range(toy.steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(inputs), labels).backward()
            optimizer.step()
        yield number


@torch.no_grad()
def _score(toy: Toy, head: Head, prepared: Tensor, labels: Tensor, learnt: int) -> Score:
    right = head(prepared).argmax(-1) == labels
    seen = labels < learnt * toy.classes_per_task
    by_task = [right[torch.isin(labels, task)].double().mean().item() for task in toy.tasks]
    return Score(right[seen].double().mean().item(), by_task)


def _only_first(head: BottleneckHead, train: Examples, toy: Toy) -> Tensor:
    """[C, K] bool: pairs that points of the first task fetch, and none of a later task."""
    first = torch.isin(train.labels, toy.tasks[0])
    codes = head.prepare(train.features)
    mine, others = (kvb.unlearning.hits(head.bottleneck, codes[rows]) for rows in (first, ~first))
    return (mine > 0) & (others == 0)


def square() -> Tensor:
    """The places of a map, [GRID * GRID, 2], row by row from the bottom."""
    steps = (torch.arange(GRID) + 0.5) / GRID
    return torch.cartesian_prod(steps, steps).flip(-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(toy: Toy = STUDY, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Run:
    """The whole experiment; ``say`` gets every line of the report as soon as it is known."""
    train, test = draw(toy, torch.Generator().manual_seed(seed))
    for line in _header(toy, seed):
        say(line)
    results, rest, audit, maps = {}, {}, [], {}
    heads = {name: build(toy, name, seed) for name in HEADS}
    heads[OTHER] = copy.deepcopy(heads[OTHER.partition(",")[0]])
    for name, head in heads.items():
        optimizer = optimizer_of(toy, head, name)
        with torch.no_grad():
            prepared, places = head.prepare(test.features), head.prepare(square())
        marked = _only_first(head, train, toy) if isinstance(head, BottleneckHead) else None
        scores, drawn = [], []
        tables = [head.bottleneck.values.detach().clone()] if isinstance(head, BottleneckHead) else []
        for number in learn(toy, head, optimizer, train):
            scores.append(_score(toy, head, prepared, test.labels, number))
            with torch.no_grad():
                drawn.append(head(places).softmax(-1).view(GRID, GRID, -1))
            if isinstance(head, BottleneckHead):
                tables.append(head.bottleneck.values.detach().clone())
        results[name], maps[name] = Result(scores), drawn
        say(f"{name:>36}" + "".join(f"{score.seen:>9.3f}" for score in scores) + f"{results[name].forgetting:>12.3f}")
        if marked is not None:
            start, first, *_, last = (table[marked] for table in tables)
            rest[name] = Rest(int(marked.sum()), _largest(first - start), _largest(last - first))
        if name == OTHER:
            audit = [str(finding) for finding in optim.audit(optimizer, head, warn=False)]
    done = Run(seed, train, results, rest, audit, maps)
    for line in _footer(done):
        say(line)
    return done


def _largest(change: Tensor) -> float:
    return change.abs().max().item() if change.numel() else 0.0


# --- the report -------------------------------------------------------------------------------------------------------


def save(toy: Toy, done: Run, out: Path) -> tuple[Path, Path]:
    """Write ``toy.png`` and ``toy.json`` into the existing folder ``out``; returns their paths."""
    record = {
        "seed": done.seed,
        "versions": versions(),
        "configuration": asdict(toy) | {"hidden": HIDDEN},
        "tasks": [task.tolist() for task in toy.tasks],
        "heads": {
            name: {
                "accuracy_over_seen_classes": [score.seen for score in result.scores],
                "accuracy_matrix": result.matrix,
                "final_accuracy": result.final,
                "average_forgetting": result.forgetting,
            }
            for name, result in done.results.items()
        },
        "values_of_the_first_task_alone": {name: rest._asdict() for name, rest in done.rest.items()},
        "audit_of_torch_adam": done.audit,
    }
    numbers, figure = out / f"{toy.name}.json", out / f"{toy.name}.png"
    numbers.write_text(json.dumps(record, indent=2) + "\n")
    plots.decisions(
        {name: done.maps[name] for name in HEADS},
        {name: [score.seen for score in done.results[name].scores] for name in HEADS},
        train=done.train,
        tasks=toy.tasks,
        path=figure,
    )
    return figure, numbers


def main(toy: Toy, out: Path, seed: int) -> None:
    """Run, print the report line by line, and save the figure and the numbers."""
    begun = time.perf_counter()

    def say(line: str) -> None:
        print(line, flush=True)

    figure, numbers = save(toy, run(toy, seed, say), out)
    say(f"\nFigure:  {figure}\nNumbers: {numbers}\nTook {time.perf_counter() - begun:.1f} s.")


def _header(toy: Toy, seed: int) -> list[str]:
    tasks = " | ".join(", ".join(map(str, task.tolist())) for task in toy.tasks)
    points = toy.key_steps * toy.key_batch
    return [
        f"Toy: {toy.classes} classes of {toy.samples} points in the plane, Gaussians of spread {toy.spread:g}; "
        f"seed {seed}",
        f"  tasks     {tasks}, one after the other, no replay; {toy.steps:,} steps of Adam each, rate {toy.rate:g}",
        f"  keys      learn by moving averages from {points:,} points anywhere in the unit square, then are frozen",
        "  values    learn by RowwiseAdam; the last line shows what torch.optim.Adam does instead",
        f"  others    linear, and an MLP with one hidden layer of {HIDDEN} (ReLU), by torch.optim.Adam",
        "",
        f"Test accuracy over the classes seen so far, out of all {toy.classes} outputs",
        f"{'after task':>36}"
        + "".join(f"{number:>9}" for number in range(1, len(toy.tasks) + 1))
        + f"{'forgetting':>12}",
    ]


def _footer(done: Run) -> list[str]:
    lines = ["", "Values that only points of the first task fetch: the largest change of a number"]
    lines.append(f"{'':>36}{'rows':>9}{'in task 1':>12}{'afterwards':>12}")
    lines += [f"{name:>36}{rest.rows:>9}{rest.learned:>12.3g}{rest.moved:>12.3g}" for name, rest in done.rest.items()]
    return lines + [f"  audit     {finding}" for finding in done.audit]
