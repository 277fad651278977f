"""A step of training whose gradient has no finite norm."""

from __future__ import annotations

import pytest
import torch

from kvb import ops, reference

pytestmark = [pytest.mark.contract, pytest.mark.memory]

MANY = 60 if ops.backend("cpu") == "triton" else 3000  # the interpreter takes its time


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lr", [0.1, float("nan")])
def test_a_step_whose_norm_is_not_finite_writes_nothing(bad, dtype, lr):
    """One value that is not finite, among values of other samples and codebooks that are."""
    for C, N, V in ((3, 8, 5), (40, 30, 10), (2, MANY, 40)):
        values = torch.randn(C, 7, V).to(dtype)
        indices, targets = torch.randint(7, (N, 1, C)), torch.randint(V, (N,))
        values[0, indices[0, 0, 0], V // 2] = bad
        for op in (torch.ops.kvb, reference):
            moved = values.clone()
            _, norm, _ = op.sgd_step_(moved, indices, targets, lr, 1.0, 0.1)
            assert not norm.isfinite()
            assert torch.equal(moved.isnan(), values.isnan())
            assert torch.equal(moved[~moved.isnan()], values[~values.isnan()])
