"""The GPU kernels, interpreted: which of them a search launches, what they find, and that they stay in their memory."""

from __future__ import annotations

import pytest
import torch

from kvb import ops, reference

if ops.backend("cpu") != "triton":  # Triton decides at its import whether to interpret
    pytest.skip("kernels run where TRITON_INTERPRET=1 KVB_CPU_CAPABILITY=triton is set", allow_module_level=True)

import numpy as np
from launches import FEW, require_the_nearest
from search_data import GRID, OPEN
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kvb.kernels import (
    launch_filter,
    launch_scan,
    launch_search,
    launch_shared,
    launch_table,
    rows,
)
from kvb.testing.data import clusters, duplicates, near_duplicates, normal, outliers

pytestmark = [
    pytest.mark.contract,
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, where numbers overflow on purpose
]
op = torch.ops.kvb
FILTER = ["prepare", "search", "settle", "rescan"]
RESIDENT = ["resident", "refine", "rescan"]


# --- which kernels search ---------------------------------------------------------------------------------------------


def test_few_queries_are_scanned(launched):
    queries, keys = normal(FEW, 2, 257, 10)
    require_the_nearest(queries, keys)
    assert launched.names == ["survey", "pack", "scan"]


def test_few_queries_share_a_large_codebook(launched):
    queries, keys = normal(FEW, 1, 2100, 5)
    keys[:, 2000:2010] = keys[:, :10]  # twins on both sides of the cut
    queries[0, 0, 0] = keys[0, 2000]
    queries[-1] = torch.nan
    require_the_nearest(queries, keys)
    assert launched.names == ["survey", "pack", "scan", "merge"]
    assert launched[2].grid == (1, 2)


def test_parts_without_a_usable_key(launched):
    queries, keys = normal(FEW, 1, 2100, 3)
    packed = op.pack_keys(keys)
    for usable in (range(2000, 2100), range(0)):
        mask = torch.zeros(1, 2100, dtype=torch.bool)
        mask[:, list(usable)] = True
        require_the_nearest(queries, keys, mask, packed=packed)
    assert launched.names[-2:] == ["scan", "merge"]


def test_parts_beyond_the_last_key(launched, monkeypatch):
    monkeypatch.setattr(launch_scan, "LEAST", 32)
    require_the_nearest(*normal(FEW, 1, 520, 2))
    assert launched[2].grid == (1, 16)
    assert launched[2].arguments["per_split"] * 15 > 520


@pytest.mark.parametrize(("dtype", "topk"), [(torch.float64, 1), (torch.float32, 3)])
def test_what_no_filter_can_do_is_scanned(dtype, topk, launched):
    queries, keys = (part.to(dtype) for part in normal(20, 2, 130, 6))
    require_the_nearest(queries, keys, topk=topk)
    assert launched.names[-1] == "scan"
    assert not {"resident", "search"} & set(launched.names)


@pytest.mark.parametrize(
    ("K", "D", "parts"),
    [(31, 32, (32, 0, 0)), (200, 32, (128, 64, 32)), (256, 32, (128, 64, 64)), (256, 14, (128, 128, 0))],
)
def test_small_codebooks_stay_on_the_chip(K, D, parts, launched):
    require_the_nearest(*normal(70, 2, K, D))
    assert launched.names == ["survey", "pack", *RESIDENT]
    assert tuple(launched[2].arguments[part] for part in ("P0", "P1", "P2")) == parts
    assert sum(parts) >= K


def test_programs_take_turns_at_a_small_codebook(launched, monkeypatch):
    monkeypatch.setattr(launch_filter, "RESIDENT_ROWS", 16)
    monkeypatch.setattr(launch_filter, "RESIDENT_PROGRAMS", 1)
    require_the_nearest(*normal(100, 4, 40, 8))
    (resident,) = (launch for launch in launched if launch.kernel == "resident")
    assert resident.grid == (2 * 4,)  # for seven tiles of 16 rows


