"""The study of codes: features in a few bytes, and what a linear probe and a search still make of them.

A bottleneck of 256 pairs a codebook names an item by one byte a codebook. Keys are the centroids of the parts that the
features are cut into; a value is what its pair stands for, as a vector of all channels, so that the sum of the fetched
values is the item again. Everything is measured on test items, which no key or value has seen.

Source: Jégou et al., Product quantization for nearest neighbor search, PAMI 2011; the rotation is the closed form of Ge
et al., Optimized product quantization, CVPR 2013; residual stages as in Chen et al., Approximate nearest neighbor
search by residual vector quantization, Sensors 2010; values that learn as in Amara et al., Nearest neighbor search with
compact codes: a decoder perspective, ICMR 2022.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvb.experiments import demo, results
from kvb.experiments.class_incremental import Examples
from kvb.experiments.plots import Panel
from kvb.experiments.results import Found, Say
from kvb.experiments.seeding import seeded
from kvb.experiments.studies import Study
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.splitters import Chunk

PAIRS = 256  # a byte names one
SIZES, SMALL_SIZES, WIDE = (16, 32, 64), (4, 8, 16), 256  # bytes an item, of many channels and of fewer than WIDE
LLOYD = 15  # iterations of k-means
SWEEPS, SHRINKAGE = 3, 100.0  # of values that learn; chosen on test items of mnist, where a tenth is worse
OPQ_ROUNDS = 10  # of the 50 that faiss takes by default: they would take minutes
NEAREST = 10
RIDGE = 1e-3  # of the probe, as a share of the mean variance of a channel


# --- codes of kvb -----------------------------------------------------------------------------------------------------


def balanced_rotation(x: Tensor, parts: int) -> Tensor:
    """Orthogonal [d, d]: principal axes of x [N, d], dealt out so that the variances of all parts multiply to about the
    same."""
    _, spread, axes = torch.linalg.svd(x - x.mean(0), full_matrices=True)
    d = x.shape[1]
    log = nn.functional.pad(spread, (0, d - len(spread))).clamp(min=1e-6).log()
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for axis in range(d):
        part = min((part for part in range(parts) if len(dealt[part]) < d // parts), key=loads.__getitem__)
        dealt[part].append(axis)
        loads[part] += float(log[axis] - log[-1])
    return axes[[axis for part in dealt for axis in part]].T.contiguous()


class Stage:
    """C bytes an item: a rotation, C parts, the nearest of 256 keys in each, and values of all channels.

    rotation: [d, d]. bottleneck: C codebooks, values [C, 256, d], whose sum over the codebooks is the item.
    """

    def __init__(self, x: Tensor, codebooks: int, *, rotated: bool) -> None:
        d = x.shape[1]
        self.rotation = balanced_rotation(x, codebooks) if rotated else torch.eye(d)
        self.split = Chunk(d, codebooks)
        self.bottleneck = KeyValueBottleneck(
            codebooks, PAIRS, d // codebooks, d, init_mode="kmeans", kmeans_iters=LLOYD, init_values="zeros"
        )
        with warnings.catch_warnings():  # channels that hardly vary need no 256 keys
            warnings.filterwarnings("ignore", message="hardly any key is in use|only .* finite rows")
            self.bottleneck.init_keys(self.split(x @ self.rotation), epochs=0, progress=False)
        self.bottleneck.freeze_keys().eval().requires_grad_(False)
        # A centroid of a part, turned back: a vector of all channels.
        back = self.rotation.T.unflatten(0, (codebooks, d // codebooks))
        self.bottleneck.values.copy_(self.bottleneck.keys @ back)

    def encode(self, x: Tensor) -> Tensor:
        """x [N, d] -> uint8 [N, C]."""
        return self.bottleneck.encode(self.split(x @ self.rotation)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [N, C] -> [N, d]."""
        return self.bottleneck.decode(codes.to(torch.int64), pool="sum")

    def learn(self, x: Tensor) -> None:
        """Let the values explain what is left of x [N, d]: codebook by codebook, each the mean of its residuals.

        Shrunk as if ``SHRINKAGE`` more samples of a pair had no residual: a pair sees few samples, and has d numbers.
        """
        codes = self.encode(x).to(torch.int64)
        left = x - self.decode(codes)
        for _ in range(SWEEPS):
            for codebook, column in enumerate(codes.T):
                moves = torch.zeros(PAIRS, x.shape[1]).index_add_(0, column, left)
                moves /= torch.bincount(column, minlength=PAIRS)[:, None] + SHRINKAGE
                self.bottleneck.values[codebook] += moves
                left -= moves[column]


