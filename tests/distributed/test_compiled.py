"""``torch.compile`` around ``DistributedDataParallel``, and within: the state and the steps of plain calls."""

from __future__ import annotations

import pytest
import scenarios
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import kvb
from kvb.distributed import sync_values

C, K, D, V = 4, 16, 3, 5
WAYS = {
    "plain": lambda model, shared: DDP(shared(model)),
    "around": lambda model, shared: torch.compile(DDP(shared(model))),
    "within": lambda model, shared: DDP(torch.compile(shared(model))),
    "within, shared later": lambda model, shared: DDP(shared(torch.compile(model))),
}


class Model(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(2)
        self.bottleneck = kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=sparse)
        self.head = nn.Linear(V, 3)

    def forward(self, x):
        return self.head(self.bottleneck(x, pool="mean"))


def _trained(way, rows):
    """Two steps in which keys learn, two in which hits are counted, and a forward in eval mode."""
    torch.compiler.reset()
    model = Model(sparse=rows)
    outer = WAYS[way](model, sync_values if rows else lambda module: module)
    optimizer = kvb.optim.RowwiseSGD(outer.parameters(), lr=0.3)
    for step in range(4):
        if step == 2:
            model.bottleneck.freeze_keys()
        x = torch.randn(6, C, D, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        outer(x).square().mean().backward()
        optimizer.step()
    out = outer.eval()(torch.ones(2, C, D)).detach()
    found = {name: part.detach().clone() for name, part in model.named_parameters()}
    return {"out": out, **found, **scenarios.state(model.bottleneck)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "rows"),
    [("around", False), ("within", False), ("around", True), ("within", True), ("within, shared later", True)],
)
def test_compiled_training_is_that_of_plain_calls(processes, way, rows):
    want = scenarios.same(processes(2, _trained, "plain", rows))
    scenarios.close(scenarios.same(processes(2, _trained, way, rows)), want)
