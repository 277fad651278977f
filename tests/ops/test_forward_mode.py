"""Forward-mode derivatives: against finite differences, reverse mode, and formulas; alone, nested and mapped."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from kvb import KeyValueBottleneck, functional, ops

pytestmark = pytest.mark.contract

op = torch.ops.kvb
# Every number is moved on its own, and the interpreter takes its time.
B, S, C, K, D, V = (1, 1, 2, 4, 2, 1) if ops.backend("cpu") == "triton" else (2, 2, 2, 9, 3, 2)
FORWARD = {"check_forward_ad": True, "check_batched_forward_grad": True}
SECOND = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
LAYOUTS = [*itertools.product(["none"], functional.LAYOUTS), ("mean", "bscv"), ("sum", "bscv")]


def problem(dtype=torch.float64):
    keys = torch.randn(C, K, D, dtype=dtype)
    queries, values = torch.randn(B, S, C, D, dtype=dtype), torch.randn(C, K, V, dtype=dtype)
    return queries, keys, op.pack_keys(keys), values, torch.randint(K, (B, S, C))


def chosen(keys, indices):
    return keys[torch.arange(C), indices]


# --- finite differences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_distances(topk, masked):
    queries, keys, packed, *_ = problem()
    mask = None
    if masked:  # one codebook without enough usable pairs: its last distances are infinite
        mask = torch.ones(C, K, dtype=torch.bool)
        mask[1, 2:] = False
    queries.requires_grad_()

    def finite_distances(q):
        distances = op.nearest(q, keys, packed, mask, topk)[1]
        return torch.where(distances.isfinite(), distances, 0)

    assert gradcheck(finite_distances, (queries,), **FORWARD)
    assert gradgradcheck(lambda q: finite_distances(q) ** 2, (queries,), **SECOND)


def test_distances_of_a_sample():
    queries, keys, *_ = problem()
    queries.requires_grad_()

    def distances(q):
        return op.sample(q, keys, None, 1e-9, torch.tensor(1))[1]

    assert gradcheck(distances, (queries,), check_forward_ad=True)
    assert gradgradcheck(lambda q: distances(q) ** 2, (queries,), **SECOND)


@pytest.mark.parametrize(("pool", "layout"), LAYOUTS)
def test_values(pool, layout):
    queries, keys, packed, values, indices = problem()
    values.requires_grad_()
    calls = [lambda v: op.gather(v, indices, pool, layout)]
    if layout == "bscv":
        calls += [lambda v: op.lookup(queries, keys, packed, v, None, pool)[0]]
        calls += [lambda v: functional.lookup(queries, keys, v, packed=packed, pool=pool)[0]]
    for call in calls:
        assert gradcheck(call, (values,), **FORWARD)
        assert gradgradcheck(lambda v, call=call: call(v) ** 2, (values,), **SECOND)


@pytest.mark.parametrize("pool", functional.POOLS)
def test_gradients_of_values(pool):
    *_, indices = problem()
    rows = torch.randn((B, S, C, V) if pool == "none" else (B, S, V), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda g: op.gather_backward(g, indices, K, pool), (rows,), **FORWARD)
    assert gradgradcheck(lambda g: op.gather_backward(g, indices, K, pool) ** 2, (rows,), **SECOND)


# --- torch.autograd.forward_ad ----------------------------------------------------------------------------------------


def both_modes(call, point, tangent):
    """The tangent of ``call(point)`` by dual numbers, and by two reverse passes."""
    with forward_ad.dual_level():
        forward = forward_ad.unpack_dual(call(forward_ad.make_dual(point, tangent))).tangent
    return forward, torch.autograd.functional.jvp(call, point, tangent)[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_modes_agree_in_every_dtype(dtype):
    queries, keys, packed, values, indices = problem(dtype)
    unit = torch.finfo(dtype).eps
    rows = torch.randn(B, S, V).to(dtype)
    for call, point in (
        (lambda q: op.nearest(q, keys, packed, None, 2)[1], queries),
        (lambda q: functional.nearest(q, keys)[1], queries),
        (lambda q: functional.sample(q, keys, temperature=1e-9)[1], queries),
        (lambda v: op.gather(v, indices, "mean", "bscv"), values),
        (lambda v: functional.lookup(queries, keys, v)[0], values),
        (lambda g: op.gather_backward(g, indices, K, "sum"), rows),
    ):
        tangent = torch.randn_like(point)
        forward, reverse = both_modes(call, point, tangent)
        assert forward.dtype == reverse.dtype == call(point).dtype
        torch.testing.assert_close(forward, reverse, rtol=8 * unit, atol=8 * unit)
        assert (forward != 0).any()


def test_learning_and_tangents_together():
    """A parameter that also has a tangent: both derivatives of one call, and the gradient of a tangent."""
    queries, keys, packed, values, indices = problem()
    values.requires_grad_()
    tangent = torch.randn_like(values)
    for sparse in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(values, tangent)
            out = functional.gather(dual, indices, pool="sum", sparse_grad=sparse)
            assert torch.equal(forward_ad.unpack_dual(out).tangent, op.gather(tangent, indices, "sum", "bscv"))
            (got,) = torch.autograd.grad(out.sum(), dual)
        want = op.gather_backward(torch.ones(B, S, V, dtype=torch.float64), indices, K, "sum")
        assert torch.equal(got.to_dense() if sparse else got, want)
        assert got.is_sparse == sparse
    queries.requires_grad_()
    direction = torch.randn_like(queries)
    with forward_ad.dual_level():
        distances = op.nearest(forward_ad.make_dual(queries, direction), keys, packed, None, 1)[1]
        (got,) = torch.autograd.grad(forward_ad.unpack_dual(distances).tangent.sum(), queries)
    torch.testing.assert_close(got, 2 * direction)


def test_no_tangent_where_there_is_no_distance():
    queries, keys, *_ = problem(torch.float32)
    queries[0, 0, 0, 0] = torch.nan
    mask = torch.zeros(C, K, dtype=torch.bool)
    mask[1, :2] = True
    with forward_ad.dual_level():
        distances = functional.nearest(forward_ad.make_dual(queries, torch.ones_like(queries)), keys, mask=mask, topk=3)
        tangent = forward_ad.unpack_dual(distances[1]).tangent
    assert (tangent[:, :, 0] == 0).all()
    assert (tangent[:, :, 1, 2] == 0).all()
    assert (tangent[:, :, 1, :2] != 0).all()
    assert tangent.isfinite().all()


def test_tangents_of_queries_and_keys_do_not_change_which_values_are_fetched():
    queries, keys, packed, values, _ = problem()
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(part, torch.ones_like(part)) for part in (queries, keys)]
        out, indices = op.lookup(*dual, packed, values, None, "none")
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is None or (tangent == 0).all()
    assert torch.equal(out, chosen(values, indices))


def refused(dual, arguments):
    """Calls with a tangent that would be lost."""
    queries, keys, packed, values, indices = arguments
    statistics = (torch.ones(C, K, D), torch.ones(C, K), torch.ones(C, K), torch.zeros(C, K, D))
    rest = (None, None, 0.5, 1e-5, 0.0, 1.0, False)
    yield lambda: op.nearest(queries, dual(keys), packed, None, 1)
    yield lambda: op.nearest(dual(queries), dual(keys), packed, None, 1)
    yield lambda: op.sample(queries, dual(keys), None, 1.0, torch.tensor(0))
    yield lambda: op.sgd_step_(dual(values), indices, torch.zeros(B, dtype=torch.int64), 0.1, 1.0, 0.0)
    yield lambda: op.update_keys_(dual(keys.clone()), *statistics, *rest)


def test_what_has_no_forward_derivative_raises():
    arguments = problem(torch.float32)
    with forward_ad.dual_level():
        for call in refused(lambda part: forward_ad.make_dual(part, torch.ones_like(part)), arguments):
            with pytest.raises(NotImplementedError, match=r"detach\(\)"):
                call()
        for call in refused(lambda part: part, arguments):
            call()
    sparse = functional.gather(arguments[3].requires_grad_(), arguments[-1], sparse_grad=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="gather_backward_rows"):
        sparse.backward(forward_ad.make_dual(torch.ones_like(sparse), torch.ones_like(sparse)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sums_of_queries(dtype):
    queries, _, _, _, indices = problem(dtype)
    queries[0, 0, 0, 0] = torch.nan
    tangent = torch.randint(-3, 4, queries.shape).to(dtype)
    with forward_ad.dual_level():
        hits, sums = op.accumulate(forward_ad.make_dual(queries, tangent), indices, K)
        assert forward_ad.unpack_dual(hits).tangent is None
        moved = forward_ad.unpack_dual(sums).tangent
    finite = queries.isfinite().all(-1, keepdim=True)
    want = torch.zeros_like(sums)
    for b, s, c in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        want[c, indices[b, s, c]] += torch.where(finite, tangent, 0)[b, s, c].to(want.dtype)
    assert torch.equal(moved, want)
    weight = torch.randint(-3, 4, sums.shape).to(sums.dtype)
    (op.accumulate(queries.requires_grad_(), indices, K)[1] * weight).sum().backward()
    assert torch.equal(queries.grad, torch.where(finite, chosen(weight, indices), 0).to(dtype))


def test_sums_of_queries_pass_gradcheck():
    queries, _, _, _, indices = problem()
    queries.requires_grad_()
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(lambda q: op.accumulate(q, indices, K)[1], (queries,), **options)
    assert torch.autograd.gradgradcheck(lambda q: op.accumulate(q, indices, K)[1].square(), (queries,))


def test_merged_rows_have_no_derivative():
    grad, indices = torch.randn(B, S, C, V, requires_grad=True), problem()[-1]
    with pytest.raises(NotImplementedError, match="sparse_grad=True, has no derivative of its own"):
        op.gather_backward_rows(grad, indices, K, "none")[1].sum().backward()


def test_statistics_of_keys_have_no_derivative():
    """A module whose keys learn passes the tangents of its input by, as it does with gradients."""
    module = KeyValueBottleneck(C, K, D, V, return_values_only=False).train()
    module.init_keys(torch.randn(40, C, D))
    x = torch.randn(8, C, D)
    with forward_ad.dual_level():
        output = module(forward_ad.make_dual(x, torch.ones_like(x)))
        assert (forward_ad.unpack_dual(output.distances).tangent != 0).any()
    assert module.keys.isfinite().all()


# --- torch.func -------------------------------------------------------------------------------------------------------


def test_jvp_of_distances_and_values():
    queries, keys, packed, values, indices = problem()
    direction = torch.randn_like(queries)
    (found, distances), (_, moved) = jvp(lambda q: op.nearest(q, keys, packed, None, 1), (queries,), (direction,))
    apart = queries - chosen(keys, found[..., 0])
    torch.testing.assert_close(distances[..., 0], apart.square().sum(-1))
    torch.testing.assert_close(moved[..., 0], 2 * (apart * direction).sum(-1))
    tangent = torch.randn_like(values)
    out, fetched = jvp(lambda v: op.gather(v, indices, "none", "bscv"), (values,), (tangent,))
    assert torch.equal(out, chosen(values, indices))
    assert torch.equal(fetched, chosen(tangent, indices))


def test_jacobians_of_both_modes_agree():
    queries, keys, packed, values, indices = problem()
    for call, point in (
        (lambda q: op.nearest(q, keys, packed, None, 2)[1], queries),
        (lambda v: op.gather(v, indices, "mean", "bscv"), values),
        (lambda v: op.lookup(queries, keys, packed, v, None, "none")[0], values),
        (lambda g: op.gather_backward(g, indices, K, "none"), torch.randn(B, S, C, V, dtype=torch.float64)),
    ):
        forward = jacfwd(call)(point)
        torch.testing.assert_close(forward, jacrev(call)(point))
        assert forward.any()


def test_hessians():
    queries, keys, packed, values, indices = problem()
    size = queries.numel()
    by_queries = hessian(lambda q: op.nearest(q, keys, packed, None, 1)[1].sum())(queries)
    torch.testing.assert_close(by_queries.view(size, size), 2 * torch.eye(size, dtype=torch.float64))

    def loss(v, fetch):
        return fetch(v).square().sum()

    table, hits = values.numel(), op.count(queries, indices, K)
    want = torch.diag((2 * hits[..., None]).expand(C, K, V).flatten()).double()
    got = hessian(loss)(values, lambda v: op.gather(v, indices, "none", "bscv"))
    torch.testing.assert_close(got.view(table, table), want)
    codes = op.nearest(queries, keys, packed, None, 1)[0][..., 0]
    want = hessian(loss)(values, lambda v: chosen(v, codes))
    torch.testing.assert_close(
        hessian(loss)(values, lambda v: op.lookup(queries, keys, packed, v, None, "none")[0]), want
    )


def twice(f, point, one, two):
    """Second derivatives, by every nesting of two transforms."""
    both = torch.stack([one, two])
    return {
        "forward over reverse": jvp(grad(f), (point,), (one,))[1],
        "reverse over forward": grad(lambda p: jvp(f, (p,), (one,))[1])(point),
        "forward over forward": jvp(lambda p: jvp(f, (p,), (one,))[1], (point,), (two,))[1],
        "reverse over reverse": grad(lambda p: (grad(f)(p) * one).sum())(point),
        "mapped forward over reverse": vmap(lambda t: jvp(grad(f), (point,), (t,))[1])(both),
        "reverse over mapped forward": grad(lambda p: vmap(lambda t: jvp(f, (p,), (t,))[1])(both).sum())(point),
    }


def test_every_nesting_of_two_transforms():
    """As PyTorch's own indexing has it, with something that is not linear before and behind."""
    queries, keys, packed, values, indices = problem()
    codes = op.nearest((queries**3).clamp(-9, 9), keys, packed, None, 2)[0]
    near = torch.stack([chosen(keys, rank) for rank in codes.unbind(-1)], -2)
    rows = torch.randn(B, S, C, V, dtype=torch.float64)
    flat = (indices + torch.arange(C) * K).flatten()
    first = op.lookup(queries, keys, packed, values, None, "none")[1]
    pairs = (
        (
            lambda q: op.nearest((q**3).clamp(-9, 9), keys, packed, None, 2)[1].pow(2).sum(),
            lambda q: ((q**3).clamp(-9, 9)[..., None, :] - near).square().sum(-1).pow(2).sum(),
            queries,
        ),
        (
            lambda v: op.gather(v**3, indices, "none", "bscv").exp().sum(),
            lambda v: chosen(v**3, indices).exp().sum(),
            values,
        ),
        (
            lambda v: op.lookup(queries, keys, packed, v**3, None, "none")[0].exp().sum(),
            lambda v: chosen(v**3, first).exp().sum(),
            values,
        ),
        (
            lambda g: op.gather_backward(g**3, indices, K, "none").sin().sum(),
            lambda g: torch.zeros(C * K, V).double().index_add(0, flat, (g**3).view(-1, V)).sin().sum(),
            rows,
        ),
    )
    for call, plain, point in pairs:
        one, two = torch.randn(2, *point.shape, dtype=torch.float64)
        want = twice(plain, point, one, two)
        for name, got in twice(call, point, one, two).items():
            torch.testing.assert_close(got, want[name], msg=lambda text, name=name: f"{name}: {text}")
            assert got.any(), name


