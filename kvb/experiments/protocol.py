"""The paper's protocol on any features: its recipe, its scenarios, and the other heads, over seeds and class orders.

Keys are learned from a separate set of features without labels, and frozen; codes are searched once; then values learn.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5, and the settings of the
authors' experiments.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvb.classifier import KeyValueClassifier
from kvb.experiments.baselines import BASELINES
from kvb.experiments.class_incremental import (
    DOMAINS,
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
from kvb.experiments.heads import BottleneckHead, Budget, CodesHead, CountingHead, Head, NearestPairsHead
from kvb.experiments.seeding import seeded
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.key_learning import Method
from kvb.modules.key_report import KeyReport, dead_code_threshold
from kvb.splitters import RandomProjection

ON_CLASSIFIER: dict[str, type[CountingHead] | type[NearestPairsHead]] = {  # on the codes of ``KeyValueClassifier``
    "counting": CountingHead,
    "8 nearest, SGD": NearestPairsHead,
}
HEADS = ("bottleneck", *ON_CLASSIFIER, *BASELINES)
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
    """What one seed works on: features for the keys, without labels, and examples to train and test on.

    domains: where labels name a class and a domain, the labels of each domain; classes: the class of every label then.
    """

    keys: Tensor  # [N, channels]
    train: Examples
    test: Examples
    domains: tuple[Tensor, ...] = ()
    classes: Tensor | None = None


def set_aside(train: Examples, test: Examples, share: float, generator: torch.Generator) -> Data:
    """The features of a random ``share`` of every class become key data, lose their labels, and train nothing else."""
    rest, aside = stratified_split(train.labels, share, generator)
    return Data(train.features[aside], train.take(rest), test)


def with_few_labels(data: Data, each: int, seed: int) -> Data:
    """The same with ``each`` random training examples of every class; all, where it has no more.

    Of fewer than four none can be spared, and rates of the other heads are chosen on the training examples themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [(data.train.labels == label).nonzero()[:, 0] for label in data.train.labels.unique()]
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:each]] for rows in places]
    return data._replace(train=data.train.take(torch.cat(chosen)))


def normalised(data: Data) -> Data:
    """All features centred on the mean of the key data, and divided by its mean length then.

    This changes nothing for the bottleneck, but for random keys, and the rates of other heads depend on it.
    """
    mean = data.keys.mean(0)
    length = (data.keys - mean).norm(dim=1).mean().clamp(min=1e-12)

    def moved(features: Tensor) -> Tensor:
        return (features - mean) / length

    train, test = (part._replace(features=moved(part.features)) for part in (data.train, data.test))
    return data._replace(keys=moved(data.keys), train=train, test=test)


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
            threshold_ema_dead_code=dead_code_threshold(K, recipe.batch_size, factor=recipe.dead)
            if recipe.dead
            else 0.0,
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


def _sizes(tasks: Sequence[Tensor], scenario: str, outputs: Tensor | None = None) -> list[int]:
    """How many classes each head has."""
    sizes = [len(task) for task in tasks]
    if outputs is not None:
        return [int(outputs.max()) + 1]
    return sizes if scenario == "task-incremental" else [sum(sizes)]


def _of(scenario: str, heads: list[Head]) -> Heads:
    return heads if scenario == "task-incremental" else heads[0]


def _other(name: str, recipe: Recipe, sizes: Sequence[int], scenario: str, seed: int, features: Tensor) -> Heads:
    """A head for these features, or one for every task; those of an MLP share their hidden layer."""
    with seeded(seed):
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
    seconds: dict[str, dict[str, float]] = field(
        default_factory=dict, compare=False
    )  # of learning and testing, codes included
    kept: dict[str, int] = field(default_factory=dict)  # bytes of a head for all classes


