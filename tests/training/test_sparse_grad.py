"""``sparse_grad=True``: the gradient is a list of rows, equal to the dense one bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kvb import KeyValueBottleneck, functional

pytestmark = pytest.mark.fallback

# Two codebooks of three pairs; two samples. Pair 1 of codebook 0 is fetched twice.
VALUES = [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]
CODES = [[[1, 2]], [[1, 0]]]
GRAD = [[[[1, 10], [2, 20]]], [[[3, 30], [4, 40]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["bscv", "bcsv"])
def test_rows_written_by_hand(dtype, layout):
    values = torch.tensor(VALUES, dtype=dtype).requires_grad_()
    out = functional.gather(values, torch.tensor(CODES), layout=layout, sparse_grad=True)
    weight = torch.tensor(GRAD, dtype=dtype)
    (grad,) = torch.autograd.grad(out, values, weight if layout == "bscv" else weight.transpose(1, 2))
    assert grad.is_coalesced()
    assert grad.dtype == dtype
    assert grad.shape == (2, 3, 2)
    assert grad.indices().T.tolist() == [[0, 1], [1, 0], [1, 2]]
    assert grad.values().tolist() == [[4, 40], [4, 40], [2, 20]]


def pair(**options):
    modules = [KeyValueBottleneck(3, 11, 5, 4, sparse_grad=sparse, **options) for sparse in (True, False)]
    modules[1].load_state_dict(modules[0].state_dict())
    return [module.freeze_keys() for module in modules]


@pytest.mark.parametrize("pool", functional.POOLS)
@pytest.mark.parametrize("batch", [0, 1, 60])
def test_forward_and_decode_give_the_rows_of_the_dense_gradient(pool, batch):
    sparse, dense = pair()
    x = torch.randn(batch, 3, 2, 5)
    for forward in (lambda m: m(x, pool=pool), lambda m: m.decode(m.encode(x, dtype="auto"), pool)):
        want = forward(dense)
        weight = torch.randn_like(want)
        (want_grad,) = torch.autograd.grad(want, dense.values, weight)
        got = forward(sparse)
        assert torch.equal(got, want)
        (grad,) = torch.autograd.grad(got, sparse.values, weight)
        assert grad.is_coalesced()
        assert torch.equal(grad.to_dense(), want_grad)
        fetched = [set(codes.tolist()) for codes in dense.encode(x).transpose(0, 1).flatten(1)]
        rows = {(c, k) for c, codes in enumerate(fetched) for k in codes}
        assert set(map(tuple, grad.indices().T.tolist())) == rows


def test_topk_has_it_too():
    sparse, dense = pair(topk=2)
    x = torch.randn(6, 3, 5)
    grads = [torch.autograd.grad(module(x).square().sum(), module.values)[0] for module in (sparse, dense)]
    assert torch.equal(grads[0].to_dense(), grads[1])


def test_no_dense_gradient_is_made_on_the_way():
    sparse, _ = pair()
    with mock.patch.object(torch.ops.kvb, "gather_backward", side_effect=AssertionError("a dense table was made")):
        sparse(torch.randn(6, 3, 5)).square().sum().backward()
    assert sparse.values.grad.layout == torch.sparse_coo


def test_two_uses_add_up():
    sparse, dense = pair()
    x = torch.randn(6, 3, 5)
    for module in (sparse, dense):
        (module(x).sum() + 3 * module(x, pool="mean").sum()).backward()
    torch.testing.assert_close(sparse.values.grad.to_dense(), dense.values.grad, rtol=1e-6, atol=1e-6)


def test_keys_that_are_fetched_and_forwards_without_gradient_are_unaffected():
    sparse, dense = (module.eval() for module in pair(return_values_only=False))
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(sparse(x), dense(x), strict=True))


def test_compiled_it_breaks_the_graph_and_stays_right():
    sparse, dense = pair()
    x = torch.randn(6, 3, 5)
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(sparse, backend=counter)(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert counter.frame_count > 1
    assert torch.equal(sparse.values.grad.to_dense(), dense.values.grad)


def test_torch_optimizers_for_sparse_gradients_take_it():
    sparse, dense = pair()
    x = torch.randn(6, 3, 5)
    optimizers = torch.optim.SGD(sparse.parameters(), 0.3), torch.optim.SGD(dense.parameters(), 0.3)
    for _ in range(3):
        for module, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(sparse.values, dense.values, rtol=1e-6, atol=1e-6)


def test_mapped_and_nested_derivatives_are_those_of_the_dense_gradient():
    x = torch.randn(6, 2, 3)
    modules = [KeyValueBottleneck(2, 5, 3, 4, sparse_grad=sparse).freeze_keys().eval() for sparse in (True, False)]
    modules[1].load_state_dict(modules[0].state_dict())
    values = modules[0].values.detach()

    def results(module):
        def run(values, part=x):
            return torch.func.functional_call(module, {"values": values}, (part,))

        def loss(values, part=x):
            return (run(values, part) ** 3).sum()

        yield torch.func.jacrev(run)(values)
        yield torch.func.jacfwd(run)(values)
        yield torch.func.hessian(loss)(values)
        yield torch.func.jacrev(torch.func.jacrev(loss))(values)
        yield torch.vmap(torch.func.grad(loss), (None, 0))(values, x[:, None])
        yield torch.func.jvp(torch.func.grad(loss), (values,), (values,))[1]
        yield torch.autograd.functional.jacobian(run, values, vectorize=True)

    for ours, theirs in zip(*map(results, modules), strict=True):
        torch.testing.assert_close(ours, theirs)
    grad = torch.func.grad(lambda values: torch.func.functional_call(modules[0], {"values": values}, (x,)).sum())
    assert grad(values).layout == torch.sparse_coo


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_pooled_over_positions_too(dtype, pool, S, compiled):
    codes = torch.randint(5, (4, S, 2))
    weight = torch.randint(-3, 4, (4, 6)).to(dtype)
    fetch = torch.compile(functional.gather, backend="eager") if compiled else functional.gather
    found = []
    for options in ({}, {"sparse_grad": True}, {"pool_positions": True}, {"pool_positions": True, "sparse_grad": True}):
        values = torch.randint(-9, 9, (2, 5, 6), generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = fetch(values, codes, pool=pool, **options)
        if "pool_positions" not in options:
            out = out.mean(1) if pool == "mean" else out.sum(1)
        (grad,) = torch.autograd.grad(out, values, weight)
        found.append((out.detach(), grad.to_dense()))
    assert found[0][0].shape == (4, 6)
    for out, grad in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=0, atol=0)
        torch.testing.assert_close(grad, found[0][1])


def test_pooled_over_positions_has_all_derivatives():
    values, codes = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(5, (4, 3, 2))

    def fetch(values, sparse):
        return functional.gather(values, codes, pool="mean", pool_positions=True, sparse_grad=sparse).square().sum()

    tangent = torch.randn_like(values)
    for derivative in (
        lambda f: torch.func.grad(f)(values).to_dense(),
        lambda f: torch.func.jvp(f, (values,), (tangent,))[1],
        lambda f: torch.vmap(f)(torch.stack([values, 2 * values])),
    ):
        rows, dense = (derivative(lambda given, sparse=sparse: fetch(given, sparse)) for sparse in (True, False))
        torch.testing.assert_close(rows, dense)


def test_positions_are_pooled_with_codebooks_alone():
    with pytest.raises(ValueError, match='pool_positions needs a pool over codebooks: expected pool="mean" or "sum"'):
        functional.gather(torch.zeros(2, 3, 4), torch.zeros(1, 1, 2, dtype=torch.int64), pool_positions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pool", ["none", "mean"])
def test_few_rows_of_a_large_table(dtype, pool):
    K, codes = 3000, torch.tensor([[[2999, 7]], [[0, 7]], [[2999, 8]]])
    values = torch.zeros(2, K, 2, dtype=dtype, requires_grad=True)
    out = functional.gather(values, codes, pool=pool, sparse_grad=True)
    (grad,) = torch.autograd.grad(out.sum(), values)
    share = 0.5 if pool == "mean" else 1.0
    assert grad.indices().T.tolist() == [[0, 0], [0, 2999], [1, 7], [1, 8]]
    assert grad.values().tolist() == [[share * n] * 2 for n in (1, 2, 2, 1)]
