"""The study of a generative model: a small network draws digits pixel by pixel, with and without a memory inside.

The network predicts the level of a pixel from the pixels above and to the left, its place and the class. It learns
some classes and is frozen; the memory is a bottleneck on its last hidden layer, and adds what it fetches to the
network's logits. The class is a part of the query, far from all other classes: each class has pairs of its own, and a
class that comes later brings new ones. Without the memory the network learns on.

Source: the factorisation over pixels is that of van den Oord et al., Pixel recurrent neural networks, ICML 2016; the
memory is that of Träuble et al., ICML 2023 (arXiv:2207.11240). A classifier that samples teach, tested on real images:
Ravuri and Vinyals, Classification accuracy score for conditional generative models, NeurIPS 2019.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from kvb.experiments import results
from kvb.experiments.class_incremental import Examples
from kvb.experiments.results import Found, Say
from kvb.experiments.seeding import seeded
from kvb.experiments.studies import Study
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.splitters import RandomProjection

SEEDS, OLD = 3, 8  # classes 0 to OLD - 1 come first
LEVELS, REACH = 17, 3  # of a pixel; how many rows above and columns beside it are seen
HIDDEN, EPOCHS, BATCH, RATE, NAMELESS = 128, 10, 512, 2e-3, 0.2  # NAMELESS: share of images without their class
# Chosen on a quarter of the training images of seed 0, like the network's numbers.
CODEBOOKS, PAIRS, DIM_KEYS, PASSES, STEP = 16, 64, 16, 12, 10.0  # PAIRS of a class; STEP as a share of the codebooks
FAR = 100.0  # between classes, in the keys: no hidden layer reaches so far
SAMPLES, SHOWN = 50, 8  # of a class: measured, and drawn in the figure
Logits = Callable[[Tensor, Tensor], Tensor]  # contexts [N, P, ...] and classes [N] -> [N, P, LEVELS]


def contexts(levels: Tensor) -> Tensor:
    """What is known of each pixel before it is drawn: levels [N, side * side] -> [N, P, REACH * (2 * REACH + 2) + P].

    The pixels in reach, row by row up to the one to the left, and which of the P places it is.
    """
    N, P = levels.shape
    side = math.isqrt(P)
    framed = nn.functional.pad(levels.view(N, side, side).float() / (LEVELS - 1), (REACH, REACH, REACH, 0))
    seen = [
        framed[:, down : down + side, right : right + side].flatten(1)
        for down in range(REACH + 1)
        for right in range(2 * REACH + 1)
        if down < REACH or right < REACH
    ]
    return torch.cat([torch.stack(seen, -1), torch.eye(P).expand(N, -1, -1)], -1)


class Network(nn.Module):
    """Logits of the levels of a pixel, by its context and the class; a class beyond ``known`` is as none."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classes, self.known = classes, classes
        self.hidden = nn.Sequential(
            *(nn.Linear(channels + classes, HIDDEN), nn.ReLU()), *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        )
        self.out = nn.Linear(HIDDEN, LEVELS)

    def features(self, seen: Tensor, labels: Tensor) -> Tensor:
        """[N, P, channels] and [N] -> [N, P, HIDDEN]; a label of -1 says nothing."""
        named = (labels[:, None] == torch.arange(self.classes)) & (labels[:, None] < self.known)
        return self.hidden(torch.cat([seen, named.float()[:, None].expand(-1, seen.shape[1], -1)], -1))

    def forward(self, seen: Tensor, labels: Tensor) -> Tensor:
        return self.out(self.features(seen, labels))

    def learn(self, levels: Tensor, labels: Tensor, epochs: int) -> None:
        """Adam on the cross-entropy; some images come without their class, so that there is an answer for any."""
        optimizer, seen = torch.optim.Adam(self.parameters(), lr=RATE), contexts(levels)
        images = max(1, BATCH // seen.shape[1])
        for _ in range(epochs):
            named = torch.where(torch.rand(len(labels)) < NAMELESS, -1, labels)
            for rows in torch.randperm(len(labels)).split(images):
                loss = _loss(self(seen[rows], named[rows]), levels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def _loss(logits: Tensor, levels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), levels.flatten())


class Memory:
    """A frozen network, and a bottleneck whose values are added to its logits.

    A query is a projection of the hidden layer, and the class in further dims. values: [C, K, LEVELS], K PAIRS a class.
    """

    bottleneck: KeyValueBottleneck  # as soon as there is a class

    def __init__(self, network: Network) -> None:
        self.network, self.classes = network, list[int]()
        self.split = RandomProjection(HIDDEN, CODEBOOKS, DIM_KEYS)

    def _named(self, heads: Tensor, labels: Tensor) -> Tensor:
        """heads [N, C, DIM_KEYS] of the classes [N] -> [N, C, DIM_KEYS + classes]."""
        names = FAR * nn.functional.one_hot(labels, self.network.classes)
        return torch.cat([heads, names[:, None].expand(-1, CODEBOOKS, -1)], -1)

    @torch.no_grad()
    def _queries(self, seen: Tensor, labels: Tensor) -> Tensor:
        heads = self.split(self.network.features(seen, labels).flatten(0, 1))
        return self._named(heads, labels.repeat_interleave(seen.shape[1]))

    @torch.no_grad()
    def _more_keys(self, queries: Tensor, labels: Tensor) -> None:
        """Pairs for the classes of queries [N, C, D], by k-means on those of each."""
        new = [label for label in labels.unique().tolist() if label not in self.classes]
        found = []
        for label in new:
            one = KeyValueBottleneck(CODEBOOKS, PAIRS, queries.shape[2], 1, init_mode="kmeans")
            one.init_keys(queries[labels == label], epochs=0, progress=False)
            found.append(one.keys)
        if not new:
            return
        keys, former, self.classes = torch.cat(found, 1), self.classes, self.classes + new
        if former:
            self.bottleneck.expand_pairs(len(self.classes) * PAIRS, keys)
        else:
            made = KeyValueBottleneck(CODEBOOKS, keys.shape[1], keys.shape[2], LEVELS, init_values="zeros")
            self.bottleneck = made.set_keys(keys)
        self.bottleneck.freeze_keys().eval()

    def learn(self, levels: Tensor, labels: Tensor, passes: int) -> None:
        """SGD on the values that these images fetch; classes that were never seen get pairs first."""
        seen = contexts(levels)
        queries, each = self._queries(seen, labels), labels.repeat_interleave(seen.shape[1])
        self._more_keys(queries, each)
        codes = self.bottleneck.encode(queries)
        with torch.no_grad():
            start = self.network(seen, labels).flatten(0, 1)
        optimizer = torch.optim.SGD([self.bottleneck.values], lr=STEP * CODEBOOKS)
        for _ in range(passes):
            for rows in torch.randperm(len(codes)).split(BATCH):
                logits = start[rows] + self.bottleneck.decode(codes[rows], pool="mean")
                loss = nn.functional.cross_entropy(logits, levels.flatten()[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def __call__(self, seen: Tensor, labels: Tensor) -> Tensor:
        codes = self.bottleneck.encode(self._queries(seen, labels))
        fetched = self.bottleneck.decode(codes, pool="mean")
        return self.network(seen, labels) + fetched.unflatten(0, seen.shape[:2])


# --- measures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits(model: Logits, levels: Tensor, labels: Tensor) -> float:
    """Bits per pixel: the negative logarithm of the likelihood of the images, given their classes."""
    return _loss(model(contexts(levels), labels), levels).item() / math.log(2)


@torch.no_grad()
def draw(model: Logits, labels: Tensor, pixels: int) -> Tensor:
    """Images of the classes [N], pixel by pixel: levels [N, pixels]."""
    levels = torch.zeros(len(labels), pixels, dtype=torch.int64)
    for place in range(pixels):
        logits = model(contexts(levels)[:, place : place + 1], labels)[:, 0]
        levels[:, place] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return levels


def judged(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy of a support vector machine that learns from the first images, on the second."""
    return float(
        (torch.from_numpy(SVC().fit(train.numpy(), labels.numpy()).predict(test.numpy())) == truth).float().mean()
    )


# --- the study --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Of a model and a seed.

    old_before, old_after, new: bits per pixel of test images, of the old classes before and after the new ones came,
    and of the new ones. recognised: share of samples that a classifier of real images takes for their class. taught:
    accuracy on real images of a classifier that learned from samples alone.
    """

    model: str
    seed: int
    old_before: float
    old_after: float
    new: float
    recognised: float
    taught: float


def _levels(examples: Examples) -> tuple[Tensor, Tensor]:
    return (examples.features * (LEVELS - 1)).round().long(), examples.labels


def _models(train: Examples, classes: int, epochs: int, passes: int) -> dict[str, tuple[Logits, Callable[[], Logits]]]:
    """Each model that has learned the old classes, and what makes it learn the new ones."""
    levels, labels = _levels(train)
    old, channels = labels < OLD, contexts(levels[:1]).shape[2]

    def network(rows: Tensor) -> Network:
        made = Network(channels, classes)
        made.learn(levels[rows], labels[rows], epochs)
        return made

    frozen = network(old).requires_grad_(False)
    frozen.known = OLD
    memory, tuned = Memory(frozen), Network(channels, classes)
    memory.learn(levels[old], labels[old], passes)
    tuned.load_state_dict(frozen.state_dict())

    def learn_on() -> Logits:
        tuned.learn(levels[~old], labels[~old], epochs)
        return tuned

    def remember() -> Logits:
        memory.learn(levels[~old], labels[~old], passes)
        return memory

    whole = network(labels >= 0)
    return {
        "with the memory": (memory, remember),
        "without, frozen": (frozen, lambda: frozen),
        "without, learns on": (tuned, learn_on),
        "without, all classes at once": (whole, lambda: whole),
    }


def scores(
    train: Examples, test: Examples, seed: int, *, epochs: int, passes: int, samples: int
) -> tuple[list[Score], dict[str, Tensor]]:
    """Of all models of a seed; and their samples, [classes, samples, P] by name."""
    found, drawn = [], {}
    classes = int(train.labels.max()) + 1
    (levels, labels), (real, truth) = _levels(train), _levels(test)
    old = truth < OLD
    wanted = torch.arange(classes).repeat_interleave(samples)
    with seeded(seed):
        for name, (model, learn_new) in _models(train, classes, epochs, passes).items():
            before = bits(model, real[old], truth[old])
            model = learn_new()
            after, new = bits(model, real[old], truth[old]), bits(model, real[~old], truth[~old])
            images = draw(model, wanted, levels.shape[1])
            recognised, taught = judged(levels, labels, images, wanted), judged(images, wanted, real, truth)
            found.append(Score(name, seed, before, after, new, recognised, taught))
            drawn[name] = images.unflatten(0, (classes, samples))
    return found, drawn


def _spread(numbers: list[float]) -> str:
    return f"{statistics.mean(numbers):.3f} ± {statistics.stdev(numbers) if len(numbers) > 1 else 0.0:.3f}"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for every model: mean ± sd over seeds."""
    rows = []
    for name in dict.fromkeys(one["model"] for one in records):
        own = [one for one in records if one["model"] == name]
        change = max(abs(one["old_after"] / one["old_before"] - 1) for one in own)
        bits_, rest = (
            [_spread([one[field] for one in own]) for field in fields]
            for fields in (("old_before", "old_after", "new"), ("recognised", "taught"))
        )
        rows.append([name, *bits_, f"{change:.2%}", *rest])
    head = ["network", f"bits per pixel, classes 0 to {OLD - 1}", "the same after the others came", "the others"]
    return results.table([*head, "largest change", "samples recognised", "classifier taught by samples"], rows)


def generate(study: Study, seed: int, say: Say, *, seeds: int, epochs: int, passes: int, samples: int) -> Found:
    """Every model over seeds; the samples are those of the first."""
    every: list[Score] = []
    shown: dict[str, Tensor] = {}
    for number in range(seed, seed + seeds):
        train, test = study.split(torch.Generator().manual_seed(number), None)
        found, drawn = scores(train, test, number, epochs=epochs, passes=passes, samples=samples)
        every += found
        shown = shown or {name: images[:, :SHOWN] for name, images in drawn.items()}
        for one in found:
            say(f"seed {number}, {one.model}: {one.old_before:.4f}, then {one.old_after:.4f}; new {one.new:.4f}")
    records = [asdict(one) for one in every]
    say("\n" + table(records))
    return Found(records, table(records), [], shown)


def main(study: Study, name: str, out: Path, seed: int, say: Say = results.aloud) -> None:
    """Run the study; writes ``generate-DATA.json``, ``.md`` and ``.png`` into the folder ``out``."""
    sizes = {"seeds": SEEDS, "epochs": EPOCHS, "passes": PASSES, "samples": SAMPLES}
    about = {"data": study.name, "seed": seed, **sizes}
    title, path = f"Samples of every class, seed {seed}", out / f"{name}-{study.name}"
    results.write(path, about, title, lambda: generate(study, seed, say, **sizes), say)
