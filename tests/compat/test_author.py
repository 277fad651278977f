"""The authors' package: its own numbers (tests/data/golden.pt), its contract, its quirks by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvb
from kvb.compat.key_value_bottleneck import core

pytestmark = pytest.mark.fallback

GOLDEN = torch.load(Path(__file__).parents[1] / "data" / "golden.pt", weights_only=True)


# --- the author's code: numbers ---------------------------------------------------------------------------------------


def author(state, **options):
    C, K, V = state["values"].shape
    module = core.KeyValueBottleneck(C, K, state["keys"].shape[-1], V, return_values_only=False, **options)
    module.load_state_dict(state, strict=True)
    return module


def assert_distances(got, want, x, keys):
    """Golden distances, of the expanded form, are themselves 1e-5 (|x|^2 + |k|^2) from float64."""
    limit = 1e-5 * (x[:, :, None].square().sum(-1) + keys.square().sum(-1))
    assert ((got - want).abs() <= limit[..., None]).all()


@pytest.mark.parametrize(("name", "topk"), [("lookup_0", 1), ("lookup_1", 1), ("lookup_2", 1), ("topk3", 3)])
def test_lookup(name, topk):
    case = GOLDEN[name]
    module = author(case["state"], topk=topk).freeze_keys()
    values, keys, indices, distances, counts = module(case["x"])
    for got, name in ((values, "values"), (keys, "keys"), (indices, "indices"), (counts, "counts")):
        assert torch.equal(got, case[name])
    assert_distances(distances, case["neg_sq_dist"], case["x"], keys)
    if "grad_values" in case:
        (values * case["loss_weight"]).sum().backward()
        torch.testing.assert_close(module.values.grad, case["grad_values"], rtol=1e-6, atol=1e-6)
        assert torch.equal(module.cluster_size_counter, case["counter_after"])


def test_masked():
    case = GOLDEN["masked"]
    module = author(case["state"]).freeze_keys()
    for x in case["x_count"]:
        module(x)
    assert torch.equal(module.cluster_size_counter, case["counter"])
    assert torch.equal(module.fraction_of_unused_keys(), case["fraction_unused"])
    values, keys, indices, distances, counts = module.deactivate_counts().eval()(case["x_eval"])
    assert torch.equal(values, case["values"])
    assert torch.equal(indices, case["indices"])
    assert_distances(distances, case["neg_sq_dist"], case["x_eval"], keys)
    assert (counts > 0).all()


@pytest.mark.parametrize("name", ["ema_0", "ema_1"])
def test_moving_averages_of_every_pair(name):
    case = GOLDEN[name]
    module = author(case["state"], decay=case["decay"], eps=case["eps"])
    for x, step in zip(case["x"], case["steps"], strict=True):
        assert torch.equal(module(x)[2], step["indices"])
        for name in ("keys", "keys_avg", "cluster_size"):
            torch.testing.assert_close(getattr(module, name), step[name], rtol=1e-6, atol=1e-6)


def test_train_trajectory():
    case = GOLDEN["train_trajectory"]
    module = author(case["state"]).freeze_keys()
    optimizer = torch.optim.SGD(module.parameters(), lr=case["lr"])
    for x, y, want in zip(case["x"], case["y"], case["loss"], strict=True):
        logits = module(x)[0].mean((1, 2, 3))
        loss = F.cross_entropy(logits, y, label_smoothing=case["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), case["clip"])
        optimizer.step()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.values.detach(), case["values_final"], rtol=1e-5, atol=1e-5)


# --- the author's code: contract --------------------------------------------------------------------------------------


def test_the_tuple_and_its_shapes():
    x = torch.randn(5, 3, 7, 4, dtype=torch.float64)
    module = core.KeyValueBottleneck(3, 9, 4, 2, topk=2)
    (values,) = module(x)
    assert values.shape == (5, 3, 1, 7, 2)  # topk only once the keys are frozen
    (values,) = module.freeze_keys()(x)
    assert values.shape == (5, 3, 2, 7, 2)
    module.return_values_only = False
    assert [part.shape[2:] for part in module(x)] == [(2, 7, 2), (2, 7, 4), (2, 7, 1), (2, 7, 1), (2, 7, 1)]
    assert {part.dtype for part in module(x)} == {torch.float32, torch.int64}
    with pytest.raises(ValueError, match=r"expected x of shape \(b, C, n, D\) = \(b, 3, n, 4\), got \(5, 3, 4\)"):
        module(x[:, :, 0])


def test_distances_are_negative_and_differentiable():
    module = core.KeyValueBottleneck(3, 9, 4, 2, return_values_only=False).freeze_keys()
    x = torch.randn(5, 3, 7, 4, requires_grad=True)
    _, keys, _, distances, _ = module(x)
    torch.testing.assert_close(distances[..., 0], -(x[:, :, None] - keys).square().sum(-1))
    distances.sum().backward()
    torch.testing.assert_close(x.grad, -2 * (x.detach() - keys[:, :, 0]))


def test_a_state_dict_is_the_published_one():
    module = core.KeyValueBottleneck(3, 9, 4, 2)
    assert list(module.state_dict()) == list(GOLDEN["lookup_0"]["state"])
    assert {part.dtype for part in module.state_dict().values()} == {torch.float32}
    module.freeze_keys().load_state_dict(module.state_dict())
    assert not module.update_keys
    module.load_state_dict(kvb.KeyValueBottleneck(3, 9, 4, 2).freeze_keys().state_dict())


@pytest.mark.parametrize("freeze", [False, True])
def test_keys_that_wait_take_the_first_batch_in_every_mode(freeze):
    module = core.KeyValueBottleneck(3, 9, 4, 2, init_mode="kmeans").eval()
    if freeze:
        module.freeze_keys()
    x = torch.randn(50, 3, 2, 4) + 5
    module(x)
    assert module.initted.item() == 1
    assert module.update_keys != freeze
    torch.testing.assert_close(module.keys.mean((0, 1)), torch.full((4,), 5.0), rtol=0, atol=0.5)


def test_ranks_without_a_usable_pair_have_the_value_zero():
    module = core.KeyValueBottleneck(1, 4, 2, 3, topk=3, return_values_only=False).freeze_keys()
    module.keys.copy_(torch.tensor([[[0.0, 0], [1, 0], [2, 0], [9, 0]]]))
    module.values.data[0, 2:] = 1000.0
    module.cluster_size_counter.copy_(torch.tensor([[5, 3, 0, 0]]))
    module.deactivate_counts()
    values, _, indices, distances, _ = module(torch.zeros(1, 1, 1, 2))
    assert indices.flatten().tolist() == [0, 1, 2]
    assert distances.flatten().tolist() == [0, -1, -torch.inf]
    assert torch.equal(values[0, 0, :, 0], torch.stack([module.values[0, 0], module.values[0, 1], torch.zeros(3)]))
    values.sum().backward()
    assert module.values.grad[0, :, 0].tolist() == [1, 1, 0, 0]


def test_nothing_counted_finds_index_zero():
    module = core.KeyValueBottleneck(3, 9, 4, 2, return_values_only=False).freeze_keys().deactivate_counts().eval()
    assert (module(torch.randn(5, 3, 7, 4))[2] == 0).all()


def test_get_cluster_size():
    module = core.KeyValueBottleneck(3, 9, 4, 2, return_values_only=False, topk=2).freeze_keys()
    indices = module(torch.randn(5, 3, 7, 4))[2]
    assert torch.equal(module.get_cluster_size(indices), module.cluster_size_counter.long())
    assert torch.equal(module.reset_cluster_size_counter().cluster_size_counter, torch.zeros(3, 9))


def test_values_grow_with_the_classes():
    module = core.KeyValueBottleneck(3, 9, 4, 2).freeze_keys()
    x = torch.randn(5, 3, 7, 4)
    before = module(x)[0]
    more = torch.cat([module.values.detach(), torch.zeros(3, 9, 5)], -1)
    module.values = nn.Parameter(more)
    after = module(x)[0]
    assert after.shape == (5, 3, 1, 7, 7)
    assert torch.equal(after[..., :2], before)
    assert module.dim_values == 7
    assert dict(module.named_parameters()).keys() == {"values"}
    after.sum().backward()
    assert module.values.grad.shape == (3, 9, 7)
    core.KeyValueBottleneck(3, 9, 4, 7).load_state_dict(module.state_dict())
    assert "7-d" in repr(module)

    del module.values
    assert "no values" in repr(module)
    module.values = more + 1  # no parameter: what a decoder of its own learns, say
    assert torch.equal(module(x)[0], after.detach() + 1)
    assert not list(module.parameters())


def test_keys_of_another_size():
    module = core.KeyValueBottleneck(3, 9, 4, 2).freeze_keys()
    module.keys, module.values = torch.randn(3, 20, 6), nn.Parameter(torch.randn(3, 20, 2))
    for name in ("keys_avg", "cluster_size", "cluster_size_counter"):
        setattr(module, name, torch.zeros(3, 20, 6) if name == "keys_avg" else torch.zeros(3, 20))
    assert (module.num_codebooks, module.key_value_pairs_per_codebook, module.dim_keys) == (3, 20, 6)
    module.return_values_only = False
    indices = module(torch.randn(50, 3, 7, 6))[2]
    assert indices.max() > 9
    assert torch.equal(module.get_cluster_size(indices), module.cluster_size_counter.long())


def test_several_draws_at_a_temperature():
    module = core.KeyValueBottleneck(
        3, 9, 4, 2, topk=3, sample_codebook_temperature=20.0, return_values_only=False
    ).freeze_keys()
    x = torch.randn(400, 3, 2, 4)
    values, keys, indices, distances, _ = module(x)
    assert values.shape == (400, 3, 3, 2, 2)
    assert (indices.sort(2).values.diff(dim=2) > 0).all()  # without replacement
    assert not torch.equal(module(x)[2], indices)
    torch.testing.assert_close(distances[..., 0], -(x[:, :, None] - keys).square().sum(-1))
    cold = core.KeyValueBottleneck(3, 9, 4, 2, topk=3, return_values_only=False)
    cold.load_state_dict(module.state_dict())
    module.sample_codebook_temperature = 1e-6
    assert torch.equal(module(x)[2], cold.freeze_keys()(x)[2])


# --- its bugs, by name only -------------------------------------------------------------------------------------------


def test_bug_learns_in_eval():
    x = torch.randn(50, 3, 2, 4)
    for bugs, changed in (((), False), (("learns_in_eval",), True)):
        module = core.KeyValueBottleneck(3, 9, 4, 2, bugs=bugs).eval()
        before = module.keys.clone()
        with torch.no_grad():
            module(x)
            assert torch.equal(module.keys, before) != changed
            module.freeze_keys()(x)
        assert bool(module.cluster_size_counter.any()) == changed


def test_bug_starts_at_zero():
    x = torch.randn(4, 3, 2, 4)
    for bugs, explodes in (((), False), (("starts_at_zero",), True)):
        module = core.KeyValueBottleneck(3, 64, 4, 2, bugs=bugs)
        module(x)
        assert (module.keys.abs().max() > 1e4) == explodes


def test_bug_kmeans_forgets_statistics():
    x = torch.randn(50, 3, 2, 4) + 5
    for bugs, mean in (((), 5.0), (("kmeans_forgets_statistics",), 0.25)):
        module = core.KeyValueBottleneck(3, 9, 4, 2, init_mode="kmeans", bugs=bugs)
        module(x)
        torch.testing.assert_close(module.keys.mean(), torch.tensor(mean), rtol=0.05, atol=0)


def test_bug_replaces_keys_only():
    x = torch.randn(50, 3, 2, 4)
    for bugs, restarted in (((), True), (("replaces_keys_only",), False)):
        module = core.KeyValueBottleneck(3, 9, 4, 2, threshold_ema_dead_code=1e6, bugs=bugs)
        module(x)
        assert bool((module.cluster_size == 1e6).all()) == restarted
        rows = x.transpose(0, 1).flatten(1, 2)
        assert (module.keys[:, :, None] == rows[:, None]).all(-1).any(-1).all()


def test_unknown_bugs_are_named():
    with pytest.raises(ValueError, match="bugs must be one of 'learns_in_eval', 'starts_at_zero', .*; got 'typo'"):
        core.KeyValueBottleneck(3, 9, 4, 2, bugs=["typo"])
