"""Figures of results: of a class-incremental run, the protocol and its ablations, unlearning, studies, and the toy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from kvb.experiments.class_incremental import Examples, Result
from kvb.experiments.protocol import Run, Spread

# Okabe and Ito's palette, which colour-blind readers can tell apart too; the markers differ in print.
STYLES = (
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")),
    *(("#56B4E9", "P"), ("#666666", "X"), ("#000000", "<"), ("#7F3C8D", ">")),
    *(("#A5AA00", "h"), ("#8C510A", "*")),
)
LINE = 0.07  # the height of a label, in accuracy
SHORT = 6  # letters of a label that fits below a column of a heat map
INK, FAINT = "#222222", "#767676"


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def class_incremental(
    results: Mapping[str, Result], *, tasks: Sequence[str], chance: Sequence[float], title: str, path: Path
) -> None:
    """Two panels as a PNG: (a) accuracy over the classes seen so far, (b) the accuracy matrix of every head.

    Args:
        results: by the name of the head, at most as many as ``STYLES``.
        tasks: what to call each task on the axes.
        chance: the accuracy of guessing after each task.
    """
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(9, 7.4), dpi=200, layout=layout)
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.02))[:, 0]
    _curves(above.subplots(), results, tasks, chance)
    row = below.subplots(1, len(results), sharey=True, squeeze=False)[0]
    short = max(map(len, tasks)) <= SHORT
    labels = tasks if short else [str(number) for number in range(1, len(tasks) + 1)]
    for axes, (name, result), (colour, _) in zip(row, results.items(), STYLES, strict=False):
        image = _heat_map(axes, name, colour, result, labels)
    row[0].set_ylabel("after learning" if short else "after task", fontsize=11)
    below.supxlabel("tested on the classes" if short else "tested on the classes of task", fontsize=11)
    below.suptitle("(b) Accuracy on the classes of each task", fontsize=12.5, color=INK)
    below.colorbar(image, ax=list(row), shrink=0.82, label="test accuracy")
    figure.savefig(path)


def _curves(axes: Axes, results: Mapping[str, Result], tasks: Sequence[str], chance: Sequence[float]) -> None:
    steps = np.arange(1, len(tasks) + 1)
    axes.plot(steps, chance, color=FAINT, linestyle=":", linewidth=1.8)
    labels = [(f"chance  {chance[-1]:.2f}", chance[-1], FAINT)]
    for (name, result), (colour, marker) in zip(results.items(), STYLES, strict=False):
        seen = [score.seen for score in result.scores]
        axes.plot(steps, seen, color=colour, marker=marker, markersize=7, linewidth=2.4, clip_on=False, zorder=3)
        labels.append((f"{name}  {seen[-1]:.2f}", seen[-1], colour))
    lowest = -1.0
    for text, height, colour in sorted(labels, key=lambda label: label[1]):
        lowest = max(height, lowest + LINE)  # labels of equal heights stand above each other
        axes.annotate(
            text,
            (steps[-1], lowest),
            xytext=(11, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=11.5,
            fontweight="bold",
        )
    axes.set_title("(a) Accuracy over all classes seen so far", fontsize=12.5, color=INK, pad=10)
    axes.set_xticks(steps, [f"task {step}\n+ {task}" for step, task in zip(steps, tasks, strict=True)], fontsize=11)
    axes.set_xlim(0.85, len(tasks) + 0.85)
    axes.set_ylim(0, 1)
    axes.set_ylabel("test accuracy", fontsize=11)
    _plain(axes)


def _heat_map(axes: Axes, name: str, colour: str, result: Result, tasks: Sequence[str]) -> AxesImage:
    matrix = np.array(result.matrix)
    learnt = np.tril(np.ones_like(matrix, dtype=bool))
    image = axes.imshow(np.ma.array(matrix, mask=~learnt), cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(learnt):
        accuracy = matrix[row, column]
        axes.text(
            column,
            row,
            f"{accuracy:.2f}",
            ha="center",
            va="center",
            fontsize=10,
            color="white" if accuracy > 0.55 else INK,
        )
    axes.set_title(name, fontsize=12, fontweight="bold", color=colour)
    axes.set_xticks(range(len(tasks)), tasks, fontsize=10)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=10)
    axes.set_xticks(np.arange(0.5, len(tasks) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(tasks) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


# --- unlearning -------------------------------------------------------------------------------------------------------


def unlearning(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    overlap: Sequence[Sequence[float]],
    one_after_another: Sequence[tuple[str, float, float]],
    chosen: float,
    label: str,
    title: str,
    path: Path,
) -> None:
    """Four panels as a PNG: (a) what is forgotten, (b) what is kept, (c) shared pairs, (d) one class after another.

    Args:
        curves: pairs masked, forget and retain accuracy, from no pair on, by the name of the way, at most as many as
            ``STYLES``.
        overlap: of every class with every other.
        one_after_another: what to call the class, accuracy on all forgotten so far, and on the others.
        chosen, label: the number of pairs of the main table, and what to call it.
    """
    figure = Figure(figsize=(10, 8), dpi=200, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK)
    (forgotten, kept), (shared, several) = figure.subplots(2, 2)
    for (way, points), (colour, marker) in zip(curves.items(), STYLES, strict=False):
        pairs, forget, retain = np.array(points).T
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2, "label": way}
        forgotten.plot(pairs, forget, **style)
        kept.plot(pairs, 100 * (retain - retain[0]), **style)
    for axes in (forgotten, kept):
        axes.axvline(chosen, color=FAINT, linestyle=":", linewidth=1.5, zorder=0)
        axes.set_xlabel("pairs masked", fontsize=11)
    _titled(forgotten, "(a) Accuracy on what is forgotten")
    forgotten.set_ylim(-0.02, 1.02)
    forgotten.legend(frameon=True, framealpha=1, edgecolor="white", fontsize=10.5, loc="upper right")
    _titled(kept, "(b) Change of accuracy on the rest", "points")
    low, high = kept.get_ylim()
    kept.set_ylim(min(low, -2.0), max(high, 1.0))
    kept.axhline(0, color=FAINT, linewidth=1, zorder=0)
    kept.annotate(label, (chosen, kept.get_ylim()[0]), (-4, 6), textcoords="offset points", ha="right", color=FAINT)
    _overlaps(shared, np.array(overlap))
    steps = range(1, len(one_after_another) + 1)
    heights = np.array([entry[1:] for entry in one_after_another])
    for name, column, (colour, marker) in zip(("forgotten", "others"), heights.T, STYLES[1::-1], strict=True):
        several.plot(steps, column, color=colour, marker=marker, markersize=7, linewidth=2.4, label=name, clip_on=False)
    several.set_xticks(steps, ["+ " + entry[0] for entry in one_after_another], fontsize=10)
    several.set_xlim(0.8, len(one_after_another) + 0.2)
    several.set_ylim(0, 1)
    several.set_xlabel("classes forgotten, one after another", fontsize=11)
    several.legend(frameon=False, fontsize=10.5, loc="center right")
    _titled(several, "(d) Masks on top of each other")
    figure.savefig(path)


def _titled(axes: Axes, title: str, unit: str = "test accuracy") -> None:
    axes.set_title(title, fontsize=12.5, color=INK)
    axes.set_ylabel(unit, fontsize=11)
    _plain(axes)


def _overlaps(axes: Axes, table: np.ndarray) -> None:
    apart = ~np.eye(len(table), dtype=bool)
    top = max(float(table[apart].max()), 1e-9)
    axes.imshow(np.ma.array(table, mask=~apart), cmap="Blues", vmin=0, vmax=top)
    if len(table) <= 12:
        for row, column in np.argwhere(apart):
            share = table[row, column]
            colour = "white" if share > 0.6 * top else INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_title("(c) Hits that two classes share, in %", fontsize=12.5, color=INK)
    axes.set_xticks(range(len(table)))
    axes.set_yticks(range(len(table)))
    axes.set_xlabel("class", fontsize=11)
    axes.set_ylabel("class", fontsize=11)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


# --- the toy ----------------------------------------------------------------------------------------------------------


def decisions(
    maps: Mapping[str, Sequence[Tensor]],
    accuracies: Mapping[str, Sequence[float]],
    *,
    train: Examples,
    tasks: Sequence[Tensor],
    path: Path,
) -> None:
    """What every head decides in the unit square after each task, as a PNG: rows are heads, columns are tasks.

    A place has the colour of its class, paler the less probable the class is there. The points of the tasks learned so
    far lie on top, those of the last one with dark edges.

    Args:
        maps: probabilities [G, G, classes] after each task, rows from the bottom, by the name of the head.
        accuracies: test accuracy over the classes seen so far, after each task.
        tasks: the classes of every task, at most ten in all.
    """
    figure = Figure(figsize=(2.5 * len(tasks) + 0.6, 2.55 * len(maps) + 0.7), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.04, w_pad=0.04))
    figure.suptitle("Two classes at a time: what each head decides after every task", fontsize=15, fontweight="bold")
    grid = figure.subplots(len(maps), len(tasks), squeeze=False, sharex=True, sharey=True)
    colours = colormaps["tab10"](np.arange(10))[:, :3]
    for row, (name, drawn) in zip(grid, maps.items(), strict=True):
        row[0].set_ylabel(name, fontsize=12, fontweight="bold", color=INK)
        for number, (axes, probabilities) in enumerate(zip(row, drawn, strict=True)):
            likeliest, classes = (part.numpy() for part in probabilities.max(-1))
            chance = 1 / probabilities.shape[-1]
            strength = ((likeliest - chance) / max(likeliest.max() - chance, 1e-9))[..., None]
            axes.imshow(1 - 0.6 * strength * (1 - colours[classes]), origin="lower", extent=(0, 1, 0, 1))
            for step, task in enumerate(tasks[: number + 1]):
                for label in task.tolist():
                    points = train.features[train.labels == label].T
                    edge = INK if step == number else "white"
                    axes.scatter(*points, s=9, color=[colours[label]], edgecolors=edge, linewidths=0.35)
            axes.set_xlabel(f"accuracy {accuracies[name][number]:.2f}", fontsize=11, color=INK, labelpad=3)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("#bbbbbb")
    for number, (axes, task) in enumerate(zip(grid[0], tasks, strict=True), start=1):
        axes.set_title(f"task {number}: classes {', '.join(map(str, task.tolist()))}", fontsize=11.5, color=INK)
    figure.supxlabel("test accuracy over the classes seen so far; the paler, the less likely any class", fontsize=11)
    figure.savefig(path)


# --- the paper's protocol ---------------------------------------------------------------------------------------------


def protocol(runs: Sequence[Run], *, title: str, path: Path) -> None:
    """Accuracy of every head as a PNG: after every task with a band of one sd, and at the end of every scenario."""
    scenarios = list(runs[0].results)
    first = next((name for name in scenarios if name != "iid"), scenarios[0])
    figure = Figure(figsize=(9, 4), dpi=120, layout=ConstrainedLayoutEngine())
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    left, right = figure.subplots(1, 2, sharey=True)
    heads = list(runs[0].results[first])
    for column, (head, (colour, marker)) in enumerate(zip(heads, STYLES[: len(heads)], strict=True)):
        seen = np.array([[score.seen for score in each.results[first][head].scores] for each in runs])
        steps = np.arange(1, seen.shape[1] + 1)
        mean, sd = seen.mean(0), seen.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
        left.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
        left.plot(steps, mean, color=colour, marker=marker, linewidth=2, label=head)
        places = np.arange(len(scenarios)) + (column - (len(heads) - 1) / 2) * 0.6 / len(heads)
        ends = np.array([[each.results[name][head].final for name in scenarios] for each in runs])
        spread = ends.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(scenarios))
        right.errorbar(places, ends.mean(0), spread, color=colour, marker=marker, linestyle="none", capsize=3)
    left.set_xlabel(f"tasks seen ({first})")
    left.set_ylabel("test accuracy")
    left.set_xticks(steps)
    left.legend(frameon=False, ncols=2)
    right.set_xticks(range(len(scenarios)), [name.replace("-", "-\n") for name in scenarios])
    right.set_xlabel("at the end")
    for axes in (left, right):
        _plain(axes)
    left.set_ylim(0, 1.02)
    figure.savefig(path)


def ablation(results: Mapping[str, Mapping[str, Spread]], *, axis: str, title: str, path: Path) -> None:
    """Final accuracy over what was varied as a PNG, a line for every scenario."""
    figure = Figure(figsize=(5.4, 4), dpi=120, layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    for (scenario, column), (colour, marker) in zip(results.items(), STYLES, strict=False):
        ends = list(column.values())
        axes.errorbar(
            range(len(column)),
            [end.mean for end in ends],
            [end.sd for end in ends],
            color=colour,
            marker=marker,
            capsize=3,
            label=scenario,
        )
        axes.set_xticks(range(len(column)), list(column))
    axes.set_xlabel(axis)
    axes.set_ylabel("final test accuracy")
    axes.set_title(title, fontsize=13, fontweight="bold", color=INK)
    axes.legend(frameon=False)
    _plain(axes)
    figure.savefig(path)


# --- studies ----------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """What one part of a figure shows: xs and ys by the name of the line."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    joined: bool = True


