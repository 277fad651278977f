"""The contract around the numbers: shapes, strides, transforms, tracing, dispatch, direct calls."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_calls import PLAIN, SIZES, arguments, brute, problem
from torch._subclasses import FakeTensorMode

from kvb import functional, ops, reference
from kvb.testing import Case

pytestmark = [pytest.mark.contract, pytest.mark.memory]

op = torch.ops.kvb


def parts(out):
    """What an operator returned, as a tuple."""
    return () if out is None else out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_nearest_agrees_with_brute_force(sizes, poisoned):
    queries, keys, packed, _ = problem(sizes)
    topk = min(3, keys.shape[1])
    indices, distances = op.nearest(queries, keys, packed, None, topk)
    want = brute(queries, keys).sort(dim=-1, stable=True)
    assert torch.equal(indices, want.indices[..., :topk])
    assert torch.equal(distances, want.values[..., :topk].float())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("pool", functional.POOLS)
@pytest.mark.parametrize("layout", functional.LAYOUTS)
def test_gather_and_its_gradients(sizes, pool, layout, poisoned):
    *_, values = problem(sizes)
    B, S, C, K, V = sizes.B, sizes.S, sizes.C, sizes.K, sizes.V
    values.requires_grad_()
    indices = torch.randint(K, (B, S, C))
    each = values[torch.arange(C), indices]
    want = {"none": each if layout == "bscv" else each.transpose(1, 2), "mean": each.mean(2), "sum": each.sum(2)}[pool]
    got = functional.gather(values, indices, pool=pool, layout=layout)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-6 if pool != "none" else 0, atol=1e-6 if pool != "none" else 0)
    weight = torch.randn_like(got)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), values)
    (grad,) = torch.autograd.grad((got * weight).sum(), values)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)

    weight = weight.transpose(1, 2) if pool == "none" and layout == "bcsv" else weight
    rows, grads, count = op.gather_backward_rows(weight, indices, K, pool)
    assert rows.shape == (min(B * S * C, C * K),)
    assert grads.shape == (*rows.shape, V)
    n = int(count)
    assert (rows[n:] == -1).all()
    assert (grads[n:] == 0).all()
    assert torch.equal(rows[:n], torch.unique((indices + torch.arange(C) * K).flatten()))
    dense = torch.zeros(C * K, V).index_copy_(0, rows[:n], grads[:n]).view(C, K, V)
    # The kernels may add the two in another order; in the same one where algorithms are deterministic: test_kernels.py.
    unit = 1e-6 if ops.backend("cpu") == "triton" else 0
    torch.testing.assert_close(dense, op.gather_backward(weight, indices, K, pool), rtol=unit, atol=4 * unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scatter_is_as_accurate_as_pytorch(dtype):
    """At most twice the error of PyTorch's own scatter, both against float64."""
    indices = torch.randint(3, (500, 1, 2))
    grad = torch.randn(500, 1, 2, 5).to(dtype)
    flat = (indices + torch.arange(2) * 3).flatten()
    exact = torch.zeros(6, 5, dtype=torch.float64).index_add_(0, flat, grad.double().view(-1, 5))
    peer = torch.zeros(6, 5).index_add_(0, flat, grad.float().view(-1, 5)).to(dtype)
    got = op.gather_backward(grad, indices, 3, "none").view(6, 5)
    assert (got.double() - exact).abs().max() <= 2 * (peer.double() - exact).abs().max()


def strided_variants(queries):
    """The same numbers in other memory."""
    B, S, C, D = queries.shape
    yield "seed b", queries.transpose(1, 2).contiguous().transpose(1, 2)
    yield "batch last", queries.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    padded = torch.randn(B + 1, S, C, D + 3)
    padded[1:, ..., 2 : 2 + D] = queries
    yield "slice with offset", padded[1:, ..., 2 : 2 + D]
    yield "last axis strided", queries.transpose(2, 3).contiguous().transpose(2, 3)


def test_strides_do_not_matter_and_inputs_are_not_touched():
    queries, keys, packed, _ = problem(PLAIN)
    want = op.nearest(queries, keys, packed, None, 2)
    hits = op.accumulate(queries, want[0][..., 0], 20)
    for name, variant in strided_variants(queries):
        before = variant.clone()
        got = functional.nearest(variant, keys, topk=2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
        codes = got[0].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)[..., 0]
        assert all(torch.equal(a, b) for a, b in zip(op.accumulate(variant, codes, 20), hits, strict=True)), name
        assert torch.equal(variant, before)
    expanded = queries[:1].expand(4, -1, -1, -1)
    assert torch.equal(op.nearest(expanded, keys, packed, None, 2)[0], want[0][:1].expand(4, -1, -1, -1))
    wide = torch.randn(2, 20, 12)[..., ::2]
    got = functional.nearest(queries, wide)
    assert torch.equal(got[0], functional.nearest(queries, wide.contiguous())[0])


