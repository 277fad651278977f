"""Hand-written integer tables: every operator, every dtype, exact. Small integers are exact in all of them."""

from __future__ import annotations

import pytest
import torch

from kvb import ops  # noqa: F401  (registers the operators)

pytestmark = [pytest.mark.contract, pytest.mark.memory, pytest.mark.interpreted]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
op = torch.ops.kvb

# Two codebooks of four keys in the plane. Codebook 0 holds the twins 1 and 3.
KEYS = [[[0, 0], [4, 0], [0, 4], [4, 0]], [[1, 1], [-1, 1], [-1, -1], [1, -1]]]
VALUES = [[[1, 10], [2, 20], [3, 30], [4, 40]], [[5, 50], [6, 60], [7, 70], [8, 80]]]
# Three queries for each codebook: [B=3, S=1, C=2, D=2].
QUERIES = [
    [[[1, 0], [2, 2]]],  # nearest to key 0; nearest to key 0
    [[[4, 1], [0, 0]]],  # the twins 1 and 3 tie; all four tie
    [[[2, 2], [-3, 0]]],  # all four tie; keys 1 and 2 tie
]


def table(dtype):
    keys = torch.tensor(KEYS, dtype=dtype)
    return torch.tensor(QUERIES, dtype=dtype), keys, op.pack_keys(keys), torch.tensor(VALUES, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nearest_breaks_ties_by_lowest_index(dtype):
    queries, keys, packed, _ = table(dtype)
    indices, distances = op.nearest(queries, keys, packed, None, 1)
    assert indices.dtype == torch.int64
    assert indices[:, 0, :, 0].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert distances[:, 0, :, 0].tolist() == [[1, 2], [1, 2], [8, 5]]
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk_lists_every_rank(dtype):
    queries, keys, packed, _ = table(dtype)
    indices, distances = op.nearest(queries, keys, packed, None, 4)
    assert indices[:, 0].tolist() == [
        [[0, 1, 3, 2], [0, 1, 3, 2]],
        [[1, 3, 0, 2], [0, 1, 2, 3]],
        [[0, 1, 2, 3], [1, 2, 0, 3]],
    ]
    assert distances[:, 0].tolist() == [
        [[1, 9, 9, 17], [2, 10, 10, 18]],
        [[1, 1, 17, 25], [2, 2, 2, 2]],
        [[8, 8, 8, 8], [5, 5, 17, 17]],
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_mask_bars_pairs(dtype):
    queries, keys, packed, _ = table(dtype)
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    indices, distances = op.nearest(queries, keys, packed, mask, 1)
    assert indices[:, 0, :, 0].tolist() == [[0, 1], [3, 1], [0, 1]]
    assert distances[:, 0, :, 0].tolist() == [[1, 10], [1, 2], [8, 5]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_too_few_usable_pairs_are_filled_with_the_lowest_unused(dtype):
    queries, keys, packed, _ = table(dtype)
    mask = torch.tensor([[False, False, True, False], [False, False, False, False]])
    indices, distances = op.nearest(queries, keys, packed, mask, 3)
    inf = float("inf")
    assert indices[:, 0].tolist() == [[[2, 0, 1], [0, 1, 2]]] * 3
    assert distances[:, 0].tolist() == [[[d, inf, inf], [inf, inf, inf]] for d in (17, 25, 8)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_gets_the_first_pairs_at_nan(dtype, bad):
    queries, keys, packed, _ = table(dtype)
    queries[0, 0, 1, 0] = bad
    indices, distances = op.nearest(queries, keys, packed, None, 2)
    assert indices[0, 0].tolist() == [[0, 1], [0, 1]]
    assert distances[0, 0, 0].tolist() == [1, 9]
    assert distances[0, 0, 1].isnan().all()
    assert indices[1:, 0].tolist() == [[[1, 3], [0, 1]], [[0, 1], [1, 2]]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_never_wins_and_spoils_nothing(dtype, bad):
    queries, keys, _, _ = table(dtype)
    keys[0, 0, 1] = bad
    indices, distances = op.nearest(queries, keys, op.pack_keys(keys), None, 4)
    assert indices[:, 0, 0].tolist() == [[1, 3, 2, 0], [1, 3, 2, 0], [1, 2, 3, 0]]
    assert distances[:, 0, 0].tolist() == [[9, 9, 17, float("inf")], [1, 1, 25, float("inf")], [8, 8, 8, float("inf")]]
    assert indices[:, 0, 1].tolist() == [[0, 1, 3, 2], [0, 1, 2, 3], [1, 2, 0, 3]]


def test_a_codebook_without_a_finite_key():
    queries, keys, _, _ = table(torch.float32)
    keys[0] = float("nan")
    indices, distances = op.nearest(queries, keys, op.pack_keys(keys), None, 2)
    assert indices[:, 0, 0].tolist() == [[0, 1]] * 3
    assert distances[:, 0, 0].isinf().all()
    assert indices[:, 0, 1, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_sample_at_a_low_temperature_is_the_nearest(dtype):
    queries, keys, _, _ = table(dtype)
    mask = torch.tensor([[True, False, True, True], [True, True, True, True]])
    indices, distances = op.sample(queries[:1], keys, mask, 1e-3, torch.tensor(7))
    assert indices.tolist() == [[[[0], [0]]]]
    assert distances.tolist() == [[[[1], [2]]]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_sample_draws_ties_evenly_and_never_a_masked_pair(dtype):
    _, keys, _, _ = table(dtype)
    queries = torch.zeros(4000, 1, 2, 2, dtype=dtype)
    queries[:, 0, 0] = 2  # every key of codebook 0 is at distance 8
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    indices, distances = op.sample(queries, keys, mask, 1.0, torch.tensor(1))
    share = indices[:, 0, 0, 0].bincount(minlength=4) / 4000
    assert share[1] == 0
    assert (share[[0, 2, 3]] - 1 / 3).abs().max() < 0.04
    assert (distances[:, 0, 0] == 8).all()
    assert (indices[:, 0, 1] == 0).all()
    assert distances[:, 0, 1].isinf().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", INTEGERS)
def test_gather(dtype, index):
    *_, values = table(dtype)
    indices = torch.tensor([[[3, 0]], [[1, 1]], [[0, 3]]], dtype=index)
    each = [[[4, 40], [5, 50]], [[2, 20], [6, 60]], [[1, 10], [8, 80]]]
    assert op.gather(values, indices, "none", "bscv")[:, 0].tolist() == each
    assert op.gather(values, indices, "none", "bcsv")[:, :, 0].tolist() == each
    assert op.gather(values, indices, "sum", "bscv")[:, 0].tolist() == [[9, 90], [8, 80], [9, 90]]
    assert op.gather(values, indices, "mean", "bscv")[:, 0].tolist() == [[4.5, 45], [4, 40], [4.5, 45]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", INTEGERS)
def test_gather_backward(dtype, index):
    indices = torch.tensor([[[3, 0], [3, 1]], [[1, 0], [3, 0]]], dtype=index)
    grad = torch.tensor(
        [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[[9, 10], [11, 12]], [[13, 14], [15, 16]]]], dtype=dtype
    )
    dense = [[[0, 0], [9, 10], [0, 0], [19, 22]], [[29, 32], [7, 8], [0, 0], [0, 0]]]
    assert op.gather_backward(grad, indices, 4, "none").tolist() == dense
    rows, grads, count = op.gather_backward_rows(grad, indices, 4, "none")
    assert count.tolist() == [4]
    assert rows.tolist() == [1, 3, 4, 5, -1, -1, -1, -1]
    assert grads.tolist() == [[9, 10], [19, 22], [29, 32], [7, 8], *[[0, 0]] * 4]


@pytest.mark.parametrize("dtype", FLOATS)
def test_pooled_gradients_share_the_row(dtype):
    indices = torch.tensor([[[3, 0]], [[3, 1]]])
    grad = torch.tensor([[[2, 4]], [[6, 8]]], dtype=dtype)
    assert op.gather_backward(grad, indices, 4, "sum").tolist() == [
        [[0, 0], [0, 0], [0, 0], [8, 12]],
        [[2, 4], [6, 8], [0, 0], [0, 0]],
    ]
    assert op.gather_backward(grad, indices, 4, "mean").tolist() == [
        [[0, 0], [0, 0], [0, 0], [4, 6]],
        [[1, 2], [3, 4], [0, 0], [0, 0]],
    ]
    rows, grads, count = op.gather_backward_rows(grad, indices, 4, "mean")
    assert (rows.tolist(), count.tolist()) == ([3, 4, 5, -1], [3])
    assert grads.tolist() == [[4, 6], [1, 2], [3, 4], [0, 0]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", INTEGERS)
def test_accumulate_and_count_skip_what_is_not_finite(dtype, index):
    queries, *_ = table(dtype)
    queries[2, 0, 0, 1] = float("nan")
    queries[0, 0, 1, 0] = -float("inf")
    indices = torch.tensor([[[1, 0]], [[1, 2]], [[1, 2]]], dtype=index)
    hits, sums = op.accumulate(queries, indices, 4)
    assert hits.dtype == torch.int64
    assert hits.tolist() == [[0, 2, 0, 0], [0, 0, 2, 0]]
    assert sums.tolist() == [[[0, 0], [5, 1], [0, 0], [0, 0]], [[0, 0], [0, 0], [-3, 0], [0, 0]]]
    assert op.count(queries, indices, 4).tolist() == hits.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_lookup(dtype):
    queries, keys, packed, values = table(dtype)
    out, indices = op.lookup(queries, keys, packed, values, None, "none")
    assert indices[:, 0].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert out[:, 0].tolist() == [[[1, 10], [5, 50]], [[2, 20], [5, 50]], [[1, 10], [6, 60]]]
    assert op.lookup(queries, keys, packed, values, None, "sum")[0][:, 0].tolist() == [[6, 60], [7, 70], [7, 70]]


@pytest.mark.parametrize("keys_dtype", FLOATS)
@pytest.mark.parametrize("queries_dtype", FLOATS)
def test_mixed_dtypes(queries_dtype, keys_dtype):
    queries, _, _, _ = table(queries_dtype)
    _, keys, packed, _ = table(keys_dtype)
    indices, distances = op.nearest(queries, keys, packed, None, 1)
    assert indices[:, 0, :, 0].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert (distances.dtype == torch.float64) == (torch.float64 in (queries_dtype, keys_dtype))


def test_pack_keys_is_the_same_bytes_every_time(poisoned):
    keys = torch.randn(3, 21, 5)
    assert torch.equal(op.pack_keys(keys), op.pack_keys(keys.clone()))
