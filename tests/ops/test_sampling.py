"""Draws of several keys per query without replacement: ``sample`` with ``topk`` > 1, and its module."""

from __future__ import annotations

import pytest
import torch

import kvb
from kvb import functional

pytestmark = pytest.mark.contract

op = torch.ops.kvb


def brute(queries, keys):
    """Squared distances [B, S, C, K] in float64."""
    return (queries.double()[..., None, :] - keys.double()).square().sum(-1)


def plackett_luce(logits, ranks):
    """The exact probability of every ordered draw without replacement: {(i, j, ...): p}."""
    chance = {(): 1.0}
    for _ in range(ranks):
        chance = {
            (*drawn, i): p * float(logits[i].exp() / sum(logits[j].exp() for j in range(len(logits)) if j not in drawn))
            for drawn, p in chance.items()
            for i in range(len(logits))
            if i not in drawn
        }
    return chance


def test_sample_draws_without_replacement():
    keys, N, T = torch.randn(1, 4, 2), 40_000, 2
    queries = torch.randn(1, 1, 1, 2).expand(N, -1, -1, -1)
    indices, distances = op.sample(queries, keys, None, 2.0, torch.tensor(5), T)
    exact = brute(queries[:1], keys)[0, 0, 0]
    assert torch.equal(distances[:, 0, 0], exact.float()[indices[:, 0, 0]])
    found = (indices[:, 0, 0] * torch.tensor([4, 1])).sum(-1).bincount(minlength=16) / N
    for pair, chance in plackett_luce(-exact.double() / 2, T).items():
        assert abs(found[4 * pair[0] + pair[1]] - chance) < 0.01, pair
    assert torch.equal(op.sample(queries, keys, None, 2.0, torch.tensor(5))[0], indices[..., :1])


def test_cold_draws_are_the_nearest_and_masked_pairs_come_last():
    keys, queries = torch.randn(2, 20, 3), torch.randn(5, 2, 2, 3)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    mask[1, [4, 1]] = True
    queries[0, 0, 0, 0] = torch.nan
    want, gap = op.nearest(queries, keys, op.pack_keys(keys), mask, 4)
    for temperature in (1e-6, 1e-40):
        indices, distances = op.sample(queries, keys, mask, temperature, torch.tensor(5), 4)
        assert torch.equal(indices, want)
        torch.testing.assert_close(distances, gap, equal_nan=True)
    with pytest.raises(RuntimeError, match="expected topk between 1 and 20, got 21"):
        op.sample(queries, keys, mask, 1.0, torch.tensor(5), 21)


def test_draws_have_gradients_and_can_be_mapped():
    keys, queries = torch.randn(2, 9, 3, dtype=torch.double), torch.randn(4, 2, 2, 3, dtype=torch.double)
    seed = torch.tensor(1)
    queries.requires_grad_()
    for topk in ((), (3,)):
        assert torch.autograd.gradcheck(lambda q, t=topk: op.sample(q, keys, None, 1.0, seed, *t)[1], (queries,))
        mapped = torch.vmap(lambda q, t=topk: op.sample(q[None], keys, None, 1.0, seed, *t)[0])(queries.detach())
        assert torch.equal(mapped[2], op.sample(queries[2:3].detach(), keys, None, 1.0, seed, *topk)[0])


def test_the_function_and_the_module_draw_several():
    queries, keys = torch.randn(6, 2, 3, 4), torch.randn(3, 9, 4)
    draws = [functional.sample(queries, keys, temperature=2.0, topk=3, generator=torch.Generator().manual_seed(1))[0]]
    draws.append(functional.sample(queries, keys, temperature=2.0, generator=torch.Generator().manual_seed(1))[0])
    assert draws[0].shape == (6, 2, 3, 3)
    assert torch.equal(draws[0][..., 0], draws[1])
    with pytest.raises(ValueError, match="topk must be at most the 9 pairs of a codebook, got 10"):
        functional.sample(queries, keys, temperature=2.0, topk=10)

    module = kvb.KeyValueBottleneck(
        3, 9, 4, 2, topk=3, sample_codebook_temperature=5.0, return_values_only=False
    ).freeze_keys()
    x = torch.randn(50, 3, 2, 4)
    first, second = module(x), module(x)
    assert first.values.shape == (50, 3, 3, 2, 2)
    assert not torch.equal(first.indices, second.indices)
    assert (first.indices.sort(2).values.diff(dim=2) > 0).all()
    torch.testing.assert_close(first.distances, (x[:, :, None] - first.keys).square().sum(-1))
    assert module.cluster_size_counter.sum() == 2 * 50 * 3 * 3 * 2
