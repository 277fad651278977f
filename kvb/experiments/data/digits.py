"""The demo without a download: scikit-learn's handwritten digits, two classes at a time, on raw pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from kvb.experiments.class_incremental import Examples, stratified_split
from kvb.experiments.studies import SMALL, Source, Study

TEST_SHARE = 0.2


def _split(generator: torch.Generator, folder: Path | None) -> tuple[Examples, Examples]:
    raw = load_digits()
    images = Examples(torch.from_numpy(raw.data).float() / 16, torch.from_numpy(raw.target).long())
    rest, held = stratified_split(images.labels, TEST_SHARE, generator)
    return images.take(rest), images.take(held)


STUDY = Study(
    name="digits",
    data="Digits: {count:,} real images of 8x8 pixels",
    title="Handwritten digits, two classes at a time, no replay",
    features=("pixels / 16, centred on the mean training image (changes nothing for the bottleneck)",),
    classes=tuple(map(str, range(10))),
    classes_per_task=2,
    split=_split,
)

SOURCE = Source(STUDY, _split, features=("64 numbers: pixels / 16",), recipe=SMALL)
