"""The demo without a download: scikit-learn's handwritten digits, two classes at a time, on raw pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from kvb.experiments.class_incremental import Examples, stratified_split
from kvb.experiments.domains import ANGLES, Domains, of_angles, turned
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


def _domains(generator: torch.Generator, folder: Path | None) -> Domains:
    raw = load_digits()
    pixels = torch.from_numpy(raw.data).float().reshape(-1, 1, 8, 8) / 16
    images, labels = turned(pixels, torch.from_numpy(raw.target).long(), len(STUDY.classes))
    rest, held = stratified_split(labels, TEST_SHARE, generator)
    examples = Examples(images.flatten(1), labels)
    return of_angles(examples.take(rest), examples.take(held), len(STUDY.classes))


SOURCE = Source(
    STUDY,
    _split,
    features=("64 numbers: pixels / 16",),
    recipe=SMALL,
    domains=_domains,
    about_domains=f"each image is turned by one of {ANGLES} degrees; all ten digits in every task",
)
