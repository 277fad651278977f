"""The command for the paper's protocol: real data, lines as they are known, a table, a figure and all numbers.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5: the main comparison and
the ablations.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvb.experiments import plots, protocol, shares
from kvb.experiments.baselines import BASELINES
from kvb.experiments.class_incremental import DOMAINS, SCENARIOS
from kvb.experiments.protocol import HEADS, Data, Recipe, Run, Spread
from kvb.experiments.studies import KEY_SHARE, Source
from kvb.experiments.versions import versions

KEY_DATA = "key_data"  # the ablation that is no number of the recipe
WHY = {
    "key_init": "random key features: as good on validation examples, in seconds",
    "key_steps": "they stay where they are",
    "epochs": "10 to 200 are within .006 of each other on validation examples",
    "classes_per_task": "20 classes in 5 tasks",
}
# For a first look: everything tiny.
QUICK = Recipe(
    codebooks=16, pairs=64, dim_keys=8, key_init="sample", key_steps=0, epochs=2, projected=32, rates=(0.1, 1.0)
)
QUICK_VALUES = 2  # of an ablation


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    seeds: int
    scenarios: tuple[str, ...] = SCENARIOS
    epochs: int | None = None
    patience: int | None = None
    quick: bool = False
    labels: int | None = None  # of a class, instead of all
    heads: tuple[str, ...] = HEADS

    def data(self, source: Source, seed: int, out: Path) -> Data:
        """What a seed works on; a few labelled examples of a class keep all features for the keys."""
        data = (source.domain_data if self.scenarios == (DOMAINS,) else source.data)(seed, out)
        return data if self.labels is None else protocol.with_few_labels(data, self.labels, seed)

    def file(self, source: Source) -> str:
        """What the files of a comparison are called."""
        return "-".join(
            ["protocol", source.study.name]
            + (["domains"] if self.scenarios == (DOMAINS,) else [])
            + ([] if self.labels is None else [f"{self.labels}-labels"])
        )

    def recipe(self, source: Source) -> Recipe:
        base = replace(QUICK, classes_per_task=source.recipe.classes_per_task) if self.quick else source.recipe
        return replace(base, epochs=self.epochs or base.epochs, patience=self.patience)


def _print(line: str) -> None:
    print(line, flush=True)


# --- the main comparison ----------------------------------------------------------------------------------------------


def header(source: Source, recipe: Recipe, data: Data) -> list[str]:
    """What is about to run, in lines."""
    train, test = len(data.train.labels), len(data.test.labels)
    rates = ", ".join(f"{rate:g}" for rate in recipe.rates)
    return [
        f"{source.study.data.format(count=len(data.keys) + train + test)}, {test:,} of them to test on",
        *(f"  {'' if number else 'features':<10}{line}" for number, line in enumerate(source.features)),
        "            centred, and scaled to a mean length of 1, by the key data",
        f"  keys      {len(data.keys):,} other features, half of the training part, without labels: nothing else is "
        "trained on them",
        *_shortage(recipe, data),
        f"  values    {train:,} labelled examples, the other half; all heads learn from these alone",
        f"  tasks     {_tasks(source, recipe, data)}, in another order for each seed; no replay",
        f"  recipe    C={recipe.codebooks}, K={recipe.pairs}, D={recipe.dim_keys}, random projections, values from "
        f"zero, codebook voting; SGD {recipe.rate:g},",
        f"            batches of {recipe.batch_size}, {recipe.epochs} epochs per task, norm clipped to "
        f"{recipe.clip_norm:g}, label smoothing {recipe.label_smoothing:g}",
        *(f"            {line}" for line in _differences(source, recipe)),
        f"  others    linear, and an MLP of {recipe.hidden}: the same batches, output layers from zero; for each seed "
        "and scenario the rate",
        f"            that is best on a quarter of the examples, of {rates}",
        f"            {', '.join(name for name in BASELINES if name not in ('linear', 'MLP'))}: one pass",
        "            counting: KeyValueClassifier() with its defaults, one pass; 8 nearest, SGD: values on its codes",
        "",
    ]


def _tasks(source: Source, recipe: Recipe, data: Data) -> str:
    if data.domains:
        return f"{len(data.domains)} domains ({source.about_domains})"
    return f"{len(source.study.classes) // recipe.classes_per_task} of {recipe.classes_per_task} classes"


def _shortage(recipe: Recipe, data: Data) -> list[str]:
    """What the warning about too few features says, once."""
    if len(data.keys) >= recipe.pairs:
        return []
    return [f"            fewer than a codebook's {recipe.pairs:,} keys: the rest are copies, moved a little"]


@contextmanager
def without_shortage_warning() -> Iterator[None]:
    """Silence the warning about too few features: ``header`` says it once, seeds would repeat it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only .* finite rows", category=UserWarning)
        yield


