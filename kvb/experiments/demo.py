"""The demos: classes of real data arrive a few at a time, and three heads on fixed features try not to forget.

The linear and the MLP head start from PyTorch's default initialisation. With output layers that start at zero, and a
small learning rate, they come close to nearest-mean classifiers: they forget less, and still end below the bottleneck.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvb.experiments import plots
from kvb.experiments.baselines import BASELINES
from kvb.experiments.class_incremental import (
    Examples,
    Result,
    choose_rate,
    draw_tasks,
    learn,
    stratified_split,
)
from kvb.experiments.heads import BottleneckHead, Budget, Head
from kvb.experiments.seeding import seeded
from kvb.experiments.studies import Study
from kvb.experiments.versions import versions
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.key_learning import Method
from kvb.splitters import RandomProjection

VALIDATION_SHARE = 0.25  # of the training examples
INIT_MODE: Method = "sample"
HIDDEN = 128
BUDGET = Budget(epochs=3, batch_size=32, label_smoothing=0.1, clip_norm=1.0)


# --- the three heads; each is built from the training features, of which only the bottleneck makes use ----------------


def bottleneck_head(study: Study, features: Tensor) -> Head:
    C, D = study.codebooks, study.dim_keys
    splitter = RandomProjection(features.shape[1], C, D)
    bottleneck = KeyValueBottleneck(C, study.pairs, D, len(study.classes), init_mode=INIT_MODE)
    bottleneck.init_keys(splitter(features), epochs=0, progress=False)
    return BottleneckHead(splitter, bottleneck)


def baseline(name: str, study: Study, features: Tensor) -> Head:
    (head,) = BASELINES[name](features.shape[1], [len(study.classes)], hidden=HIDDEN, projected=0, from_zero=False)
    return head


HEADS: dict[str, Callable[[Study, Tensor], Head]] = {
    "bottleneck": bottleneck_head,
    "linear": partial(baseline, "linear"),
    "MLP": partial(baseline, "MLP"),
}


def build(study: Study, name: str, seed: int, features: Tensor) -> Head:
    with seeded(seed):
        return HEADS[name](study, features)


# --- the data of one seed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The examples of one seed, split, and the order in which their classes arrive."""

    train: Examples
    test: Examples
    fit: Examples  # the training examples without those of ``validation``
    validation: Examples
    tasks: tuple[Tensor, ...]


