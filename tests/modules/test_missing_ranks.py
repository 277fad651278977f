"""topk above the usable pairs: what finds no pair has the value zero, no gradient and no count."""

from __future__ import annotations

import pytest
import torch

from kvb import KeyValueBottleneck, unlearning
from kvb.modules.bottleneck import BottleneckOutput

pytestmark = pytest.mark.fallback

MASK = torch.tensor([[True, False, True, False], [False, True, False, False]])


def make(topk=3, **options):
    module = KeyValueBottleneck(2, 4, 3, 5, topk=topk, **options)
    with torch.no_grad():
        module.values.copy_(torch.arange(1.0, 9.0).view(2, 4, 1).expand(2, 4, 5))
        module.values[~MASK] = 1000.0  # what nobody may see
    return module.mask_pairs(MASK)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
@pytest.mark.parametrize("pool", ["none", "mean", "sum"])
def test_a_missing_rank_has_the_value_zero_and_gets_no_gradient(pool, shape, sparse):
    module, x = make(sparse_grad=sparse), torch.randn(7, 2, *shape, 3)
    for learning in (True, False):
        module = module if learning else module.freeze_keys()
        module.values.grad = None
        out = module(x, return_values_only=False, pool=pool)
        assert isinstance(out, BottleneckOutput)
        found = out.distances.isfinite()
        assert found.sum(2).amax((0, *range(2, found.dim() - 1))).tolist() == [2, 1]
        each = torch.where(
            found[..., None], module.values[torch.arange(2).view(2, *[1] * (found.dim() - 2)), out.indices], 0
        )
        want = each if pool == "none" else getattr(each, pool)(1)
        torch.testing.assert_close(out.values, want)
        if not learning:
            assert torch.equal(module(x, pool=pool), out.values)
        assert out.values.abs().max() < 1000
        out.values.sum().backward()
        grad = module.values.grad.to_dense() if sparse else module.values.grad
        assert torch.equal(grad.abs().sum(-1) > 0, MASK)
        if sparse:
            rows = module.values.grad.coalesce().indices()
            assert MASK[rows[0], rows[1]].all()


def test_a_missing_rank_has_the_index_as_before_and_the_distance_infinity():
    out = make()(torch.randn(7, 2, 3), return_values_only=False)
    assert out.indices[:, 1].tolist() == [[1, 0, 2]] * 7
    assert out.distances[:, 0, 2].isposinf().all()
    assert out.distances[:, 1, 1:].isposinf().all()
    assert out.distances[:, 1, 0].isfinite().all()


def test_a_missing_rank_is_not_counted():
    module = make().freeze_keys()
    module(torch.randn(7, 2, 3))
    assert module.cluster_size_counter.tolist() == [[7, 0, 7, 0], [0, 7, 0, 0]]


def test_decode_is_the_forward():
    module, x = make().eval(), torch.randn(7, 2, 6, 3)
    codes = module.encode(x, dtype="auto")
    for pool in ("none", "mean", "sum"):
        torch.testing.assert_close(module.decode(codes, pool), module(x, pool=pool))
    with pytest.raises(IndexError, match="index 6 is out of bounds for codebook with 4 pairs"):
        module.decode(codes + 4)
    module.mask_pairs(None)
    assert module.decode(codes).max() == 1000  # those pairs may be fetched again


@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize("shape", [(), (6,)])
def test_a_codebook_without_a_usable_pair(shape, pool):
    module = make(topk=1)
    module.mask_pairs(MASK & torch.tensor([[True], [False]]))
    keys, x = module.keys.clone(), torch.randn(7, 2, *shape, 3)
    each = module.eval()(x)
    out = module.train()(x, pool=pool)
    assert (each[:, 1] == 0).all()
    assert (each[:, 0] > 0).all()
    torch.testing.assert_close(out, each if pool == "none" else each.mean(1))
    out.sum().backward()
    assert (module.values.grad[1] == 0).all()
    assert torch.equal(module.keys[1], keys[1])
    assert not torch.equal(module.keys[0], keys[0])
    counting = make(topk=1).mask_pairs(MASK & torch.tensor([[True], [False]])).freeze_keys()
    counting(x)
    assert counting.cluster_size_counter[1].sum() == 0


def test_counted_pairs_that_are_fewer_than_topk():
    module = KeyValueBottleneck(1, 6, 2, 1, topk=3).freeze_keys()
    with torch.no_grad():
        module.values.fill_(1000)
    module.cluster_size_counter[0, 2] = 1
    module.deactivate_counts()
    with torch.no_grad():
        module.values[0, 2] = 1
    x = torch.randn(9, 1, 2)
    assert module(x)[:, 0].squeeze(-1).tolist() == [[1, 0, 0]] * 9


def test_what_was_forgotten_votes_no_more():
    module = KeyValueBottleneck(2, 4, 3, 5, topk=3).freeze_keys()
    with torch.no_grad():
        module.values[~MASK] = 1000.0
    unlearning.forget(module, MASK)
    assert module(torch.randn(50, 2, 3)).abs().max() < 100


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("shape", [(), (6,)])
def test_histograms_leave_out_what_was_not_found(topk, shape):
    module, x = make(topk).eval(), torch.randn(7, 2, *shape, 3)
    positions = x[0, 0, ..., 0].numel() * 7
    found = unlearning.hits(module, x)
    assert found.sum(1).tolist() == ([2 * positions, positions] if topk > 1 else [positions] * 2)
    assert (found[~MASK] == 0).all()
    module.mask_pairs(MASK & torch.tensor([[True], [False]]))
    assert unlearning.hits(module, x)[1].sum() == 0


def test_in_a_compiled_graph():
    module, x = make().freeze_keys().eval(), torch.randn(7, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
