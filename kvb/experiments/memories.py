"""A memory layer in a small language model: its loss beside a dense block's, and what a second text takes away.

Source: the method is that of Lin et al., Continual Learning via Sparse Memory Finetuning, 2025 (arXiv:2510.15103):
forgetting of what came first against learning of what follows, for full, low-rank and sparse updates.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvb import optim
from kvb.experiments import results, shares
from kvb.experiments.data.texts import Text, Texts
from kvb.experiments.language_model import LanguageModel, Shape, adapt
from kvb.experiments.plots import Panel
from kvb.experiments.results import Found, Say
from kvb.experiments.seeding import seeded


@dataclass(frozen=True)
class Plan:
    """How long everything goes on.

    steps, rate: of training on the first text. more: steps on the second; every: between two measurements. gain: bits
    per byte at which updates are compared. rows: of the table that a sparse step moves, at most. background: windows of
    the first text that the rows are counted over, each a batch. windows: of each text that a measurement reads. rank:
    of low-rank updates.
    """

    seeds: int = 3
    bytes: int = 400_000
    steps: int = 500
    rate: float = 2e-3
    more: int = 80
    every: int = 10
    gain: float = 0.1
    rows: int = 512
    background: int = 400
    windows: int = 64
    rank: int = 4
    shape: Shape = field(default_factory=Shape)


KINDS: dict[str, Callable[[Shape], nn.Module]] = {"dense": Shape.dense, "memory": Shape.memory}
# Each way of updating: the block of the model, and which parameters learn.
WAYS = {
    "dense, all weights": ("dense", "all"),
    "dense, low-rank": ("dense", "low-rank"),
    "memory, all weights": ("memory", "all"),
    "memory, low-rank": ("memory", "low-rank"),
    "memory, all rows that are read": ("memory", "rows"),
    "memory, rows by TF-IDF": ("memory", "tfidf"),
    "memory, rows by KL": ("memory", "kl"),
}
# Of these each way takes the rate that forgets least at the gain.
RATES = {
    "all": (2e-4, 1e-3),
    "low-rank": (1e-3, 5e-3),
    "rows": (1e-2, 3e-2),
    "tfidf": (1e-2, 3e-2),
    "kl": (1e-2, 3e-2),
}


# --- training ---------------------------------------------------------------------------------------------------------


def _batches(data: Tensor, plan: Plan, count: int, seed: int) -> Iterator[Tensor]:
    """Windows [B, L + 1] from random places."""
    generator, length = torch.Generator().manual_seed(seed), plan.shape.context + 1
    for _ in range(count):
        starts = torch.randint(len(data) - length, (plan.shape.batch, 1), generator=generator)
        yield data[starts + torch.arange(length)]


@torch.no_grad()
def measured(model: LanguageModel, text: Text, windows: int) -> float:
    """Bits per byte of the first windows of what was left out."""
    length = model.shape.context + 1
    data = text.test[: len(text.test) // length * length].view(-1, length)[:windows]
    return float(model.loss(data))


def first_model(kind: str, text: Text, plan: Plan, seed: int) -> LanguageModel:
    """A model trained on the first text."""
    with seeded(seed):
        model = LanguageModel(plan.shape, KINDS[kind])
    optimizer = optim.RowwiseAdam(model.parameters(), lr=plan.rate)
    for step, batch in enumerate(_batches(text.train, plan, plan.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, (step + 1) / 50, (plan.steps - step) / (0.3 * plan.steps))
        optimizer.zero_grad()
        model.loss(batch).backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def background(model: LanguageModel, text: Text, plan: Plan, seed: int) -> optim.RowCounts:
    """How often windows of the first text read each row."""
    counts = optim.RowCounts(model.memory.num_pairs)
    model.memory.counter = counts
    for batch in _batches(text.train, plan, plan.background // plan.shape.batch, seed):
        for window in batch[:, :-1].split(1):
            model(window)
    model.memory.counter = None
    return counts


def _learning(model: LanguageModel, what: str, plan: Plan) -> list[Tensor]:
    if what == "all":
        return list(model.parameters())
    if what == "low-rank":
        return adapt(model, plan.rank)
    model.requires_grad_(False)
    model.memory.values.requires_grad_()
    return [model.memory.values]


@dataclass(frozen=True)
class Point:
    """After some steps on the second text: bits per byte of both."""

    step: int
    first: float
    second: float


@dataclass(frozen=True)
class Course:
    """What one way of updating does at one rate."""

    way: str
    seed: int
    rate: float
    moved: int  # rows of the table, where only rows move; else numbers that learn
    points: list[Point]

    @property
    def gain(self) -> float:
        """The most that the second text's loss falls."""
        return self.points[0].second - min(point.second for point in self.points)

    def forgotten(self, gain: float) -> float | None:
        """By how much the first text's loss has risen when the second one's first falls by ``gain``, interpolated."""
        start = self.points[0]
        for before, after in zip(self.points, self.points[1:], strict=False):
            low, high = start.second - before.second, start.second - after.second
            if low < gain <= high:
                share = (gain - low) / (high - low)
                return before.first + share * (after.first - before.first) - start.first
        return None