def _centred(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """Both with the mean of the training features taken off: nothing to the bottleneck, a help to the other heads."""
    mean = train.features.mean(0)
    return train._replace(features=train.features - mean), test._replace(features=test.features - mean)


def load(study: Study, seed: int, folder: Path | None = None) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    train, test = study.split(generator, folder)
    fit, validation = stratified_split(train.labels, VALIDATION_SHARE, generator)
    return Problem(
        *_centred(train, test),
        *_centred(train.take(fit), train.take(validation)),
        draw_tasks(len(study.classes), study.classes_per_task, generator),
    )


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """What one seed gave; every dictionary is by the name of the head."""

    seed: int
    tasks: list[list[int]]
    rates: dict[str, float]
    validation: dict[str, list[float]]  # final accuracy for each rate of the study
    results: dict[str, Result]


def run(
    study: Study, seed: int = 0, say: Callable[[str], None] = lambda line: None, folder: Path | None = None
) -> Demo:
    """The whole experiment; ``say`` gets every line of the report as soon as it is known."""
    problem = load(study, seed, folder)
    tasks = problem.tasks
    for line in _header(study, seed, problem):
        say(line)
    rates, validation = {}, {}
    for name in HEADS:
        rates[name], validation[name] = choose_rate(
            partial(build, study, name, seed),
            problem.fit,
            problem.validation,
            tasks,
            rates=study.rates,
            budget=BUDGET,
            seed=seed,
        )
        say(f"{name:>13}" + "".join(f"{accuracy:8.3f}" for accuracy in validation[name]) + f"{rates[name]:10g}")

    say(f"\nTest accuracy over the classes seen so far, out of all {len(study.classes)} outputs")
    width = 3 + max(len("classes") - 1, *(len(_classes(task.tolist())) for task in tasks))
    say(f"{'after task':>13}{'classes':>{width}}" + "".join(f"{name:>12}" for name in HEADS) + f"{'chance':>12}")
    learning = [
        learn(
            build(study, name, seed, problem.train.features),
            problem.train,
            problem.test,
            tasks,
            rate=rates[name],
            budget=BUDGET,
            seed=seed,
        )
        for name in HEADS
    ]
    rounds = []
    for number, scores in enumerate(zip(*learning, strict=True), start=1):
        rounds.append(scores)
        seen = "".join(f"{accuracy:12.3f}" for accuracy in (*(score.seen for score in scores), study.chance(number)))
        say(f"{number:>13}{_classes(tasks[number - 1].tolist()):>{width}}{seen}")
    results = {name: Result(list(scores)) for name, scores in zip(HEADS, zip(*rounds, strict=True), strict=True)}
    demo = Demo(seed, [task.tolist() for task in tasks], rates, validation, results)
    for line in _footer(study, demo):
        say(line)
    return demo


def save(study: Study, demo: Demo, out: Path) -> tuple[Path, Path]:
    """Write ``NAME.png`` and ``NAME.json`` into the existing folder ``out``; returns their paths."""
    chances = [study.chance(number) for number in range(1, len(demo.tasks) + 1)]
    record = {
        "seed": demo.seed,
        "versions": versions(),
        "configuration": {
            "features": " ".join(study.features),
            "validation_share": VALIDATION_SHARE,
            "codebooks": study.codebooks,
            "pairs": study.pairs,
            "dim_keys": study.dim_keys,
            "init_mode": INIT_MODE,
            "hidden": HIDDEN,
            "budget": asdict(BUDGET),
            "rates": study.rates,
        },
        "classes": study.classes,
        "tasks": demo.tasks,
        "chance": chances,
        "heads": {
            name: {
                "rate": demo.rates[name],
                "validation_accuracy_by_rate": demo.validation[name],
                "accuracy_over_seen_classes": [score.seen for score in result.scores],
                "accuracy_matrix": result.matrix,
                "final_accuracy": result.final,
                "average_incremental_accuracy": result.average,
                "average_forgetting": result.forgetting,
            }
            for name, result in demo.results.items()
        },
    }
    numbers, figure = out / f"{study.name}.json", out / f"{study.name}.png"
    numbers.write_text(json.dumps(record, indent=2) + "\n")
    plots.class_incremental(
        demo.results,
        tasks=[_classes(task) for task in demo.tasks],
        chance=chances,
        title=study.title,
        path=figure,
    )
    return figure, numbers


def main(study: Study, out: Path, seed: int) -> None:
    """Run, print the report line by line, and save the figure and the numbers."""
    begun = time.perf_counter()

    def say(line: str) -> None:
        print(line, flush=True)

    figure, numbers = save(study, run(study, seed, say, out), out)
    say(f"\nFigure:  {figure}\nNumbers: {numbers}\nTook {time.perf_counter() - begun:.1f} s.")


# --- the report -------------------------------------------------------------------------------------------------------


def _classes(task: Sequence[int]) -> str:
    return ", ".join(map(str, task))


def _header(study: Study, seed: int, problem: Problem) -> list[str]:
    train, test, validation = (len(part.labels) for part in (problem.train, problem.test, problem.validation))
    tasks = " | ".join(_classes(task.tolist()) for task in problem.tasks)
    names = ", ".join(f"{number} {name}" for number, name in enumerate(study.classes) if name != str(number))
    return [
        f"{study.data.format(count=train + test)}, {train:,} to train and {test:,} to test on; seed {seed}",
        *(f"  {'' if number else 'features':<10}{line}" for number, line in enumerate(study.features)),
        *textwrap.wrap(names, 112, initial_indent="  classes   ", subsequent_indent=" " * 12),
        f"  tasks     {tasks}",
        "            one after the other: no replay, no task id, one pass over the tasks",
        f"  keys      {study.codebooks} codebooks of {study.pairs}, {study.dim_keys}-d random projections: sampled "
        "from the training features",
        "            of ALL classes, without their labels, then frozen; values start at zero and alone learn",
        "  others    linear, and an MLP with one hidden layer of "
        f"{HIDDEN} (ReLU); both start as PyTorch initialises them",
        "            (with output layers that start at zero they forget less, and still end below the bottleneck)",
        f"  budget    each head: {BUDGET.epochs} epochs per task, the same batches of {BUDGET.batch_size} in the same "
        "order, SGD without momentum,",
        f"            gradients clipped to norm {BUDGET.clip_norm:g}, label smoothing {BUDGET.label_smoothing:g}",
        "",
        f"Choosing each learning rate: the whole protocol on {train - validation:,} training examples, final "
        f"accuracy on the other {validation:,}",
        " " * 13 + "".join(f"{rate:8g}" for rate in study.rates) + f"{'chosen':>10}",
    ]


def _footer(study: Study, demo: Demo) -> list[str]:
    lines = ["", "Accuracy matrices: row = after task, column = test accuracy on the classes of task"]
    columns = range(1, len(demo.tasks) + 1)
    gap = " " * 3
    lines.append(" " * 4 + gap.join(f"{name:^{6 * len(columns)}}" for name in demo.results))
    lines.append(" " * 4 + gap.join("".join(f"{column:6}" for column in columns) for _ in demo.results))
    for row, cells in zip(columns, zip(*(result.matrix for result in demo.results.values()), strict=True), strict=True):
        lines.append(f"{row:4}" + gap.join("".join(f"{cell:6.2f}" for cell in part) for part in cells))
    lines += ["", f"{'At the end':13}{'all classes':>13}{'average':>13}{'forgetting':>13}"]
    for name, result in demo.results.items():
        lines.append(f"{name:>13}{result.final:13.3f}{result.average:13.3f}{result.forgetting:13.3f}")
    lines += [
        f"{'chance':>13}{study.chance(len(demo.tasks)):13.3f}",
        "  average     mean over the tasks of the accuracy over the classes seen so far",
        "  forgetting  mean over all tasks but the last of the best earlier minus the final accuracy",
    ]
    return lines
