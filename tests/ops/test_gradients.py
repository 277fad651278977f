"""Gradients: checked against differences, going where the contract says, through tensors that change meanwhile."""

from __future__ import annotations

import itertools

import pytest
import torch
from operator_calls import PLAIN, problem

from kvb import functional, ops
from kvb.testing import Case

pytestmark = [pytest.mark.contract, pytest.mark.memory]

op = torch.ops.kvb


def test_gradcheck():
    # Every number is moved on its own, and the interpreter takes its time.
    B, S, K, V = (1, 1, 4, 1) if ops.backend("cpu") == "triton" else (2, 2, 9, 2)
    queries, keys, packed, values = problem(Case("small", B=B, S=S, K=K, D=3, V=V, dtype=torch.float64))
    indices = torch.randint(K, (B, S, 2))
    values.requires_grad_()
    for pool, layout in itertools.product(functional.POOLS, functional.LAYOUTS):
        assert torch.autograd.gradcheck(lambda v, p=pool, o=layout: op.gather(v, indices, p, o), (values,))
        assert torch.autograd.gradgradcheck(lambda v, p=pool, o=layout: op.gather(v, indices, p, o) ** 2, (values,))
    assert torch.autograd.gradcheck(lambda v: op.lookup(queries, keys, packed, v, None, "mean")[0], (values,))
    queries.requires_grad_()
    mask = torch.rand(2, K) < 0.5
    assert torch.autograd.gradcheck(lambda q: op.nearest(q, keys, packed, mask, 3)[1], (queries,))
    assert torch.autograd.gradgradcheck(lambda q: op.nearest(q, keys, packed, None, 2)[1], (queries,))
    assert torch.autograd.gradcheck(lambda q: op.sample(q, keys, None, 1.0, torch.tensor(1))[1], (queries,))


def test_gradients_go_where_the_contract_says():
    queries, keys, packed, values = problem(PLAIN)
    for tensor in (queries, keys, values):
        tensor.requires_grad_()
    out, indices = op.lookup(queries, keys, packed, values, None, "none")
    assert not indices.requires_grad
    out.sum().backward()
    assert queries.grad is None
    assert keys.grad is None
    assert values.grad.sum() == out.numel()
    codes, distances = op.nearest(queries, keys, packed, None, 1)
    assert not codes.requires_grad
    distances.sum().backward()
    chosen = keys.detach()[torch.arange(2), codes[..., 0]]
    torch.testing.assert_close(queries.grad, 2 * (queries.detach() - chosen))
    assert keys.grad is None


def test_distance_gradient_is_zero_where_there_is_no_distance():
    queries, keys, _, _ = problem(PLAIN)
    queries[0, 0, 0, 0] = float("nan")
    queries.requires_grad_()
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[1] = True
    _, distances = functional.nearest(queries, keys, mask=mask, topk=2)
    distances.sum().backward()
    assert (queries.grad[:, :, 0] == 0).all()
    assert queries.grad[:, :, 1].isfinite().all()
    assert (queries.grad[:, :, 1] != 0).any()


def test_keys_may_move_before_the_backward_pass():
    queries, keys, packed, _ = problem(PLAIN)
    queries.requires_grad_()
    indices, distances = op.nearest(queries, keys, packed, None, 1)
    want = 2 * (queries.detach() - keys[torch.arange(2), indices[..., 0]])
    keys.add_(1)
    distances.sum().backward()
    torch.testing.assert_close(queries.grad, want)


def test_indices_saved_for_backward_are_guarded_and_values_are_not():
    *_, values = problem(PLAIN)
    indices = torch.randint(20, (4, 3, 2))
    values.requires_grad_()
    out = op.gather(values, indices, "none", "bscv")
    with torch.no_grad():
        values.mul_(2)
    out.sum().backward()
    out = op.gather(values, indices, "none", "bscv")
    indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_codes_made_in_inference_mode_can_be_trained_on():
    queries, keys, packed, values = problem(PLAIN)
    with torch.inference_mode():
        codes = op.nearest(queries, keys, packed, None, 1)[0][..., 0]
    values.requires_grad_()
    op.gather(values, codes, "mean", "bscv").sum().backward()
    assert values.grad.sum() > 0
