"""The study of facts: three knowledge graphs, questions to them, and 200 facts that change one after another.

Ranks are filtered, both for heads and for tails, and those of equal scores count as their mean ("realistic"). Edits
change, add and remove facts; each is right when the new answer comes first of all that are no answers, and the old one
behind half of these, for both questions that the fact answers.

Source: the protocol is that of Bordes et al., Translating embeddings for modeling multi-relational data, NIPS 2013; the
rank of ties as in Berrendorf et al., On the ambiguity of rank-based evaluation of entity alignment or link prediction,
2020 (arXiv:2002.06914).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvb.experiments import answers, results
from kvb.experiments.answers import Answers, Bottleneck, Embedding, Goal, Neighbours
from kvb.experiments.data.graphs import Graph, Graphs
from kvb.experiments.plots import Panel
from kvb.experiments.results import Found, Say
from kvb.experiments.seeding import seeded

SEEDS, EDITS, MOST, POINTS = 3, 200, 50, 20  # MOST steps of an edit; POINTS of the curve


# --- links ------------------------------------------------------------------------------------------------------------


def ranks(model: Answers, graph: Graph, facts: Tensor, true: Tensor) -> Tensor:
    """Filtered ranks of the facts [N, 3] as answers to both of their questions, [2N] float64."""
    questions, wanted = graph.asked(facts)
    with torch.no_grad():
        scores = model.scores(questions)
    at = scores.gather(1, wanted[:, None])
    scores = scores.masked_fill(true[questions], -torch.inf)  # the answer itself, too
    return 1 + (scores > at).sum(1).double() + (scores == at).sum(1).double() / 2


def links(found: Tensor) -> dict[str, float]:
    """Mean reciprocal rank, and the shares of ranks up to 1 and to 10."""
    return {
        "MRR": (1 / found).mean().item(),
        "Hits@1": (found <= 1).double().mean().item(),
        "Hits@10": (found <= 10).double().mean().item(),
    }


def learned(graph: Graph, seed: int) -> list[tuple[Answers, float]]:
    """The models of one seed, and the seconds that each took; all have the embedding's in common."""
    with seeded(seed):
        begun, found = time.process_time(), list[tuple[Answers, float]]()
        encoder = Embedding(graph)
        of_encoder = time.process_time() - begun
        found.append((encoder, of_encoder))
        begun, true = time.process_time(), graph.true()
        choices = [Neighbours(graph, encoder, count) for count in answers.NEIGHBOURS]
        best = max(choices, key=lambda one: links(ranks(one, graph, graph.valid, true))["MRR"])
        found.append((best, of_encoder + time.process_time() - begun))
        begun = time.process_time()
        found.append((Bottleneck(graph, encoder), of_encoder + time.process_time() - begun))
    return found


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """What edits one after another came to. Other facts are all that were not edited by the step at hand.

    before, at_once, in_time: shares of edits that are right before, after one step and after ``MOST``; steps: their
    mean. apart: share of other facts that share no row with the edit; apart_changed: how many of them had another
    score of any entity afterwards, counted over all edits. changed: share of all other facts that had. still: share of
    edits that are right in the end. curve: edits made, and the mean reciprocal rank of the test facts.
    """

    graph: str
    model: str
    edits: int
    before: float
    at_once: float
    in_time: float
    steps: float
    apart: float
    apart_changed: int
    changed: float
    still: float
    curve: list[tuple[int, float]]