# On a slow machine the first example waits for PyTorch.
@settings(
    max_examples=20 if ops.backend("cpu") == "triton" else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    sizes=st.tuples(*(st.integers(0, 5), st.integers(0, 4)), *(st.integers(1, n) for n in (4, 40, 12))),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    grid=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_nearest_on_anything(sizes, dtype, scale, grid, masked, seed, data):
    B, S, C, K, D = sizes
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, S, C, D, generator=generator)
    keys = torch.randn(C, K, D, generator=generator)
    if grid:
        queries, keys, scale = queries.round(), keys.round(), 1.0
    queries, keys = (queries * scale).to(dtype), (keys * scale).to(dtype)
    mask = torch.rand(C, K, generator=generator) < 0.6 if masked else None
    topk = data.draw(st.integers(1, K), label="topk")
    indices, distances = op.nearest(queries, keys, op.pack_keys(keys), mask, topk)
    exact = brute(queries, keys)
    exact = exact if mask is None else exact.masked_fill(~mask, torch.inf)
    want = exact.sort(dim=-1, stable=True)
    if dtype != torch.float64 or grid:  # float64 sums may round differently
        finite = want.values[..., :topk].isfinite()
        assert torch.equal(indices[finite], want.indices[..., :topk][finite])
    assert torch.equal(distances.isinf(), want.values[..., :topk].isinf())
    torch.testing.assert_close(distances.double(), want.values[..., :topk], rtol=1e-6, atol=0)
    assert all(len(set(row)) == topk for row in indices.reshape(-1, topk).tolist())


def test_tiles_of_every_size_agree(monkeypatch):
    """Tiling is invisible: one row at a time, odd cuts, everything at once."""
    queries, keys, packed, values = problem(Case("tiles", B=5, S=7, C=3, K=40, D=4, V=6))

    def run():
        indices, distances = op.nearest(queries, keys, packed, None, 2)
        code = indices[..., 0]
        grad = queries[..., :3]
        return (
            op.pack_keys(keys),
            indices,
            distances,
            op.gather(values, code, "mean", "bscv"),
            op.gather_backward(grad, code, 40, "none"),
            op.gather_backward_rows(grad, code, 40, "none")[1],
            *op.accumulate(queries, code, 40),
        )

    want = run()
    for tile in (1, 48, 100, 1000, 5000):
        monkeypatch.setattr(reference.shared, "TILE", tile)
        for got, expected in zip(run(), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ops.NAMES)
@pytest.mark.parametrize("sizes", [PLAIN, SIZES["B=1"], SIZES["S=1"]])
def test_opcheck(name, sizes):
    torch.library.opcheck(getattr(op, name).default, arguments(sizes)[name])


@pytest.mark.parametrize("pool", functional.POOLS)
def test_one_position_without_an_axis(pool):
    queries, keys, packed, values = problem(SIZES["S=1"])
    values.requires_grad_()
    one = queries.repeat(2, 1, 1, 1)[len(queries) :, 0]  # from the middle of its memory
    torch.library.opcheck(op.lookup.default, (one, keys, packed, values, None, pool))
    found, wanted = (op.lookup(q, keys, packed, values, None, pool) for q in (one, queries))
    for part, whole in zip(found, wanted, strict=True):
        assert torch.equal(part, whole[:, 0])
        assert part.is_contiguous()
    weight = torch.randn_like(found[0])
    for run in (op.lookup, ops.lookup):
        out = run(one, keys, packed, values, None, pool)[0]
        gradients = (torch.autograd.grad(o, values, w)[0] for o, w in ((out, weight), (wanted[0], weight[:, None])))
        assert torch.equal(*gradients)
        wanted = op.lookup(queries, keys, packed, values, None, pool)
    mapped = torch.vmap(lambda q: op.lookup(q, keys, packed, values.detach(), None, pool)[0])(one[:, None])
    assert torch.equal(mapped[:, 0], found[0])
    tangent = torch.randn_like(values)
    moved = [
        torch.func.jvp(lambda v, q=q: op.lookup(q, keys, packed, v, None, pool)[0], (values.detach(),), (tangent,))[1]
        for q in (one, queries)
    ]
    assert torch.equal(moved[0], moved[1][:, 0])