def test_few_rows_stay_open_and_fewer_are_rescanned(launched):
    """The share that benchmarks/triton_static/predict.py predicts with."""
    require_the_nearest(*normal(512, 2, 200, 32))
    assert 0 < launched.opened() <= 0.07 * 1024
    assert launched.listed() <= 2


def test_large_codebooks_are_filtered(launched):
    require_the_nearest(*normal(20, 2, 257, 10))
    assert launched.names == ["survey", "pack", *FILTER]
    assert launched.listed() == 0


@pytest.mark.parametrize(
    ("K", "D", "searched"), [(300, 1, "scan"), (2900, 2, "scan"), (2400, 2, "rescan"), (300, 3, "rescan")]
)
def test_keys_too_close_together_for_the_filter_are_scanned(K, D, searched, launched):
    queries, keys = normal(20, 1, K, D)
    keys[:, 200:220] = keys[:, :20]
    queries[:20, 0, 0] = keys[0, :20] + queries[:, 0, 0] / K
    mask = torch.rand(1, K) < 0.7
    require_the_nearest(queries, keys)
    assert launched.names[-1] == searched
    require_the_nearest(queries, keys, mask)
    assert launched.names[-1] == searched


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_rescans_are_few_on_a_line(target, launched, monkeypatch):
    """Small codebooks of one coordinate: what stays on the chip settles nearly all rows by itself."""
    monkeypatch.setattr(launch_search, "target", lambda device: target)
    require_the_nearest(*normal(200, 1, 250, 1))
    assert launched.names[-1] == ("scan" if target == "sm_80" else "rescan")
    assert launched.listed() <= 10


def test_programs_share_a_large_codebook(launched):
    queries, keys = normal(20, 1, 600, 8)
    keys[:, 590:] = keys[:, :10]  # twins in different parts
    queries[:10, 0, 0] = keys[0, :10]
    require_the_nearest(queries, keys)
    (search,) = (launch for launch in launched if launch.kernel == "search")
    assert search.grid[1] == search.arguments["splits"] == 2


def test_more_tiles_of_keys_than_are_read_at_once(monkeypatch):
    """The largest key, which bounds the error of all scores, lies in the last of five tiles."""
    monkeypatch.setattr(launch_filter, "RADII", 2)
    queries, keys = normal(20, 2, 300, 14)
    keys[:, -1] *= 1000
    keys[:, 1:101] = keys[:, :100] + 1e-4 * torch.randn(2, 100, 14)
    queries[:, 0] = keys[:, :20].transpose(0, 1) + 1e-5
    require_the_nearest(queries, keys)


def test_a_mask_packs_the_keys_anew(launched):
    queries, keys = normal(20, 2, 300, 7)
    packed = op.pack_keys(keys)
    launched.clear()
    mask = torch.rand(2, 300) < 0.2
    mask[1] = False
    require_the_nearest(queries, keys, mask, packed=packed)
    assert launched.names == ["survey", "pack", *FILTER]


@pytest.mark.parametrize(("shape", "chunks"), [((30, 1), 3), ((4, 8), 4), ((1, 33), 4)])
def test_more_rows_than_one_launch_takes(shape, chunks, launched, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 20)
    queries, keys = torch.randn(*shape, 2, 5), torch.randn(2, 300, 5)
    packed = op.pack_keys(keys)
    launched.clear()
    require_the_nearest(queries, keys, packed=packed)
    assert launched.names == chunks * FILTER


def test_a_lookup_of_few_queries_is_one_kernel(launched):
    (queries, keys), values = normal(FEW, 2, 40, 6), torch.randn(2, 40, 70)
    packed = op.pack_keys(keys)
    launched.clear()
    fetched, indices = op.lookup(queries, keys, packed, values, None, "none")
    assert launched.names == ["scan"]
    assert torch.equal(indices, reference.nearest(queries, keys, reference.pack_keys(keys), None, 1)[0][..., 0])
    assert torch.equal(fetched, values[torch.arange(2), indices])
    op.lookup(queries, keys, packed, values, None, "mean")
    assert launched.names == ["scan", "scan", "gather_pooled"]