def follow(
    model: LanguageModel,
    way: str,
    texts: tuple[Text, Text],
    seen: optim.RowCounts | None,
    plan: Plan,
    seed: int,
    rate: float,
) -> Course:
    """Train a copy of the model on the second text."""
    model, what = copy.deepcopy(model), WAYS[way][1]
    with seeded(seed):
        learning = _learning(model, what, plan)
    optimizer = optim.RowwiseAdam(learning, lr=rate)
    start = model.memory.values.detach().clone() if what in ("rows", "tfidf", "kl") else None
    points = [Point(0, *(measured(model, text, plan.windows) for text in texts))]
    for step, batch in enumerate(_batches(texts[1].train, plan, plan.more, seed), start=1):
        optimizer.zero_grad()
        if seen is not None:
            model.memory.counter = optim.RowCounts(model.memory.num_pairs)
        model.loss(batch).backward()
        if seen is not None and (what == "tfidf" or what == "kl"):
            rows = optim.select_rows(model.memory.counter, seen, plan.rows, by=what)  # type: ignore[arg-type]
            optim.keep_rows_(model.memory.values, rows)
        optim.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if step % plan.every == 0 or step == plan.more:
            if seen is not None:
                model.memory.counter = None
            points.append(Point(step, *(measured(model, text, plan.windows) for text in texts)))
    moved = sum(one.numel() for one in learning)
    if start is not None:
        moved = int((model.memory.values != start).any(-1).sum())
    return Course(way, seed, rate, moved, points)


# --- the tables -------------------------------------------------------------------------------------------------------


def _spread(numbers: Sequence[float], sign: str = "") -> str:
    return f"{statistics.fmean(numbers):{sign}.3f} ± {statistics.pstdev(numbers):.3f}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def losses(found: list[dict[str, Any]], plan: Plan) -> str:
    """The first table: both blocks on the first text."""
    lines = [_line("block", "multiplications per byte", "parameters", "bits per byte of the first text")]
    lines.append("|---|---|---|---|")
    for kind in KINDS:
        rows = [one for one in found if one["block"] == kind]
        bits = _spread([one["bits"] for one in rows])
        lines.append(_line(kind, f"{plan.shape.memory_products():,}", f"{rows[0]['parameters']:,}", bits))
    return "\n".join(lines)


def best_of_rates(courses: list[Course], gain: float) -> dict[str, list[Course]]:
    """For each way its courses at one rate: that which forgets least at the gain, or else gains most."""
    chosen: dict[str, list[Course]] = {}
    for way in dict.fromkeys(course.way for course in courses):
        by_rate: dict[float, list[Course]] = {}
        for course in courses:
            if course.way == way:
                by_rate.setdefault(course.rate, []).append(course)
        chosen[way] = min(by_rate.values(), key=lambda found: _rank(found, gain))
    return chosen


def _rank(found: list[Course], gain: float) -> tuple[bool, float]:
    """The lower, the better: those that reach the gain in every seed come first."""
    equal = _at(found, gain)
    return (False, statistics.fmean(equal)) if equal else (True, -statistics.fmean(one.gain for one in found))


def _at(found: list[Course], gain: float) -> list[float]:
    """What each has forgotten at the gain; empty where one does not reach it."""
    equal = [one.forgotten(gain) for one in found]
    return [] if None in equal else [lost for lost in equal if lost is not None]