@pytest.mark.parametrize("name", ["nearest", "sample"])
def test_opcheck_with_gradient(name):
    """The tracing check sums an integer output first, which only works without gradient."""
    queries, *rest = arguments(PLAIN)[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(op, name).default, (queries.requires_grad_(), *rest), test_utils=tests)


@pytest.mark.parametrize("name", ops.NAMES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_fake_tensors_have_the_real_shapes(name, sizes):
    real = arguments(sizes)[name]
    with FakeTensorMode() as mode:
        got = getattr(op, name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in real))
    want = getattr(op, name)(*real)
    for m, r in zip(parts(got), parts(want), strict=True):
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


def test_function_transforms():
    queries, keys, packed, values = problem(PLAIN)
    indices = torch.randint(20, (4, 3, 2))

    def loss(v, codes):
        return op.gather(v, codes, "mean", "bscv").square().sum()

    values.requires_grad_()
    (want,) = torch.autograd.grad(loss(values, indices), values)
    v = values.detach()
    assert torch.equal(torch.func.grad(loss)(v, indices), want)
    each = torch.func.vmap(lambda codes: torch.func.grad(loss)(v, codes[None]))(indices)
    torch.testing.assert_close(each.sum(0), want)
    jacobian = torch.func.jacrev(lambda v: op.gather(v, indices, "none", "bscv"))(v)
    assert jacobian.sum() == indices.numel() * 5
    distance_grad = torch.func.grad(lambda q: op.nearest(q, keys, packed, None, 1)[1].sum())(queries)
    chosen = keys[torch.arange(2), op.nearest(queries, keys, packed, None, 1)[0][..., 0]]
    torch.testing.assert_close(distance_grad, 2 * (queries - chosen))


@pytest.mark.parametrize("name", [name for name in ops.NAMES if name not in ops.IN_PLACE])
def test_vmap_over_every_tensor_argument(name):
    """Each tensor argument mapped alone over its last axis agrees with a loop."""
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in arguments(PLAIN)[name]]
    call = getattr(op, name)
    for place, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor) or arg.dtype == torch.uint8 or (name == "sample" and place == 4):
            continue
        variants = [arg, arg.flip(0), arg.roll(1, 0)]
        if place == 1 and name in ("nearest", "lookup"):  # other keys need another packing
            variants = [arg, arg.clone()]
        stacked = torch.stack(variants, -1)
        dims = tuple(stacked.dim() - 1 if i == place else None for i in range(len(args)))
        got = torch.vmap(call, in_dims=dims)(*args[:place], stacked, *args[place + 1 :])
        outs = [call(*args[:place], one, *args[place + 1 :]) for one in variants]
        outs = [*map(parts, outs)]
        for part, want in zip(got if isinstance(got, tuple) else (got,), zip(*outs, strict=True), strict=True):
            assert torch.equal(part, torch.stack(want)), (name, place)


