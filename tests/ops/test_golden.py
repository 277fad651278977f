"""The published implementations' own numbers (tests/data/golden.pt)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kvb import BottleneckedEncoder, KeyValueBottleneck, ops
from kvb.decoders import CodebookVoting
from kvb.optim import RowwiseSGD, clip_grad_norm_
from kvb.splitters import Chunk, LearnedProjection, RandomProjection
from kvb.training import sgd_step

pytestmark = pytest.mark.contract

GOLDEN = torch.load(Path(__file__).parents[1] / "data" / "golden.pt", weights_only=True)


def module_for(state, **options):
    """A bottleneck that loaded a published state_dict, strictly."""
    C, K, V = state["values"].shape
    module = KeyValueBottleneck(C, K, state["keys"].shape[-1], V, return_values_only=False, **options)
    module.load_state_dict(state, strict=True)
    return module


def assert_distances(got, neg_sq_dist, x, keys):
    """|d - d*| <= 1e-5 (|x|^2 + |k|^2): the published expanded form is itself that far from float64."""
    limit = 1e-5 * (x.square().sum(-1) + keys.square().sum(-1))
    assert ((got + neg_sq_dist).abs() <= limit).all()


@pytest.mark.parametrize("name", ["lookup_0", "lookup_1", "lookup_2"])
def test_lookup(name):
    case = GOLDEN[name]
    module = module_for(case["state"]).freeze_keys()
    x = case["x"]
    out = module(x)
    assert torch.equal(out.values, case["values"].squeeze(2))
    assert torch.equal(out.keys, case["keys"].squeeze(2))
    assert torch.equal(out.indices, case["indices"].squeeze(-1).squeeze(2))
    assert_distances(out.distances, case["neg_sq_dist"].squeeze(-1).squeeze(2), x, out.keys)
    (out.values * case["loss_weight"].squeeze(2)).sum().backward()
    torch.testing.assert_close(module.values.grad, case["grad_values"], rtol=1e-6, atol=1e-6)
    assert torch.equal(module.cluster_size_counter, case["counter_after"])


def test_topk():
    case = GOLDEN["topk3"]
    module = module_for(case["state"], topk=3).freeze_keys()
    out = module(case["x"])
    assert torch.equal(out.values, case["values"])
    assert torch.equal(out.keys, case["keys"])
    assert torch.equal(out.indices, case["indices"].squeeze(-1))
    assert_distances(out.distances, case["neg_sq_dist"].squeeze(-1), case["x"][:, :, None], out.keys)


def test_masked():
    case = GOLDEN["masked"]
    module = module_for(case["state"]).freeze_keys()
    for x in case["x_count"]:
        module(x)
    assert torch.equal(module.cluster_size_counter, case["counter"])
    assert torch.equal(module.fraction_of_unused_keys(), case["fraction_unused"])
    module.deactivate_counts().eval()
    out = module(case["x_eval"])
    assert torch.equal(out.values, case["values"].squeeze(2))
    assert torch.equal(out.indices, case["indices"].squeeze(-1).squeeze(2))
    assert_distances(out.distances, case["neg_sq_dist"].squeeze(-1).squeeze(2), case["x_eval"], out.keys)
    assert torch.equal(module.cluster_size_counter, case["counter"])


@pytest.mark.parametrize("name", ["ema_0", "ema_1"])
def test_moving_averages(name):
    """Pairs hit in a step agree; the others keep their key here, where the published code rescales it."""
    case = GOLDEN[name]
    module = module_for(case["state"], decay=case["decay"], eps=case["eps"])
    for x, step in zip(case["x"], case["steps"], strict=True):
        before = module.keys.clone()
        out = module(x)
        indices = step["indices"].squeeze(-1).squeeze(2)
        assert torch.equal(out.indices, indices)
        hits = F.one_hot(indices, module.keys.shape[1]).sum((0, 2))
        assert hits.sum() == indices.numel()
        torch.testing.assert_close(module.keys[hits > 0], step["keys"][hits > 0], rtol=1e-4, atol=1e-6)
        assert torch.equal(module.keys[hits == 0], before[hits == 0])
        torch.testing.assert_close(module.keys_avg, step["keys_avg"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.cluster_size, step["cluster_size"], rtol=1e-4, atol=1e-6)


def test_random_projection():
    case = GOLDEN["random_projection"]
    C, channels, D = case["state"]["rand_proj"].shape
    splitter = RandomProjection(channels, C, D)
    splitter.load_state_dict(case["state"], strict=True)
    torch.testing.assert_close(splitter(case["x"]), case["y"], rtol=1e-5, atol=1e-5)


def test_chunk():
    case = GOLDEN["chunk"]
    splitter = Chunk(case["x"].shape[-1], case["y"].shape[1])
    assert torch.equal(splitter(case["x"]), case["y"])


def test_learned_projection():
    case = GOLDEN["learned_projection"]
    C, D = case["y"].shape[1], case["y"].shape[-1]
    splitter = LearnedProjection(case["x"].shape[-1], C, D)
    splitter.load_state_dict(case["state"], strict=True)
    torch.testing.assert_close(splitter(case["x"]), case["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["random_projection", "chunk"])
def test_encoder(mode):
    """The published tuple, its axes of ranks and of single numbers left out."""
    case = GOLDEN[f"encoder_{mode}"]
    (C, K, D), V = case["state"]["bottleneck.keys"].shape, case["state"]["bottleneck.values"].shape[-1]
    values, keys, indices, neg_sq_dist, _, heads, features = case["out"]
    model = BottleneckedEncoder(
        torch.nn.Conv2d(3, 12, 3, padding=1),
        num_channels=12,
        num_codebooks=C,
        key_value_pairs_per_codebook=K,
        dim_keys=D,
        dim_values=V,
        splitting_mode=mode,
        encoder_is_channel_last=False,
        return_values_only=False,
    )
    model.load_state_dict(case["state"], strict=True)
    model.freeze_encoder().freeze_splitter().freeze_keys()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model.forward_encoder(case["x"]), features.movedim(1, -1), **close)
    torch.testing.assert_close(model.forward_splitter(case["x"]).flatten(2, -2), heads, **close)
    out = model(case["x"])
    assert torch.equal(out.values, values.squeeze(2))
    assert torch.equal(out.keys, keys.squeeze(2))
    assert torch.equal(out.indices, indices.squeeze(3).squeeze(2))
    compared = model.forward_splitter(case["x"]), out.keys.movedim(2, -1)
    assert_distances(out.distances, neg_sq_dist.squeeze(3).squeeze(2), *compared)


@pytest.mark.parametrize("way", ["search", "codes", "sparse", "fused"])
def test_train_trajectory(way):
    """Forty steps of the paper's recipe: through the search, on cached codes, with row gradients, in one operator."""
    case = GOLDEN["train_trajectory"]
    module = module_for(case["state"], sparse_grad=way == "sparse").freeze_keys()
    vote = CodebookVoting(module.dim_values)
    recipe = {"lr": case["lr"], "max_norm": case["clip"], "label_smoothing": case["label_smoothing"]}
    kind, clip = (RowwiseSGD, clip_grad_norm_) if way == "sparse" else (torch.optim.SGD, torch.nn.utils.clip_grad_norm_)
    optimizer = kind(module.parameters(), lr=case["lr"])
    losses, steps = [], 4 if ops.backend("cpu") == "triton" else len(case["x"])  # the interpreter takes its time
    for x, y in zip(case["x"][:steps], case["y"][:steps], strict=True):
        if way == "fused":
            losses.append(sgd_step(module.values, module.encode(x, dtype="auto"), y, **recipe).loss)
            continue
        cached = way == "codes"
        logits = module.decode(module.encode(x, dtype="auto"), "mean")[:, 0] if cached else vote(module(x).values)
        loss = F.cross_entropy(logits, y, label_smoothing=case["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        clip(module.parameters(), case["clip"])
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), case["loss"][:steps], rtol=1e-5, atol=1e-5)
    if steps == len(case["x"]):
        torch.testing.assert_close(module.values.detach(), case["values_final"], rtol=1e-5, atol=1e-5)