def test_nothing_is_launched_for_nothing(launched):
    keys = torch.randn(2, 300, 5)
    packed = op.pack_keys(keys)
    launched.clear()
    for shape in ((0, 3, 2, 5), (3, 0, 2, 5)):
        indices, distances = op.nearest(torch.randn(shape), keys, packed, None, 2)
        assert indices.shape == distances.shape == (*shape[:3], 2)
        out, _ = op.lookup(torch.randn(shape), keys, packed, torch.randn(2, 300, 4), None, "mean")
        assert out.shape == (*shape[:2], 4)
    assert launched == []


# --- what they find ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "D", "dtype", "data", "memory"), GRID)
def test_the_grid(K, D, dtype, data, memory):
    queries, keys = (part.to(dtype) for part in data(34, 2, K, D))
    require_the_nearest(memory(queries), keys)


@pytest.mark.parametrize(("target", "K", "D", "dtype", "data"), OPEN)
def test_rows_that_one_product_leaves_open(target, K, D, dtype, data, launched, monkeypatch):
    """In both layouts of scores, with a mask and without."""
    monkeypatch.setattr(launch_search, "target", lambda device: target)
    queries, keys = (part.to(dtype) for part in data(40, 2, K, D))
    packed = op.pack_keys(keys)
    launched.clear()
    require_the_nearest(queries, keys, packed=packed)
    assert launched.names == RESIDENT
    if data in (near_duplicates, clusters) and K > 2 and D > 10:
        assert launched.opened() > 40
    mask = torch.rand(2, K) < 0.5
    require_the_nearest(queries, keys, mask, packed=packed)


def test_every_row_may_stay_open(launched):
    """Nearly all keys are candidates of every row: one far key leaves the others too close together."""
    queries, keys = normal(20, 1, 200, 32)
    keys = keys[:, :1] + keys * 1e-4
    keys[:, -1] += 100
    require_the_nearest(queries, keys)
    assert launched.opened() == 20


@pytest.mark.parametrize(("target", "D"), list(zip(launch_table.SEARCH, (5, 130, 14, 64, 10, 100, 32), strict=True)))
def test_every_architecture_finds_the_same(target, D, monkeypatch):
    """Its block sizes and its layout of scores, for one width of packed keys."""
    monkeypatch.setattr(launch_search, "target", lambda device: target)
    require_the_nearest(*duplicates(40, 1, 300, D))


@pytest.mark.slow
@pytest.mark.parametrize("D", [10, 14, 32, 64, 100, 130])
@pytest.mark.parametrize("target", launch_table.SEARCH)
def test_the_whole_launch_table(target, D, monkeypatch):
    monkeypatch.setattr(launch_search, "target", lambda device: target)
    for K in (200, 600, 1100):
        require_the_nearest(*duplicates(300, 2, K, D))


@pytest.fixture
def flushing(monkeypatch):
    """Matrix products take 16-bit numbers without a full significand as zero; call it and the launches know of it."""
    multiply = InterpreterBuilder.create_dot

    def flushed(handle):
        small = handle.dtype.primitive_bitwidth == 16 and np.abs(handle.data) < 2.0**-14
        return TensorHandle(np.where(small, 0, handle.data).astype(handle.data.dtype), handle.dtype)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: multiply(self, flushed(a), flushed(b), *rest)
    )

    def told():
        for module in (launch_filter, launch_shared):
            monkeypatch.setattr(module, "matrix_units", lambda device: "flushing")

    return told


