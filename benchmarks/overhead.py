"""The overhead of a call: the forward of a frozen bottleneck of one pair, next to ``nn.Linear(1, 1)``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import kvb
from benchmarks import verify
from benchmarks.timing import Contestant, Effort, Race, race

KVB, PEER = "kvb", "nn.Linear"


def measure(with_gradient: bool, effort: Effort) -> Race:
    """Eval mode, values only; ``with_gradient`` records the graph for both, and no backward is timed."""
    module = kvb.KeyValueBottleneck(1, 1, 1, 1).eval().freeze_keys()
    linear = nn.Linear(1, 1).eval()
    x, flat = torch.randn(1, 1, 1), torch.randn(1, 1)

    def check(out: Tensor, expected: Tensor) -> None:
        verify.equal(out.detach(), expected.detach(), "one number")
        verify.equal(torch.tensor(out.requires_grad), torch.tensor(with_gradient), "whether it has a gradient")

    contestants = {
        KVB: Contestant(functools.partial(module, x), lambda out: check(out, module.values)),
        PEER: Contestant(functools.partial(linear, flat), lambda out: check(out, flat @ linear.weight.T + linear.bias)),
    }
    with torch.set_grad_enabled(with_gradient):
        return race(contestants, effort)
