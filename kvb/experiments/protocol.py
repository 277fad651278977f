"""The paper's protocol on any features: its recipe, its scenarios, and the other heads, over seeds and class orders.

Keys are learned from a separate set of features without labels, and frozen; codes are searched once; then values learn.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5, and the settings of the
authors' experiments.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvb.experiments.baselines import BASELINES
from kvb.experiments.class_incremental import (
    SCENARIOS,
    Examples,
    Plateau,
    Result,
    Score,
    choose_rate,
    draw_tasks,
    learn,
    stratified_split,
)
from kvb.experiments.heads import BottleneckHead, Budget, CodesHead, Head
from kvb.experiments.seeding import seeded
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.key_learning import KeyReport, Method
from kvb.splitters import RandomProjection

HEADS = ("bottleneck", *BASELINES)
VALIDATION_SHARE = 0.25  # of the training examples: rates of the other heads are chosen on them
# What the paper's ablations vary; key data is named by whoever has it.
ABLATIONS: dict[str, tuple[int, ...]] = {
    "codebooks": (16, 32, 64, 128, 256),
    "pairs": (256, 512, 1024, 2048, 4096),
    "dim_keys": (4, 8, 12, 14, 16, 32),
}
Say = Callable[[str], None]
Heads = Head | list[Head]  # for all classes, or one for every task


@dataclass(frozen=True)
class Recipe:
    """How everything is trained; the defaults are the paper's.

    codebooks, pairs, dim_keys: C, K and D. key_init: as ``init_mode`` of the bottleneck. key_steps: batches that the
    keys learn from, at least; whole passes (the paper's 10 passes over 50,000 images). decay: of their moving averages.
    dead: pairs with fewer hits than ``dead * batch_size / K`` are replaced. rate: of the bottleneck. patience,
    min_delta: end a task on a plateau of the loss; None ends it after its epochs. hidden: of the MLP. projected: of
    RanPAC. rates: of the linear head and the MLP, to choose from on validation examples; the paper's is 0.001.
    """

    codebooks: int = 256
    pairs: int = 4096
    dim_keys: int = 14
    key_init: Method = "random"
    key_steps: int = 1960
    decay: float = 0.95
    dead: float = 0.1
    rate: float = 0.3
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    batch_size: int = 256
    epochs: int = 2000
    patience: int | None = None
    min_delta: float = 0.0
    classes_per_task: int = 2
    hidden: int = 128
    projected: int = 2000
    rates: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.1, 1.0, 3.0)

    @property
    def budget(self) -> Budget:
        return Budget(self.epochs, self.batch_size, self.label_smoothing, self.clip_norm)

    @property
    def stop(self) -> Plateau | None:
        return None if self.patience is None else Plateau(self.patience, self.min_delta)


class Data(NamedTuple):
    """What one seed works on: features for the keys, without labels, and examples to train and test on."""

    keys: Tensor  # [N, channels]
    train: Examples
    test: Examples


def set_aside(train: Examples, test: Examples, share: float, generator: torch.Generator) -> Data:
    """The features of a random ``share`` of every class become key data, lose their labels, and train nothing else."""
    rest, aside = stratified_split(train.labels, share, generator)
    return Data(train.features[aside], train.take(rest), test)


def normalised(data: Data) -> Data:
    """All features centred on the mean of the key data, and divided by its mean length then.

    This changes nothing for the bottleneck, but for random keys, and the rates of other heads depend on it.
    """
    mean = data.keys.mean(0)
    length = (data.keys - mean).norm(dim=1).mean().clamp(min=1e-12)

    def moved(features: Tensor) -> Tensor:
        return (features - mean) / length

    train, test = (part._replace(features=moved(part.features)) for part in (data.train, data.test))
    return Data(moved(data.keys), train, test)


# --- keys -------------------------------------------------------------------------------------------------------------


class _Shuffled:
    """The queries of features in batches, in another order for every pass."""

    def __init__(self, features: Tensor, splitter: nn.Module, batch_size: int) -> None:
        self.features, self.splitter, self.batch_size = features, splitter, batch_size

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in torch.randperm(len(self.features)).split(self.batch_size):
            yield self.splitter(self.features[rows])


class Keys(NamedTuple):
    """A fixed projection and a bottleneck whose keys have learned; what they report."""

    splitter: nn.Module
    bottleneck: KeyValueBottleneck
    report: KeyReport


def learn_keys(recipe: Recipe, features: Tensor, num_classes: int, seed: int, *, progress: bool = False) -> Keys:
    """Random projections, and keys that learn from these features [N, channels] and are frozen.

    Source: section 4 of the paper; N(0, 1) keys, moving averages, dead pairs replaced.
    """
    with seeded(seed):
        C, K, D = recipe.codebooks, recipe.pairs, recipe.dim_keys
        splitter = RandomProjection(features.shape[1], C, D)
        bottleneck = KeyValueBottleneck(
            C,
            K,
            D,
            num_classes,
            init_mode=recipe.key_init,
            decay=recipe.decay,
            threshold_ema_dead_code=recipe.dead * recipe.batch_size / K,
        )
        batches = _Shuffled(features, splitter, recipe.batch_size)
        epochs = -(-recipe.key_steps // len(batches))
        report = bottleneck.init_keys(batches, epochs=epochs, progress=progress)
    return Keys(splitter, bottleneck.freeze_keys(), report)


def codes_used(codes: Tensor, pairs: int) -> float:
    """The share of all C*K pairs that codes [N, C] name."""
    used = torch.zeros(codes.shape[1], pairs, dtype=torch.bool)
    return used.scatter_(1, codes.long().t(), True).double().mean().item()


# --- heads ------------------------------------------------------------------------------------------------------------


def _sizes(tasks: Sequence[Tensor], scenario: str) -> list[int]:
    """How many classes each head has."""
    sizes = [len(task) for task in tasks]
    return sizes if scenario == "task-incremental" else [sum(sizes)]


def _of(scenario: str, heads: list[Head]) -> Heads:
    return heads if scenario == "task-incremental" else heads[0]


def _other(name: str, recipe: Recipe, tasks: Sequence[Tensor], scenario: str, seed: int, features: Tensor) -> Heads:
    """A head for these features, or one for every task; those of an MLP share their hidden layer."""
    with seeded(seed):
        sizes = _sizes(tasks, scenario)
        return _of(
            scenario,
            BASELINES[name](features.shape[1], sizes, hidden=recipe.hidden, projected=recipe.projected, from_zero=True),
        )


# --- one seed ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one seed gave; ``results`` and ``rates`` are by scenario, then by head."""

    seed: int
    tasks: list[list[int]]
    codes_used: float  # share of pairs that a training example hits
    keys: str  # the report on them
    rates: dict[str, dict[str, float]]
    results: dict[str, dict[str, Result]]


def run(
    recipe: Recipe,
    data: Data,
    seed: int,
    *,
    num_classes: int | None = None,
    scenarios: Sequence[str] = SCENARIOS,
    heads: Sequence[str] = HEADS,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Run:
    """Every head in every scenario, on the class order of one seed.

    Args:
        data: any features; ``set_aside`` and ``normalised`` make it of training and test examples.
        seed: of the class order, the projections, the keys, the networks and the batches.
        num_classes: one more than the largest label, by default.
        say: gets a line for every head and scenario as soon as it is known.
    Raises:
        ValueError: an unknown scenario or head, or classes that do not divide into tasks.
    """
    unknown = [name for name in (*scenarios, *heads) if name not in (*SCENARIOS, *HEADS)]
    if unknown:
        raise ValueError(f"expected scenarios of {SCENARIOS} and heads of {HEADS}, got {unknown[0]!r}")
    V = int(max(data.train.labels.max(), data.test.labels.max())) + 1 if num_classes is None else num_classes
    generator = torch.Generator().manual_seed(seed)
    tasks = draw_tasks(V, recipe.classes_per_task, generator)
    fit, validation = stratified_split(data.train.labels, VALIDATION_SHARE, generator)
    parts = data.train.take(fit), data.train.take(validation)
    used, report = 0.0, ""
    if "bottleneck" in heads:
        keys = learn_keys(recipe, data.keys, V, seed, progress=progress)
        encoder = BottleneckHead(keys.splitter, keys.bottleneck)
        coded = [part._replace(features=encoder.prepare(part.features)) for part in (data.train, data.test)]
        used = codes_used(coded[0].features, recipe.pairs)
        report = str(keys.report)
        say(f"  seed {seed}: {used:.1%} of the pairs used by training examples")
    rates: dict[str, dict[str, float]] = {scenario: {} for scenario in scenarios}
    results: dict[str, dict[str, Result]] = {scenario: {} for scenario in scenarios}
    for scenario in scenarios:
        arguments: dict[str, Any] = {"budget": recipe.budget, "seed": seed, "scenario": scenario, "stop": recipe.stop}
        for name in heads:
            if name == "bottleneck":
                tables = [torch.zeros(recipe.codebooks, recipe.pairs, size) for size in _sizes(tasks, scenario)]
                built, rate = _of(scenario, [CodesHead(table) for table in tables]), recipe.rate
                train, test = coded
            else:
                build = partial(_other, name, recipe, tasks, scenario, seed)
                built, rate = build(data.train.features), 0.0
                train, test = data.train, data.test
                if not (built if isinstance(built, Head) else built[0]).passes:
                    rate, _ = choose_rate(build, *parts, tasks, rates=recipe.rates, **arguments)
            result = Result(list(learn(built, train, test, tasks, rate=rate, **arguments)))
            rates[scenario][name], results[scenario][name] = rate, result
            steps = sum(score.steps for score in result.scores)
            line = f"  seed {seed}: {scenario:<17} {name:<12} {result.final:.4f}"
            if scenario != "iid":
                line += f"  average {result.average:.4f}  forgetting {result.forgetting:.4f}"
            say(f"{line}  ({steps:,} steps" + (f", rate {rate:g})" if rate else ")"))
    return Run(seed, [task.tolist() for task in tasks], used, report, rates, results)


# --- over seeds -------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """The mean over seeds, and the standard deviation of a sample (0 for a single seed)."""

    mean: float
    sd: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f}"


def spread(numbers: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0)


def summary(runs: Sequence[Run], scenario: str, head: str) -> dict[str, Spread]:
    """Final accuracy, average accuracy and forgetting of a head over all runs."""
    results = [each.results[scenario][head] for each in runs]
    return {
        "final_accuracy": spread([result.final for result in results]),
        "average_accuracy": spread([result.average for result in results]),
        "forgetting": spread([result.forgetting for result in results]),
    }


# --- ablations --------------------------------------------------------------------------------------------------------


def variants(recipe: Recipe, axis: str) -> dict[str, Recipe]:
    """The recipe with C, K or D of the paper's ablations, by that number.

    Raises:
        ValueError: an axis that ``ABLATIONS`` does not name.
    """
    if axis not in ABLATIONS:
        raise ValueError(f"axis must be one of {', '.join(ABLATIONS)}, got {axis!r}")
    return {str(number): _with(recipe, {axis: number}) for number in ABLATIONS[axis]}


def _with(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    return replace(recipe, **changes)


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(recipe: Recipe, runs: Sequence[Run]) -> dict[str, Any]:
    """Plain lists, numbers and strings; ``from_json`` gives everything back."""
    return {
        "recipe": asdict(recipe),
        "runs": [asdict(each) for each in runs],
        "summary": {
            scenario: {
                head: {name: one._asdict() for name, one in summary(runs, scenario, head).items()}
                for head in runs[0].results[scenario]
            }
            for scenario in runs[0].results
        },
    }


def _result(record: Mapping[str, Any]) -> Result:
    return Result([Score(*score) for score in record["scores"]])


def from_json(record: Mapping[str, Any]) -> tuple[Recipe, list[Run]]:
    """The recipe and the runs of what ``to_json`` made."""
    recipe = Recipe(**{**record["recipe"], "rates": tuple(record["recipe"]["rates"])})
    runs = [
        Run(
            **{
                **each,
                "results": {
                    scenario: {head: _result(result) for head, result in heads.items()}
                    for scenario, heads in each["results"].items()
                },
            }
        )
        for each in record["runs"]
    ]
    return recipe, runs
