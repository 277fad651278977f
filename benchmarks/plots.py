"""Results as pictures: every suite's times by shape, and how time and memory grow. Log axes, 5 to 95 % bands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers import need
from benchmarks.suites import KVB

INK = {"kvb": "#c0392b", "torch baddbmm": "#2c6fbb"}
OTHERS = ("#4d4d4d", "#7a9e3b", "#b07aa1", "#e08e2b", "#5aa5a5", "#9c755f", "#bab0ab")
AXES = ("N", "K", "D", "C")


def digest(found: Mapping[str, Any]) -> str:
    """What a picture carries to say which document it shows."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def file_name(found: Mapping[str, Any]) -> str:
    return f"bench-{found['suite']}--{found['slug']}--{found['device']}.svg"


def shows(picture: str, found: Mapping[str, Any]) -> bool:
    """Whether the text of a picture was drawn from this document."""
    return f"data: {digest(found)}" in picture


def _ink(name: str, number: int) -> str:
    return INK.get(name, OTHERS[number % len(OTHERS)])


def _suite(found: Mapping[str, Any], pyplot: Any) -> Any:
    """A line per shape, a mark per contestant, and the ceiling as a bar."""
    rows = found["rows"][::-1]
    names = [KVB, *sorted({name for row in rows for name in row["contestants"]} - {KVB})]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(rows)))
    for number, name in enumerate(names):
        there = [(place, row["contestants"][name]) for place, row in enumerate(rows) if name in row["contestants"]]
        places, median = [place for place, _ in there], [times["median"] for _, times in there]
        spread = [
            [times["median"] - times["p5"] for _, times in there],
            [times["p95"] - times["median"] for _, times in there],
        ]
        ink = _ink(name, number)
        axes.errorbar(median, places, xerr=spread, fmt="D" if name == KVB else "o", color=ink, label=name, ms=5)
    for place, row in enumerate(rows):
        if row["ceiling"]:
            least, label = row["amount"] / row["ceiling"]["rate"], None if place else "at the ceiling"
            axes.plot([least, least], [place - 0.3, place + 0.3], color="black", lw=1, label=label)
    axes.set_yticks(range(len(rows)), [row["shape"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("seconds per call")
    axes.set_title(found["suite"], loc="left")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _scaling(found: Mapping[str, Any], pyplot: Any) -> Any:
    """Time above, memory below, one column per axis."""
    from benchmarks.scaling import PEER, points

    figure, grid = pyplot.subplots(2, len(AXES), figsize=(3 * len(AXES), 5), sharex="col", sharey="row")
    for column, axis in enumerate(AXES):
        times, memory = grid[0][column], grid[1][column]
        for number, who in enumerate((KVB, PEER)):
            low, median, high, peak = (
                points(found["rows"], axis, who, w) for w in ("p5", "median", "p95", "peak_bytes")
            )
            ink, sizes = _ink(who, number), [size for size, _ in median]
            times.plot(sizes, [y for _, y in median], "o-", ms=3, color=ink, label=who)
            times.fill_between(sizes, [y for _, y in low], [y for _, y in high], color=ink, alpha=0.2, lw=0)
            there = [(size, y) for size, y in peak if y]
            memory.plot([size for size, _ in there], [y for _, y in there], "o-", ms=3, color=ink)
        limits = [
            (float(row["shape"].partition("=")[2]), row["amount"] / row["ceiling"]["rate"])
            for row in found["rows"]
            if row["shape"].startswith(f"{axis}=") and row["ceiling"]
        ]
        if limits:
            times.plot(*zip(*limits, strict=True), color="black", lw=1, ls="--", label="multiply-add peak")
        for axes in (times, memory):
            axes.set_xscale("log")
            axes.set_yscale("log")
        memory.set_xlabel(axis)
    grid[0][0].set_ylabel("seconds per forward")
    grid[1][0].set_ylabel("bytes, result included")
    grid[0][0].legend(fontsize=7, frameon=False)
    return figure


def draw(documents: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One SVG per document; the files.

    Raises:
        Absent: matplotlib is not installed.
    """
    need.package("matplotlib", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    made = []
    settings = {
        "svg.hashsalt": "kvb",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 8,
    }
    for found in documents:
        results.validate(found)
        with matplotlib.rc_context(settings):
            figure = (_scaling if found["suite"] == "scaling" else _suite)(found, pyplot)
            target = folder / file_name(found)
            about = {"Date": None, "Description": f"data: {digest(found)}"}
            figure.savefig(target, bbox_inches="tight", metadata=about)
            pyplot.close(figure)
        made.append(target)
    return made
