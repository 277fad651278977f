"""What values and keys start as, keys that are given, and tables that grow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kvb
from kvb import BottleneckedEncoder, DiscreteKeyValueBottleneck, KeyValueBottleneck

pytestmark = pytest.mark.fallback

C, K, D, V = 3, 8, 4, 5
BUFFERS = ("keys", "keys_avg", "cluster_size", "cluster_size_counter", "kvb_mask")


def bare(**options):
    return KeyValueBottleneck(C, K, D, V, **options)


def encoder(**options):
    return BottleneckedEncoder(nn.Linear(7, 6), 6, C, K, D, V, **options)


def learned(**options):
    return encoder(splitting_mode="learned_projection", **options)


def sparse(**options):
    return encoder(splitting_mode="sparse_projection", **options)


def discrete(**options):
    sizes = {"num_memories": K, "dim_embed": 7, "num_memory_codebooks": C, "dim_memory": V}
    return DiscreteKeyValueBottleneck(D, **sizes, average_pool_memories=False, **options)


BUILDS = [bare, encoder, learned, sparse, discrete]
ALL = pytest.mark.parametrize("build", BUILDS)


def core(module):
    return module if isinstance(module, KeyValueBottleneck) else module.bottleneck


def inputs(build, B=64):
    return torch.randn(B, *((C, D) if build is bare else (7,)))


def used(build, **options):
    """A module with a history: keys that moved, counts, a mask."""
    module = build(**options).train()
    module(inputs(build))
    module.freeze_keys()
    module(inputs(build))
    mask = torch.ones(C, K, dtype=torch.bool)
    mask[0, 3] = False
    return module.mask_pairs(mask).eval()


# --- what values start as ---------------------------------------------------------------------------------------------


@ALL
def test_values_start_at_zero_or_random(build):
    torch.manual_seed(0)
    assert core(build()).values.std() > 0.5
    module = build(init_values="zeros")
    assert core(module).init_values == "zeros"
    assert not core(module).values.any()
    assert core(module).values.requires_grad
    core(module).values.data.fill_(1)
    core(module).reset_parameters()
    assert not core(module).values.any()


def test_random_values_are_those_of_before():
    torch.manual_seed(0)
    torch.randn(C, K, D)
    want = torch.randn(C, K, V)
    torch.manual_seed(0)
    assert torch.equal(bare().values, want)


def test_values_start_is_one_of_two():
    with pytest.raises(ValueError, match="init_values must be one of 'random', 'zeros'; got 'ones'"):
        bare(init_values="ones")


def test_a_module_from_before_the_choice_has_random_values():
    module = bare()
    state = module.__getstate__()
    del state["init_values"]
    old = KeyValueBottleneck.__new__(KeyValueBottleneck)
    old.__setstate__(state)
    assert old.init_values == "random"
    old.expand_values(V + 1)


# --- keys that are given ----------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_given_keys_are_searched(build, dtype):
    module = build(init_mode="kmeans").eval()
    keys = torch.randn(C, K, D).to(dtype)
    values = core(module).values.clone()
    assert module.set_keys(keys) is module
    assert module.keys_initialised
    assert torch.equal(module.keys, keys.float())
    assert torch.equal(core(module).keys_avg, keys.float())
    assert torch.equal(core(module).cluster_size, torch.ones(C, K))
    assert torch.equal(core(module).values, values)
    heads = keys.float().transpose(0, 1)  # every key is its own nearest
    assert torch.equal(core(module).encode(heads), torch.arange(K)[:, None].expand(K, C))
    module.set_keys(keys.flip(1))  # no packed keys are left from before
    assert torch.equal(core(module).encode(heads), torch.arange(K).flip(0)[:, None].expand(K, C))


def test_given_keys_learn_on_and_stay_when_frozen():
    module, keys = bare(init_mode="sample"), torch.randn(C, K, D)
    module.set_keys(keys).train()(torch.randn(50, C, D))
    assert not torch.equal(module.keys, keys)
    module.freeze_keys()
    with pytest.raises(RuntimeError, match=r"keys are frozen: call unfreeze_keys\(\) before set_keys"):
        module.set_keys(keys)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([[1.0]], TypeError, "argument 'keys' must be Tensor, not list"),
        (torch.ones(C, K, D, dtype=torch.int64), TypeError, "expected a floating-point keys, got torch.int64"),
        (torch.ones(C, K + 1, D), ValueError, r"expected keys of shape \(C, K, D\) = \(3, 8, 4\), got \(3, 9, 4\)"),
        (torch.full((C, K, D), float("nan")), ValueError, "keys contains NaN or Inf in 24 of 24 rows"),
        (torch.full((C, K, D), 1e300, dtype=torch.float64), ValueError, "keys contains NaN or Inf"),
    ],
)
def test_what_are_no_keys(keys, error, message):
    module = bare(init_mode="kmeans")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        module.set_keys(keys)
    assert not module.keys_initialised
    assert all(torch.equal(before[name], new) for name, new in module.state_dict().items())


# --- growing: the reference is torch.cat ------------------------------------------------------------------------------


@ALL
def test_values_grow(build):
    module, x = used(build), inputs(build)
    codes, before, old = module.encode(x), module(x), core(module).values
    state = {name: getattr(core(module), name).clone() for name in BUFFERS}
    assert module.expand_values(V + 3) is module
    new = core(module).values
    assert new is not old
    assert isinstance(new, nn.Parameter)
    assert new.shape == (C, K, V + 3)
    assert torch.equal(new[..., :V], old)
    assert new[..., V:].std() > 0.5
    assert torch.equal(module.encode(x), codes)
    assert torch.equal(module(x)[..., :V], before)
    assert core(module).dim_values == V + 3
    assert all(torch.equal(getattr(core(module), name), state[name]) for name in BUFFERS)
    module(x).sum().backward()
    assert new.grad.shape == new.shape


@ALL
def test_pairs_grow(build):
    module, x = used(build, init_values="zeros"), inputs(build)
    core(module).values.data.normal_()
    codes, old = module.encode(x), core(module).values
    before = module.decode(codes)
    state = {name: getattr(core(module), name).clone() for name in BUFFERS}
    assert module.expand_pairs(K + 4) is module
    own = core(module)
    assert own.key_value_pairs_per_codebook == K + 4
    assert torch.equal(own.values[:, :K], old)
    assert not own.values[:, K:].any()
    for name in BUFFERS:
        grown = getattr(own, name)
        assert grown.shape[:2] == (C, K + 4)
        assert grown.dtype == state[name].dtype
        assert torch.equal(grown[:, :K], state[name]), name
    assert torch.equal(own.keys_avg[:, K:], own.keys[:, K:])
    assert (own.cluster_size[:, K:] == 1).all()
    assert not own.cluster_size_counter[:, K:].any()
    assert torch.equal(module.decode(codes), before)
    assert module.pair_mask.sum() == C * (K + 4) - 1
    assert not module.pair_mask[0, 3]
    # The search is that of plain PyTorch over all pairs that may be fetched.
    heads = x if build is bare else module.forward_splitter(x)
    apart = (heads[:, :, None].double() - own.keys.double()).square().sum(-1)
    apart = apart.masked_fill(~module.pair_mask, float("inf"))
    assert torch.equal(module.encode(x), apart.argmin(-1))
    assert (module.encode(x) >= K).any()


@ALL
def test_codebooks_grow(build):
    if build is learned:
        torch.manual_seed(1)
    module, x = used(build), inputs(build)
    if build is not bare:
        before_heads = module.forward_splitter(x)
    codes, before, old = module.encode(x), module(x), core(module).values
    state = {name: getattr(core(module), name).clone() for name in BUFFERS}
    assert module.expand_codebooks(C + 2) is module
    own = core(module)
    assert own.num_codebooks == C + 2
    assert torch.equal(own.values[:C], old)
    for name in BUFFERS:
        assert torch.equal(getattr(own, name)[:C], state[name]), name
    if build is bare:
        x = torch.cat([x, torch.randn(len(x), 2, D)], 1)
    else:
        heads = module.forward_splitter(x)
        assert heads.shape[1] == C + 2
        torch.testing.assert_close(heads[:, :C], before_heads)
        assert not torch.equal(heads[:, C], heads[:, C + 1])
    assert module.encode(x).shape == (len(x), C + 2)
    assert torch.equal(module.encode(x)[:, :C], codes)
    assert torch.equal(module(x)[:, :C], before)


@ALL
def test_sizes_that_are_attributes_follow(build):
    module = build()
    module.expand_values(V + 1).expand_pairs(K + 1).expand_codebooks(C + 1)
    if build is discrete:
        config = module.config
        assert (config.num_memory_codebooks, config.num_memories, config.dim_memory) == (C + 1, K + 1, V + 1)
    else:
        sizes = module.num_codebooks, module.key_value_pairs_per_codebook, module.dim_values
        assert sizes == (C + 1, K + 1, V + 1)
    assert str(module)


@ALL
def test_a_grown_module_is_saved_and_loaded(build, tmp_path):
    module = used(build)
    module.expand_values(V + 1).expand_pairs(K + 2).expand_codebooks(C + 1)
    kvb.save(module, tmp_path / "grown")
    other = build()
    with pytest.raises((kvb.CheckpointError, RuntimeError)):
        kvb.load(other, tmp_path / "grown")
    other.expand_values(V + 1).expand_pairs(K + 2).expand_codebooks(C + 1)
    kvb.load(other, tmp_path / "grown")
    other.eval()
    x = torch.randn(20, C + 1, D) if build is bare else inputs(build)
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_new_keys_that_are_given():
    module = used(bare)
    far = torch.randn(C, 2, D) + 50
    x = far.transpose(0, 1)
    module.expand_pairs(K + 2, far)
    assert torch.equal(module.encode(x), torch.tensor([[K] * C, [K + 1] * C]))
    near = module.keys[:, :1].clone()
    module.expand_pairs(K + 3, near)  # of equals the first, as ever
    assert torch.equal(module.encode(near.transpose(0, 1))[:, 1:], torch.zeros(1, C - 1, dtype=torch.int64))
    books = torch.randn(1, K + 3, D)
    module.expand_codebooks(C + 1, books)
    assert torch.equal(module.keys[C:], books)


def test_new_keys_lie_where_the_others_do():
    module = KeyValueBottleneck(2, 500, 3, 4)
    module.set_keys(torch.randn(2, 500, 3) * 0.5 + torch.tensor([10.0, -20.0])[:, None, None])
    module.expand_pairs(1500)
    new = module.keys[:, 500:]
    torch.testing.assert_close(new.mean((1, 2)), torch.tensor([10.0, -20.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(new.std((1, 2)), torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)


def test_keys_that_wait_for_data_wait_on():
    module = bare(init_mode="kmeans")
    module.expand_pairs(K + 2).expand_codebooks(C + 1)
    assert not module.keys_initialised
    assert not module.keys.any()
    module.init_keys(torch.randn(200, C + 1, D), progress=False)
    assert module.keys.shape == (C + 1, K + 2, D)


def test_grown_keys_learn_and_count():
    module = used(bare).unfreeze_keys().train()
    module.expand_pairs(K + 2)
    module(torch.randn(100, C, D))
    module.freeze_keys()
    module.reset_cluster_size_counter()
    module(torch.randn(100, C, D))
    assert module.cluster_size_counter.sum() == 100 * C


def test_while_counts_restrict_the_search_new_pairs_are_not_fetched():
    module = used(bare).train()
    module(torch.randn(100, C, D))
    module.deactivate_counts().eval()
    x = torch.randn(300, C, D)
    codes = module.encode(x)
    module.expand_pairs(K + 20)
    assert torch.equal(module.encode(x), codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_growth_keeps_dtypes(dtype):
    module = used(bare).to(dtype)
    before = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    module.expand_values(V + 1).expand_pairs(K + 1).expand_codebooks(C + 1)
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == before


def test_growth_is_reproducible_and_keeps_requires_grad():
    tables = []
    for _ in range(2):
        torch.manual_seed(0)
        module = bare()
        module.values.requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        torch.rand(_ + 1)
        module.expand_values(V + 1, generator=generator).expand_pairs(K + 1, generator=generator)
        module.expand_codebooks(C + 1, generator=generator)
        assert not module.values.requires_grad
        tables.append((module.values, module.keys))
    assert all(torch.equal(*pair) for pair in zip(*tables, strict=True))


def test_growth_in_inference_mode_can_learn():
    module = bare()
    with torch.inference_mode():
        module.expand_values(V + 1).expand_pairs(K + 1)
    module.freeze_keys()(torch.randn(9, C, D)).sum().backward()
    assert module.values.grad is not None


def test_the_same_size_changes_nothing():
    module = bare()
    values, keys = module.values, module.keys
    module.expand_values(V).expand_pairs(K).expand_codebooks(C)
    assert module.values is values
    assert module.keys is keys


@pytest.mark.parametrize(
    ("method", "letter", "size"), [("expand_values", "V", V), ("expand_pairs", "K", K), ("expand_codebooks", "C", C)]
)
def test_tables_only_grow(method, letter, size):
    module = bare()
    with pytest.raises(ValueError, match=rf"{method}\(\): tables only grow, expected {letter} >= {size}, got 2"):
        getattr(module, method)(2)
    with pytest.raises(TypeError, match=f"{letter} must be a positive integer"):
        getattr(module, method)(9.5)
    with pytest.raises(ValueError, match=f"{letter} must be a positive integer"):
        getattr(module, method)(0)


def test_new_keys_that_do_not_fit_change_nothing():
    module = bare()
    with pytest.raises(ValueError, match=r"expected keys of shape \(C, K, D\) = \(3, 2, 4\), got \(3, 1, 4\)"):
        module.expand_pairs(K + 2, torch.zeros(C, 1, D))
    with pytest.raises(ValueError, match="keys contains NaN or Inf in 6 of 6 rows"):
        module.expand_pairs(K + 2, torch.full((C, 2, D), float("inf")))
    assert module.values.shape == (C, K, V)
    assert module.keys.shape == (C, K, D)


def test_a_splitter_without_more_heads():
    module = BottleneckedEncoder(nn.Identity(), 12, 3, K, 4, V, splitting_mode="chunk")
    with pytest.raises(TypeError, match=r"the splitter Chunk has no method expand\(num_codebooks\)"):
        module.expand_codebooks(4)
    assert module.bottleneck.num_codebooks == 3
    module.expand_pairs(K + 1).expand_values(V + 1)
    with pytest.raises(ValueError, match="splitters only grow, expected num_codebooks >= 3, got 2"):
        kvb.splitters.RandomProjection(12, 3, 4).expand(2)


# --- usage while keys learn -------------------------------------------------------------------------------------------


def test_usage_and_perplexity_while_keys_learn():
    module = bare(decay=0.5).train()
    for _ in range(4):
        module(torch.randn(64, C, D))
    share = module.cluster_size / module.cluster_size.sum(-1, keepdim=True)
    torch.testing.assert_close(module.usage(), share)
    torch.testing.assert_close(module.perplexity(), torch.exp(-torch.special.xlogy(share, share).sum(-1)))
    module.freeze_keys()
    assert not module.perplexity().any()  # nothing was counted
    module(torch.randn(64, C, D))
    counted = module.cluster_size_counter / 64
    torch.testing.assert_close(module.usage(), counted)
    module.unfreeze_keys()  # counts are exact, and stay what usage is about until they are reset
    torch.testing.assert_close(module.usage(), counted)
    assert not bare(init_mode="kmeans").perplexity().any()