def panels(parts: Sequence[Panel], *, title: str, path: Path) -> None:
    """Panels side by side as a PNG."""
    figure = Figure(figsize=(4.6 * len(parts) + 0.6, 4), dpi=120, layout=ConstrainedLayoutEngine())
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for (name, (xs, ys)), (colour, marker) in zip(part.lines.items(), STYLES, strict=False):
            style = "-" if part.joined else "none"
            axes.plot(xs, ys, color=colour, marker=marker, linestyle=style, markersize=4, linewidth=2, label=name)
        axes.set_title(part.title, fontsize=11.5, color=INK)
        axes.set_xlabel(part.x)
        axes.set_ylabel(part.y)
        axes.legend(frameon=False)
        _plain(axes)
    figure.savefig(path)


def images(parts: Mapping[str, Tensor], *, title: str, path: Path) -> None:
    """Images [classes, each, side * side] as a PNG: a block for every name, a row for every class."""
    figure = Figure(figsize=(2.4 * len(parts) + 0.4, 3.4), dpi=150, layout=ConstrainedLayoutEngine())
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    for axes, (name, given) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        side = round(given.shape[2] ** 0.5)
        framed = np.pad(given.unflatten(2, (side, side)).numpy(), ((0, 0), (0, 0), (1, 0), (1, 0)))
        axes.imshow(framed.transpose(0, 2, 1, 3).reshape(len(framed) * (side + 1), -1), cmap="gray_r")
        axes.set_title(name, fontsize=9, color=INK)
        axes.set_axis_off()
    figure.savefig(path)
