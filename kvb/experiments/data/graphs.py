"""Three small knowledge graphs: facts (head, relation, tail), and the questions that they answer.

Source: Kok and Domingos, Statistical predicate invention, ICML 2007, who collected them; the split is that of PyKEEN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvb.experiments.data import packages

PACKAGE = "pykeen"
NAMES = ("nations", "umls", "kinships")


@dataclass(frozen=True)
class Graph:
    """Facts [N, 3] of int64: head, relation, tail; E entities and R relations.

    A question is (head, relation, ?), or (?, relation, tail) by relation + R; its number is relation * E + entity.
    """

    name: str
    entities: int
    relations: int
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def questions(self) -> int:
        """How many there are."""
        return 2 * self.relations * self.entities

    def asked(self, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Both questions that each of the facts [N, 3] answers, and their answers: [2N] and [2N], tails first."""
        head, relation, tail = facts.T
        questions = torch.cat([relation * self.entities + head, (relation + self.relations) * self.entities + tail])
        return questions, torch.cat([tail, head])

    def true(self) -> Tensor:
        """bool [questions, E]: the answers that some fact gives."""
        true = torch.zeros(self.questions, self.entities, dtype=torch.bool)
        true[self.asked(torch.cat([self.train, self.valid, self.test]))] = True
        return true


def parse(name: str, parts: dict[str, str]) -> Graph:
    """A graph of the texts "train", "valid" and "test": a fact a line, its words separated by tabs."""
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    facts = {}
    for part, text in parts.items():
        rows = []
        for line in filter(None, text.splitlines()):
            head, relation, tail = line.split("\t")
            ends = entities.setdefault(head, len(entities)), entities.setdefault(tail, len(entities))
            rows.append((ends[0], relations.setdefault(relation, len(relations)), ends[1]))
        facts[part] = torch.tensor(rows)
    return Graph(name, len(entities), len(relations), **facts)


def load(name: str) -> Graph:
    """One of ``NAMES``, read from the files of the package."""
    parts = ("train", "valid", "test")
    return parse(name, {part: packages.find(PACKAGE, f"{name}/{part}.txt").read_text("utf-8") for part in parts})


@dataclass(frozen=True)
class Graphs:
    """What the study of facts is about."""

    name: str = "graphs"
    names: tuple[str, ...] = NAMES
    load: Callable[[str], Graph] = load


STUDY = Graphs()
