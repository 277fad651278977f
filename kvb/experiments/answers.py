"""What answers questions about a graph: an embedding, its nearest neighbours, and a bottleneck on its features.

Source: Trouillon et al., Complex embeddings for simple link prediction, ICML 2016, trained as in Lacroix et al.,
Canonical tensor decomposition for knowledge base completion, ICML 2018 (relations both ways, cross-entropy over all
entities, nuclear 3-norm); the bottleneck is that of Träuble et al., ICML 2023 (arXiv:2207.11240).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvb import training
from kvb.experiments.data.graphs import Graph
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.splitters import RandomProjection

# All chosen on validation facts.
RANK, EPOCHS, BATCH, RATE, PENALTY, START = 64, 60, 500, 0.1, 0.01, 0.01  # of the embedding
CODEBOOKS, PAIRS, DIM_KEYS, PASSES, STEP, VALUES_BATCH = 64, 512, 48, 3, 3.0, 256  # of the bottleneck
NEIGHBOURS = (1, 3, 10, 30)  # to choose from, on validation facts
MARGIN = 0.1  # of a score that an edit has moved
TUNING_RATES = (0.01, 0.1)  # of an embedding that is edited: the smaller forgets less, the larger needs fewer steps


class Goal(NamedTuple):
    """What a score shall be: that of an entity as the answer to a question, first of all or an answer no longer."""

    question: int
    entity: int
    first: bool


class Answers:
    """Scores of all entities as answers to questions. ``name`` stands in tables."""

    name: str

    def scores(self, questions: Tensor) -> Tensor:
        """questions [N] -> [N, E]."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """Numbers kept to answer."""
        raise NotImplementedError

    def step(self, goals: list[Goal], true: Tensor) -> None:
        """Move towards all goals at once; ``true`` is bool [questions, E], as it is after the edit."""
        raise NotImplementedError

    def missing(self, goals: list[Goal], true: Tensor) -> Tensor:
        """How far each score is from the line that it has to pass, [G]; above 0 where it has not."""
        rows = self.scores(torch.tensor([goal.question for goal in goals]))
        lines = torch.stack([line(row, true[goal.question], goal) for row, goal in zip(rows, goals, strict=True)])
        at = rows[torch.arange(len(goals)), [goal.entity for goal in goals]]
        return torch.where(torch.tensor([goal.first for goal in goals]), lines - at, at - lines)

    def right(self, goals: list[Goal], true: Tensor) -> bool:
        """Whether all goals are reached."""
        with torch.no_grad():
            return bool((self.missing(goals, true) < 0).all())


def line(row: Tensor, true: Tensor, goal: Goal) -> Tensor:
    """The best score of what is no answer, or, to be an answer no longer, the median of these."""
    rivals = ~true
    rivals[goal.entity] = False
    if not bool(rivals.any()):
        return row.new_tensor(-torch.inf if goal.first else torch.inf)
    return row[rivals].max() if goal.first else row[rivals].median()


class Embedding(Answers):
    """ComplEx: complex vectors of entities and relations; a score is the real part of their product."""

    name = "embedding"
    tuning_rate = TUNING_RATES[0]

    def __init__(self, graph: Graph, *, epochs: int = EPOCHS, rank: int = RANK) -> None:
        self.entities = (torch.randn(graph.entities, 2, rank) * START).requires_grad_()
        self.relations = (torch.randn(2 * graph.relations, 2, rank) * START).requires_grad_()
        optimizer = torch.optim.Adagrad([self.entities, self.relations], lr=RATE)
        questions, answers = graph.asked(graph.train)
        for _ in range(epochs):
            for rows in torch.randperm(len(questions)).split(BATCH):
                loss = nn.functional.cross_entropy(self.scores(questions[rows]), answers[rows])
                used = (*self._parts(questions[rows]), self.entities[answers[rows]])
                loss = loss + PENALTY * sum(part.norm(dim=1).pow(3).sum() for part in used) / len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def _parts(self, questions: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.entities)
        return self.entities[questions % count], self.relations[questions // count]

    def tuned(self, rate: float) -> Embedding:
        """A copy that is edited at this rate."""
        copied = copy.copy(self)
        copied.name, copied.tuning_rate = f"{self.name}, rate {rate:g}", rate
        copied.entities, copied.relations = (
            part.detach().clone().requires_grad_() for part in (self.entities, self.relations)
        )
        return copied

    def features(self, questions: Tensor) -> Tensor:
        """questions [N] -> [N, 2 * rank]: entity times relation."""
        (a, b), (c, d) = (part.unbind(1) for part in self._parts(questions))
        return torch.cat([a * c - b * d, a * d + b * c], 1)

    def scores(self, questions: Tensor) -> Tensor:
        return self.features(questions) @ self.entities.flatten(1).T

    @property
    def kept(self) -> int:
        return self.entities.numel() + self.relations.numel()

    def step(self, goals: list[Goal], true: Tensor) -> None:
        """A step of SGD on hinge losses of the goals: it moves the vectors of these entities and relations only."""
        moved = self.entities, self.relations
        lost = (self.missing(goals, true) + MARGIN).clamp(min=0).sum()
        for parameter, gradient in zip(moved, torch.autograd.grad(lost, moved), strict=True):
            parameter.data.sub_(gradient, alpha=self.tuning_rate)


class Neighbours(Answers):
    """The answers of the training questions whose features are nearest; how many is chosen on validation facts."""

    name = "nearest neighbours"

    def __init__(self, graph: Graph, encoder: Embedding, count: int) -> None:
        with torch.no_grad():
            self.features = encoder.features(torch.arange(graph.questions))
        self.known, self.count = torch.zeros(graph.questions, graph.entities), count
        questions, answers = graph.asked(graph.train)
        self.known[questions, answers] = 1
        self.learned = questions.unique()

    def scores(self, questions: Tensor) -> Tensor:
        distances = torch.cdist(self.features[questions], self.features[self.learned])
        nearest = distances.topk(min(self.count, len(self.learned)), largest=False).indices
        return self.known[self.learned[nearest]].mean(1)

    @property
    def kept(self) -> int:
        return self.features[self.learned].numel() + int(self.known.sum())


class Bottleneck(Answers):
    """Values hold the scores of all entities; a question fetches one in each codebook, by the embedding's features.

    codes: [questions, C]. The encoder is frozen: an edit writes values alone.
    """

    name = "bottleneck"

    def __init__(self, graph: Graph, encoder: Embedding, *, codebooks: int = CODEBOOKS, pairs: int = PAIRS) -> None:
        questions, answers = graph.asked(graph.train)
        with torch.no_grad():
            features = encoder.features(torch.arange(graph.questions))
        dim_keys, learned = min(DIM_KEYS, features.shape[1]), questions.unique()
        pairs = min(pairs, len(learned) // 2)
        split = RandomProjection(features.shape[1], codebooks, dim_keys)
        self.bottleneck = KeyValueBottleneck(
            codebooks, pairs, dim_keys, graph.entities, init_mode="kmeans", init_values="zeros"
        )
        self.bottleneck.init_keys(split(features[learned]), epochs=0, progress=False)
        self.bottleneck.freeze_keys().eval().requires_grad_(False)
        self.codes = self.bottleneck.encode(split(features))
        self.fixed = self.bottleneck.keys.numel() + encoder.kept
        for _ in range(PASSES):
            for rows in torch.randperm(len(questions)).split(VALUES_BATCH):
                codes, rate = self.codes[questions[rows]], STEP * codebooks
                training.sgd_step(
                    self.bottleneck.values, codes, answers[rows], lr=rate, max_norm=None, label_smoothing=0.0
                )

    def scores(self, questions: Tensor) -> Tensor:
        return self.bottleneck.decode(self.codes[questions], pool="mean")

    @property
    def kept(self) -> int:
        return self.bottleneck.values.numel() + self.fixed

    def step(self, goals: list[Goal], true: Tensor) -> None:
        """The smallest change of the fetched values that moves every score just past its line, in closed form.

        Questions that share a row move each other's scores: their shares of common rows are the matrix to solve.
        """
        moves = (self.missing(goals, true) + MARGIN).clamp(min=0).nan_to_num(posinf=0)
        codes = self.codes[torch.tensor([goal.question for goal in goals])]
        common = (codes[:, None] == codes[None]).double().mean(2)
        for entity in {goal.entity for goal in goals}:
            own = torch.tensor([place for place, goal in enumerate(goals) if goal.entity == entity])
            signs = torch.tensor([1.0 if goals[place].first else -1.0 for place in own.tolist()])
            wanted = (moves[own] * signs).double()
            amounts = torch.linalg.pinv(common[own][:, own]) @ wanted
            for place, amount in zip(own.tolist(), amounts.tolist(), strict=True):
                self.bottleneck.values[torch.arange(codes.shape[1]), codes[place], entity] += amount

    def sharing(self, goals: list[Goal], questions: Tensor) -> Tensor:
        """bool [N]: whether a question fetches a row that an edit writes."""
        written = self.codes[torch.tensor([goal.question for goal in goals])]
        return torch.stack([(self.codes[questions] == row).any(1) for row in written]).any(0)
