"""Random and adversarial inputs, judged in higher precision: no query may violate the numeric contract.

For every query and rank: ``d(chosen) - d(best) <= 8 u (|q-m| + max|k-m|)^2`` with u = 2^-24 (2^-53 for float64 inputs),
the returned distance is the chosen key's (float32: rounded once; float64: a sum of D squares in float64), and equal
keys yield the lowest index.
"""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch

from kvb import functional, ops, reference
from kvb.testing.data import (
    bisectors,
    broken_keys,
    broken_queries,
    clusters,
    duplicates,
    far_key,
    lattice,
    magnitudes,
    near_duplicates,
    normal,
    offset,
    scaled,
)

pytestmark = pytest.mark.contract

# Triton's interpreter runs one program after the other.
INTERPRETED = ops.backend("cpu") == "triton"
CI_QUERIES, ALL_QUERIES = (5_000, 200_000) if INTERPRETED else (1_000_000, 10_000_000)

# How many queries a call gets, by what begins the name: few read keys as they lie, and for some each codebook is packed
# and searched in turn. Only the C++ backend tells them apart.
CALLS = {"few, ": 16, "some, ": 1000} if ops.backend("cpu") == "cpp" else {}

# name, data, (C, K, D), dtype, topk, share of all queries. Small codebooks and large ones are searched differently.
CASES = [
    ("normal", normal, (2, 64, 8), torch.float32, 1, 12),
    ("normal, K below a group", normal, (3, 7, 14), torch.float32, 2, 6),
    ("normal, large K", normal, (1, 1024, 14), torch.float32, 1, 2),
    ("normal, large D", normal, (2, 40, 200), torch.float32, 3, 2),
    ("offset 100, D of hundreds", offset, (1, 40, 520), torch.float32, 1, 1),
    ("normal, topk", normal, (2, 64, 8), torch.float32, 5, 6),
    ("normal, most keys of a codebook", normal, (1, 64, 17), torch.float32, 33, 1),
    ("normal, topk of a large K", normal, (1, 600, 14), torch.float32, 8, 1),
    ("offset 100, topk and D of dozens", offset, (1, 300, 70), torch.float32, 32, 1),
    ("near-duplicates, topk of a large K", near_duplicates, (1, 400, 5), torch.float32, 16, 1),
    ("offset 100", offset, (2, 64, 8), torch.float32, 1, 12),
    ("offset 100, topk", offset, (2, 33, 5), torch.float32, 3, 6),
    ("duplicates", duplicates, (2, 64, 8), torch.float32, 2, 6),
    ("near-duplicates", near_duplicates, (2, 64, 8), torch.float32, 1, 8),
    ("near-duplicates, topk", near_duplicates, (2, 40, 4), torch.float32, 4, 4),
    ("lattice", lattice, (2, 50, 3), torch.float32, 3, 6),
    ("bisectors", bisectors, (2, 64, 8), torch.float32, 1, 12),
    ("K=1", normal, (2, 1, 8), torch.float32, 1, 6),
    ("D=1", normal, (2, 64, 1), torch.float32, 2, 6),
    ("outliers", far_key, (2, 32, 8), torch.float32, 1, 4),
    ("clusters", clusters, (2, 40, 8), torch.float32, 2, 2),
    ("1e-15", scaled(1e-15), (2, 64, 8), torch.float32, 1, 6),
    ("1e15", scaled(1e15), (2, 64, 8), torch.float32, 1, 6),
    ("float16 1e-3", scaled(1e-3), (2, 64, 8), torch.float16, 1, 6),
    ("float16 1e3", scaled(1e3), (2, 64, 8), torch.float16, 1, 6),
    ("float16", normal, (2, 64, 8), torch.float16, 2, 6),
    ("bfloat16", offset, (2, 64, 8), torch.bfloat16, 2, 6),
    ("NaN and Inf queries", broken_queries, (2, 64, 8), torch.float32, 2, 6),
    ("NaN and Inf keys", broken_keys, (2, 64, 8), torch.float32, 2, 6),
    ("autocast", offset, (2, 64, 8), torch.float32, 1, 6),
    ("normal, K=128", normal, (1, 128, 16), torch.float32, 20, 2),
    ("duplicates, T=K", duplicates, (2, 24, 8), torch.float32, 24, 2),
    ("large, offset 100", offset, (1, 150, 8), torch.float32, 1, 4),
    ("large, offset 100, topk", offset, (1, 150, 5), torch.float32, 3, 2),
    ("large, duplicates", duplicates, (1, 150, 8), torch.float32, 2, 2),
    ("large, near-duplicates", near_duplicates, (1, 150, 8), torch.float32, 1, 4),
    ("large, near-duplicates, topk", near_duplicates, (1, 150, 4), torch.float32, 4, 2),
    ("large, bisectors", bisectors, (1, 150, 8), torch.float32, 1, 4),
    ("large, outliers", far_key, (1, 150, 8), torch.float32, 1, 2),
    ("large, clusters", clusters, (1, 150, 8), torch.float32, 2, 2),
    ("large, 1e-15", scaled(1e-15), (1, 150, 8), torch.float32, 1, 2),
    ("large, 1e15", scaled(1e15), (1, 150, 8), torch.float32, 1, 2),
    ("large, float16 1e-3", scaled(1e-3), (1, 150, 8), torch.float16, 1, 2),
    ("large, bfloat16", offset, (1, 150, 8), torch.bfloat16, 2, 2),
    ("large, NaN and Inf queries", broken_queries, (1, 150, 8), torch.float32, 2, 2),
    ("large, NaN and Inf keys", broken_keys, (1, 150, 8), torch.float32, 2, 2),
    ("many of the keys", normal, (1, 300, 14), torch.float32, 60, 1),
    ("many of the keys, offset 100", offset, (1, 200, 70), torch.float32, 40, 1),
    ("many of the keys, near-duplicates", near_duplicates, (1, 300, 4), torch.float32, 60, 1),
    ("many of the keys, duplicates", duplicates, (1, 150, 8), torch.float32, 40, 1),
    ("most of the keys", offset, (1, 200, 5), torch.float32, 150, 1),
    ("most of the keys, near-duplicates", near_duplicates, (1, 200, 70), torch.float32, 150, 1),
    ("few, normal", normal, (2, 64, 8), torch.float32, 1, 2),
    ("few, large D", normal, (2, 40, 200), torch.float32, 3, 1),
    ("few, D=1", normal, (2, 64, 1), torch.float32, 2, 1),
    ("few, D=2", lattice, (2, 50, 2), torch.float32, 3, 1),
    ("few, offset 100, topk", offset, (1, 150, 5), torch.float32, 3, 2),
    ("few, duplicates", duplicates, (1, 150, 4), torch.float32, 2, 1),
    ("few, near-duplicates", near_duplicates, (1, 150, 8), torch.float32, 1, 2),
    ("few, near-duplicates, topk", near_duplicates, (1, 150, 4), torch.float32, 30, 1),
    ("few, bisectors", bisectors, (1, 150, 8), torch.float32, 1, 2),
    ("few, outliers", far_key, (1, 150, 8), torch.float32, 1, 1),
    ("few, 1e-15", scaled(1e-15), (1, 150, 8), torch.float32, 1, 1),
    ("few, 1e15", scaled(1e15), (1, 150, 8), torch.float32, 1, 1),
    ("few, float16 1e-3", scaled(1e-3), (1, 150, 8), torch.float16, 1, 1),
    ("few, bfloat16", offset, (1, 150, 8), torch.bfloat16, 2, 1),
    ("few, NaN and Inf queries", broken_queries, (2, 64, 8), torch.float32, 2, 1),
    ("few, NaN and Inf keys", broken_keys, (2, 64, 8), torch.float32, 2, 1),
    ("few, float64", bisectors, (1, 64, 6), torch.float64, 2, 1),
    ("few, float64 offset", offset, (1, 32, 14), torch.float64, 1, 1),
    ("few, float64 1e-160", scaled(1e-160), (1, 32, 6), torch.float64, 1, 1),
    ("few, float64 1e-300 to 1e300", magnitudes, (1, 32, 6), torch.float64, 2, 1),
    ("some, normal", normal, (2, 200, 14), torch.float32, 1, 2),
    ("some, offset 100, topk", offset, (2, 64, 8), torch.float32, 3, 1),
    ("float64", bisectors, (1, 32, 6), torch.float64, 2, 2),
    ("float64, large K", normal, (1, 300, 14), torch.float64, 1, 1),
    ("float64, bisectors of a large K", bisectors, (1, 150, 8), torch.float64, 1, 1),
    ("float64, near-duplicates", near_duplicates, (1, 150, 8), torch.float64, 2, 1),
    ("float64, duplicates", duplicates, (2, 64, 8), torch.float64, 2, 1),
    ("float64, many of the keys", offset, (1, 150, 5), torch.float64, 40, 1),
    ("float64, most of the keys", near_duplicates, (1, 64, 17), torch.float64, 33, 1),
    ("float64, outliers", far_key, (1, 150, 8), torch.float64, 1, 1),
    ("float64, NaN and Inf queries", broken_queries, (1, 150, 8), torch.float64, 2, 1),
    ("float64, NaN and Inf keys", broken_keys, (1, 150, 8), torch.float64, 2, 1),
    ("float64 offset", offset, (1, 32, 6), torch.float64, 1, 2),
    ("float64 1e100", scaled(1e100), (1, 32, 6), torch.float64, 1, 2),
    ("float64 1e-300", scaled(1e-300), (1, 32, 6), torch.float64, 2, 2),
    ("float64 1e-160", scaled(1e-160), (1, 32, 6), torch.float64, 1, 2),
    ("float64 1e300", scaled(1e300), (1, 32, 6), torch.float64, 2, 2),
    ("float64 1e-300 to 1e300", magnitudes, (1, 32, 6), torch.float64, 2, 2),
]
SHARES = sum(case[-1] for case in CASES)


