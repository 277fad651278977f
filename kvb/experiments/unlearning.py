"""The study of unlearning: a bottleneck learns all classes at once, then forgets some by masking pairs.

How much is forgotten and how much is kept, by how many pairs are masked; how much the classes share; relearning.

Source: Shah et al., Unlearning via Sparse Representations (arXiv:2311.15268; TMLR 09/2025).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvb import training, unlearning
from kvb.data import CodeDataset
from kvb.experiments import demo, plots
from kvb.experiments.class_incremental import Examples
from kvb.experiments.demo import Problem
from kvb.experiments.heads import BottleneckHead
from kvb.experiments.studies import Study
from kvb.experiments.versions import versions
from kvb.modules.bottleneck import KeyValueBottleneck

EPOCHS, BATCH = 10, 32
PARTS = (0.01, 0.02, 0.03, 0.045, 0.06, 0.075, 0.09, 0.11, 0.13, 0.16, 0.2)  # of all pairs: N_a
EXAMPLES = (1, 2, 5, 10, 20, 50, 75, 100, 150, 200)  # N_e, as far as there are examples; then all of them
SHARE = 0.95  # of the hits of what is forgotten: N_a of the main table
RELEARN_EPOCHS = 3
# By what pairs are chosen, and by what they are taken away.
WAYS = {
    "activations": "the most-hit pairs of the forget set leave the search",
    "weighed": "the same, hits weighed by how much of a pair is the forget set's",
    "examples": "all pairs hit by some training examples leave the search",
    "erased": "the most-hit pairs stay in the search, their values become 0",
}


class Point(NamedTuple):
    """Test accuracy on the forgotten and on the other classes with so many pairs masked."""

    pairs: int
    forget: float
    retain: float


@dataclass(frozen=True)
class Outcome:
    """What forgetting one set of classes gave; every dictionary but the last is by the name of the way.

    before: nothing forgotten; curves: growing numbers of pairs; chosen: as many as the main table takes; relearned:
    "unmasked", "pairs left" (trained with the mask) and "pairs erased" (trained after erasing).
    """

    classes: list[int]
    before: Point
    curves: dict[str, list[Point]]
    chosen: dict[str, Point]
    relearned: dict[str, Point]

    def drop(self, way: str) -> float:
        """Retain accuracy lost; negative if won: there are fewer classes to confuse."""
        return self.before.retain - self.chosen[way].retain


@dataclass(frozen=True)
class Unlearning:
    """What one seed gave."""

    seed: int
    pairs: int
    overlap: list[list[float]]
    outcomes: list[Outcome]
    one_after_another: list[tuple[int, Point]]  # the class forgotten last, and how all of them do


class ClassesError(ValueError):
    """Classes that cannot be forgotten."""


# --- the bottleneck that forgets --------------------------------------------------------------------------------------


class Subject:
    """A bottleneck trained on all classes at once; it can forget and is then put back."""

    train: Examples
    test: Examples
    heads: Tensor
    test_heads: Tensor
    codes: Tensor
    test_codes: Tensor

    def __init__(self, study: Study, problem: Problem, seed: int) -> None:
        head = demo.build(study, "bottleneck", seed, problem.train.features)
        if not isinstance(head, BottleneckHead):
            raise TypeError(f"expected a BottleneckHead, got {type(head).__name__}")
        self.bottleneck: KeyValueBottleneck = head.bottleneck.eval()
        self.train, self.test = problem.train, problem.test
        self.heads, self.test_heads = head.splitter(problem.train.features), head.splitter(problem.test.features)
        self.codes, self.test_codes = self.bottleneck.encode(self.heads), self.bottleneck.encode(self.test_heads)
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self.learn(self.codes, torch.ones_like(self.train.labels, dtype=torch.bool), EPOCHS)
        self.learned: Tensor = self.bottleneck.values.detach().clone()
        self.hits: Tensor = unlearning.class_hits(
            self.bottleneck, CodeDataset(self.codes, self.train.labels), len(study.classes)
        )

    def learn(self, codes: Tensor, rows: Tensor, epochs: int) -> None:
        data = CodeDataset(codes[rows], self.train.labels[rows])
        for _ in range(epochs):
            for batch, labels in data.batches(BATCH, generator=self.generator):
                training.sgd_step(self.bottleneck.values.detach(), batch, labels)

    @torch.no_grad()
    def measure(self, mask: Tensor | None, classes: Tensor, codes: Tensor | None = None) -> Point:
        """With the module as it is; codes of the test inputs are searched if not given."""
        found = self.bottleneck.encode(self.test_heads) if codes is None else codes
        right = self.bottleneck.decode(found, pool="mean").argmax(-1) == self.test.labels
        members = torch.isin(self.test.labels, classes)
        return Point(
            0 if mask is None else int((~mask).sum()),
            right[members].double().mean().item(),
            right[~members].double().mean().item(),
        )

    def masked(self, way: str, mask: Tensor, classes: Tensor) -> Point:
        """Forget, measure, remember."""
        if way == "erased":
            unlearning.erase(self.bottleneck, mask)
            point = self.measure(mask, classes, self.test_codes)
        else:
            unlearning.forget(self.bottleneck, mask)
            point = self.measure(mask, classes)
        self.restore()
        return point

    @torch.no_grad()
    def restore(self) -> None:
        self.bottleneck.mask_pairs(None)
        self.bottleneck.values.copy_(self.learned)


def forget_classes(subject: Subject, chosen: Sequence[int]) -> Outcome:
    """Forget these classes together in every way and with every number of pairs, and relearn them."""
    classes = torch.tensor(chosen)
    members = torch.isin(subject.train.labels, classes)
    hits = subject.hits[classes].sum(0)
    others = subject.hits.sum(0) - hits
    examples = subject.codes[members]
    examples = examples[torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))]

    def mask_of(way: str, n: int | None) -> Tensor:
        """``None``: as many as the main table takes."""
        if way == "examples":
            return unlearning.mask_by_examples(subject.bottleneck, examples[:n])
        retain = others if way == "weighed" else None
        share = SHARE if n is None else None
        return unlearning.mask_by_activations(hits, n, share=share, retain_hits=retain)

    before = subject.measure(None, classes, subject.test_codes)
    curves, points = {}, {}
    for way in WAYS:
        sizes = [round(part * hits.numel() * len(chosen)) for part in PARTS]
        if way == "examples":
            sizes = [*EXAMPLES, len(examples)]
        curves[way] = [before, *(subject.masked(way, mask_of(way, size), classes) for size in sizes)]
        points[way] = subject.masked(way, mask_of(way, None), classes)

    mask = mask_of("weighed", None)
    undo = unlearning.forget(subject.bottleneck, mask)
    subject.bottleneck.mask_pairs(undo)
    relearned = {"unmasked": subject.measure(None, classes)}
    unlearning.forget(subject.bottleneck, mask)
    subject.learn(subject.bottleneck.encode(subject.heads), members, RELEARN_EPOCHS)
    relearned["pairs left"] = subject.measure(mask, classes)
    subject.restore()
    unlearning.erase(subject.bottleneck, mask)
    subject.learn(subject.codes, members, RELEARN_EPOCHS)
    relearned["pairs erased"] = subject.measure(None, classes, subject.test_codes)
    subject.restore()
    return Outcome(list(chosen), before, curves, points, relearned)


def forget_one_after_another(subject: Subject, order: Sequence[int]) -> list[tuple[int, Point]]:
    """Forget one class more each time, on top of those before."""
    points = []
    for number, label in enumerate(order, start=1):
        hits = subject.hits[label]
        mask = unlearning.mask_by_activations(hits, share=SHARE, retain_hits=subject.hits.sum(0) - hits)
        unlearning.forget(subject.bottleneck, mask)
        points.append((label, subject.measure(subject.bottleneck.pair_mask, torch.tensor(order[:number]))))
    subject.restore()
    return points


def run(
    study: Study,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
    classes: Sequence[int] = (),
) -> Unlearning:
    """The whole study; ``say`` gets every line of the report as soon as it is known.

    Args:
        classes: to forget together; none means every class, one at a time.
    Raises:
        ClassesError: a class that there is not, one named twice, or all of them.
    """
    L = len(study.classes)
    if len(set(classes)) != len(classes) or not all(0 <= label < L for label in classes) or len(classes) >= L:
        raise ClassesError(f"classes must be different numbers from 0 to {L - 1}, and not all of them, got {classes}")
    problem = demo.load(study, seed, folder)
    subject = Subject(study, problem, seed)
    C, K = subject.hits.shape[1:]
    for line in _header(study, seed, problem, subject):
        say(line)
    outcomes = []
    for chosen in [list(classes)] if classes else [[label] for label in range(L)]:
        outcomes.append(forget_classes(subject, chosen))
        say(_row(outcomes[-1]))
    order = list(classes) or torch.randperm(L, generator=torch.Generator().manual_seed(seed))[: L // 2].tolist()
    result = Unlearning(
        seed,
        C * K,
        unlearning.overlap(subject.hits).tolist(),
        outcomes,
        forget_one_after_another(subject, order),
    )
    for line in _footer(result):
        say(line)
    return result


def save(study: Study, result: Unlearning, out: Path) -> tuple[Path, Path]:
    """Write ``unlearning-NAME.png`` and ``unlearning-NAME.json`` into the existing folder ``out``; their paths."""
    record = {
        "seed": result.seed,
        "versions": versions(),
        "configuration": {
            "features": " ".join(study.features),
            "codebooks": study.codebooks,
            "pairs": study.pairs,
            "dim_keys": study.dim_keys,
            "init_mode": demo.INIT_MODE,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "share_of_hits": SHARE,
            "relearn_epochs": RELEARN_EPOCHS,
        },
        "classes": study.classes,
        "ways": WAYS,
        "all_pairs": result.pairs,
        "overlap": result.overlap,
        "outcomes": [_named(asdict(outcome)) for outcome in result.outcomes],
        "one_after_another": [{"class": label, **point._asdict()} for label, point in result.one_after_another],
    }
    numbers, figure = out / f"unlearning-{study.name}.json", out / f"unlearning-{study.name}.png"
    numbers.write_text(json.dumps(record, indent=2) + "\n")
    plots.unlearning(
        {way: mean_curve(result, way) for way in WAYS},
        overlap=result.overlap,
        one_after_another=[(f"{label}", point.forget, point.retain) for label, point in result.one_after_another],
        chosen=_mean([outcome.chosen["weighed"] for outcome in result.outcomes])[0],
        label=f"{SHARE:.0%} of hits",
        title=f"Unlearning: {study.data.partition(':')[0]}, {_sets(result)}",
        path=figure,
    )
    return figure, numbers


def main(study: Study, out: Path, seed: int, classes: Sequence[int] = ()) -> None:
    """Run, print the report line by line, and save the figure and the numbers."""
    begun = time.perf_counter()

    def say(line: str) -> None:
        print(line, flush=True)

    result = run(study, seed, say, out, classes)
    figure, numbers = save(study, result, out)
    say(f"\nFigure:  {figure}\nNumbers: {numbers}\nTook {time.perf_counter() - begun:.1f} s.")


# --- means and the report ---------------------------------------------------------------------------------------------


def _mean(points: Sequence[Point]) -> tuple[float, float, float]:
    pairs, forget, retain = (sum(numbers) / len(points) for numbers in zip(*points, strict=True))
    return pairs, forget, retain


def mean_curve(result: Unlearning, way: str) -> list[tuple[float, float, float]]:
    """Pairs, forget and retain accuracy, each the mean over what was forgotten, for a growing number of pairs."""
    return [_mean(points) for points in zip(*(outcome.curves[way] for outcome in result.outcomes), strict=True)]


def _named(value: object) -> object:
    """``asdict`` for named tuples, too."""
    if isinstance(value, Point):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _named(each) for name, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list) else value


def _sets(result: Unlearning) -> str:
    if len(result.outcomes) > 1:
        return f"the mean of forgetting each of {len(result.outcomes)} classes"
    classes = result.outcomes[0].classes
    return f"forgetting class{'es' if len(classes) > 1 else ''} " + ", ".join(map(str, classes))


def _header(study: Study, seed: int, problem: Problem, subject: Subject) -> list[str]:
    train, test = (len(part.labels) for part in (problem.train, problem.test))
    right = subject.bottleneck.decode(subject.test_codes, pool="mean").argmax(-1) == problem.test.labels
    return [
        f"{study.data.format(count=train + test)}, {train:,} to train and {test:,} to test on; seed {seed}",
        *(f"  {'' if number else 'features':<10}{line}" for number, line in enumerate(study.features)),
        f"  keys      {study.codebooks} codebooks of {study.pairs}, {study.dim_keys}-d random projections: sampled "
        "from the training features, then frozen",
        f"  values    learn all classes at once: {EPOCHS} epochs of SGD on codes; test accuracy "
        f"{100 * right.double().mean():.1f} %",
        *(f"  {name:<12}{what}" for name, what in WAYS.items()),
        "",
        f"Masking pairs that hold {SHARE:.0%} of the forgotten classes' hits (examples: all that training ones hit);",
        "test accuracy on the forgotten classes in %, and how far that on all others moves, in points",
        f"{'':>10}{'before':>14}" + "".join(f"{name:>23}" for name in WAYS),
        f"{'forgotten':>10}{'forget retain':>14}" + f"{'pairs  forget  retain':>23}" * len(WAYS),
    ]


def _row(outcome: Outcome) -> str:
    cells = "".join(
        f"{point.pairs:>9}{_percent(point.forget):>7}{_percent(-outcome.drop(way), sign='+'):>7}"
        for way, point in outcome.chosen.items()
    )
    name = ", ".join(map(str, outcome.classes))
    return f"{name:>10}{_percent(outcome.before.forget):>7}{_percent(outcome.before.retain):>7}{cells}"


def _percent(share: float, sign: str = "") -> str:
    return f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # never -0.0


def _footer(result: Unlearning) -> list[str]:
    outcomes = result.outcomes
    lines = []
    if len(outcomes) > 1:
        for name, of in (("mean", lambda each: sum(each) / len(each)), ("worst", max)):
            cells = ""
            for way in WAYS:
                points = [each.chosen[way] for each in outcomes]
                lost = of([each.drop(way) for each in outcomes])
                cells += f"{of([point.pairs for point in points]):>9.0f}{_percent(of([p.forget for p in points])):>7}"
                cells += f"{_percent(-lost, sign='+'):>7}"
            lines.append(f"{name:>10}{'':>14}{cells}")
    lines += ["", f"By the number of pairs masked, of {result.pairs:,}; {_sets(result)}"]
    lines.append("".join(f"{name:>25}" for name in WAYS))
    lines.append(f"{'pairs  forget  retain':>25}" * len(WAYS))
    for entries in zip_longest(*(mean_curve(result, way) for way in WAYS)):
        parts = (f"{at[0]:>11.0f}{_percent(at[1]):>7}{_percent(at[2]):>7}" if at else " " * 25 for at in entries)
        lines.append("".join(parts))
    lines.append(f"  examples: of {', '.join(map(str, (0, *EXAMPLES)))} and at last of all training examples")
    lines += ["", f"Relearning in {RELEARN_EPOCHS} epochs on the forgotten classes alone, test accuracy in %"]
    lines.append(f"{'':>28}{'forgotten':>12}{'others':>10}")
    rows = {"before": [each.before for each in outcomes], "forgotten": [each.chosen["weighed"] for each in outcomes]}
    names = {
        "unmasked": "unmasked, no training",
        "pairs left": "trained with the mask",
        "pairs erased": "erased, then trained",
    }
    rows |= {title: [each.relearned[name] for each in outcomes] for name, title in names.items()}
    for title, reached in rows.items():
        _, forget, retain = _mean(reached)
        lines.append(f"{title:>28}{_percent(forget):>12}{_percent(retain):>10}")
    lines += ["", "Overlap of two classes: what share of its hits one makes where the other makes them, too"]
    table = result.overlap
    for label, row in enumerate(table):
        rest = [(share, other) for other, share in enumerate(row) if other != label]
        mean, most = sum(share for share, _ in rest) / len(rest), max(rest)
        lines.append(f"{label:>10}  mean {mean:.3f}, most with {most[1]}: {most[0]:.3f}")
    lines += ["", "Forgetting one class after another, masks on top of each other, test accuracy in %"]
    lines.append(f"{'and then':>10}{'pairs':>9}{'forgotten':>12}{'others':>10}")
    for label, point in result.one_after_another:
        lines.append(f"{label:>10}{point.pairs:>9}{_percent(point.forget):>12}{_percent(point.retain):>10}")
    return lines