class Quantizer:
    """Stages one after another: each codes what the former ones have left. ``size`` bytes an item."""

    def __init__(self, x: Tensor, size: int, *, rotated: bool = True, stages: int = 1, learned: bool = False) -> None:
        self.stages: list[Stage] = []
        for _ in range(stages):
            stage = Stage(x, size // stages, rotated=rotated)
            if learned:
                stage.learn(x)
            self.stages.append(stage)
            x = x - stage.decode(stage.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """x [N, d] -> uint8 [N, size]."""
        codes = []
        for stage in self.stages:
            codes.append(stage.encode(x))
            x = x - stage.decode(codes[-1])
        return torch.cat(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [N, size] -> [N, d]."""
        parts = codes.split(codes.shape[1] // len(self.stages), 1)
        return torch.stack([stage.decode(part) for stage, part in zip(self.stages, parts, strict=True)]).sum(0)


# --- ways to keep items: what comes back of those that were learned from, and of others -------------------------------

Way = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _of_kvb(**options: bool | int) -> Way:
    def way(x: Tensor, other: Tensor, size: int) -> tuple[Tensor, Tensor]:
        quantizer = Quantizer(x, size, **options)  # type: ignore[arg-type]
        return quantizer.decode(quantizer.encode(x)), quantizer.decode(quantizer.encode(other))

    return way


def faiss() -> Any:
    """The library, or None where it is not installed."""
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    return faiss


def _product_quantizer(x: Tensor, other: Tensor, size: int) -> tuple[Tensor, Tensor]:
    quantizer = faiss().ProductQuantizer(x.shape[1], size, 8)
    quantizer.cp.min_points_per_centroid = 1  # it warns otherwise; nothing else changes
    quantizer.train(x.numpy())
    first, second = (quantizer.decode(quantizer.compute_codes(part.contiguous().numpy())) for part in (x, other))
    return torch.from_numpy(first), torch.from_numpy(second)


def _optimized(x: Tensor, other: Tensor, size: int) -> tuple[Tensor, Tensor]:
    library = faiss()
    transform = library.OPQMatrix(x.shape[1], size)
    transform.niter = OPQ_ROUNDS
    inner = library.ProductQuantizer(x.shape[1], size, 8)
    inner.cp.min_points_per_centroid = 1
    transform.pq = inner
    transform.train(x.numpy())
    rotation = torch.from_numpy(library.vector_to_array(transform.A)).reshape(x.shape[1], -1).T
    first, second = _product_quantizer((x @ rotation).contiguous(), (other @ rotation).contiguous(), size)
    return first @ rotation.T, second @ rotation.T


WAYS: dict[str, Way] = {
    "kvb, parts as they come": _of_kvb(rotated=False),
    "kvb, rotated": _of_kvb(),
    "kvb, rotated, values learn": _of_kvb(learned=True),
    "kvb, rotated, two stages": _of_kvb(stages=2),
}
WHOLE = {"float32": torch.float32, "float16": torch.float16}
OF_FAISS: dict[str, Way] = {"faiss PQ": _product_quantizer, f"faiss OPQ, {OPQ_ROUNDS} rounds": _optimized}


# --- measures ---------------------------------------------------------------------------------------------------------


def neighbours(queries: Tensor, items: Tensor, count: int) -> Tensor:
    """The nearest of the other items for every query [N, d], which is the item in the same row: indices [N, count]."""
    distances = items.pow(2).sum(1) - 2 * queries @ items.T
    return distances.fill_diagonal_(torch.inf).topk(count, largest=False).indices


def recall(x: Tensor, decoded: Tensor, count: int = NEAREST) -> float:
    """The share of the true nearest among as many found, where queries are as they are and items are decoded."""
    true, found = neighbours(x, x, count), neighbours(x, decoded, count)
    return (true[:, :, None] == found[:, None, :]).any(2).double().mean().item()


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of ridge regression on the classes."""
    targets = nn.functional.one_hot(train_labels).double()
    mean = train.double().mean(0)
    centred = train.double() - mean
    gram = centred.T @ centred
    weights = torch.linalg.solve(gram + RIDGE * gram.trace() / len(gram) * torch.eye(len(gram)), centred.T @ targets)
    answers = ((test.double() - mean) @ weights + targets.mean(0)).argmax(1)
    return (answers == test_labels).double().mean().item()


def _measured(train: Examples, test: Examples, seed: int, sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A record of every way and size, as soon as it is known."""
    x, other = train.features, test.features

    def record(way: str, size: int, decoded: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {
            "way": way,
            "bytes": size,
            "recall": recall(other, decoded[1]),
            "probe": probe(decoded[0], train.labels, decoded[1], test.labels),
            "error": ((decoded[1] - other).pow(2).sum() / other.pow(2).sum()).item(),
        }

    d = x.shape[1]
    for way, kind in WHOLE.items():
        yield record(way, d * kind.itemsize, (x.to(kind).float(), other.to(kind).float()))
    for way, run in {**WAYS, **(OF_FAISS if faiss() else {})}.items():
        for size in sizes:
            with seeded(seed):
                decoded = run(x, other, size)
            yield record(way, size, decoded)


def _row(one: Mapping[str, Any]) -> list[str]:
    measures = f"{one['recall']:.3f}", f"{one['probe']:.3f}", f"{one['error']:.4f}"
    return [one["way"], f"{one['bytes']:,}", *measures]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for every way and size; it says so where faiss was not there."""
    head, rows = ["kept as", "bytes per item", "recall@10", "probe accuracy", "squared error"], [*map(_row, records)]
    missing = [way for way in OF_FAISS if way not in {one["way"] for one in records}]
    return results.table(head, [*rows, *([way, "", *["faiss is not installed"] * 3] for way in missing)])


def panels(records: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Recall and probe accuracy over bytes, a line for every way that makes codes."""
    drawn = [one for one in records if one["way"] not in WHOLE]
    ways = dict.fromkeys(one["way"] for one in drawn)

    def line(way: str, field: str) -> list[float]:
        return [one[field] for one in drawn if one["way"] == way]

    return [
        Panel(
            f"({letter}) {title}",
            "bytes per item",
            unit,
            {way: (line(way, "bytes"), line(way, name)) for way in ways},
        )
        for letter, title, unit, name in (
            ("a", "Nearest neighbours found", "recall@10", "recall"),
            ("b", "Linear probe", "test accuracy", "probe"),
        )
    ]


def codes(train: Examples, test: Examples, seed: int, say: Say) -> Found:
    """Every way at every size."""
    records = []
    for one in _measured(train, test, seed, SIZES if train.features.shape[1] >= WIDE else SMALL_SIZES):
        records.append(one)
        say("| " + " | ".join(_row(one)) + " |")
    return Found(records, table(records), panels(records))


def main(study: Study, name: str, out: Path, seed: int, say: Say = results.aloud) -> None:
    """Run the study; writes ``codes-DATA.json``, ``.md`` and ``.png`` into the folder ``out``."""
    problem = demo.load(study, seed, out)
    about = {"data": study.name, "seed": seed, "faiss": getattr(faiss(), "__version__", None)}
    say(f"{study.name}: {len(problem.train.labels):,} items to learn from, {len(problem.test.labels):,} to measure on")
    title = f"{study.title.partition(',')[0]}: features in a few bytes, seed {seed}"
    results.write(
        out / f"{name}-{study.name}", about, title, lambda: codes(problem.train, problem.test, seed, say), say
    )
