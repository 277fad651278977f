"""Tables and plots from committed results: ``python -m benchmarks.report [FILE ...]``.

Each FILE, as ``python -m kvb bench --json``, ``python -m benchmarks.scaling --json`` or ``python -m benchmarks.gpu``
wrote it, is filed among the committed results first. Then this rewrites all between ``<!-- bench: SUITE -->`` and
``<!-- end -->`` in README.md and docs/benchmarks.md, and the plots in docs/ that no longer show their results.
``--check`` changes nothing and fails where it would.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kvb
from benchmarks import bench, journal, plots, results
from benchmarks.suites import KVB

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- bench: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PAGES = ("README.md", "docs/benchmarks.md")
Documents = Mapping[str, Mapping[str, Any]]


class Instead(NamedTuple):
    """One way to do without kvb: where it was measured, and what no measurement says."""

    label: str
    suite: str
    shape: str
    peer: str
    lacks: str


INSTEAD = (
    Instead(
        "discrete-key-value-bottleneck-pytorch",
        "memories",
        "paper_cifar10",
        "dkvb-pytorch",
        "adds learned projections nobody asked for; no freezing, no codes",
    ),
    Instead(
        "vector-quantize-pytorch, a codebook per head",
        "key_update",
        "paper_cifar10",
        "vector-quantize",
        "keys only: values, masks and freezing are yours to write",
    ),
    Instead(
        "faiss-cpu, an `IndexFlatL2` per codebook",
        "forward",
        "paper_cifar10",
        "faiss",
        "search only: no gradients, no learning keys, one codebook at a time",
    ),
    Instead(
        "`torch.cdist(...).argmin(-1)`, then `values[c, i]`",
        "forward",
        "paper_cifar10",
        "torch.cdist",
        "holds every distance: the authors' package does it this way",
    ),
    Instead(
        "the same by `torch.baddbmm` in chunks",
        "forward",
        "paper_cifar10",
        "torch baddbmm",
        "all that is not search and fetch",
    ),
    Instead(
        "kvb installed without a compiler",
        "forward",
        "paper_cifar10",
        "kvb in PyTorch",
        "nothing: the same results, from plain PyTorch",
    ),
)


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def _where(found: Mapping[str, Any]) -> str:
    facts = found["facts"]
    return (
        f"{facts['machine']}, {found['threads']} threads, {facts['backend on ' + found['device']]}, "
        f"torch {facts['torch']}, kvb {facts['kvb']}, {found['date']}, load before {found['load']:.1f}"
    )


def _suite(found: Mapping[str, Any]) -> list[str]:
    """A suite's table, and the geometric mean of its ratios."""
    head = (
        "shape",
        "kvb",
        "best peer here",
        "its time",
        "kvb is",
        "of ceiling",
        "kvb's memory",
        "its memory",
        "others",
    )
    lines = [(row["shape"], *bench.cells(found["suite"], row)[1:]) for row in found["rows"]]
    mean = results.mean_ratio(found["rows"])
    says = "" if mean is None else f"Geometric mean: {bench.times(mean)} faster than the best peer. "
    return [*_grid(head, lines), "", f"{says}{_where(found)}."]


def _exponent(value: float | None) -> str:
    return "flat" if value is None else f"{value:.2f}"


def _scaling(found: Mapping[str, Any]) -> list[str]:
    """Exponents, the crossover, the overhead of a call."""
    lines = []
    for axis, by_contestant in found["fits"].items():
        for who, fit in by_contestant.items():
            lines.append((axis, who, _exponent(fit["time"]), _exponent(fit["memory"])))
    table = _grid(("grows with", "", "time: exponent", "memory: exponent"), lines)
    size, calls = found["crossover"]["size"], found["overhead"]
    if size is None:
        smallest = "No problem tried was large enough for kvb to beat plain PyTorch."
    else:
        smallest = f"From N = C = K = D = V = {size} on, kvb is faster than plain PyTorch."
    costs = "; ".join(
        f"{name}: {bench.seconds(cost[KVB])}, {cost['ratio']:.2g} times `nn.Linear`" for name, cost in calls.items()
    )
    return [*table, "", f"{smallest} A call on one pair costs: {costs}. {_where(found)}."]


