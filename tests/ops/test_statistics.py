"""Sums of queries: rounded once, however many there are and however far from the origin."""

from __future__ import annotations

import pytest
import torch

from kvb import ops, reference

pytestmark = [pytest.mark.contract, pytest.mark.fallback, pytest.mark.memory]

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
op = torch.ops.kvb
BACKENDS = pytest.mark.parametrize("accumulate", [op.accumulate, reference.accumulate], ids=["cpu", "torch"])
ROWS = 2_000 if ops.backend("cpu") == "triton" else 40_000


def exact_sums(queries, indices, K):
    """float64 sums of float32 numbers; of float64 numbers, those of their upper and lower halves."""
    rows = queries[:, 0].transpose(0, 1)
    upper = rows.float().double() if queries.dtype == torch.float64 else rows.double()
    book = torch.arange(rows.shape[0])[:, None] * K
    code = (indices[:, 0].T + book).flatten()
    tables = []
    for part in (upper, rows.double() - upper):
        table = torch.zeros(rows.shape[0] * K, rows.shape[-1], dtype=torch.float64)
        tables.append(table.index_add_(0, code, part.flatten(0, 1)))
    return (tables[0] + tables[1]).view(rows.shape[0], K, -1)


@BACKENDS
@pytest.mark.parametrize("width", [1, 8, 23])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_rounded_once(accumulate, dtype, offset, width):
    K = 3
    queries = (torch.randn(ROWS, 1, 1, width, dtype=torch.float64) + offset).to(dtype)
    indices = torch.randint(K, (ROWS, 1, 1))
    hits, sums = accumulate(queries, indices, K)
    exact = exact_sums(queries, indices, K)
    unit = UNIT[sums.dtype]
    # Half a unit is one rounding; the exact sums are themselves off by a little for float64.
    slack = 1.01 if sums.dtype == torch.float32 else 4
    floor = 1e-12 * ROWS if sums.dtype == torch.float64 else 1e-9
    assert hits.sum() == ROWS
    assert ((sums.double() - exact).abs() <= slack * unit * exact.abs() + unit * floor).all()


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_a_million_rows_of_one_pair(accumulate, offset):
    """Summed one after the other in float32, the mean is off by 1.4."""
    queries = torch.randn(1_000_000, 1, 1, 4) + offset
    hits, sums = accumulate(queries, torch.zeros(1_000_000, 1, 1, dtype=torch.int64), 1)
    mean = sums / hits[..., None]
    exact = queries.double().mean((0, 1, 2))
    assert ((mean[0, 0].double() - exact).abs() <= 2.1 * UNIT[torch.float32] * exact.abs()).all()


@BACKENDS
def test_sums_do_not_depend_on_the_order(accumulate):
    queries, indices = torch.randn(3000, 1, 2, 7) + 1e4, torch.randint(50, (3000, 1, 2))
    order = torch.randperm(3000)
    some, others = accumulate(queries, indices, 50), accumulate(queries[order], indices[order], 50)
    assert torch.equal(some[0], others[0])
    torch.testing.assert_close(some[1], others[1], rtol=2.0**-23, atol=0)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_overflow_are_infinite(accumulate, dtype):
    most = torch.finfo(dtype).max
    queries = torch.tensor([most, most, most, -most, 1.0], dtype=dtype).view(5, 1, 1, 1)
    _, sums = accumulate(queries, torch.tensor([0, 0, 1, 2, 3]).view(5, 1, 1), 5)
    assert sums.flatten().tolist() == [float("inf"), most, -most, 1.0, 0.0]


@pytest.mark.slow
def test_hits_are_exact_beyond_what_float32_counts():
    n = (1 << 24) + 5
    queries = torch.zeros(1, 1, 1, 1).expand(n, 1, 1, 1)
    assert int(op.count(queries, torch.zeros(1, 1, 1, dtype=torch.int64).expand(n, 1, 1), 1)) == n


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sums_do_not_depend_on_how_rows_lie_in_memory(dtype):
    B, S, C, K, D = 7, 9, 5, 4, 6
    seen = torch.randn(B, C, S, D).to(dtype).transpose(1, 2)
    codes = torch.randint(K, (B, S, C))
    for run in (
        lambda rows: op.accumulate(rows, codes, K),
        lambda rows: (op.gather_backward(rows, codes, K, "none"), op.count(rows, codes, K)),
        lambda rows: op.gather_backward_rows(rows, codes, K, "none"),
    ):
        for found, wanted in zip(run(seen), run(seen.contiguous()), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.skipif(ops.backend("cpu") == "triton", reason="an interpreter would take minutes")
@pytest.mark.parametrize("apart", [False, True], ids=["batch order", "codebook by codebook"])
def test_rows_that_no_cache_holds(apart):
    """34 MB of float32 rows: the sums are those of batch order, to the last bit."""
    B, S, C, K, V = 4, 514, 16, 600, 257
    rows = torch.randn(B, C, S, V).transpose(1, 2) if apart else torch.randn(B, S, C, V)
    codes = torch.randint(K, (B, S, C))
    table = (codes + torch.arange(C) * K).flatten()
    want = torch.zeros(C * K, V).index_add_(0, table, rows.flatten(0, 2))
    assert torch.equal(op.gather_backward(rows, codes, K, "none").view(-1, V), want)
    found, grads, count = op.gather_backward_rows(rows, codes, K, "none")
    assert torch.equal(torch.zeros(C * K, V).index_copy_(0, found[:count], grads[:count]), want)
    exact = torch.zeros(C * K, V, dtype=torch.float64).index_add_(0, table, rows.flatten(0, 2).double()).float()
    hits, sums = op.accumulate(rows, codes, K)
    assert torch.equal(hits.flatten(), torch.bincount(table, minlength=C * K))
    assert torch.equal(sums.view(-1, V), exact)
