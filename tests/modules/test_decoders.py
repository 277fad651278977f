"""Decoders: codebook voting, linear and MLP, the distance as a channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvb import KeyValueBottleneck
from kvb.decoders import MLP, CodebookVoting, LinearProbe, add_distance_to_values


@pytest.mark.parametrize("shape", [(), (7,), (2, 4, 5)])
def test_the_mean_vote_is_the_logits(shape):
    values = torch.randn(3, 6, *shape, 10)
    want = torch.stack([sample.reshape(-1, 10).mean(0) for sample in values])
    torch.testing.assert_close(CodebookVoting(10)(values), want)
    torch.testing.assert_close(CodebookVoting(10, channel_last=False)(values.movedim(-1, 2)), want)


@pytest.mark.parametrize("shape", [(), (4, 5)])
@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_ranks_are_weighted_and_summed(shape, weights):
    values = torch.randn(2, 6, 3, *shape, 10)
    w = weights or [1.0, 1.0, 1.0]
    want = sum(w[t] * values[:, :, t] for t in range(3)).reshape(2, -1, 10).mean(1)
    vote = CodebookVoting(10, 3, weights=weights)
    torch.testing.assert_close(vote(values), want)
    assert list(vote.parameters()) == []
    assert vote.state_dict()["weights"].tolist() == pytest.approx(w)
    first = CodebookVoting(10, 3, weights=weights, channel_last=False)
    torch.testing.assert_close(first(values.movedim(-1, 3)), want)


def test_dropout_takes_whole_votes_in_training_mode_only():
    values = torch.ones(64, 5, 4, 10)
    vote = CodebookVoting(10, dropout=0.5)
    logits = vote(values)
    assert torch.equal(logits, logits[:, :1].expand(-1, 10))  # a vote is there for all classes or for none
    kept = logits[:, 0] * 20 / 2  # kept votes count twice
    torch.testing.assert_close(kept, kept.round())
    assert len(kept.unique()) > 3
    assert 8 < kept.mean() < 12
    assert torch.equal(vote.eval()(values), torch.ones(64, 10))


def test_nothing_learns():
    vote = CodebookVoting(10)
    assert list(vote.parameters()) == []
    assert list(vote.state_dict()) == []
    assert repr(vote) == "CodebookVoting(10 classes)"
    assert repr(CodebookVoting(10, 3)) == "CodebookVoting(10 classes, topk=3)"


def test_value_dim_must_be_the_classes():
    with pytest.raises(ValueError, match=r"\(B, C, \*shape, 10\), got \(3, 6, 9\).*dim_values equal to the number of"):
        CodebookVoting(10)(torch.randn(3, 6, 9))
    with pytest.raises(ValueError, match="expected values of shape"):
        CodebookVoting(10)(torch.randn(3, 10))
    with pytest.raises(ValueError, match=r"\(B, C, T, V, \*shape\) = \(B, C, 2, 10, \*shape\), got \(3, 6, 3, 10\)"):
        CodebookVoting(10, 2, channel_last=False)(torch.randn(3, 6, 3, 10))
    with pytest.raises(ValueError, match=r"\(B, C, V, \*shape\) = \(B, C, 10, \*shape\), got \(3, 6, 4, 10\)"):
        CodebookVoting(10, channel_last=False)(torch.randn(3, 6, 4, 10))


def test_voting_options_are_checked():
    with pytest.raises(ValueError, match=r"weights must hold one number for each of topk > 1 ranks, got \[1.0\]"):
        CodebookVoting(10, 2, weights=[1.0])
    with pytest.raises(ValueError, match="for topk=1"):
        CodebookVoting(10, weights=[1.0])
    with pytest.raises(ValueError, match=r"dropout must be in \[0.0, 1.0\), got 1.0"):
        CodebookVoting(10, dropout=1.0)


@pytest.mark.parametrize("shape", [(24,), (6, 4), (2, 3, 4), (0, 24)])
def test_linear_and_mlp_see_all_values(shape):
    values = torch.randn(5, *shape) if 0 not in shape else torch.randn(shape)
    linear, bare, mlp = LinearProbe(24, 3), LinearProbe(24, 3, bias=False), MLP(24, 3, hidden=7)
    flat = values.reshape(-1, 24)
    torch.testing.assert_close(linear(values), flat @ linear.linear.weight.T + linear.linear.bias)
    torch.testing.assert_close(bare(values), flat @ bare.linear.weight.T)
    want = (flat @ mlp.hidden.weight.T + mlp.hidden.bias).relu() @ mlp.output.weight.T + mlp.output.bias
    torch.testing.assert_close(mlp(values), want)
    assert bare.linear.bias is None
    assert MLP(24, 3).hidden.out_features == 128
    for decoder in (linear, mlp):
        with pytest.raises(ValueError, match=r"num_features = 24 numbers per sample, got \(2, 5, 5\)"):
            decoder(torch.randn(2, 5, 5))
        with pytest.raises(TypeError, match="expected a floating-point values"):
            decoder(torch.ones(2, 24, dtype=torch.int64))


@pytest.mark.parametrize("topk", [1, 2])
def test_the_distance_is_one_more_channel(topk):
    bottleneck = KeyValueBottleneck(4, 8, 5, 3, return_values_only=False, topk=topk).freeze_keys()
    x = torch.randn(2, 4, 6, 7, 5, requires_grad=True)
    out = bottleneck(x)
    both = add_distance_to_values(out.values, out.distances)
    assert torch.equal(both[..., :3], out.values)
    assert torch.equal(both[..., 3], out.distances)
    first = add_distance_to_values(out.values.movedim(-1, 1 + topk), out.distances, axis=1 + topk)
    assert torch.equal(first, both.movedim(-1, 1 + topk))
    logits = nn.Flatten()(both).sum()
    logits.backward()
    assert x.grad.abs().sum() > 0  # a loss on the output reaches the features
    assert add_distance_to_values(out.values.half(), out.distances).dtype == torch.float16


def test_distances_must_fit():
    values = torch.randn(2, 4, 6, 3)
    with pytest.raises(ValueError, match=r"without axis -1, \(2, 4, 6\), got \(2, 4, 3\)"):
        add_distance_to_values(values, torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match=r"axis must be one of the 4 axes of values, got 4"):
        add_distance_to_values(values, torch.randn(2, 4, 6), axis=4)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("shape", [(), (8,), (2, 3)])
def test_only_positions_that_count_vote(topk, channel_last, shape):
    B, C, V = 4, 2, 3
    vote = CodebookVoting(V, topk, channel_last=channel_last)
    values = torch.randint(-4, 5, (B, C, *([topk] if topk > 1 else []), *shape, V)).float()
    mask = torch.rand(B, *shape) < 0.5
    mask[0], mask[1] = False, True
    given = values if channel_last else values.movedim(-1, 2 + (topk > 1))
    logits = vote(given, mask)
    assert torch.equal(logits[0], torch.zeros(V))
    torch.testing.assert_close(logits[1:2], vote(given[1:2]))
    for b in range(1, B):
        rows = values[b : b + 1] if topk == 1 else values[b : b + 1].sum(2)
        kept = rows.movedim(1, -2)[mask[b : b + 1]].flatten(0, 1)
        torch.testing.assert_close(logits[b], kept.sum(0) / max(1, len(kept)))


def test_a_mask_of_votes_that_does_not_fit():
    values, vote = torch.randn(4, 2, 5, 3), CodebookVoting(3)
    with pytest.raises(TypeError, match=r"CodebookVoting\(\): mask must be torch.bool, .* got torch.float32"):
        vote(values, torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"expected mask of shape \(B, \*shape\) = \(4, 5\), got \(4, 6\)"):
        vote(values, torch.ones(4, 6, dtype=torch.bool))
