"""A frozen bottleneck compiled and exported, in calls of the plain module: ``python -m benchmarks.graphs``.

At the paper's size. As in ``benchmarks.cpu``, the exit status is 1 when a result is wrong.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

import kvb
from benchmarks import table, verify
from benchmarks.shapes import PAPER
from benchmarks.table import Measured, Row, effort
from benchmarks.timing import Contestant, race

BATCHES = (1, 16, 256)
WAYS = ("compiled", "exported")


def measure(way: str, batch: int, quick: bool) -> Measured:
    """The module searches keys of its own: an exported program holds those of another."""
    module, twin = (kvb.KeyValueBottleneck(PAPER.C, PAPER.K, PAPER.D, PAPER.V).eval().freeze_keys() for _ in range(2))
    twin.load_state_dict(module.state_dict())
    x = torch.randn(batch, PAPER.C, PAPER.D)
    if way == "compiled":
        torch.compiler.reset()
        graph = torch.compile(twin, fullgraph=True)
    else:
        graph = torch.export.export(twin, (x,)).module()
    expected = module(x)

    def check(out: Tensor) -> None:
        verify.equal(out, expected, "values")

    with torch.no_grad():
        for call in (module, graph):
            call(x)  # packs, and compiles
        contestants = {"graph": Contestant(functools.partial(graph, x), check)}
        contestants["module"] = Contestant(functools.partial(module, x), check)
        found = race(contestants, effort(quick))
    seconds = [found.seconds(who) for who in ("graph", "module")]
    return Measured(*seconds, "s", "the plain module", found.ratio("graph", "module"))


ROWS = tuple(
    Row(f"{way}:{batch}", functools.partial(measure, way, batch), 1.1, at_most=True)
    for way in WAYS
    for batch in BATCHES
)


if __name__ == "__main__":
    sys.exit(table.run(ROWS, "benchmarks.graphs", __doc__, None))
