"""Studies of edits: what changes besides, what taking samples away leaves, and thousands of edits one after another.

Source: ours; the measures are those of model editing (success, locality, reversal), as in Hartvigsen et al., Aging with
GRACE, NeurIPS 2023 (arXiv:2211.11031).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvb.experiments import demo, results
from kvb.experiments.demo import Problem
from kvb.experiments.edited import MODELS, MOST, Counts, Edited
from kvb.experiments.plots import Panel
from kvb.experiments.results import Found, Say
from kvb.experiments.studies import Study

SIZES, REPEATS = (1, 10, 50), 10
SUBSETS = 100
CONTINUAL = 1500  # samples that get a wrong label, and then the right one again; three quarters where there are fewer
POINTS = 40  # of the curve


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """The means over repeats. Others are the test samples that were not edited.

    held: share of the edited samples with their new label. rows: share of all rows that were written. same, promised:
    shares of the others' scores that kept all bits, and that had to. kept: whether all of those did. moved: change of
    the others' accuracy. reverted: whether the model was taken back bit for bit.
    """

    model: str
    kind: str  # swap: the label of training samples; correct: that of test samples that are wrong
    size: int
    held: float
    steps: float
    rows: float
    same: float
    promised: float
    kept: bool
    moved: float
    reverted: bool


def _samples(model: Edited, kind: str, size: int, number: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Samples to edit, their old labels if they were learned, their new ones, and which test samples are others."""
    generator, others = torch.Generator().manual_seed(number), torch.ones(len(model.test.labels), dtype=torch.bool)
    if kind == "swap":
        rows = torch.randperm(len(model.train.labels), generator=generator)[:size]
        old, V = model.train.labels[rows], int(model.train.labels.max()) + 1
        return (
            model.train.features[rows],
            old,
            (old + torch.randint(1, V, (len(rows),), generator=generator)) % V,
            others,
        )
    wrong = (model.scores(model.test.features).argmax(-1) != model.test.labels).nonzero()[:, 0]
    rows = wrong[torch.randperm(len(wrong), generator=generator)[:size]]
    others[rows] = False
    return model.test.features[rows], None, model.test.labels[rows], others


def edit(model: Edited, kind: str, size: int, repeats: int) -> Edit | None:
    """Edit, measure and revert, several times; None where there is nothing to correct."""
    found: list[tuple[float, ...]] = []
    for number in range(repeats):
        samples, old, new, others = _samples(model, kind, size, number)
        if not len(new):
            return None
        rest, labels, copy = model.test.features[others], model.test.labels[others], model.copy()
        before, promised = model.scores(rest), model.promised(samples, old, new, rest)
        steps = model.edit(samples, old, new)
        after, touched = model.scores(rest), model.touched(samples)
        same, right = after == before, [scores.argmax(-1) == labels for scores in (before, after)]
        held = model.scores(samples).argmax(-1) == new
        model.revert(samples, old, new, steps, copy)
        found.append(
            (
                *(held.double().mean().item(), steps, 1.0 if touched is None else touched.double().mean().item()),
                *(same.double().mean().item(), promised.double().mean().item(), float(same[promised].all())),
                *((right[1].double().mean() - right[0].double().mean()).item(), float(model.same(copy))),
            )
        )
    held_, steps_, rows, same_, promised_, kept, moved, reverted = (
        sum(one) / repeats for one in zip(*found, strict=True)
    )
    return Edit(model.name, kind, len(new), held_, steps_, rows, same_, promised_, kept == 1, moved, reverted == 1)


def row(one: Edit) -> str:
    """A line of the table of ``edits``."""
    promise = f"all of the {one.promised:.1%} promised: {_yes(one.kept)}" if one.promised else "none promised"
    cells = [one.model, one.kind, one.size, f"{one.held:.0%}", f"{one.steps:.1f}", f"{one.rows:.2%}"]
    cells += [f"{one.same:.1%}; {promise}", f"{100 * one.moved:+.2f}", _yes(one.reverted)]
    return "| " + " | ".join(map(str, cells)) + " |"


