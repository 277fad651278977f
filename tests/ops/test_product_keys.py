"""Product keys and weighted rows: tables written by hand, brute force over all pairs, derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kvb import ops, reference

pytestmark = pytest.mark.fallback

op = torch.ops.kvb


def brute(queries, keys, topk):
    """All K * K sums of half scores, sorted: equal ones by index."""
    half = keys.shape[-1]
    first = torch.einsum("ncd,ckd->nck", queries[..., :half], keys[:, 0])
    second = torch.einsum("ncd,ckd->nck", queries[..., half:], keys[:, 1])
    sums = (first[..., :, None] + second[..., None, :]).flatten(2)
    found = sums.sort(dim=-1, descending=True, stable=True)
    return found.indices[..., :topk], found.values[..., :topk]


def integers(N, C, K, D, dtype=torch.float32, high=4):
    """Small ones: every half score and every sum is exact, and many are equal."""
    draw = [torch.randint(-high, high + 1, shape) for shape in ((N, C, D), (C, 2, K, D // 2))]
    return [each.to(dtype) for each in draw]


def test_a_table_written_by_hand():
    keys = torch.tensor([[[[1.0, 0], [0, 1], [2, 0]], [[0.0, 1], [1, 1], [1, 0]]]])  # [1, 2, K = 3, 2]
    queries = torch.tensor([[[1.0, 2, 3, 1]], [[0.0, 0, 0, 0]], [[-1.0, 0, 0, 2]]])
    # First halves score 1, 2, 2; 0, 0, 0; -1, 0, -2. Second halves score 1, 4, 3; 0, 0, 0; 2, 2, 0.
    indices, scores = op.product_nearest(queries, keys, 4)
    assert indices[:, 0].tolist() == [[4, 7, 1, 5], [0, 1, 2, 3], [3, 4, 0, 1]]
    assert scores[:, 0].tolist() == [[6, 6, 5, 5], [0, 0, 0, 0], [2, 2, 1, 1]]
    values = torch.tensor([[1.0, 10], [2, 20], [3, 30]])
    rows, weights = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[1.0, -1], [0.5, 2]])
    assert op.gather_weighted(values, rows, weights).tolist() == [[2, 20], [5, 50]]
    assert op.gather_dot(values, rows, torch.tensor([[1.0, 0], [1, 1]])).tolist() == [[3, 1], [22, 22]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("K", "topk"), [(1, 1), (2, 3), (2, 4), (7, 32), (40, 5), (100, 32), (70, 100)])
def test_the_best_of_all_pairs(dtype, K, topk):
    queries, keys = integers(5, 2, K, 6, dtype)
    indices, scores = op.product_nearest(queries, keys, topk)
    want = brute(queries, keys, topk)
    assert torch.equal(indices, want[0])
    assert torch.equal(scores, want[1].to(scores.dtype))


@pytest.mark.parametrize("topk", [1, 32, 81])
def test_the_best_of_a_million_pairs(topk):
    queries, keys = integers(3, 1, 1000, 16, high=100)
    assert torch.equal(op.product_nearest(queries, keys, topk)[0], brute(queries, keys, topk)[0])


def test_the_best_of_a_million_pairs_of_real_numbers():
    """Numbers of a few bits: products and sums are exact, nearly none are equal."""
    queries, keys = (each / 256 for each in integers(3, 1, 1000, 8, high=500))
    indices, scores = op.product_nearest(queries, keys, 32)
    want = brute(queries, keys, 32)
    assert torch.equal(indices, want[0])
    assert torch.equal(scores, want[1])


def test_sums_that_round_to_the_same_number_stand_in_their_exact_order():
    """1 + 2**-30 is 1 in float32; exact sums order them nevertheless, and no index does."""
    first, second = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0**-30, 2.0**-40])
    keys = torch.zeros(1, 2, 3, 1)
    keys[0, 0, :2, 0], keys[0, 0, 2, 0], keys[0, 1, :, 0] = first, -5, second
    for run in (op.product_nearest, reference.product_nearest):
        indices, scores = run(torch.ones(1, 1, 2), keys, 4)
        assert indices.flatten().tolist() == [1, 2, 0, 4]
        assert scores.flatten().tolist() == [1, 1, 1, 0.5]


def test_numbers_that_are_not_finite():
    queries, keys = integers(4, 1, 50, 6)
    queries[1] = torch.nan
    keys[0, 0, 7] = torch.nan
    indices, scores = op.product_nearest(queries, keys, 8)
    assert indices[1].tolist() == [[*range(8)]]
    assert scores[1].isnan().all()
    assert not (indices[[0, 2, 3]] // 50 == 7).any()
    assert scores[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("view", [lambda one: one.mT.contiguous().mT, lambda one: torch.stack([one, one], -1)[..., 0]])
def test_any_strides(view):
    queries, keys = integers(5, 2, 20, 6)
    found = op.product_nearest(view(queries), view(keys), 5)
    assert torch.equal(found[0], op.product_nearest(queries, keys, 5)[0])
    values, rows, weights = torch.randn(20, 7), torch.randint(20, (5, 4)), torch.randn(5, 4)
    for run, other in ((op.gather_weighted, weights), (op.gather_dot, torch.randn(5, 7))):
        torch.testing.assert_close(run(view(values), view(rows), view(other)), run(values, rows, other))


@pytest.mark.parametrize("V", [1, 5, 16, 40, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weighted_rows_of_any_width(V, dtype):
    values, rows, weights = torch.randn(50, V, dtype=dtype), torch.randint(50, (9, 6)), torch.randn(9, 6, dtype=dtype)
    vectors = torch.randn(9, V, dtype=dtype)
    fetched, close = values.double()[rows], {"rtol": torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    want = (fetched * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(op.gather_weighted(values, rows, weights).double(), want, **close)
    want = (fetched * vectors.double()[:, None]).sum(-1)
    torch.testing.assert_close(op.gather_dot(values, rows, vectors).double(), want, rtol=close["rtol"], atol=1e-5 * V)


def test_nothing_to_do():
    keys, values = torch.randn(2, 2, 5, 3), torch.randn(5, 3)
    assert op.product_nearest(torch.randn(0, 2, 6), keys, 4)[0].shape == (0, 2, 4)
    none = torch.zeros(3, 0, dtype=torch.int64)
    assert op.gather_weighted(values, none, torch.zeros(3, 0)).tolist() == torch.zeros(3, 3).tolist()
    assert op.gather_dot(values, none, torch.zeros(3, 3)).shape == (3, 0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (RuntimeError, "topk from 1 to K \\* K = 25", lambda q, k, v, i: op.product_nearest(q, k, 26)),
        (RuntimeError, "expected queries", lambda q, k, v, i: op.product_nearest(q[:, :1], k, 2)),
        (RuntimeError, "expected keys torch.float64", lambda q, k, v, i: op.product_nearest(q.double(), k, 2)),
        (IndexError, "index 5 is out of bounds", lambda q, k, v, i: op.gather_weighted(v, i + 1, i.float())),
        (IndexError, "index -1 is out of bounds", lambda q, k, v, i: op.gather_dot(v, i - 5, v[:3])),
        (RuntimeError, "expected weights", lambda q, k, v, i: op.gather_weighted(v, i, i[:, :1].float())),
        (RuntimeError, "expected vectors", lambda q, k, v, i: op.gather_dot(v, i, v[:2])),
        (IndexError, "index 4 is out of bounds", lambda q, k, v, i: op.scatter_weighted_rows(v[:3], i, i.float(), 4)),
        (RuntimeError, "expected weights", lambda q, k, v, i: op.scatter_weighted_rows(v[:3], i, v, 5)),
        (RuntimeError, "indices torch.int64", lambda q, k, v, i: op.gather_dot(v, i.int(), v[:3])),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 2, 6), torch.randn(2, 2, 5, 3), torch.randn(5, 3), torch.full((3, 2), 4))


# --- derivatives ------------------------------------------------------------------------------------------------------


def test_derivatives_of_scores():
    C, K = 2, 5
    queries = torch.randn(2, C, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(C, 2, K, 2, dtype=torch.float64, requires_grad=True)

    def scores(q, k):
        return op.product_nearest(q, k, 3)[1]

    assert gradcheck(scores, (queries, keys), check_forward_ad=True)
    assert gradgradcheck(lambda q, k: scores(q, k) ** 2, (queries, keys))


def test_derivatives_of_weighted_rows():
    values = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(4, (3, 2))
    for run, other in ((op.gather_weighted, weights), (op.gather_dot, vectors)):
        assert gradcheck(lambda v, w, run=run: run(v, rows, w), (values, other), check_forward_ad=True)
        assert gradgradcheck(lambda v, w, run=run: run(v, rows, w) ** 2, (values, other))


def test_gradients_as_rows_are_those_of_the_dense_table(monkeypatch):
    values, weights = torch.randn(60, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    rows, grad = torch.randint(9, (4, 3)) * 5, torch.randn(4, 5)
    dense = torch.autograd.grad(op.gather_weighted(values, rows, weights), (values, weights), grad)
    for width in (1 << 22, 12, 24):  # columns at a time
        monkeypatch.setattr(ops.memory, "TILE", width)
        monkeypatch.setattr(reference.memory, "TILE", width)
        again = torch.autograd.grad(op.gather_weighted(values, rows, weights), values, grad)
        assert torch.equal(again[0], dense[0])
        sparse = torch.autograd.grad(ops.gather_weighted_row_grad(values, rows, weights), (values, weights), grad)
        assert sparse[0].is_coalesced()
        assert torch.equal(sparse[0].indices()[0], rows.unique())
        assert torch.equal(sparse[0].to_dense(), dense[0])
        assert torch.equal(sparse[1], dense[1])