def forgetting(courses: list[Course], gain: float) -> str:
    """The second table: what is lost of the first text when all have gained as much on the second."""
    head = "update", "rate", f"forgotten at a gain of {gain:g} bits", "gain in the end", "forgotten then", "moved"
    lines = [_line(*head), "|---|---|---|---|---|---|"]
    for way, found in best_of_rates(courses, gain).items():
        equal = _at(found, gain)
        ends = [[one.points[0].second - one.points[-1].second for one in found]]
        ends.append([one.points[-1].first - one.points[0].first for one in found])
        unit = "numbers" if WAYS[way][1] in ("all", "low-rank") else "rows"
        moved = f"{round(statistics.fmean(one.moved for one in found)):,} {unit}"
        first = _spread(equal, "+") if equal else "not reached"
        lines.append(_line(way, f"{found[0].rate:g}", first, *(_spread(one, "+") for one in ends), moved))
    return "\n".join(lines)


def verdict(courses: list[Course], gain: float) -> str:
    """Which way forgets least, in a sentence."""
    chosen = best_of_rates(courses, gain)
    least = min(chosen, key=lambda way: _rank(chosen[way], gain))
    found = "forget" if WAYS[least][1] in ("tfidf", "kl") else "do not forget"
    return f"At a gain of {gain:g} bits sparse updates of the memory {found} least: “{least}” does."


def _panels(courses: list[Course], gain: float) -> list[Panel]:
    lines = {}
    for way, found in best_of_rates(courses, gain).items():
        starts = [one.points[0] for one in found]
        gains, losts = [], []
        for points in zip(*(one.points for one in found), strict=True):
            pairs = list(zip(starts, points, strict=True))
            gains.append(statistics.fmean(start.second - point.second for start, point in pairs))
            losts.append(statistics.fmean(point.first - start.first for start, point in pairs))
        lines[way] = (gains, losts)
    return [Panel("A second text follows", "gain on it, bits per byte", "forgotten of the first, bits per byte", lines)]


def _both(kind: str, seed: int, study: Texts, plan: Plan, say: Say) -> tuple[dict[str, Any], list[Course]]:
    """Train a model on the first text, and update it with the second in every way and at every rate."""
    texts = study.first(plan.bytes), study.second(plan.bytes)
    model = first_model(kind, texts[0], plan, seed)
    bits, parameters = measured(model, texts[0], plan.windows), sum(one.numel() for one in model.parameters())
    say(f"seed {seed}, {kind}: {bits:.3f} bits per byte of the {texts[0].name}")
    seen = background(model, texts[0], plan, seed) if kind == "memory" else None
    courses = []
    for way, (_, what) in WAYS.items():
        for rate in RATES[what] if WAYS[way][0] == kind else ():
            courses.append(follow(model, way, texts, seen, plan, seed, rate))
            say(f"seed {seed}, {way}, rate {rate:g}: gains {courses[-1].gain:.3f} bits")
    return {"block": kind, "seed": seed, "parameters": parameters, "bits": bits}, courses


def main(
    study: Texts,
    name: str,
    out: Path,
    seed: int,
    say: Say = results.aloud,
    plan: Plan | None = None,
) -> None:
    """Run the study; writes ``memory.json``, ``.md`` and ``.png`` into the folder ``out``.

    Under torchrun each process does its share of seeds and blocks, and the first one writes.
    """
    begun, plan = time.perf_counter(), plan or Plan()
    jobs = [(kind, number) for number in range(seed, seed + plan.seeds) for kind in KINDS]
    done = shares.results(jobs, lambda job: _both(*job, study, plan, say))
    if done is None:
        return
    blocks, courses = [block for block, _ in done], [course for _, each in done for course in each]
    tables = losses(blocks, plan), forgetting(courses, plan.gain), verdict(courses, plan.gain)
    say("\n" + "\n\n".join(tables))
    about = {"data": study.title, "seed": seed, "plan": asdict(plan)}
    records = {"blocks": blocks, "courses": [asdict(one) for one in courses]}
    found = Found([], "\n\n".join(tables), _panels(courses, plan.gain))
    results.save(out / name, about, records, study.title, found, begun, say)