def _differences(source: Source, recipe: Recipe) -> list[str]:
    """Where the recipe is not the paper's, and why."""
    paper = Recipe()
    lines = []
    for each in fields(Recipe):
        value, published = (getattr(one, each.name) for one in (recipe, paper))
        if value != published and each.name != "rates":
            why = f", {WHY[each.name]}" if each.name in WHY and recipe == source.recipe else ""
            lines.append(f"{each.name} {value}, not {published}{why}")
    return lines


@without_shortage_warning()
def compare(source: Source, plan: Plan, out: Path, say: Callable[[str], None] = _print) -> tuple[Recipe, list[Run]]:
    """All heads, scenarios and seeds; writes ``protocol-NAME.json``, ``.md`` and ``.png`` into the folder ``out``.

    The name says so where domains come one after the other, or labels are few.

    Under torchrun each process takes its share of the seeds, and the first writes; no runs are returned in the others.
    """
    begun, recipe = time.perf_counter(), plan.recipe(source)

    def one(seed: int) -> Run:
        data = plan.data(source, seed, out)
        if seed == 0:
            for line in header(source, recipe, data):
                say(line)
        classes = None if data.domains else len(source.study.classes)
        return protocol.run(
            recipe, data, seed, num_classes=classes, scenarios=plan.scenarios, heads=plan.heads, say=say
        )

    runs = shares.results(range(plan.seeds), one)
    if runs is None:
        return recipe, []
    table = markdown(runs)
    say(f"\n{source.study.title.partition(',')[0]}, mean ± sd of {_seeds(plan.seeds)}\n\n{table}")
    path = out / plan.file(source)
    _write(path, source, begun, protocol.to_json(recipe, runs), table)
    plots.protocol(
        runs, title=f"{source.study.title.partition(',')[0]}: mean ± sd of {_seeds(plan.seeds)}", path=_png(path)
    )
    _close(path, begun, say)
    return recipe, runs


def markdown(runs: Sequence[Run]) -> str:
    """A table of every head: final accuracy in every scenario; class-incrementally also the average and forgetting."""
    scenarios = list(runs[0].results)
    columns = []
    for scenario in scenarios:
        columns.append((f"{scenario}", scenario, "final_accuracy"))
        if scenario in ("class-incremental", DOMAINS):
            columns += [("average", scenario, "average_accuracy"), ("forgetting", scenario, "forgetting")]
    costs = ["seconds", "MB kept"] if all(each.kept for each in runs) else []
    lines = [
        "| | " + " | ".join([*(name for name, _, _ in columns), *costs]) + " |",
        "|---|" + "---|" * (len(columns) + len(costs)),
    ]
    for head in runs[0].results[scenarios[0]]:
        cells = [str(protocol.summary(runs, scenario, head)[measure]) for _, scenario, measure in columns]
        if costs:
            taken = protocol.spread([each.seconds[scenarios[0]][head] for each in runs]).mean
            kept = protocol.spread([each.kept.get(head, 0) / 1e6 for each in runs]).mean
            cells += [f"{taken:.1f}", f"{kept:.3g}"]
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    if "bottleneck" in runs[0].results[scenarios[0]]:
        used = protocol.spread([each.codes_used for each in runs])
        lines += ["", f"Pairs used by training examples: {used}."]
    return "\n".join(lines)


# --- curves over labels -----------------------------------------------------------------------------------------------


@without_shortage_warning()
def curves(
    source: Source, plan: Plan, labels: Sequence[int | None], out: Path, say: Callable[[str], None] = _print
) -> dict[str, list[Run]]:
    """All heads by the labelled examples of a class, None for all; writes ``labels-NAME.json``, ``.md`` and ``.png``.

    In the first scenario of the plan. Under torchrun as ``compare``.
    """
    begun, recipe, scenario = time.perf_counter(), plan.recipe(source), plan.scenarios[0]
    plans = {str(each or "all"): replace(plan, labels=each, scenarios=(scenario,)) for each in labels}

    def one(job: tuple[str, int]) -> Run:
        name, seed = job
        if seed == 0:
            say(f"labels of a class: {name}")
        data = plans[name].data(source, seed, out)
        classes = None if data.domains else len(source.study.classes)
        return protocol.run(recipe, data, seed, num_classes=classes, scenarios=(scenario,), heads=plan.heads, say=say)

    runs = shares.results([(name, seed) for name in plans for seed in range(plan.seeds)], one)
    if runs is None:
        return {}
    found = {name: runs[each * plan.seeds : (each + 1) * plan.seeds] for each, name in enumerate(plans)}
    results = {
        head: {name: protocol.summary(of, scenario, head)["final_accuracy"] for name, of in found.items()}
        for head in plan.heads
    }
    rows = [f"| {head} | " + " | ".join(map(str, row.values())) + " |" for head, row in results.items()]
    table = "\n".join(["| labels of a class | " + " | ".join(found) + " |", "|---|" + "---|" * len(found), *rows])
    say(f"\n{scenario}, final accuracy, mean ± sd of {_seeds(plan.seeds)}\n\n{table}")
    path = out / f"labels-{source.study.name}"
    record = {name: protocol.to_json(recipe, of) for name, of in found.items()}
    _write(path, source, begun, {"labels": record}, table)
    title = f"{source.study.title.partition(',')[0]}, {scenario}"
    plots.ablation(results, axis="labelled examples of a class", title=title, path=_png(path))
    _close(path, begun, say)
    return found


