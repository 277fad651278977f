"""A frozen bottleneck compiled and exported, in calls of the plain module: ``python -m benchmarks.graphs``.

At the paper's size. The rows with "floor" have no bar: in both of their calls the module is plain, and one product of
PyTorch's follows it, as a graph or plain. What they are above 1 is what PyTorch takes to call any graph after a search,
which fills the caches. As in ``benchmarks.cpu``, the exit status is 1 when a result is wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kvb
from benchmarks import table, verify
from benchmarks.shapes import PAPER
from benchmarks.table import Measured, Row, effort
from benchmarks.timing import Contestant, race

BATCHES = (1, 16, 256)
WAYS = ("compiled", "exported")
Call = Callable[[Tensor], Tensor]


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _bottleneck() -> kvb.KeyValueBottleneck:
    return kvb.KeyValueBottleneck(PAPER.C, PAPER.K, PAPER.D, PAPER.V).eval().freeze_keys()


def _graph(way: str, module: nn.Module, x: Tensor) -> Call:
    if way == "compiled":
        torch.compiler.reset()
        return torch.compile(module, fullgraph=True)
    return torch.export.export(module, (x,)).module()


@torch.no_grad()
def _compared(graph: Call, module: Call, x: Tensor, quick: bool) -> Measured:
    expected = module(x)

    def check(out: Tensor) -> None:
        verify.equal(out, expected, "values")

    graph(x)  # packs, and compiles
    contestants = {
        name: Contestant(functools.partial(call, x), check) for name, call in (("graph", graph), ("module", module))
    }
    found = race(contestants, effort(quick))
    seconds = [found.seconds(who) for who in ("graph", "module")]
    return Measured(*seconds, "s", "the plain module", found.ratio("graph", "module"))


def measure(way: str, batch: int, quick: bool) -> Measured:
    """The module searches keys of its own: an exported program holds those of another."""
    module, twin = _bottleneck(), _bottleneck()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(batch, PAPER.C, PAPER.D)
    return _compared(_graph(way, twin, x), module, x, quick)


def floor(way: str, batch: int, quick: bool) -> Measured:
    """A product of [1, 8] and [8, 8], as a graph or plain, after a plain search."""
    module, product = _bottleneck(), _Product()
    x, small = torch.randn(batch, PAPER.C, PAPER.D), torch.randn(1, 8)
    graph = _graph(way, product, small)

    def then(call: Call) -> Call:
        def run(x: Tensor) -> Tensor:
            module(x)
            return call(small)

        return run

    return _compared(then(graph), then(product), x, quick)


ROWS = tuple(
    Row(f"{way}:{batch}", functools.partial(measure, way, batch), 1.1, at_most=True)
    for way in WAYS
    for batch in BATCHES
) + tuple(Row(f"floor:{way}:{batch}", functools.partial(floor, way, batch)) for way in WAYS for batch in BATCHES)


if __name__ == "__main__":
    sys.exit(table.run(ROWS, "benchmarks.graphs", __doc__, None))