def edits(study: Study, problem: Problem, seed: int, say: Say, *, repeats: int = REPEATS) -> Found:
    """Labels of 1, 10 and 50 samples are swapped, or wrong answers corrected."""
    lines = [
        "| model | edit | samples | hold | steps | rows written | scores of others with the same bits | accuracy of "
        "others, points | taken back bit for bit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: list[Edit] = []
    for kind_of in MODELS:
        model = kind_of(study, problem.train, problem.test, seed)
        for kind in ("swap", "correct"):
            for size in SIZES:
                one = edit(model, kind, size, repeats)
                if one is None or (
                    found and (found[-1].model, found[-1].kind, found[-1].size) == (one.model, one.kind, one.size)
                ):
                    continue  # there are no more to correct
                found.append(one)
                lines.append(row(one))
                say(lines[-1])
    drawn = [
        Panel(
            f"({letter}) {kind}: accuracy of others",
            "samples edited at once",
            "change in points",
            {
                model.name: (
                    [one.size for one in found if (one.model, one.kind) == (model.name, kind)],
                    [100 * one.moved for one in found if (one.model, one.kind) == (model.name, kind)],
                )
                for model in MODELS
            },
        )
        for letter, kind in zip("ab", ("swap", "correct"), strict=True)
    ]
    return Found([asdict(one) for one in found], "\n".join(lines), drawn)


# --- forgetting -------------------------------------------------------------------------------------------------------


def forgetting(study: Study, problem: Problem, seed: int, say: Say, *, subsets: int = SUBSETS) -> Found:
    """Counts that forgot random subsets, and every class, against counts that learned only the rest."""
    model = Counts(study, problem.train, problem.test, seed)
    generator, records = torch.Generator().manual_seed(seed), []
    codes, labels, whole = model.train.features, model.train.labels, model.copy()
    V = model.counts.num_classes
    for _ in range(subsets):
        size = int(torch.randint(1, len(labels), (), generator=generator))
        order = torch.randperm(len(labels), generator=generator)
        gone, kept = order[:size], order[size:].sort().values
        begun = time.process_time()
        for rows in gone.split(int(torch.randint(1, 257, (), generator=generator))):
            model.counts.remove(codes[rows], labels[rows])
        forgot, begun = time.process_time() - begun, time.process_time()
        never = model.empty()
        never.add(codes[kept], labels[kept])
        learned, test = time.process_time() - begun, model.test.features[:256]
        same = torch.equal(never.counts, model.counts.counts) and torch.equal(never(test), model.counts(test))
        records.append({"samples": size, "same": same, "seconds": forgot, "seconds_again": learned})
        model.counts.add(codes[gone], labels[gone])
    alike = sum(record["same"] for record in records)
    lines = [
        "| forgotten | bit for bit as never learned | the rest |",
        "|---|---|---|",
        f"| {subsets} random subsets of 1 to {len(labels) - 1:,} samples, in random order and batches "
        f"| {alike} of {subsets} | learned again: the very state before, {_yes(model.same(whole))} |",
        _classes(model, V),
    ]
    for line in lines:
        say(line)
    sizes = [record["samples"] for record in records]
    drawn = {"forget": "seconds", "learn the rest again": "seconds_again"}
    panel = Panel(
        "Work of forgetting, once codes are known",
        "samples forgotten",
        "seconds of a processor",
        {name: (sizes, [record[field] for record in records]) for name, field in drawn.items()},
        joined=False,
    )
    return Found(records, "\n".join(lines), [panel])


def _classes(model: Counts, V: int) -> str:
    """A line about forgetting each class by itself."""
    codes, labels, test = model.train.features, model.train.labels, model.test
    before, alike, kept, right, moved = model.scores(test.features), 0, 0, 0.0, 0.0
    for label in range(V):
        others, members = torch.arange(V) != label, test.labels == label
        model.counts.forget_classes(torch.tensor([label]))
        scores = model.scores(test.features)
        never = model.empty()
        never.add(codes[labels != label], labels[labels != label])
        alike += torch.equal(never.counts, model.counts.counts)
        kept += torch.equal(scores[:, others], before[:, others])
        answers = scores.argmax(-1) == test.labels
        right += answers[members].double().mean().item() / V
        old = (before.argmax(-1) == test.labels)[~members].double().mean()
        moved += (answers[~members].double().mean() - old).item() / V
        model.counts.add(codes[labels == label], labels[labels == label])
    return (
        f"| each of {V} classes | {alike} of {V}; accuracy on it {right:.1%} | scores bit for bit the same, {kept} of "
        f"{V}; accuracy {100 * moved:+.2f} points |"
    )


# --- one after another ------------------------------------------------------------------------------------------------


def _stream(model: Edited, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Edits: rows, old and new labels. Wrong labels first, then the right ones in another order."""
    rows, V = torch.randperm(len(model.train.labels), generator=generator)[:count], int(model.train.labels.max()) + 1
    right = model.train.labels[rows]
    wrong = (right + torch.randint(1, V, (count,), generator=generator)) % V
    for place in range(count):
        yield rows[place, None], right[place, None], wrong[place, None]
    for place in torch.randperm(count, generator=generator).tolist():
        yield rows[place, None], wrong[place, None], right[place, None]


def continual(study: Study, problem: Problem, seed: int, say: Say, *, count: int = CONTINUAL) -> Found:
    """Samples get a wrong label one by one, and then the right one again, one by one; counts take one step for each."""
    count = min(count, len(problem.train.labels) * 3 // 4)
    every = max(1, 2 * count // POINTS)
    lines = [
        "| model | edits | steps | hold at once | accuracy before | half-way | after | the state before, bit for bit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    records: list[dict[str, Any]] = []
    for kind in MODELS:
        model = kind(study, problem.train, problem.test, seed)
        before, steps, held, curve = model.copy(), 0, 0, [(0, model.accuracy())]
        for number, (rows, old, new) in enumerate(_stream(model, count, torch.Generator().manual_seed(seed)), start=1):
            samples = model.train.features[rows]
            steps += model.edit(samples, old, new, most=1 if kind is Counts else MOST)
            held += int((model.scores(samples).argmax(-1) == new).all())
            if number % every == 0 or number in (count, 2 * count):
                curve.append((number, model.accuracy()))
        same, accuracy = model.same(before), dict(curve)
        records.append({"model": kind.name, "steps": steps, "held": held, "same": same, "curve": curve})
        lines.append(
            f"| {kind.name} | {2 * count:,} | {steps:,} | {held / (2 * count):.1%} | {curve[0][1]:.3f} | "
            f"{accuracy[count]:.3f} | {curve[-1][1]:.3f} | {_yes(same)} |"
        )
        say(lines[-1])
    drawn = {record["model"]: tuple(zip(*record["curve"], strict=True)) for record in records}
    title = f"{count:,} wrong labels, and the right ones again"
    return Found(records, "\n".join(lines), [Panel(title, "edits", "test accuracy", drawn)])  # type: ignore[arg-type]


# --- the command ------------------------------------------------------------------------------------------------------

STUDIES: dict[str, Callable[..., Found]] = {"edits": edits, "forgetting": forgetting, "continual": continual}


def main(study: Study, name: str, out: Path, seed: int, say: Say = results.aloud) -> None:
    """Run one of the studies; writes ``NAME-DATA.json``, ``.md`` and ``.png`` into the folder ``out``."""
    about, title = {"data": study.name, "seed": seed}, f"{study.title.partition(',')[0]}, seed {seed}"
    results.write(
        out / f"{name}-{study.name}",
        about,
        title,
        lambda: STUDIES[name](study, demo.load(study, seed, out), seed, say),
        say,
    )
