"""One run as long as the paper's: features tiled to 50,000 samples, 5 tasks of 2,000 epochs of 40 steps: 400,000 steps.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5, and the settings of the
authors' experiments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kvb.experiments.class_incremental import Examples, draw_tasks, learn
from kvb.experiments.heads import BottleneckHead, CodesHead
from kvb.experiments.protocol import Data, Recipe, Say, codes_used, learn_keys
from kvb.experiments.report import Plan, without_shortage_warning
from kvb.experiments.studies import Source
from kvb.experiments.versions import versions

SAMPLES = 50_000
LINES = 10  # of progress, for every task


@dataclass(frozen=True)
class FullRun:
    """Accuracy over the classes seen so far, and on those of every task, after each; and what it took."""

    tasks: list[list[int]]
    seen: list[float]
    matrix: list[list[float]]
    codes_used: float
    steps: int
    training_seconds: float  # of the steps alone
    minutes: float  # of everything: keys, codes, steps, tests

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.training_seconds / self.steps


def tiled(examples: Examples, samples: int) -> Examples:
    """The examples, repeated in their order, until there are so many; classes stay balanced where they divide it."""
    return examples.take(torch.arange(samples) % len(examples.labels))


class _Clock:
    """Lines of progress, and the time that steps take without tests between the tasks."""

    def __init__(self, steps: int, tasks: int, say: Say) -> None:
        self.steps, self.tasks, self.say = steps, tasks, say  # steps of one task
        self.task, self.seconds, self.reported = 0, 0.0, 0
        self.last = 0, 0.0  # steps and seconds at the last line
        self.start()

    def start(self) -> None:
        self.before = time.perf_counter()

    def __call__(self, taken: int) -> None:
        now = time.perf_counter()
        self.seconds += now - self.before
        self.before = now
        part = taken * LINES // self.steps
        if part > self.reported:
            done, total = self.task * self.steps + taken, self.tasks * self.steps
            pace = (self.seconds - self.last[1]) / (done - self.last[0])
            self.say(
                f"  step {done:>7,} of {total:,}  {1000 * pace:.3f} ms per step, {1 / pace:,.0f} steps/s, "
                f"{(total - done) * pace / 60:.1f} min to go"
            )
            self.last = done, self.seconds
        self.reported = part

    def next_task(self) -> None:
        self.task, self.reported = self.task + 1, 0
        self.start()


def run(recipe: Recipe, data: Data, seed: int, *, num_classes: int, samples: int = SAMPLES, say: Say) -> FullRun:
    """The bottleneck, class-incrementally, on ``data`` tiled to ``samples``."""
    begun = time.perf_counter()
    tasks = draw_tasks(num_classes, recipe.classes_per_task, torch.Generator().manual_seed(seed))
    keys = learn_keys(recipe, data.keys, num_classes, seed, progress=True)
    encoder = BottleneckHead(keys.splitter, keys.bottleneck)
    # Equal features have equal codes: those of each example are searched once, and tiled.
    once, test = (part._replace(features=encoder.prepare(part.features)) for part in (data.train, data.test))
    train, used = tiled(once, samples), codes_used(once.features, recipe.pairs)
    sizes = [int(torch.isin(train.labels, task).sum()) for task in tasks]
    steps = recipe.epochs * -(-max(sizes) // recipe.batch_size)
    say(
        f"Keys and codes took {time.perf_counter() - begun:.0f} s; {used:.1%} of the pairs are used.\n"
        f"{len(tasks)} tasks of {', '.join(f'{size:,}' for size in sizes)} samples, {recipe.epochs} epochs each"
    )
    clock = _Clock(steps, len(tasks), say)
    scores = []
    head = CodesHead(keys.bottleneck.values)
    for score in learn(
        head,
        train,
        test,
        tasks,
        rate=recipe.rate,
        budget=recipe.budget,
        seed=seed,
        stop=recipe.stop,
        watch=clock,
    ):
        scores.append(score)
        say(
            f"After task {len(scores)} (classes {', '.join(map(str, tasks[len(scores) - 1].tolist()))}): "
            f"accuracy over the classes seen {score.seen:.4f}; by task "
            + " ".join(f"{one:.3f}" for one in score.by_task[: len(scores)])
        )
        clock.next_task()
    return FullRun(
        [task.tolist() for task in tasks],
        [score.seen for score in scores],
        [score.by_task for score in scores],
        used,
        sum(score.steps for score in scores),
        clock.seconds,
        (time.perf_counter() - begun) / 60,
    )


@without_shortage_warning()
def main(source: Source, plan: Plan, out: Path, say: Callable[[str], None] | None = None) -> FullRun:
    """Run seed 0 with the paper's epochs, tell how it goes, and write ``full-NAME.json``."""
    tell: Say = say or (lambda line: print(line, flush=True))
    recipe = plan.recipe(source)
    if plan.epochs is None and not plan.quick:
        recipe = replace(recipe, epochs=Recipe.epochs)
    data = source.data(0, out)
    tell(
        f"{source.study.name}: {len(data.train.labels):,} examples tiled to {SAMPLES:,}; C={recipe.codebooks}, "
        f"K={recipe.pairs}, D={recipe.dim_keys}, V={len(source.study.classes)}, batches of {recipe.batch_size}, "
        f"{torch.get_num_threads()} threads"
    )
    done = run(recipe, data, 0, num_classes=len(source.study.classes), say=tell)
    path = out / f"full-{source.study.name}.json"
    record = {"data": source.study.name, "samples": SAMPLES, "versions": versions(), "recipe": asdict(recipe)}
    path.write_text(json.dumps({**record, "ms_per_step": done.ms_per_step, **asdict(done)}) + "\n")
    tell(
        f"{done.steps:,} steps in {done.training_seconds / 60:.1f} minutes, {done.ms_per_step:.3f} ms each, "
        f"{1000 / done.ms_per_step:,.0f} a second; {done.minutes:.1f} minutes in all.\nWritten: {path}"
    )
    return done