def draw(graph: Graph, count: int, seed: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Facts to take away and facts to put in their place: a change, an addition, a removal, and so on.

    No fact is edited twice, and no fact that is added is true before, or its entities the same.
    """
    generator, true = torch.Generator().manual_seed(seed), graph.true()
    old = iter(graph.train[torch.randperm(len(graph.train), generator=generator)])
    drawn: list[tuple[Tensor | None, Tensor | None]] = []
    while len(drawn) < count:
        kind = ("change", "add", "remove")[len(drawn) % 3]
        fact, new = next(old), None
        if kind != "remove":
            tail = int(torch.randint(graph.entities, (), generator=generator))
            new = torch.tensor([int(fact[0]), int(fact[1]), tail])
            place = graph.asked(new[None])
            if tail == int(fact[0]) or bool(true[place].any()):
                continue
            true[place] = True
        drawn.append((fact if kind != "add" else None, new))
    return drawn


def goals_of(graph: Graph, old: Tensor | None, new: Tensor | None, true: Tensor) -> list[Goal]:
    """What scores an edit asks for; ``true`` is brought up to date."""
    goals = []
    for fact, first in ((old, False), (new, True)):
        if fact is not None:
            questions, entities = graph.asked(fact[None])
            true[questions, entities] = first
            goals += [Goal(*each, first) for each in zip(questions.tolist(), entities.tolist(), strict=True)]
    return goals


def edit(model: Answers, graph: Graph, count: int, seed: int) -> Edits:
    """Edits one after another; every other fact's scores are compared bit for bit before and after each."""
    true, all_goals = graph.true(), list[list[Goal]]()
    questions, _ = graph.asked(torch.cat([graph.train, graph.valid, graph.test]))
    asked, facts_of = questions.unique(return_counts=True)
    curve = [(0, links(ranks(model, graph, graph.test, true))["MRR"])]
    before = at_once = in_time = steps = apart = apart_changed = changed = others = 0
    for number, (old, new) in enumerate(draw(graph, count, seed), start=1):
        goals = goals_of(graph, old, new, true)
        all_goals.append(goals)
        with torch.no_grad():
            was = model.scores(asked).clone()
        before += model.right(goals, true)
        for taken in range(1, MOST + 1):
            model.step(goals, true)
            right = model.right(goals, true)
            at_once += right and taken == 1
            if right:
                break
        in_time, steps = in_time + right, steps + taken
        with torch.no_grad():
            differ = (model.scores(asked) != was).any(1)
        other = ~torch.isin(asked, torch.tensor([goal.question for goal in goals]))
        own = ~model.sharing(goals, asked) if isinstance(model, Bottleneck) else torch.zeros_like(other)
        others += int(facts_of[other].sum())
        apart += int(facts_of[other & own].sum())
        apart_changed += int(facts_of[other & own & differ].sum())
        changed += int(facts_of[other & differ].sum())
        if number % max(1, count // POINTS) == 0:
            curve.append((number, links(ranks(model, graph, graph.test, true))["MRR"]))
    still = sum(model.right(goals, true) for goals in all_goals)
    return Edits(
        *(graph.name, model.name, count, before / count, at_once / count, in_time / count, steps / count),
        *(apart / others, apart_changed, changed / others, still / count, curve),
    )


# --- the study --------------------------------------------------------------------------------------------------------


def _spread(numbers: list[float]) -> str:
    sd = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.3f} ± {sd:.3f}"


def _links(graph: Graph, seed: int, seeds: int, say: Say) -> tuple[list[dict[str, Any]], list[Answers]]:
    """Records of every model and seed, and the models of the first seed."""
    first: list[Answers] = []
    records = []
    for number in range(seed, seed + seeds):
        for model, seconds in learned(graph, number):
            found = links(ranks(model, graph, graph.test, graph.true()))
            record = {"graph": graph.name, "model": model.name, "seed": number, **found, "kept": model.kept}
            records.append({**record, "seconds": round(seconds, 1)})
            say(f"{graph.name}, seed {number}, {model.name}: MRR {found['MRR']:.3f}")
            first += [model] if number == seed else []
    return records, first


def link_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for every graph and model: mean ± sd over seeds."""
    rows = []
    for graph, name in dict.fromkeys((one["graph"], one["model"]) for one in records):
        own = [one for one in records if (one["graph"], one["model"]) == (graph, name)]
        cells = [_spread([one[measure] for one in own]) for measure in ("MRR", "Hits@1", "Hits@10")]
        taken = f"{statistics.mean(one['seconds'] for one in own):.0f}"
        rows.append([graph, name, *cells, f"{own[0]['kept']:,}", taken])
    return results.table(LINK_HEAD, rows)


def _editable(models: list[Answers]) -> Iterator[Answers]:
    """The models that learn a fact by steps, the embedding at every rate."""
    for model in models:
        if isinstance(model, Embedding):
            yield from map(model.tuned, answers.TUNING_RATES)
        elif isinstance(model, Bottleneck):
            yield model


def _edit_row(one: Edits) -> list[str]:
    apart = f"{one.apart:.1%}, {one.apart_changed:,} changed" if one.apart else "none"
    shares = [f"{share:.1%}" for share in (one.before, one.at_once, one.in_time)]
    ends = f"{one.curve[0][1]:.3f} → {one.curve[-1][1]:.3f}"
    return [one.graph, one.model, *shares, f"{one.steps:.1f}", apart, f"{one.changed:.1%}", f"{one.still:.1%}", ends]


LINK_HEAD = ["graph", "model", "MRR", "Hits@1", "Hits@10", "numbers kept", "seconds of a processor"]
EDIT_HEAD = [
    *("graph", "model", "right before", "after one step", f"within {MOST}", "steps", "other facts that share no row"),
    *("other facts with changed scores", "still right in the end", "MRR of test facts"),
]


def edit_table(edited: Sequence[Edits]) -> str:
    """A line for every graph and model."""
    return results.table(EDIT_HEAD, [*map(_edit_row, edited)])


def facts(study: Graphs, seed: int, say: Say, *, seeds: int, edits: int) -> Found:
    """Links of every graph over seeds, then edits with the models of the first seed."""
    records: list[dict[str, Any]] = []
    edited: list[Edits] = []
    for name in study.names:
        graph = study.load(name)
        found, models = _links(graph, seed, seeds, say)
        records += found
        for model in _editable(models):
            edited.append(edit(model, graph, edits, seed))
            say("| " + " | ".join(_edit_row(edited[-1])) + " |")
    panels = [
        Panel(
            name,
            "facts edited",
            "MRR of test facts",
            {one.model: tuple(zip(*one.curve, strict=True)) for one in edited if one.graph == name},  # type: ignore[misc]
        )
        for name in study.names
    ]
    tables = f"{link_table(records)}\n\n{edit_table(edited)}"
    return Found([*records, *map(asdict, edited)], tables, panels)


def main(study: Graphs, name: str, out: Path, seed: int, say: Say = results.aloud) -> None:
    """Run the study; writes ``facts.json``, ``.md`` and ``.png`` into the folder ``out``."""
    about = {"data": list(study.names), "seed": seed, "seeds": SEEDS, "edits": EDITS}
    results.write(
        out / name, about, "Facts edited one by one", lambda: facts(study, seed, say, seeds=SEEDS, edits=EDITS), say
    )