# --- ablations --------------------------------------------------------------------------------------------------------


@without_shortage_warning()
def ablate(
    source: Source, axis: str, plan: Plan, out: Path, say: Callable[[str], None] = _print
) -> dict[str, list[Run]]:
    """The bottleneck with other numbers or key data; writes ``ablation-NAME-AXIS.json``, ``.md`` and ``.png``.

    Under torchrun as ``compare``.
    """
    begun, recipe = time.perf_counter(), plan.recipe(source)
    recipes = dict.fromkeys(source.key_choices, recipe) if axis == KEY_DATA else protocol.variants(recipe, axis)
    if plan.quick:
        recipes = dict(list(recipes.items())[:QUICK_VALUES])
    scenarios = [name for name in plan.scenarios if name != "task-incremental"] or list(plan.scenarios)

    def one(job: tuple[str, int]) -> Run:
        name, seed = job
        if seed == 0:
            say(f"{axis} {name}")
        return protocol.run(
            recipes[name],
            source.data(seed, out, name if axis == KEY_DATA else "set aside"),
            seed,
            num_classes=len(source.study.classes),
            scenarios=scenarios,
            heads=("bottleneck",),
            say=say,
        )

    runs = shares.results([(name, seed) for name in recipes for seed in range(plan.seeds)], one)
    if runs is None:
        return {}
    found = {name: runs[each * plan.seeds : (each + 1) * plan.seeds] for each, name in enumerate(recipes)}
    results = {
        scenario: {
            name: protocol.summary(runs, scenario, "bottleneck")["final_accuracy"] for name, runs in found.items()
        }
        for scenario in scenarios
    }
    used = {name: protocol.spread([each.codes_used for each in runs]) for name, runs in found.items()}
    table = _ablation_table(axis, results, used)
    say(f"\nFinal accuracy, mean ± sd of {_seeds(plan.seeds)}\n\n{table}")
    path = out / f"ablation-{source.study.name}-{axis}"
    record = {name: protocol.to_json(recipes[name], runs) for name, runs in found.items()}
    _write(path, source, begun, {"axis": axis, "values": record}, table)
    plots.ablation(
        results, axis=axis.replace("_", " "), title=f"{source.study.title.partition(',')[0]}", path=_png(path)
    )
    _close(path, begun, say)
    return found


def _ablation_table(axis: str, results: Mapping[str, Mapping[str, Spread]], used: Mapping[str, Spread]) -> str:
    rows = [
        f"| {name} | " + " | ".join(str(column[name]) for column in results.values()) + f" | {used[name]} |"
        for name in used
    ]
    return "\n".join(
        [f"| {axis} | " + " | ".join(results) + " | pairs used |", "|---|" + "---|" * (len(results) + 1), *rows]
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _seeds(number: int) -> str:
    return "seed 0" if number == 1 else f"seeds 0 to {number - 1}"


def _png(path: Path) -> Path:
    return path.with_name(path.name + ".png")


def _write(path: Path, source: Source, begun: float, record: Mapping[str, Any], table: str) -> None:
    whole = {
        "data": source.study.name,
        "features": " ".join(source.features),
        "key_share": KEY_SHARE,
        "versions": versions(),
        "seconds": round(time.perf_counter() - begun, 1),
        **record,
    }
    path.with_name(path.name + ".json").write_text(json.dumps(whole, separators=(",", ":")) + "\n")
    path.with_name(path.name + ".md").write_text(table + "\n")


def _close(path: Path, begun: float, say: Callable[[str], None]) -> None:
    names = ", ".join(f"{path}.{ending}" for ending in ("json", "md", "png"))
    say(f"\nWritten: {names}\nTook {time.perf_counter() - begun:.0f} s.")