def exact_distances(queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """[n, C, K]: float64 arithmetic judges float32 inputs, extended precision judges float64."""
    wide = np.longdouble if queries.dtype == torch.float64 else np.float64
    q, k = (part.double().numpy().astype(wide) for part in (queries[:, 0], keys))
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.zeros((*q.shape[:2], k.shape[1]), wide)
        for d in range(q.shape[-1]):
            total += (q[:, :, None, d] - k[None, :, :, d]) ** 2
    return total


def violations(queries, keys, indices, distances, topk) -> int:
    """How many (query, codebook, rank) break the contract."""
    unit = 2.0**-53 if queries.dtype == torch.float64 else 2.0**-24
    exact = exact_distances(queries, keys)
    good_query = queries[:, 0].isfinite().all(-1).numpy()
    good_key = keys.isfinite().all(-1).numpy()
    got, d = indices[:, 0].numpy(), distances[:, 0].numpy()

    safe = np.where(good_key[..., None], keys.double().numpy(), 0).astype(exact.dtype)
    centre = safe.sum(1) / np.maximum(good_key.sum(1, keepdims=True), 1)
    with np.errstate(invalid="ignore", over="ignore"):
        reach = np.sqrt(((queries[:, 0].double().numpy() - centre) ** 2).sum(-1))
    radius = np.where(good_key, np.sqrt(((safe - centre[:, None]) ** 2).sum(-1)), 0).max(1)
    bound = (8 * unit * (reach + radius) ** 2)[..., None]

    exact = np.where(good_key, exact, np.inf)
    order = np.sort(exact, -1)[..., :topk]
    chosen = np.take_along_axis(exact, got, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        regret_ok = (chosen <= order + bound) | (np.isinf(chosen) & np.isinf(order))
        roundings = 1 if unit > 2.0**-53 else 3 + np.ceil(np.log2(keys.shape[-1]))
        rounded_ok = (np.abs(d - chosen) <= roundings * unit * chosen + np.finfo(d.dtype).tiny) | (
            d == chosen.astype(d.dtype)
        )
    # A twin with a lower index must have been chosen at an earlier rank.
    distinct_ok = np.array([len(set(row)) == topk for row in got.reshape(-1, topk)]).reshape(got.shape[:2])[..., None]
    ok = regret_ok & rounded_ok & distinct_ok
    broken_ok = (got == np.arange(topk)) & np.isnan(d)
    return int((~np.where(good_query[..., None], ok, broken_ok)).sum())


def twins_out_of_order(keys, indices) -> int:
    """Chosen keys that have an identical twin with a lower index which was not chosen before."""
    wrong = 0
    for c in range(keys.shape[0]):
        _, label = torch.unique(keys[c], dim=0, return_inverse=True)
        got = indices[:, 0, c]
        lower = torch.stack([(label[:k] == label[k]).sum() for k in range(len(label))])
        earlier = torch.zeros_like(got)
        for t in range(got.shape[1]):
            earlier[:, t] = (label[got[:, :t]] == label[got[:, t : t + 1]]).sum(-1)
        wrong += int((lower[got] != earlier).sum())
    return wrong


def found(name, queries, keys, topk):
    """What the calls of a case return, as [n, 1, C, topk]."""
    size = next((size for begin, size in CALLS.items() if name.startswith(begin)), len(queries))
    parts = [functional.nearest(part, keys, topk=topk) for part in queries.split(size)]
    return [torch.cat(part).view(len(queries), 1, keys.shape[0], topk) for part in zip(*parts, strict=True)]


def run_case(name, make, sizes, dtype, topk, share, total) -> int:
    """Queries judged; raises at the first violation."""
    C, K, D = sizes
    judged, wanted = 0, -(-total * share // SHARES)
    while judged < wanted:
        n = min(20_000, -(-wanted // C))
        drawn = torch.promote_types(dtype, torch.float32)
        queries, keys = (part.to(dtype) for part in make(n, C, K, D, drawn))
        autocast = torch.autocast("cpu", torch.bfloat16) if name == "autocast" else contextlib.nullcontext()
        with autocast:
            indices, distances = found(name, queries, keys, topk)
        assert violations(queries, keys, indices, distances, topk) == 0, name
        if "dup" in name or make is lattice:
            assert twins_out_of_order(keys, indices) == 0, name
        if make is lattice:  # exact ties everywhere: the full order is known
            exact = torch.from_numpy(exact_distances(queries, keys))
            assert torch.equal(indices[:, 0], exact.sort(dim=-1, stable=True).indices[..., :topk]), name
        judged += n * C
    return judged


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_no_violation(case):
    *_, topk, share = case
    total = CI_QUERIES // topk if INTERPRETED else CI_QUERIES  # the kernels search once for every rank
    assert run_case(*case, total=total) >= total * share // SHARES


@pytest.mark.slow
def test_no_violation_in_many_more_queries():
    judged = sum(run_case(*case, total=ALL_QUERIES) for case in CASES)
    print(f"\nexactness: 0 violations in {judged:,} queries over {len(CASES)} kinds of data")
    assert judged >= ALL_QUERIES


def test_the_judge_sees_a_wrong_index():
    queries, keys = normal(100, 2, 8, 4)
    indices, distances = functional.nearest(queries, keys, topk=2)
    assert violations(queries, keys, indices, distances, 2) == 0
    swapped = indices.flip(-1)
    assert violations(queries, keys, swapped, distances.flip(-1), 2) > 0
    assert violations(queries, keys, indices, distances * 1.001, 2) > 0
    twins = torch.cat([keys, keys], 1)
    assert twins_out_of_order(twins, indices[..., :1] + 8) == 200


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_matrix_products_change_nothing(precision):
    queries, keys = offset(40 if INTERPRETED else 5000, 2, 64, 8)
    want = functional.nearest(queries, keys, topk=3)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        got = functional.nearest(queries, keys, topk=3)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_an_offset_does_not_change_the_answer():
    """Queries and keys on a grid of 2^-10, so that adding 100 is exact."""
    n = 1000 if INTERPRETED else 20_000
    queries, keys = ((part * 1024).round() / 1024 for part in normal(n, 2, 64, 8))
    plain = functional.nearest(queries, keys)
    moved = functional.nearest(queries + 100, keys + 100)
    assert torch.equal(plain[0], moved[0])
    assert torch.equal(plain[1], moved[1])


@pytest.mark.parametrize("K", [64, 200])
def test_the_batch_around_a_query_changes_nothing(K):
    """Large and infinite neighbours must not move the bounds of others; keys are near-twins, so that bounds matter."""
    queries, keys = normal(130, 3, K, 12)
    keys[:, 1::2] = keys[:, ::2] * (1 + 2**-21)
    queries[5], queries[70], queries[71] = queries[5] * 1e6, torch.inf, queries[71] * 1e-6
    packed = functional.pack_keys(keys)
    indices, distances = functional.nearest(queries, keys, packed=packed)
    for size in (1, 64):
        for place in (6, 72):
            rows = slice(place // size * size, place // size * size + size)
            alone = functional.nearest(queries[rows], keys, packed=packed)
            assert torch.equal(alone[0], indices[rows])
            assert torch.equal(alone[1].nan_to_num(-1), distances[rows].nan_to_num(-1))


@pytest.mark.skipif(INTERPRETED, reason="the kernels have no way of their own for few keys; thousands of launches")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "D"), [(2, 1), (5, 230), (9, 17), (30, 40), (70, 5)])
def test_few_keys_are_as_exact_for_many_queries_as_for_one(K, D, dtype):
    """Many queries are compared with all keys at once: the same bits, with ties, NaN, Inf, twins and masks."""
    values = torch.arange(2.0 * K).view(2, K, 1)
    queries, keys = (tensor.to(dtype) for tensor in normal(21, 2, K, D))
    keys[:, -1] = keys[:, 0]
    queries[3] = keys[:, 0]
    queries[4, ..., 0], queries[5, ..., 0] = torch.nan, -torch.inf
    queries[6, :, 0] = torch.finfo(dtype).max / 2
    if dtype == torch.float64:
        queries[:, :, 1] *= 1e-170  # squares underflow
        keys[1] *= 1e-170
    keys[0, K // 2, 0] = torch.nan
    some = torch.arange(2 * K).view(2, K) % 3 != 1
    for topk, mask in itertools.product(sorted({1, K // 2 + 1, K}), (None, some, torch.zeros_like(some))):
        indices, distances = functional.nearest(queries, keys, topk=topk, mask=mask)
        packed = functional.nearest(queries, keys, packed=functional.pack_keys(keys), topk=topk, mask=mask)
        assert torch.equal(indices, packed[0])
        assert torch.equal(distances.nan_to_num(-1), packed[1].nan_to_num(-1))
        for size in (1, 7):
            parts = [functional.nearest(part, keys, topk=topk, mask=mask) for part in queries.split(size)]
            assert torch.equal(indices, torch.cat([found[0] for found in parts]))
            found = torch.cat([found[1] for found in parts])
            assert torch.equal(distances.nan_to_num(-1), found.nan_to_num(-1))
        expected = reference.nearest(queries, keys, reference.pack_keys(keys), mask, topk)
        assert torch.equal(indices.reshape(-1), expected[0].reshape(-1))
        if topk == 1:
            assert torch.equal(functional.lookup(queries, keys, values, mask=mask)[1].reshape(-1), indices.reshape(-1))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
def test_thread_count_changes_nothing():
    queries, keys = normal(3000, 3, 300, 12)
    values = torch.randn(3, 300, 7)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            indices, distances = functional.nearest(queries, keys, topk=2)
            code = indices[..., 0]
            grads = torch.ops.kvb.gather_backward(queries[..., :7], code, 300, "none")
            rows = torch.ops.kvb.gather_backward_rows(queries[..., :7], code, 300, "none")
            sums = torch.ops.kvb.accumulate(queries, code, 300)
            pooled = functional.gather(values, code, pool="mean")
            runs.append([indices, distances, grads, *rows, *sums, pooled])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
