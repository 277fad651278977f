"""Growth where no key is near: which queries are far, abstention, pairs of their own, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kvb
from kvb import growth, optim

C, K, D, V = 3, 40, 4, 5


def bottleneck(**options):
    generator = torch.Generator().manual_seed(0)
    module = kvb.KeyValueBottleneck(C, K, D, V, **{"init_values": "zeros", **options})
    module.set_keys(torch.randn(C, K, D, generator=generator)).freeze_keys()
    nn.init.normal_(module.values, generator=generator)
    return module.eval()


def queries(*shape, seed=1, scale=1.0):
    return scale * torch.randn(shape[0], C, *shape[1:], D, generator=torch.Generator().manual_seed(seed))


def gaps(module, x):
    """Squared distances [B, C] to the nearest key, by definition."""
    return (x[:, :, None] - module.keys).square().sum(-1).amin(-1)


def test_a_share_of_known_queries_is_near():
    module, known = bottleneck(), queries(200)
    for share in (0.5, 0.99, 1.0):
        threshold = growth.distance_threshold(module, known, share=share)
        assert threshold.shape == (C,)
        near = ~growth.none_near(module, known, threshold)
        assert near.sum(0).tolist() == [round(200 * share)] * C
    torch.testing.assert_close(threshold, gaps(module, known).amax(0))


def test_far_is_farther_than_the_threshold_in_every_shape():
    module, x = bottleneck(), queries(6, 2, 3, scale=2.0)
    threshold = torch.tensor([0.5, 1.0, 4.0])
    found = growth.none_near(module, x, threshold)
    assert found.shape == (6, C, 2, 3)
    assert found.dtype == torch.bool
    flat = x.movedim(1, -2).flatten(0, 2)
    want = gaps(module, flat) > threshold
    assert torch.equal(found.movedim(1, -1).flatten(0, 2), want)
    assert 0 < want.sum() < want.numel()
    assert growth.none_near(module, x, 0.0).all()


def test_padding_and_nan_are_not_far():
    module, x = bottleneck(), queries(4, 3, scale=9.0)
    mask = torch.tensor([True, False, True]).expand(4, 3).clone()
    x[0, :, 0] = torch.nan
    found = growth.none_near(module, x, 0.01, mask=mask)
    assert not found[..., 1].any()
    assert not found[0, :, 0].any()
    assert found[1:, :, ::2].all()
    assert growth.add_pairs(module, x, 0.01, mask=mask).tolist() == [4 + 3] * C
    threshold = growth.distance_threshold(module, x, share=1.0, mask=mask)
    assert threshold.isfinite().all()


def test_masked_pairs_are_not_near():
    module, x = bottleneck(), queries(1)
    x[0] = module.keys[:, 7]
    assert not growth.none_near(module, x, 0.1).any()
    mask = torch.ones(C, K, dtype=torch.bool)
    mask[:, 7] = False
    module.mask_pairs(mask)
    assert growth.none_near(module, x, 1e-6).all()


@pytest.mark.parametrize("masked", [False, True])
def test_pairs_are_added_as_the_loop_says(masked):
    module, x, threshold = bottleneck(), queries(50, scale=1.6), torch.tensor([1.0, 2.0, 6.0])
    usable = torch.ones(C, K, dtype=torch.bool)
    if masked:
        usable[:, 3] = False
        module.mask_pairs(usable)
    lists = [list(module.keys[c][usable[c]]) for c in range(C)]
    for c, keys in enumerate(lists):
        for q in x[:, c]:
            if min((q - key).square().sum() for key in keys) > threshold[c]:
                keys.append(q)
    old_keys, old_values = module.keys.clone(), module.values.detach().clone()
    added = growth.add_pairs(module, x, threshold)
    assert added.tolist() == [len(keys) - int(usable[c].sum()) for c, keys in enumerate(lists)]
    assert len(set(added.tolist())) > 1
    assert module.key_value_pairs_per_codebook == K + int(added.max())
    for c, keys in enumerate(lists):
        assert torch.equal(module.keys[c, K : K + int(added[c])], torch.stack(keys)[int(usable[c].sum()) :])
        assert module.pair_mask[c].tolist() == usable[c].tolist() + [n < added[c] for n in range(int(added.max()))]
    assert torch.equal(module.keys[:, :K], old_keys)
    assert torch.equal(module.values[:, :K], old_values)
    assert not module.values[:, K:].any()
    assert not growth.none_near(module, x, threshold).any()
    assert not growth.add_pairs(module, x, threshold).any()


def test_only_queries_that_a_new_key_is_nearer_to_change():
    module, old = bottleneck(), queries(300)
    before, codes, apart = module(old).detach(), module.encode(old), gaps(module, old)
    new = queries(60, seed=2, scale=2.0)
    assert growth.add_pairs(module, new, growth.distance_threshold(module, old, share=0.9)).min() > 0
    fresh = module.keys[:, K:].masked_fill(~module.pair_mask[:, K:, None], torch.inf)
    nearer = (old[:, :, None] - fresh).square().sum(-1).amin(-1) < apart
    assert 0 < nearer.sum() < 0.2 * nearer.numel()
    assert torch.equal(module.encode(old) >= K, nearer)
    assert torch.equal(module(old)[~nearer], before[~nearer])
    assert torch.equal(module.decode(codes), before)


def test_new_pairs_learn_and_an_optimizer_follows():
    module, old = bottleneck(), queries(100)
    optimizer = optim.RowwiseAdam([module.values], lr=0.1)
    module(old).square().sum().backward()
    optimizer.step()
    table, before, codes = module.values, module(old).detach(), module.encode(old)
    new = queries(10, seed=3) + 8.0
    growth.add_pairs(module, new, growth.distance_threshold(module, old, share=1.0))
    optim.grow(optimizer, table, module.values)
    kept = module.values.detach()[:, :K].clone()
    for _ in range(30):
        optimizer.zero_grad()
        (module(new) - 1).square().mean().backward()
        optimizer.step()
    assert (module(new) - 1).abs().max() < 0.2
    assert torch.equal(module.values.detach()[:, :K], kept)
    assert torch.equal(module.decode(codes), before)


def test_a_grown_module_is_saved(tmp_path):
    module, x = bottleneck(), queries(30, scale=3.0)
    growth.add_pairs(module, x, torch.tensor([1.0, 2.0, 9.0]))
    kvb.save(module, tmp_path / "grown.pt")
    other = kvb.KeyValueBottleneck(C, module.key_value_pairs_per_codebook, D, V).eval()
    kvb.load(other, tmp_path / "grown.pt")
    assert torch.equal(other(x), module(x))
    assert torch.equal(other.pair_mask, module.pair_mask)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, x: growth.none_near(m, x, -1.0), ValueError, "threshold must be in"),
        (lambda m, x: growth.none_near(m, x, "1"), TypeError, "threshold must be a number"),
        (lambda m, x: growth.none_near(m, x, torch.ones(C + 1)), ValueError, "threshold"),
        (lambda m, x: growth.none_near(m, x, -torch.ones(C)), ValueError, "threshold must be >= 0, got -1"),
        (lambda m, x: growth.none_near(m, x, torch.full((C,), torch.nan)), ValueError, "threshold must be >= 0"),
        (lambda m, x: growth.add_pairs(m, x[:, :2], 1.0), ValueError, "expected"),
        (lambda m, x: growth.distance_threshold(m, x, share=1.5), ValueError, "share must be in"),
        (lambda m, x: growth.none_near(nn.Linear(2, 2), x, 1.0), TypeError, "expected a KeyValueBottleneck"),
        (
            lambda m, x: growth.none_near(kvb.DiscreteKeyValueBottleneck(8, num_memories=4), x, 1.0),
            TypeError,
            "give its attribute bottleneck",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    module = bottleneck()
    before = module.state_dict()
    with pytest.raises(error, match=match):
        call(module, queries(2))
    assert all(torch.equal(module.state_dict()[name], part) for name, part in before.items())


def test_no_query_at_all():
    module = bottleneck()
    assert growth.none_near(module, queries(0), 1.0).shape == (0, C)
    assert growth.add_pairs(module, queries(0), 1.0).tolist() == [0] * C
    assert growth.distance_threshold(module, queries(0)).tolist() == [0.0] * C
    assert module.key_value_pairs_per_codebook == K
