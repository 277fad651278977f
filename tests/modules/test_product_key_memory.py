"""Memory layers: the definition, gradients, masks, sharing, files, and training in the place of a dense block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kvb
from kvb.memory import ProductKeyMemory
from kvb.optim import RowCounts

pytestmark = pytest.mark.fallback

SMALL = {"num_keys": 6, "topk": 4, "heads": 2, "dim_key": 8}


def definition(memory, x):
    """All n * n scores of each head, written out."""
    queries = memory.query(x).unflatten(-1, (memory.heads, memory.dim_key))
    out = 0
    for h in range(memory.heads):
        first, second = queries[..., h, :].chunk(2, -1)
        scores = (first @ memory.keys[h, 0].T)[..., :, None] + (second @ memory.keys[h, 1].T)[..., None, :]
        best, rows = scores.flatten(-2).topk(memory.topk)
        out = out + (best.softmax(-1)[..., None] * memory.values[rows]).sum(-2)
    if memory.gated:
        return memory.project(nn.functional.silu(memory.gate(x)) * out)
    return out


@pytest.mark.parametrize("options", [{}, {"gated": True, "dim_values": 5, "dim_out": 7}, {"dim_values": 3}])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_the_definition_and_its_gradients(options, sparse_grad):
    memory = ProductKeyMemory(10, **SMALL, **options, sparse_grad=sparse_grad, dtype=torch.float64)
    x = torch.randn(3, 5, 10, dtype=torch.float64, requires_grad=True)
    wanted, found = definition(memory, x), memory(x)
    assert found.shape == (3, 5, memory.dim_out)
    torch.testing.assert_close(found, wanted)
    grad, leaves = torch.randn_like(found), [x, *memory.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine.to_dense() if mine.is_sparse else mine, theirs)


def test_positions_that_do_not_count():
    memory = ProductKeyMemory(10, **SMALL, query_norm="batch", sparse_grad=True)
    memory.counter = RowCounts(memory.num_pairs)
    x, mask = torch.randn(2, 4, 10), torch.tensor([[True, True, False, False], [True, False, False, False]])
    x[~mask] = torch.nan
    out = memory(x, mask)
    assert (out[~mask] == 0).all()
    assert memory.counter.counts.sum() == 3 * 2 * 4
    out.sum().backward()
    assert all(parameter.grad.to_dense().isfinite().all() for parameter in memory.parameters())
    torch.testing.assert_close(memory.eval()(x[mask]), memory(x, mask)[mask])
    assert memory(x, torch.zeros(2, 4, dtype=torch.bool)).eq(0).all()


@pytest.mark.parametrize("query_norm", ["none", "batch", "layer"])
def test_norms_of_queries(query_norm):
    memory = ProductKeyMemory(10, **SMALL, query_norm=query_norm)
    x = torch.randn(20, 10)
    plain = memory.query(x)
    seen = []
    memory.query_norm.register_forward_hook(lambda module, given, found: seen.append(found))
    memory(x)
    if query_norm == "none":
        assert not seen
    elif query_norm == "batch":
        torch.testing.assert_close(seen[0], nn.functional.batch_norm(plain, None, None, training=True))
    else:
        torch.testing.assert_close(seen[0], nn.functional.layer_norm(plain.view(20, 2, 8), (8,)))


def test_shared_values_learn_from_both():
    first = ProductKeyMemory(10, **SMALL)
    second = ProductKeyMemory(10, **SMALL, values=first.values)
    assert second.values is first.values
    pair = nn.Sequential(first, second)
    assert len(list(pair.parameters())) == len(list(first.parameters())) + 3
    assert list(kvb.optim.param_groups(pair, 0.1)[1]["params"]) == [first.values]
    again = nn.Sequential(ProductKeyMemory(10, **SMALL), ProductKeyMemory(10, **SMALL))
    again[1].values = again[0].values
    again.load_state_dict(pair.state_dict())
    x = torch.randn(4, 10)
    assert torch.equal(again(x), pair(x))


def test_copies_and_dtypes():
    memory = ProductKeyMemory(10, **SMALL, gated=True)
    x = torch.randn(4, 10)
    assert torch.equal(copy.deepcopy(memory)(x), memory(x))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert copy.deepcopy(memory).to(dtype)(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = memory(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert memory.values.grad.dtype == memory.keys.grad.dtype == torch.float32


def test_only_rows_that_were_read_move():
    memory = ProductKeyMemory(10, num_keys=40, topk=4, heads=2, dim_key=8, sparse_grad=True)
    memory.counter = RowCounts(memory.num_pairs)
    before = memory.values.detach().clone()
    optimizer = kvb.optim.RowwiseAdam(kvb.optim.param_groups(memory, 0.01))
    memory(torch.randn(5, 10)).square().sum().backward()
    assert memory.values.grad._nnz() == (memory.counter.counts > 0).sum()
    optimizer.step()
    moved = (memory.values != before).any(-1)
    assert torch.equal(moved, memory.counter.counts > 0)


def test_a_memory_learns_what_a_block_learns():
    """Sixty-four random pairs of vectors, by heart."""
    memory = ProductKeyMemory(16, num_keys=12, topk=8, heads=2)
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = kvb.optim.RowwiseAdam(memory.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (memory(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_compiled():
    memory = ProductKeyMemory(10, **SMALL)
    x = torch.randn(4, 10)
    assert torch.equal(torch.compile(memory, backend="eager", fullgraph=True)(x), memory(x))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "dim_key must be even", lambda: ProductKeyMemory(10, dim_key=7)),
        (ValueError, "topk must be at most the 36 pairs", lambda: ProductKeyMemory(10, 6, topk=37)),
        (ValueError, "num_keys must be at most 65536", lambda: ProductKeyMemory(10, 70000)),
        (ValueError, "dim_out needs gated=True", lambda: ProductKeyMemory(10, 6, dim_out=3)),
        (ValueError, "query_norm must be one of 'none', 'batch', 'layer'", lambda: ProductKeyMemory(10, query_norm="")),
        (TypeError, "values must be the nn.Parameter", lambda: ProductKeyMemory(10, 6, values=torch.zeros(36, 10))),
        (ValueError, "expected values", lambda: ProductKeyMemory(10, 6, values=nn.Parameter(torch.zeros(35, 10)))),
        (ValueError, r"\(..., 10\), got \(3, 9\)", lambda: ProductKeyMemory(10, **SMALL)(torch.zeros(3, 9))),
        (TypeError, "floating-point x", lambda: ProductKeyMemory(10, **SMALL)(torch.zeros(3, 10).long())),
        (
            TypeError,
            "mask must be torch.bool",
            lambda: ProductKeyMemory(10, **SMALL)(torch.zeros(3, 10), torch.ones(3)),
        ),
        (
            ValueError,
            "expected mask",
            lambda: ProductKeyMemory(10, **SMALL)(torch.zeros(3, 10), torch.ones(2, dtype=torch.bool)),
        ),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()