class _Contest:
    """What the heads of one seed are made of: keys are learned once for all scenarios."""

    def __init__(self, recipe: Recipe, data: Data, classes: int, seed: int) -> None:
        self.recipe, self.data, self.classes, self.seed = recipe, data, classes, seed
        generator = torch.Generator().manual_seed(seed)
        if data.domains:
            order = torch.randperm(len(data.domains), generator=generator).tolist()
            self.tasks = tuple(data.domains[number] for number in order)
        else:
            self.tasks = draw_tasks(classes, recipe.classes_per_task, generator)
        fit, validation = stratified_split(data.train.labels, VALIDATION_SHARE, generator)
        self.parts = data.train.take(fit), data.train.take(validation)
        if len(self.parts[1].labels.unique()) < len(data.train.labels.unique()):
            self.parts = data.train, data.train
        self.coded: list[Examples] = []
        self.used, self.report = 0.0, ""
        self.model: KeyValueClassifier | None = None

    def encode(self, progress: bool) -> None:
        """Learn the keys of the bottleneck, and search all codes."""
        keys = learn_keys(self.recipe, self.data.keys, self.classes, self.seed, progress=progress)
        encoder = BottleneckHead(keys.splitter, keys.bottleneck)
        examples = self.data.train, self.data.test
        self.coded = [part._replace(features=encoder.prepare(part.features)) for part in examples]
        self.used, self.report = codes_used(self.coded[0].features, self.recipe.pairs), str(keys.report)

    def enter(self, name: str, scenario: str, arguments: Mapping[str, Any]) -> tuple[Heads, float, list[Examples]]:
        """A head, or one for every task, its learning rate, and the examples that it trains and is tested on."""
        recipe, tasks, examples = self.recipe, self.tasks, [self.data.train, self.data.test]
        sizes = _sizes(tasks, scenario, self.data.classes)
        if name == "bottleneck":
            tables = [torch.zeros(recipe.codebooks, recipe.pairs, size) for size in sizes]
            return _of(scenario, [CodesHead(table) for table in tables]), recipe.rate, self.coded
        if name in ON_CLASSIFIER:
            self.model = self.model or KeyValueClassifier(random_state=self.seed).fit_keys(self.data.keys)
            kind = ON_CLASSIFIER[name]
            return (
                _of(scenario, [kind(self.model, size) for size in sizes]),
                0.0 if kind.passes else recipe.rate,
                examples,
            )
        build = partial(_other, name, recipe, sizes, scenario, self.seed)
        built, rate = build(self.data.train.features), 0.0
        if not (built if isinstance(built, Head) else built[0]).passes:
            rate, _ = choose_rate(build, *self.parts, tasks, rates=recipe.rates, **arguments)
        return built, rate, examples


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
        scenarios: of data with domains, "domain-incremental" alone; of other data, any of ``SCENARIOS``.
        say: gets a line for every head and scenario as soon as it is known.
    Raises:
        ValueError: an unknown scenario or head, or classes that do not divide into tasks.
    """
    known = (DOMAINS,) if data.domains else SCENARIOS
    unknown = [name for name in (*scenarios, *heads) if name not in (*known, *HEADS)]
    if unknown:
        raise ValueError(f"expected scenarios of {known} and heads of {HEADS}, got {unknown[0]!r}")
    V = int(max(data.train.labels.max(), data.test.labels.max())) + 1 if num_classes is None else num_classes
    contest = _Contest(recipe, data, V, seed)
    if "bottleneck" in heads:
        contest.encode(progress)
        say(f"  seed {seed}: {contest.used:.1%} of the pairs used by training examples")
    rates: dict[str, dict[str, float]] = {scenario: {} for scenario in scenarios}
    results: dict[str, dict[str, Result]] = {scenario: {} for scenario in scenarios}
    seconds: dict[str, dict[str, float]] = {scenario: {} for scenario in scenarios}
    kept: dict[str, int] = {}
    for scenario in scenarios:
        arguments: dict[str, Any] = {
            **{"budget": recipe.budget, "seed": seed, "scenario": scenario},
            **{"outputs": data.classes, "stop": recipe.stop},
        }
        for name in heads:
            built, rate, (train, test) = contest.enter(name, scenario, arguments)
            begun = time.perf_counter()
            result = Result(list(learn(built, train, test, contest.tasks, rate=rate, **arguments)))
            seconds[scenario][name] = time.perf_counter() - begun
            rates[scenario][name], results[scenario][name] = rate, result
            if isinstance(built, Head):
                kept[name] = built.kept()
            say(_line(seed, scenario, name, result, rate))
    tasks = [task.tolist() for task in contest.tasks]
    return Run(seed, tasks, contest.used, contest.report, rates, results, seconds, kept)


def _line(seed: int, scenario: str, name: str, result: Result, rate: float) -> str:
    steps = sum(score.steps for score in result.scores)
    line = f"  seed {seed}: {scenario:<17} {name:<14} {result.final:.4f}"
    if scenario != "iid":
        line += f"  average {result.average:.4f}  forgetting {result.forgetting:.4f}"
    return f"{line}  ({steps:,} steps" + (f", rate {rate:g})" if rate else ")")


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
