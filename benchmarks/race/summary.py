"""What a race found: figures by operator, a list of losses, and a picture of ratio against work."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import need
from benchmarks.race.draws import OPERATORS, Draw

LOSS = 0.95  # a smaller ratio is a loss
INK = dict(zip(OPERATORS, ("#c0392b", "#e08e2b", "#2c6fbb", "#5aa5a5", "#7a9e3b", "#b07aa1"), strict=True))
Line = Mapping[str, Any]


def shape(line: Line) -> Draw:
    return Draw(**{name: line[name] for name in Draw._fields})


def raced(lines: Sequence[Line]) -> list[Line]:
    """Those that kvb raced with somebody."""
    return [line for line in lines if "ratio" in line]


def losses(lines: Sequence[Line]) -> list[Line]:
    """The worst one first."""
    return sorted((line for line in raced(lines) if line["ratio"] < LOSS), key=lambda line: line["ratio"])


def mean(lines: Sequence[Line]) -> float:
    """The geometric mean of the ratios."""
    return statistics.geometric_mean(line["ratio"] for line in lines)


def _operators(lines: Sequence[Line]) -> Iterator[str]:
    yield f"{'operator':<15} {'shapes':>6} {'mean':>6} {'worst':>6} {'losses':>6}"
    for operator in (*OPERATORS, "all"):
        found = [line for line in raced(lines) if operator in (line["operator"], "all")]
        if found:
            worst = min(line["ratio"] for line in found)
            yield f"{operator:<15} {len(found):>6} {mean(found):>6.3g} {worst:>6.2f} {len(losses(found)):>6}"


def text(lines: Sequence[Line], left_out: Mapping[str, int]) -> str:
    """All of it, for a terminal; ``mean`` is the geometric mean of the best opponent's time over kvb's."""
    said = [*_operators(lines), ""]
    slow = losses(lines)
    said.append(f"{len(slow)} of {len(raced(lines))} shapes lost (ratio < {LOSS}):" if slow else "No shape lost.")
    said += [f"{one['ratio']:5.2f} ({one['low']:.2f} to {one['high']:.2f})  {_told(one)}" for one in slow]
    said += [f"WRONG: {shape(line)}: {line['wrong']}" for line in lines if "wrong" in line]
    said += [f"alone: {shape(line)}" for line in lines if "ratio" not in line and "wrong" not in line]
    if left_out:
        parts = ", ".join(f"{count} of them for their {what}" for what, count in sorted(left_out.items()))
        said += ["", f"{sum(left_out.values())} draws were too large and drawn again, {parts}."]
    return "\n".join(said)


def _told(line: Line) -> str:
    ours, theirs = (line["seconds"][who] * 1e6 for who in ("kvb", line["best"]))
    return f"#{line['index']} {shape(line)}: kvb {ours:.4g} us, {line['best']} {theirs:.4g} us"


def draw(lines: Sequence[Line], file: Path) -> None:
    """A point per shape, quartiles as bars.

    Raises:
        Absent: matplotlib is not installed.
    """
    need.package("matplotlib", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for operator, ink in INK.items():
        found = [line for line in raced(lines) if line["operator"] == operator]
        if not found:
            continue
        work, ratio = [line["work"] for line in found], [line["ratio"] for line in found]
        # Quartiles are of ratios round by round, and need not enclose that of the medians.
        bars = [[max(0.0, line["ratio"] - line["low"]) for line in found]]
        bars += [[max(0.0, line["high"] - line["ratio"]) for line in found]]
        axes.errorbar(work, ratio, yerr=bars, fmt="o", ms=3, lw=0.7, alpha=0.8, color=ink, label=operator)
    axes.axhline(1, color="black", lw=0.8)
    axes.axhline(LOSS, color="black", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds of a search, or numbers fetched")
    axes.set_ylabel("time of the best opponent / kvb's")
    if raced(lines):
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, bbox_inches="tight")
    pyplot.close(figure)
