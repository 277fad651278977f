"""Every wrapper has the methods of ``KeyValueBottleneck`` under the same names, and loses none of its options."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
import typing_extensions
from torch import nn

import kvb
from kvb import BottleneckedEncoder, ConvMixerBottleneckedEncoder, DiscreteKeyValueBottleneck, KeyValueBottleneck
from kvb.compat.key_value_bottleneck import core
from kvb.modules.discrete import DiscreteKeyValueBottleneckConfig
from kvb.modules.wrapping import BottleneckOptions, KvbOptions

pytestmark = pytest.mark.fallback

C, K, D, V, CHANNELS = 3, 8, 4, 5, 6
SHARED = (
    *("forward", "encode", "encode_dataset", "decode", "init_keys", "freeze_keys", "unfreeze_keys", "mask_pairs"),
    *("activate_counts", "deactivate_counts", "reset_cluster_size_counter", "refresh_keys", "fraction_of_unused_keys"),
    *("usage", "perplexity", "enable_update_keys", "disable_update_keys"),
    *("set_keys", "expand_values", "expand_pairs", "expand_codebooks"),
)
ATTRIBUTES = ("values", "keys", "keys_initialised", "keys_frozen", "pair_mask")
EVERY_OPTION = {
    "init_mode": "kmeans",
    "kmeans_iters": 3,
    "decay": 0.5,
    "eps": 1e-3,
    "threshold_ema_dead_code": 0.25,
    "sample_codebook_temperature": 0.0,
    "return_values_only": False,
    "topk": 2,
    "init_values": "zeros",
    "sparse_grad": True,
    "check_finite": True,
    "pool": "sum",
}


def bare(**options):
    return KeyValueBottleneck(C, K, D, V, **options)


def encoder(**options):
    return BottleneckedEncoder(nn.Linear(7, CHANNELS), CHANNELS, C, K, D, V, **options)


def named(**options):
    return ConvMixerBottleneckedEncoder(
        C, K, D, V, splitting_mode="random_projection", input_is_embedding=True, **options
    )


def discrete(**options):
    sizes = {"num_memories": K, "dim_embed": 7, "num_memory_codebooks": C, "dim_memory": V}
    return DiscreteKeyValueBottleneck(D, **sizes, average_pool_memories=False, **options)


WRAPPERS = [encoder, named, discrete]
INPUTS = {bare: (C, D), encoder: (7,), named: (256,), discrete: (7,)}


def bottleneck_of(module):
    return module if isinstance(module, KeyValueBottleneck) else module.bottleneck


def inputs(build, B=40):
    return torch.randn(B, *INPUTS[build])


@pytest.mark.parametrize("build", WRAPPERS)
def test_every_method_takes_the_same_arguments(build):
    wrapper, own = build(), bare()
    for name in SHARED:
        theirs, ours = (inspect.signature(getattr(one, name)).parameters for one in (wrapper, own))
        missing = set(ours) - set(theirs) - ({"return_values_only"} if build is discrete else set())
        assert not missing, (name, missing)
    for name in ATTRIBUTES:
        assert hasattr(wrapper, name)


@pytest.mark.parametrize("build", WRAPPERS)
def test_no_option_is_lost(build):
    assert set(EVERY_OPTION) == BottleneckOptions.__optional_keys__
    names = set(inspect.signature(KeyValueBottleneck).parameters) - {"process_group", "device", "dtype"}
    assert names == {*EVERY_OPTION, "num_codebooks", "key_value_pairs_per_codebook", "dim_keys", "dim_values"}
    given = dict(EVERY_OPTION)
    if build is discrete:
        del given["return_values_only"], given["pool"]  # what it returns is chosen per call, and it averages
    own = build(**given).bottleneck
    assert {name: getattr(own, name) for name in given} == given
    with pytest.raises(TypeError, match="unexpected keyword argument 'decays'"):
        build(decays=0.5)


@pytest.mark.parametrize("build", WRAPPERS)
def test_the_process_group_is_that_of_the_bottleneck(build):
    """No option: it is neither part of a configuration nor of a pickle."""
    module = build()
    assert module.process_group is None
    module.process_group = False
    assert module.bottleneck.process_group is False


@pytest.mark.parametrize("build", [bare, *WRAPPERS])
def test_the_whole_life_under_the_same_names(build):
    module, x = build(init_mode="kmeans"), inputs(build, 200)
    own = bottleneck_of(module)
    assert not module.keys_initialised
    assert not module.keys_frozen
    report = module.init_keys(x, "kmeans++", epochs=2, generator=torch.Generator().manual_seed(1), progress=False)
    assert (report.method, report.rows) == ("kmeans++", 200)
    assert module.keys_initialised
    assert module.freeze_keys() is module
    assert module.keys_frozen
    with pytest.raises(RuntimeError, match="keys are frozen"):
        module.init_keys(x, progress=False)
    module(x)
    assert own.cluster_size_counter.sum() == 200 * C
    assert torch.equal(module.usage(), own.usage())
    assert torch.equal(module.perplexity(), own.perplexity())
    assert module.fraction_of_unused_keys() == own.fraction_of_unused_keys()
    codes = module.eval().encode(x)
    assert codes.shape == (200, C)
    assert torch.equal(module.decode(codes), module(x))
    for pool in ("mean", "sum"):
        torch.testing.assert_close(module.decode(codes, pool), module(x, pool=pool))
        assert module(x, pool=pool).shape == (200, V)
    kept = module.encode_dataset(x, progress=False)
    assert torch.equal(kept.codes, codes.to(kept.codes.dtype))
    mask = torch.arange(C * K).view(C, K) % K > 3
    assert module.mask_pairs(mask) is module
    assert torch.equal(module.pair_mask, mask)
    assert module.encode(x).min() > 3
    assert module.mask_pairs(None).pair_mask is None
    assert torch.equal(module.encode(x), codes)
    assert module.unfreeze_keys().disable_update_keys().keys_frozen
    assert not module.enable_update_keys().keys_frozen
    assert module.values is own.values
    assert module.keys is own.keys


@pytest.mark.parametrize("build", [bare, *WRAPPERS])
def test_published_names_are_aliases(build):
    own = bottleneck_of(build())
    assert own.update_keys
    own.update_keys = False
    assert own.keys_frozen
    own.count_cluster_size = False
    assert own.kvb_flags.tolist() == [2, 0, 0]


def test_the_published_order_of_arguments_still_works():
    order = ("kmeans", 3, "random_projection", 0.5, 1e-3, 0.25, False, True, 0.0, False, 2)
    model = BottleneckedEncoder(nn.Identity(), CHANNELS, C, K, D, V, *order)
    own = model.bottleneck
    assert (own.init_mode, own.kmeans_iters, own.decay, own.eps, own.threshold_ema_dead_code) == (
        "kmeans",
        3,
        *order[3:6],
    )
    assert (model.encoder_is_channel_last, model.concat_values_from_all_codebooks) == (False, True)
    assert (own.return_values_only, own.topk) == (False, 2)
    own = KeyValueBottleneck(C, K, D, V, "sample", 3, 0.5, 1e-3, 0.25, 0.0, False, 2)
    assert (own.init_mode, own.kmeans_iters, own.decay, own.eps) == ("sample", 3, 0.5, 1e-3)
    assert (own.threshold_ema_dead_code, own.return_values_only, own.topk) == (0.25, False, 2)
    order = ("kmeans", 3, "convmixer", 3, True, "random_projection", 0.5, 1e-3, 0.25, False, 0.0, False, 2, True)
    model = ConvMixerBottleneckedEncoder(C, K, D, V, *order)
    assert (model.bottleneck.decay, model.bottleneck.topk) == (0.5, 2)
    assert not model.concat_values_from_all_codebooks


# --- splitters --------------------------------------------------------------------------------------------------------


class Reversed(nn.Module):
    """A splitter of one's own: the channels from last to first, cut into heads."""

    def forward(self, x):
        return x.flip(-1).unflatten(-1, (3, 2)).movedim(-2, 1)


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_any_module_may_split(shape):
    x, own = torch.randn(30, *shape, CHANNELS), Reversed()
    model = BottleneckedEncoder(nn.Identity(), CHANNELS, 3, K, 2, V, splitting_mode=own).eval()
    assert model.splitter is own
    assert torch.equal(model(x), model.bottleneck(own(x)))
    assert "Reversed" in repr(model)
    other = DiscreteKeyValueBottleneck(
        2, num_memories=K, dim_embed=CHANNELS, num_memory_codebooks=3, splitter=own
    ).eval()
    assert torch.equal(other(x), other.bottleneck(own(x), pool="mean"))
    with pytest.raises(ValueError, match=r"expected x of shape \(B, C, \*shape, D\)"):
        BottleneckedEncoder(nn.Identity(), CHANNELS, 3, K, 2, V, splitting_mode=nn.Identity())(x)