def small_parts(N, C, K, D):
    """Pairs of keys that differ by what float16 flushes, far from all others, and queries next to them."""
    queries, keys = normal(N, C, K, D)
    keys[:, 1::2] = keys[:, ::2][:, : K // 2] + torch.randn(C, K // 2, D) * 2e-6
    queries[:, 0] = keys[torch.arange(C), torch.randint(K, (N, C))]
    return queries, keys


@pytest.mark.parametrize("data", [small_parts, near_duplicates, outliers, clusters])
@pytest.mark.parametrize(("K", "D"), [(300, 10), (300, 14), (300, 31), (257, 130), (200, 8), (200, 32)])
def test_flushed_numbers_decide_nothing(K, D, data, flushing):
    queries, keys = data(40, 2, K, D)
    flushing()
    require_the_nearest(queries, keys)


def test_what_is_flushed_may_decide(flushing):
    """A query that is nearer to one of two keys by many small coordinates, and to the other by one large one."""
    D = 128
    others = torch.nn.functional.normalize(torch.randn(149, D), dim=1) * 1.1
    one = torch.full((1, D), D**-0.5)
    keys = torch.cat([one, others, -others, -one])[None]
    scale = op.pack_keys(keys).view(torch.float32)[0, 0]
    query = torch.full((1, 1, 1, D), 0.99 * 2.0**-14)
    query[..., -1] = -0.9 * query[..., :-1].sum()
    queries = (query / scale).expand(10, -1, -1, -1)
    with pytest.raises(AssertionError, match="10 of 10 differ"):
        require_the_nearest(queries, keys)
    flushing()
    require_the_nearest(queries, keys)


@pytest.mark.parametrize("K", [20, 300])
def test_small_gradients_are_not_flushed(K, flushing):
    indices = torch.randint(K, (40, 1, 2))
    grad = (torch.randn(40, 1, 2, 5) * 2.0**-18).to(torch.float16)
    want = reference.gather_backward(grad, indices, K, "none")
    if K == 20:
        assert op.gather_backward(grad, indices, K, "none").eq(0).all()
    flushing()
    torch.testing.assert_close(op.gather_backward(grad, indices, K, "none"), want, rtol=1e-3, atol=2.0**-24)
    grads = op.gather_backward_rows(grad, indices, K, "none")[1]
    torch.testing.assert_close(
        grads, reference.gather_backward_rows(grad, indices, K, "none")[1], rtol=1e-3, atol=2.0**-24
    )


@pytest.mark.parametrize("K", [20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_without_matrix_units(K, dtype, launched, monkeypatch):
    monkeypatch.setattr(launch_shared, "matrix_units", lambda device: "none")
    indices, grad = torch.randint(K, (40, 2, 3)), torch.randn(40, 2, 3, 5).to(dtype)
    unit = torch.finfo(dtype).eps
    for got, want in (
        (op.gather_backward(grad, indices, K, "none"), reference.gather_backward(grad, indices, K, "none")),
        (
            op.gather_backward_rows(grad, indices, K, "none")[1],
            reference.gather_backward_rows(grad, indices, K, "none")[1],
        ),
    ):
        torch.testing.assert_close(got, want, rtol=2 * unit, atol=2e-6)
    assert "add_by_product" not in launched.names


@pytest.mark.parametrize("K", [200, 1100])
def test_twins_do_not_flood_the_rescan(K, launched):
    require_the_nearest(*duplicates(64, 2, K, 14))
    assert launched.names[-1] == "rescan"
    assert launched.listed() <= 6  # of 128


@pytest.mark.parametrize(("K", "D"), [(257, 8), (600, 8), (300, 20)])
def test_what_the_filter_cannot_tell_apart_is_rescanned(K, D, launched):
    """Keys that differ in the last bits: no filter in float16 parts can order them."""
    queries, keys = normal(20, 1, K, D)
    keys[:, 100:200] = (keys[:, :100].view(torch.int32) + torch.randint(-2, 3, (1, 100, D), dtype=torch.int32)).view(
        torch.float32
    )
    queries[:, 0, 0] = keys[0, :20] + 1e-3
    require_the_nearest(queries, keys)
    assert launched.names[-1] == "rescan"
    assert launched.listed() > 0