def test_autocast_changes_nothing():
    for name, args in arguments(PLAIN).items():
        again = [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        want = getattr(op, name)(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = getattr(op, name)(*again)
        for a, b in zip(parts(got), parts(want), strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


def test_sample_follows_softmax_and_its_seed():
    keys = torch.randn(1, 5, 2)
    queries = torch.randn(1, 1, 1, 2).expand(20_000, -1, -1, -1)
    temperature = 2.0
    indices, distances = op.sample(queries, keys, None, temperature, torch.tensor(5))
    share = indices.flatten().bincount(minlength=5) / 20_000
    exact = brute(queries[:1], keys)[0, 0, 0]
    assert (share - (-exact / temperature).softmax(-1)).abs().max() < 0.02
    assert torch.equal(distances.flatten(), exact.float()[indices.flatten()])
    assert torch.equal(op.sample(queries, keys, None, temperature, torch.tensor(5))[0], indices)
    assert not torch.equal(op.sample(queries, keys, None, temperature, torch.tensor(6))[0], indices)


def test_the_backend_that_is_named_answers():
    """A spy on the reference's own tile search: the dispatcher reaches it only where it reports it."""
    queries, keys, packed, _ = problem(PLAIN)
    with mock.patch.object(reference.search, "_rank", wraps=reference.search._rank) as spy:
        op.nearest(queries, keys, packed, None, 1)
    assert spy.call_count == {"torch": 1, "cpp": 0, "triton": 0}[ops.backend("cpu")]
    assert ops.backend("meta") == "torch"


def test_direct_calls_check_themselves():
    queries, keys, packed, values = problem(PLAIN)
    indices = torch.zeros(4, 3, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"expected queries \[B, S, 2, 6\]"):
        op.nearest(queries[..., :5], keys, packed, None, 1)
    with pytest.raises(RuntimeError, match="packed keys do not match"):
        op.nearest(queries, keys, packed[:, :-64], None, 1)
    if ops.backend("cpu") != "triton":  # a GPU looks at the size alone: to read it would make the host wait
        with pytest.raises(RuntimeError, match="packed keys do not match.*K=20 D=6"):
            op.nearest(queries, keys, torch.zeros_like(packed), None, 1)
    with pytest.raises(RuntimeError, match="expected mask torch.bool"):
        op.nearest(queries, keys, packed, torch.ones(2, 20), 1)
    with pytest.raises(RuntimeError, match="expected topk between 1 and 20, got 21"):
        op.nearest(queries, keys, packed, None, 21)
    with pytest.raises(RuntimeError, match=r"expected indices \[B, S, 2\]"):
        op.gather(values, indices[..., :1], "none", "bscv")
    with pytest.raises(RuntimeError, match="expected integer indices, got torch.float32"):
        op.gather(values, indices.float(), "none", "bscv")


@pytest.mark.parametrize("bad", [20, -1])
def test_indices_out_of_bounds(bad):
    """A GPU asserts on the device. Where assertions are left out, as by the interpreter, there is no such pair."""
    queries, _, _, values = problem(PLAIN)
    indices = torch.zeros(4, 3, 2, dtype=torch.int64)
    indices[1, 1, 1] = bad
    calls = {
        "gather": lambda: op.gather(values, indices, "none", "bscv"),
        "pooled": lambda: op.gather(values, indices, "sum", "bscv"),
        "gradient": lambda: op.gather_backward(queries, indices, 20, "none"),
        "merged rows": lambda: op.gather_backward_rows(queries, indices, 20, "none"),
        "sums": lambda: op.accumulate(queries, indices, 20),
        "hits": lambda: op.count(queries, indices, 20),
    }
    if ops.backend("cpu") != "triton":
        for call in calls.values():
            with pytest.raises(IndexError, match=f"index {bad} is out of bounds for codebook with 20 pairs"):
                call()
        return
    got = {name: call() for name, call in calls.items()}
    want, left = values[torch.arange(2), torch.zeros_like(indices)], queries.clone()
    want[1, 1, 1], left[1, 1, 1] = 0, 0
    assert torch.equal(got["gather"], want)
    torch.testing.assert_close(got["pooled"], want.sum(2))
    torch.testing.assert_close(got["gradient"][:, 0], left.sum((0, 1)))
    assert (got["gradient"][:, 1:] == 0).all()
    rows, grads, count = got["merged rows"]
    assert rows.tolist() == [0, 20] + [-1] * 22
    torch.testing.assert_close(grads[:2], got["gradient"][:, 0])
    assert count.item() == 2
    assert got["hits"][:, 0].tolist() == [12, 11]
    assert got["hits"].sum() == 23
    assert torch.equal(got["sums"][0], got["hits"])
    torch.testing.assert_close(got["sums"][1], got["gradient"])


def test_narrow_indices_meet_large_codebooks():
    values = torch.randn(2, 1000, 3)
    for dtype in (torch.int8, torch.uint8, torch.int16):
        indices = torch.tensor([[[3, 120]], [[0, 7]]], dtype=dtype)
        assert torch.equal(op.gather(values, indices, "none", "bscv"), values[torch.arange(2), indices.long()])
        assert op.gather_backward(values[:2, None, :2], indices, 1000, "none").sum() != 0


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Queries through a stride of 0, and a table of 2^31 + elements in bfloat16 (4.3 GB)."""
    keys = torch.randn(1, 3, 2048)
    queries = torch.randn(1, 1, 1, 2048).expand((1 << 20) + 1, -1, -1, -1)
    assert queries.numel() > 1 << 31
    indices, _ = op.nearest(queries, keys, op.pack_keys(keys), None, 1)
    assert (indices == brute(queries[:1], keys).argmin(-1).item()).all()
    assert op.count(queries, indices[..., 0], 3).sum() == queries.shape[0]
    K = (1 << 20) + 16
    values = torch.zeros(1, K, 2048, dtype=torch.bfloat16)
    values[0, -1] = 1
    codes = torch.tensor([[[K - 1]], [[0]]])
    assert op.gather(values, codes, "none", "bscv")[:, 0, 0].sum(-1).tolist() == [2048, 0]
