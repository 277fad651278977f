"""The benchmark of memory layers: what is wrong is never timed, and plain PyTorch takes part as the papers have it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks import memory_layers
from benchmarks.timing import WrongResult


def test_a_right_result_passes_and_wrong_ones_do_not():
    given = memory_layers.problem(20, 50)
    rows, scores, out = memory_layers.kvb_read(*given)
    memory_layers.verify((rows, scores, out), given)
    with pytest.raises(WrongResult, match="scores differ"):
        memory_layers.verify((rows, scores.nextafter(torch.tensor(0.0)), out), given)
    with pytest.raises(WrongResult, match="what is read differs"):
        memory_layers.verify((rows, scores, out + 1e-3), given)
    others = rows.roll(1, 0)
    weighted = torch.ops.kvb.gather_weighted(given.values, others, scores.softmax(-1))
    with pytest.raises(WrongResult, match="pairs differ"):
        memory_layers.verify((others, scores, weighted), given)


def test_both_learn_the_same():
    given = [one.clone().requires_grad_() for one in memory_layers.problem(20, 50)]
    found = []
    for read in (memory_layers.kvb_read, memory_layers.plain_read):
        grads = torch.autograd.grad(read(*given, False)[2].square().mean(), given)
        found.append(grads)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