def test_mapped_tangents_points_and_both():
    queries, keys, packed, values, indices = problem()
    for call, point in (
        (lambda q: op.nearest(q, keys, packed, None, 2)[1], queries),
        (lambda q: op.sample(q, keys, None, 1e-9, torch.tensor(1), 2)[1], queries),
        (lambda v: op.gather(v, indices, "mean", "bscv"), values),
        (lambda v: op.lookup(queries, keys, packed, v, None, "none")[0], values),
        (lambda g: op.gather_backward(g, indices, K, "none"), torch.randn(B, S, C, V, dtype=torch.float64)),
    ):
        points, tangents = (torch.stack([point, 2 * point, -point]) * torch.rand(3, *[1] * point.dim()) for _ in "pt")

        def pushed(p, t, call=call):
            return jvp(call, (p,), (t,))

        randomness = "same"
        each = [pushed(p, t) for p, t in zip(points, tangents, strict=True)]
        got = vmap(pushed, randomness=randomness)(points, tangents)
        for part, want in zip(got, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(part, torch.stack(want))
        got = vmap(pushed, in_dims=(None, 0))(point, tangents)[1]
        torch.testing.assert_close(got, torch.stack([pushed(point, t)[1] for t in tangents]))
        mapped = jvp(vmap(call), (points,), (tangents,))[1]
        torch.testing.assert_close(mapped, torch.stack([tangent for _, tangent in each]))


def test_a_mapped_table_of_values_is_fetched_in_one_call(monkeypatch):
    """A Jacobian maps a table for every entry of the table."""
    queries, keys, packed, values, indices = problem()
    tables = torch.randn(5, *values.shape, dtype=torch.float64)
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("kvb."):
                calls.append(str(function))
            return function(*args, **(kwargs or {}))

    for call in (
        lambda v: op.gather(v, indices, "mean", "bscv"),
        lambda v: op.lookup(queries, keys, packed, v, None, "none"),
        lambda v: op.gather_backward(v[:, :S, None].expand(C, S, C, V), indices[:1].expand(C, S, C), K, "none"),
    ):
        wanted = [call(table) for table in tables]
        calls.clear()
        with Count():
            got = vmap(call)(tables)
        assert len(calls) == 1
        wanted = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *wanted)
        for part, want in zip(*((out if isinstance(out, tuple) else (out,)) for out in (got, wanted)), strict=True):
            assert torch.equal(part, want)


