"""Counting class histograms: against a loop, in any order, back again, over processes, and what a score depends on."""

from __future__ import annotations

import itertools

import pytest
import torch

import kvb
from kvb.counting import ClassCounts, distance_weights

C, K, V, T, N = 3, 20, 5, 4, 60
INTEGERS = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])


def samples(n=N, classes=V):
    return torch.randint(K, (n, C, T)), torch.randint(classes, (n,))


def head(codes, labels, **options):
    return ClassCounts(C, K, V, **options).add(codes, labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_counts_and_scores_are_those_of_a_loop(dtype):
    codes, labels = samples()
    counts = torch.zeros(C, K, V)
    for b, c, t in itertools.product(range(N), range(C), range(T)):
        counts[c, codes[b, c, t], labels[b]] += 1
    found = head(codes, labels, dtype=dtype)
    assert torch.equal(found.counts, counts.to(dtype))
    logs = (counts / counts.sum(1, keepdim=True) + 0.1 / K).log()
    want = logs[torch.arange(C)[:, None], codes].mean((1, 2))
    torch.testing.assert_close(found(codes), want)
    torch.testing.assert_close(found(codes, torch.ones(T)), want)
    assert torch.equal(found.predict(codes), want.argmax(-1))
    ranks = torch.tensor([1.0, 0.5, 0.25, 0.125])
    weighted = (logs[torch.arange(C)[:, None], codes] * ranks[:, None]).sum((1, 2)) / (C * ranks.sum())
    torch.testing.assert_close(
        ClassCounts(C, K, V, rank_weights=ranks.tolist()).merge(head(codes, labels))(codes), weighted
    )


def test_votes_are_shares_of_the_pairs():
    codes, labels = samples()
    found = head(codes, labels)
    share = found.counts / found.totals
    share = torch.where(share.sum(-1, keepdim=True) > 0, share / share.sum(-1, keepdim=True), 0)
    votes = found(codes, method="vote")
    torch.testing.assert_close(votes, share[torch.arange(C)[:, None], codes].mean((1, 2)))
    torch.testing.assert_close(votes.sum(-1), torch.ones(N))


@INTEGERS
def test_order_and_batches_do_not_matter(dtype):
    codes, labels = samples()
    want = head(codes, labels, dtype=dtype).state_dict()
    for size in (1, 7, 59):
        order = torch.randperm(N)
        found = ClassCounts(C, K, V, dtype=dtype)
        for rows in order.split(size):
            found.add(codes[rows].to(torch.int16), labels[rows])
        assert all(torch.equal(found.state_dict()[name], part) for name, part in want.items())


@INTEGERS
def test_any_subset_is_removed_bit_for_bit(dtype):
    codes, labels = samples()
    whole = head(codes, labels, dtype=dtype)
    for _ in range(100):
        gone = torch.rand(N) < torch.rand(())
        never = head(codes[~gone], labels[~gone], dtype=dtype)
        rows = gone.nonzero()[:, 0][torch.randperm(int(gone.sum()))]
        for part in rows.split(int(torch.randint(1, N, ()))):
            whole.remove(codes[part], labels[part])
        assert torch.equal(whole.counts, never.counts)
        assert torch.equal(whole.totals, never.totals)
        assert torch.equal(whole(codes), never(codes))
        whole.add(codes[rows], labels[rows])


def test_what_was_never_added_cannot_be_removed():
    codes, labels = samples()
    found = head(codes, labels)
    before = found.counts.clone()
    with pytest.raises(ValueError, match="added before with these labels"):
        found.remove(codes, (labels + 1) % V)
    assert torch.equal(found.counts, before)


def test_processes_add_up():
    codes, labels = samples()
    parts = [head(codes[rows], labels[rows]) for rows in torch.randperm(N).tensor_split(3)]
    assert torch.equal(parts[0].merge(parts[1]).merge(parts[2]).counts, head(codes, labels).counts)
    assert torch.equal(parts[0](codes), head(codes, labels)(codes))
    with pytest.raises(TypeError, match="int32"):
        parts[0].merge(ClassCounts(C, K, V, dtype=torch.int64))


def test_a_score_depends_on_its_own_class_alone():
    """Also the first score in a table of more classes, whose numbers lie elsewhere."""
    codes, labels = samples(classes=V - 1)
    found = head(codes, labels)
    before = found(codes)
    assert (before[:, -1] == -torch.inf).all()
    more = samples()[0]
    found.add(more, torch.full((N,), V - 1))
    assert torch.equal(found(codes)[:, : V - 1], before[:, : V - 1])
    for classes in (V + 1, V + 40):
        found.expand(classes).add(more, torch.full((N,), classes - 1))
        assert torch.equal(found(codes)[:, : V - 1], before[:, : V - 1])
    found.forget_classes(torch.tensor([0]))
    assert (found(codes)[:, 0] == -torch.inf).all()
    assert torch.equal(found(codes)[:, 1 : V - 1], before[:, 1 : V - 1])


def test_whole_weights_are_exact():
    codes, labels = samples()
    distances = torch.rand(N, C, T).sort(-1).values
    weights = distance_weights(distances, levels=16)
    found = ClassCounts(C, K, V).add(codes, labels, weights)
    assert found.counts.sum() == weights.sum()
    order = torch.randperm(N)
    again = ClassCounts(C, K, V).add(codes[order], labels[order], weights[order])
    assert torch.equal(again.counts, found.counts)
    found.remove(codes[:50], labels[:50], weights[:50])
    assert torch.equal(found.counts, ClassCounts(C, K, V).add(codes[50:], labels[50:], weights[50:]).counts)
    floats = ClassCounts(C, K, V, dtype=torch.float64).add(codes, labels, distance_weights(distances.double()))
    torch.testing.assert_close(floats.counts.sum(), distance_weights(distances.double()).sum())


def test_weights_by_distance():
    weights = distance_weights(torch.tensor([[[0.0, 1.0, 2.1]], [[0.0, 0.0, 0.0]], [[1.0, torch.inf, torch.nan]]]))
    torch.testing.assert_close(weights[0, 0], 1 - torch.tensor([0.0, 1.0, 2.1]) / 2.205)
    assert weights[1].tolist() == [[1, 1, 1]]
    assert weights[2, 0, 1:].tolist() == [0, 0]


def test_a_bottleneck_and_a_file(tmp_path):
    bottleneck = kvb.KeyValueBottleneck(C, K, 6, 1, topk=T).freeze_keys()
    x, labels = torch.randn(N, C, 6), torch.randint(V, (N,))
    codes = bottleneck.encode(x)
    found = head(codes, labels)
    kvb.save(found, tmp_path / "counts.pt")
    other = ClassCounts(C, K, 2)
    other.load_state_dict(found.state_dict())
    assert torch.equal(other(codes), found(codes))
    assert torch.equal(kvb.load(ClassCounts(C, K, V), tmp_path / "counts.pt")(codes), found(codes))
    near = bottleneck(x, return_values_only=False)
    assert found(near.indices, distance_weights(near.distances)).shape == (N, V)


def test_wrong_arguments_are_named():
    codes, labels = samples()
    found = head(codes, labels)
    for error, message, call in (
        (TypeError, "expected integer codes", lambda: found.add(codes.float(), labels)),
        (TypeError, "expected integer labels", lambda: found.add(codes, labels.float())),
        (TypeError, "expected integer weights", lambda: found.add(codes, labels, torch.ones(N, C, T))),
        (ValueError, r"codes of shape \(B, 3\) or", lambda: found.add(codes[:, :2], labels)),
        (ValueError, "expected labels of shape", lambda: found.add(codes, labels[:-1])),
        (ValueError, "weights must be >= 0, got -1", lambda: found.add(codes, labels, torch.full((N, C, T), -1))),
        (ValueError, "expected weights of the shape of codes", lambda: found(codes, torch.ones(T + 1))),
        (IndexError, "label 5 is out of bounds for 5 classes", lambda: found.add(codes, labels + 4 - labels + 1)),
        (IndexError, "index 20 is out of bounds for codebook with 20 pairs", lambda: found.add(codes * 0 + 20, labels)),
        (ValueError, "method must be one of", lambda: found(codes, method="mean")),
        (ValueError, "rank_weights for each of the 4", lambda: ClassCounts(C, K, V, rank_weights=(1,))(codes)),
        (ValueError, "dtype must be", lambda: ClassCounts(C, K, V, dtype=torch.int16)),
        (ValueError, "at least the 5", lambda: found.expand(4)),
    ):
        with pytest.raises(error, match=message):
            call()
    many = torch.full((N, C, T), 1 << 25)
    with pytest.raises(OverflowError, match="int64"):
        found.add(codes, torch.zeros_like(labels), many)
    assert torch.equal(found.counts, head(codes, labels).counts)
    assert torch.equal(found.totals, head(codes, labels).totals)