def _against(documents: Documents) -> list[str]:
    """What people use now, on the suite that does the same job, with the results of every machine."""
    head = ("instead of kvb", "job", "takes", "kvb takes", "memory", "kvb's", "to know")
    lines, where = [], []
    for way, found in itertools.product(INSTEAD, documents.values()):
        for row in found["rows"]:
            if (found["suite"], row["shape"]) != (way.suite, way.shape) or way.peer not in row["contestants"]:
                continue
            theirs, ours = row["contestants"][way.peer], row["contestants"][KVB]
            times = bench.times(results.ratio(row, way.peer))
            cost = (bench.seconds(theirs["median"]), f"**{bench.seconds(ours['median'])}** ({times})")
            memory = (bench.size(theirs["peak_bytes"]), f"**{bench.size(ours['peak_bytes'])}**")
            lines.append((way.label, f"`{way.suite}`, {way.shape}", *cost, *memory, way.lacks))
            where.append(_where(found))
    return [*_grid(head, lines), "", " ".join(f"{one}." for one in sorted(set(where))), ""] if lines else []


def section(suite: str, documents: Documents, pictures: str = "docs/") -> str:
    """What belongs between the markers of a suite: of every machine, its table and its picture, from that folder."""
    lines: list[str] = _against(documents) if suite == "against" else []
    for found in documents.values():
        if found["suite"] == suite:
            table = _scaling(found) if suite == "scaling" else _suite(found)
            lines += [*table, "", f"![{suite}]({pictures}{plots.file_name(found)})", ""]
    return "\n".join(lines) if lines else "Not measured yet.\n"


def rendered(text: str, documents: Documents, pictures: str) -> str:
    """The text with everything between markers rewritten."""
    return BLOCK.sub(lambda block: block[1] + section(block[2], documents, pictures) + block[4], text)


def pages(root: Path, documents: Documents) -> dict[str, tuple[str, str]]:
    """Each page as it is, and as it should be."""
    found = {}
    for name in PAGES:
        if (root / name).is_file():
            text = (root / name).read_text()
            found[name] = text, rendered(text, documents, "" if name.startswith("docs/") else "docs/")
    return found


def stale(root: Path, documents: Documents) -> list[str]:
    """What no longer shows the committed results."""
    found = [name for name, (text, wanted) in pages(root, documents).items() if text != wanted]
    for one in documents.values():
        picture = root / "docs" / plots.file_name(one)
        if not (picture.is_file() and plots.shows(picture.read_text(), one)):
            found.append(f"docs/{picture.name}")
    wanted = {plots.file_name(one) for one in documents.values()}
    found += [f"docs/{picture.name}" for picture in (root / "docs").glob("bench-*.svg") if picture.name not in wanted]
    return found


def _documents(file: Path) -> list[Mapping[str, Any]]:
    if file.suffix == ".jsonl":
        return [results.from_gpu(journal.read(file))]
    found = json.loads(file.read_text())
    return found if isinstance(found, list) else [found]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results to file first")
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    options = parser.parse_args(arguments)
    folder = root / "benchmarks" / "results"
    for file in options.files:
        for one in _documents(file):
            print(f"wrote {results.write(one, folder)}")
    documents = results.committed(kvb.__version__, folder)
    old = stale(root, documents)
    if options.check:
        for name in old:
            print(f"{name} is stale: run python -m benchmarks.report")
        return 1 if old else 0
    for name, (_, text) in pages(root, documents).items():
        (root / name).write_text(text)
    for name in old:
        if name.endswith(".svg"):
            (root / name).unlink(missing_ok=True)
    plots.draw((one for one in documents.values() if f"docs/{plots.file_name(one)}" in old), root / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