def test_compiled():
    queries, keys, packed, values, indices = problem(torch.float32)
    one, tangent = torch.randn_like(queries), torch.randn_like(values)

    def moved(q, t):
        return jvp(lambda p: op.nearest(p, keys, packed, None, 1)[1], (q,), (t,))[1]

    def fetched(v, t):
        return jvp(lambda p: op.gather(p, indices, "mean", "bscv"), (v,), (t,))[1]

    for call, point, direction in ((moved, queries, one), (fetched, values, tangent)):
        want = call(point, direction)
        torch.testing.assert_close(torch.compile(call, backend="aot_eager")(point, direction), want)
        assert want.any()


@pytest.mark.parametrize("options", [{}, {"topk": 2}, {"sparse_grad": True}], ids=str)
def test_a_module(options):
    """Values by functional_call, and distances by its input."""
    module = KeyValueBottleneck(C, K, D, V, return_values_only=False, **options).double().freeze_keys().eval()
    x = torch.randn(4, C, D, dtype=torch.float64)
    values, tangent, rate = module.values.detach(), torch.randn(C, K, V, dtype=torch.float64), 1e-6

    def fetch(v):
        return functional_call(module, {"values": v}, (x,))[0].square()

    def distances(q):
        return module(q).distances

    for call, point, direction in ((fetch, values, tangent), (distances, x, torch.ones_like(x))):
        moved = jvp(call, (point,), (direction,))[1]
        want = (call(point + rate * direction) - call(point - rate * direction)) / (2 * rate)
        torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-6)
        assert moved.any()
    table = jacfwd(fetch)(values)
    torch.testing.assert_close((table * tangent).sum((-3, -2, -1)), jvp(fetch, (values,), (tangent,))[1])
