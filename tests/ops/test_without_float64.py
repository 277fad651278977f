"""The reference on a device that has no float64: the CPU stands for one, and every float64 tensor is refused."""

from __future__ import annotations

import pytest
import torch
from test_exactness import CASES, twins_out_of_order, violations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvb import reference
from kvb.reference import arithmetic


class NoFloat64(TorchDispatchMode):
    """Raises wherever float64 goes into an operator of PyTorch or comes out of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            dtype = leaf.dtype if isinstance(leaf, torch.Tensor) else leaf
            if dtype == torch.float64:
                raise TypeError(f"{func} has no float64 here")
        return out


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(arithmetic, "WITHOUT_FLOAT64", {"cpu"})
    with NoFloat64():
        yield


@pytest.fixture
def data():
    """Queries and keys of every kind in float32 and smaller, drawn before float64 is refused."""
    return [
        (name, *make(400, *sizes), dtype, topk)
        for name, make, sizes, dtype, topk, _ in CASES
        if dtype != torch.float64 and sizes[0] * sizes[1] < 1000 and name != "autocast"
    ]


def search(queries, keys, topk):
    return reference.nearest(queries, keys, reference.pack_keys(keys), None, topk)


def test_float64_is_refused(narrow):
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(3).double()


def test_the_search_is_exact(data):
    for name, queries, keys, dtype, topk in data:
        queries, keys = queries.to(dtype), keys.to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arithmetic, "WITHOUT_FLOAT64", {"cpu"})
            with NoFloat64():
                indices, distances = search(queries, keys, topk)
        assert violations(queries, keys, indices, distances, topk) == 0, name
        if "dup" in name or name == "lattice":
            assert twins_out_of_order(keys, indices) == 0, name
        want = search(queries, keys, topk)
        same = (indices == want[0]).float().mean()
        assert same > 0.999, name
        torch.testing.assert_close(distances, want[1], rtol=1e-6, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1.0, 1e18, 1e30, 3e37])
def test_squares_neither_overflow_nor_underflow(scale, monkeypatch):
    queries, keys = torch.randn(200, 1, 2, 6) * scale, torch.randn(2, 50, 6) * scale
    want = search(queries, keys, 2)
    monkeypatch.setattr(arithmetic, "WITHOUT_FLOAT64", {"cpu"})
    with NoFloat64():
        indices, distances = search(queries, keys, 2)
    assert torch.equal(indices, want[0])
    torch.testing.assert_close(distances, want[1], rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_sums_are_rounded_once(offset, monkeypatch):
    queries, indices = torch.randn(20_000, 1, 2, 5) + offset, torch.randint(7, (20_000, 1, 2))
    want = reference.accumulate(queries, indices, 7)
    monkeypatch.setattr(arithmetic, "WITHOUT_FLOAT64", {"cpu"})
    with NoFloat64():
        hits, sums = reference.accumulate(queries, indices, 7)
    assert torch.equal(hits, want[0])
    torch.testing.assert_close(sums, want[1], rtol=2.0**-23, atol=1e-30)


def test_every_other_operator_runs(narrow):
    C, K, D, V, B = 3, 20, 6, 5, 40
    queries, keys, values = torch.randn(B, 1, C, D), torch.randn(C, K, D), torch.randn(C, K, V)
    packed = reference.pack_keys(keys)
    assert reference.packed_matches(keys, packed)
    out, indices = reference.lookup(queries, keys, packed, values, torch.rand(C, K) < 0.8, "mean")
    assert out.isfinite().all()
    drawn, _ = reference.sample(queries, keys, None, 1e-5, torch.tensor(3))
    assert (drawn == search(queries, keys, 1)[0]).float().mean() > 0.95
    grad = torch.randn(B, 1, V)
    dense = reference.gather_backward(grad, indices, K, "mean")
    rows, merged, count = reference.gather_backward_rows(grad, indices, K, "mean")
    torch.testing.assert_close(dense.view(-1, V)[rows[:count]], merged[:count])
    loss, norm, _ = reference.sgd_step_(values, indices, torch.randint(V, (B,)), 0.1, 1.0, 0.1)
    assert loss.isfinite()
    assert norm.isfinite()
    hits, sums = reference.accumulate(queries, indices, K)
    spare, usable = torch.randn(C, 4, D), torch.full((C,), 4)
    state = keys, keys.clone(), torch.ones(C, K)
    again = reference.update_keys_(*state, hits.float(), sums, spare, usable, 0.9, 1e-5, 0.5, 1.0, False)
    assert reference.packed_matches(keys, again)