def test_what_is_no_splitter():
    with pytest.raises(TypeError, match="splitting_mode must be a string or a torch.nn.Module, got function"):
        BottleneckedEncoder(nn.Identity(), CHANNELS, 3, K, 2, V, splitting_mode=lambda x: x)
    with pytest.raises(ValueError, match="splitting_mode must be one of 'chunk', 'random_projection'"):
        BottleneckedEncoder(nn.Identity(), CHANNELS, 3, K, 2, V, splitting_mode="chunks")
    with pytest.raises(TypeError, match="splitter must be a torch.nn.Module or None, got str"):
        kvb.DiscreteKeyValueBottleneckConfig(dim=2, num_memories=3, splitter="chunk")


def test_every_class_lists_the_options_alike():
    """With the types and defaults of ``KeyValueBottleneck``, but for what is documented as published."""
    own = inspect.signature(KeyValueBottleneck, eval_str=True).parameters
    types = typing.get_type_hints(BottleneckOptions)
    config = inspect.signature(DiscreteKeyValueBottleneckConfig, eval_str=True).parameters
    encoders = [
        inspect.signature(one, eval_str=True, locals={"Unpack": typing_extensions.Unpack}).parameters
        for one in (BottleneckedEncoder, ConvMixerBottleneckedEncoder)
    ]
    for name, kind in types.items():
        assert own[name].annotation == kind, name
        for listed in (config, *encoders):
            if name in listed:
                assert listed[name].annotation == kind, name
                assert listed[name].default == own[name].default or (listed is config and name == "decay"), name
            else:
                assert name in KvbOptions.__optional_keys__ or listed is config, name
    assert set(types) - set(config) == {"pool", "return_values_only"}
    assert config["decay"].default == 0.8


def test_the_published_classes_take_every_option():
    every = {name: value for name, value in EVERY_OPTION.items() if name != "pool"}  # they have a shape of their own
    given = {**every, "bugs": ("learns_in_eval",)}
    order = ("kmeans", 3, 0.5, 1e-3, 0.25, 0.0, False, 2)
    options = {name: given[name] for name in ("init_values", "sparse_grad", "check_finite", "bugs")}
    for module in (
        core.KeyValueBottleneck(C, K, D, V, *order, **options),
        core.KeyValueBottleneck(C, K, D, V, **given),
    ):
        assert {name: getattr(module, name) for name in every} == every
        assert module.bugs == {"learns_in_eval"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'decays'"):
        core.KeyValueBottleneck(C, K, D, V, decays=0.5)
    model = core.BottleneckedEncoder(nn.Identity(), CHANNELS, C, K, D, V, **given)
    assert {name: getattr(model, name) for name in every} == every
    assert {name: getattr(model.bottleneck, name) for name in every} == every
