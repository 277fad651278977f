"""The published contracts: their own numbers (tests/data/golden.pt), their modules' names, their quirks by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvb
from kvb.compat import discrete_key_value_bottleneck as configured
from kvb.compat import discrete_key_value_bottleneck_pytorch as lucidrains
from kvb.compat.key_value_bottleneck import core, splitters

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


@pytest.mark.parametrize("mode", ["random_projection", "chunk"])
def test_encoder(mode):
    case = GOLDEN[f"encoder_{mode}"]
    C, K, V = case["state"]["bottleneck.values"].shape
    module = core.BottleneckedEncoder(
        *(nn.Conv2d(3, 12, 3, padding=1), 12, C, K, case["state"]["bottleneck.keys"].shape[-1], V),
        splitting_mode=mode,
        encoder_is_channel_last=False,
        return_values_only=False,
    )
    module.load_state_dict(case["state"], strict=True)
    output = module.freeze_encoder().freeze_splitter().freeze_keys()(case["x"])
    assert [part.shape for part in output] == [part.shape for part in case["out"]]
    values, keys, indices, distances, counts, heads, features = output
    for part, want in ((heads, 5), (features, 6)):
        torch.testing.assert_close(part, case["out"][want], rtol=1e-5, atol=1e-5)
    for part, want in ((values, 0), (keys, 1), (indices, 2), (counts, 4)):
        assert torch.equal(part, case["out"][want])
    torch.testing.assert_close(distances, case["out"][3], rtol=1e-5, atol=1e-5 * 200)


def test_learned_projection():
    case = GOLDEN["learned_projection"]
    splitter = splitters.LearnedDownProjection(12, 4, 5)
    splitter.load_state_dict(case["state"], strict=True)
    torch.testing.assert_close(splitter(case["x"]), case["y"], rtol=1e-5, atol=1e-5)


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


def test_nothing_counted_finds_index_zero():
    module = core.KeyValueBottleneck(3, 9, 4, 2, return_values_only=False).freeze_keys().deactivate_counts().eval()
    assert (module(torch.randn(5, 3, 7, 4))[2] == 0).all()


def test_get_cluster_size():
    module = core.KeyValueBottleneck(3, 9, 4, 2, return_values_only=False, topk=2).freeze_keys()
    indices = module(torch.randn(5, 3, 7, 4))[2]
    assert torch.equal(module.get_cluster_size(indices), module.cluster_size_counter.long())
    assert torch.equal(module.reset_cluster_size_counter().cluster_size_counter, torch.zeros(3, 9))


def encoder(**options):
    sizes = (nn.Conv2d(3, 12, 3, padding=1), 12, 4, 16, 3, 6)
    return core.BottleneckedEncoder(*sizes, splitting_mode="chunk", encoder_is_channel_last=False, **options)


@pytest.mark.parametrize(
    ("network", "last", "x", "values", "concatenated"),
    [
        (nn.Conv2d(3, 12, 1), False, (2, 3, 4, 5), (2, 4, 1, 6, 4, 5), (2, 1, 24, 4, 5)),
        (nn.Linear(3, 12), True, (2, 4, 5, 3), (2, 4, 1, 20, 6), (2, 1, 20, 24)),
        (nn.Linear(3, 12), True, (2, 3), (2, 4, 1, 6), (2, 1, 24)),
        (nn.Linear(3, 12), False, (2, 3), (2, 4, 1, 6), (2, 1, 24)),
    ],
    ids=["channel_first", "channel_last", "embedding", "embedding_channel_first"],
)
def test_encoder_shapes(network, last, x, values, concatenated):
    for concat, shape in ((False, values), (True, concatenated)):
        module = core.BottleneckedEncoder(
            *(network, 12, 4, 16, 3, 6),
            splitting_mode="chunk",
            encoder_is_channel_last=last,
            concat_values_from_all_codebooks=concat,
        )
        got, heads, features = module(torch.randn(x))
        assert got.shape == shape
        assert heads.shape == (2, 4, features.numel() // 24, 3)
        assert torch.equal(features, network(torch.zeros(x)) * 0 + features)
        assert torch.equal(heads, module.forward_splitter(torch.zeros(x)) * 0 + heads)


def test_prepare_learns_keys_and_freezes():
    module = encoder(threshold_ema_dead_code=0.1).eval()
    before = module.bottleneck.keys.clone()
    loader = [(torch.randn(8, 3, 4, 5), None)] * 5
    assert module.prepare(loader, epochs=0, progress=False) is module
    assert torch.equal(module.bottleneck.keys, before)
    module.unfreeze_keys()
    module.prepare(loader=loader, epochs=2, inputs_extractor=lambda item: item[0], progress=False)
    assert not torch.equal(module.bottleneck.keys, before)
    assert not module.bottleneck.update_keys
    assert not module.training
    assert not any(part.requires_grad for part in module.encoder.parameters())


def test_published_encoder_files_go_both_ways(tmp_path):
    module, twin = encoder(), encoder()
    module.save(tmp_path / "file")
    file = torch.load(tmp_path / "file", weights_only=True)
    assert set(file) == {"bottleneck", "splitter"}
    assert set(file["bottleneck"]) == set(GOLDEN["lookup_0"]["state"])
    twin.load(tmp_path / "file")
    assert torch.equal(twin.bottleneck.values, module.bottleneck.values)


@pytest.mark.parametrize("name", ["Dino", "Swav", "VICReg", "SLPretrained", "CLIP", "ConvMixer"])
def test_named_encoders(name):
    module = getattr(core, f"{name}BottleneckedEncoder")(
        num_codebooks=16, key_value_pairs_per_codebook=10, input_is_embedding=True, return_values_only=False
    )
    assert isinstance(module.bottleneck, core.KeyValueBottleneck)
    values, keys, *_, heads, features = module(torch.randn(2, module.num_channels))
    assert values.shape == (2, 1, module.num_channels)
    assert keys.shape == (2, 16, 1, module.num_channels // 16)
    assert heads.shape == (2, 16, 1, module.num_channels // 16)
    assert features.shape == (2, module.num_channels)


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


# --- lucidrains 0.1.1, alone and behind a config ----------------------------------------------------------------------


CASES = ["lucidrains_codebook_dim", "lucidrains_default_projections", "lucidrains_one_codebook", "config_readme"]


def discrete(name, **options):
    state = GOLDEN[name]["state"]
    C, K, V = state["values"].shape
    E, D = state["rand_proj"].shape[1:]
    sizes = {"num_memories": K, "num_memory_codebooks": C, "dim_embed": E, "dim_memory": V}
    options |= {"codebook_dim": D} if "codebook_dim" in name else {}
    if name.startswith("config"):  # with the published decay, .8
        config = configured.DiscreteKeyValueBottleneckConfig(dim=D, **sizes)
        module = configured.DiscreteKeyValueBottleneck(config, **options)
    else:
        module = lucidrains.DiscreteKeyValueBottleneck(D, **sizes, decay=0.9, **options)
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("name", CASES)
def test_discrete(name):
    case, module = GOLDEN[name], discrete(name)
    memories, (quantized, indices, commit_loss) = module.eval()(case["x"], return_intermediates=True)
    torch.testing.assert_close(memories, case["memories"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantized, case["quantized"], rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, case["indices"])
    torch.testing.assert_close(commit_loss, case["commit_loss"])
    assert torch.equal(module(case["x"], average_pool_memories=False), case["memories_not_pooled"])
    module.train()
    for step in case["train_steps"]:
        torch.testing.assert_close(module(step["x"]), step["memories"], rtol=1e-5, atol=1e-5)
        codebook = module.vq._codebook
        for part in ("embed", "embed_avg", "cluster_size"):
            torch.testing.assert_close(getattr(codebook, part), step[part], rtol=1e-6, atol=1e-6)


def test_discrete_keys_stay_where_the_published_ways_freeze_them():
    x = torch.randn(2, 6, 8)
    for module in (discrete(CASES[0]), discrete(CASES[0], freeze_codebook=True)):
        if not module.vq.freeze_codebook:
            module.vq.eval()
        before = module.vq.codebook.clone()
        module(x)
        assert torch.equal(module.vq.codebook, before)
        module.vq.train().freeze_codebook = False
        module(x)
        assert not torch.equal(module.vq.codebook, before)


def test_discrete_kmeans_starts_from_the_first_batch():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, kmeans_init=True, kmeans_iters=5).eval()
    assert not module.vq._codebook.initted
    assert not module.vq.codebook.any()
    module(torch.randn(50, 6, 4))
    codebook = module.vq._codebook
    assert codebook.initted
    assert codebook.cluster_size.sum() == 300
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * codebook.cluster_size[..., None])


def test_discrete_replaces_dead_codes():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, threshold_ema_dead_code=50)
    module(torch.randn(5, 6, 4))
    assert (module.vq._codebook.cluster_size == 50).all()


def test_discrete_keys_learn_from_the_loss_instead():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, learnable_codebook=True, ema_update=False)
    assert [name for name, _ in module.vq.named_parameters()] == ["_codebook.embed"]
    x = torch.randn(5, 6, 4)
    _, (_, indices, loss) = module(x, return_intermediates=True)
    before = module.vq.codebook.detach().clone()
    loss.backward()
    assert torch.equal(module.vq.codebook, before)
    hit = module.vq.codebook.grad.abs().sum(-1)[0] > 0
    assert torch.equal(hit.nonzero()[:, 0], indices.unique())


def test_discrete_without_moving_averages_still_replaces_dead_codes():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, ema_update=False, threshold_ema_dead_code=0.9)
    x = torch.randn(5, 1, 4)
    before = module.vq.codebook.clone()
    indices = module(x, return_intermediates=True)[1][1]
    kept = torch.zeros(9, dtype=torch.bool).scatter(0, indices.flatten(), True)
    assert torch.equal((module.vq.codebook == before).all(-1)[0], kept)


def test_discrete_gradients_through_the_quantised_output():
    """The rotation trick: as a rotation keeps lengths, so does the gradient, up to the keys' and queries' lengths."""
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, commitment_weight=0.0)
    x = torch.randn(5, 6, 4)
    heads = torch.einsum("bnd,de->bne", x, module.rand_proj[0]).requires_grad_()
    quantized, _, loss = module.vq(heads)
    assert loss == 0
    upstream = torch.randn_like(quantized)
    quantized.backward(upstream)
    scale = quantized.detach().norm(dim=-1) / heads.detach().norm(dim=-1)
    torch.testing.assert_close(heads.grad.norm(dim=-1), upstream.norm(dim=-1) * scale, rtol=1e-4, atol=1e-6)
    straight = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, commitment_weight=0.0, rotation_trick=False)
    heads.grad = None
    straight.vq(heads)[0].backward(upstream)
    assert torch.equal(heads.grad, upstream)


def test_discrete_with_an_encoder_and_its_arguments():
    class Encoder(nn.Linear):
        def forward(self, x, shift):
            return super().forward(x) + shift

    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, encoder=Encoder(3, 4))
    module(torch.randn(5, 6, 3), shift=1.0).sum().backward()
    assert not module.encoder.training
    assert module.encoder.weight.grad is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stochastic_sample_codes": True}, ValueError, "stochastic_sample_codes=True is not part of this replica"),
        ({"learnable_codebook": True}, ValueError, "learnable_codebook=True needs ema_update=False"),
        ({"typo": 1}, TypeError, "unexpected keyword argument 'typo'"),
        ({"num_memory_codebooks": 0}, ValueError, "num_memory_codebooks must be a positive integer, got 0"),
    ],
)
def test_discrete_bad_parameters(options, error, message):
    with pytest.raises(error, match=message):
        lucidrains.DiscreteKeyValueBottleneck(4, **{"num_memories": 9, **options})


def test_discrete_bad_inputs():
    with pytest.raises(ValueError, match=r"expected x of shape \(b, n, dim_embed\) = \(b, n, 8\), got \(2, 8\)"):
        discrete(CASES[0])(torch.randn(2, 8))
    with pytest.raises(ValueError, match="dim: Value must be positive, got 0"):
        configured.DiscreteKeyValueBottleneckConfig(dim=0, num_memories=1)


# --- the packages' names ----------------------------------------------------------------------------------------------


@pytest.fixture
def aliased(monkeypatch):
    for name in kvb.compat.aliases.NAMES:  # where a package is installed, another test may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield kvb.compat.alias
    kvb.compat.unalias()


def test_alias_to_kvb_itself(aliased):
    aliased()
    from discrete_key_value_bottleneck import DiscreteKeyValueBottleneck, DiscreteKeyValueBottleneckConfig
    from key_value_bottleneck.core import BottleneckedEncoder, DinoBottleneckedEncoder, KeyValueBottleneck

    assert KeyValueBottleneck is kvb.KeyValueBottleneck
    assert BottleneckedEncoder is kvb.BottleneckedEncoder
    assert DinoBottleneckedEncoder is kvb.DinoBottleneckedEncoder
    assert DiscreteKeyValueBottleneck is kvb.DiscreteKeyValueBottleneck
    assert DiscreteKeyValueBottleneckConfig is kvb.DiscreteKeyValueBottleneckConfig


def test_alias_to_the_replicas(aliased):
    aliased("seed")
    aliased("published")
    import discrete_key_value_bottleneck
    import discrete_key_value_bottleneck_pytorch
    import key_value_bottleneck.core
    from key_value_bottleneck.splitters import RandomDownProjection

    assert key_value_bottleneck.core.KeyValueBottleneck is core.KeyValueBottleneck
    assert key_value_bottleneck.core is core
    assert discrete_key_value_bottleneck.DiscreteKeyValueBottleneck is configured.DiscreteKeyValueBottleneck
    assert discrete_key_value_bottleneck_pytorch.DiscreteKeyValueBottleneck is lucidrains.DiscreteKeyValueBottleneck
    assert RandomDownProjection is kvb.splitters.RandomProjection


def test_alias_hides_an_installed_package_until_undone(aliased, tmp_path, monkeypatch):
    (tmp_path / "key_value_bottleneck.py").write_text("installed = True")
    monkeypatch.syspath_prepend(tmp_path)
    aliased()
    assert not hasattr(importlib.import_module("key_value_bottleneck"), "installed")
    kvb.compat.unalias()
    assert importlib.import_module("key_value_bottleneck").installed
    with pytest.raises(RuntimeError, match="key_value_bottleneck was imported already; call kvb.compat.alias"):
        aliased()
    del sys.modules["key_value_bottleneck"]


def test_alias_names_its_contracts(aliased):
    with pytest.raises(ValueError, match="contract must be one of 'seed', 'published'; got 'legacy'"):
        aliased("legacy")
    assert not sys.modules.keys() & set(kvb.compat.aliases.NAMES)
