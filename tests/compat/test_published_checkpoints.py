"""Checkpoints of the published packages, there and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kvb
from kvb import DiscreteKeyValueBottleneck, KeyValueBottleneck, checkpoints
from kvb.compat import discrete_key_value_bottleneck_pytorch as lucidrains
from kvb.compat.key_value_bottleneck import core


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def bitwise(state, other):
    return same(state, other) and all(value.dtype == other[name].dtype for name, value in state.items())


def test_the_authors_bottleneck(tmp_path):
    published = core.KeyValueBottleneck(2, 9, 3, 4)
    published.freeze_keys()(torch.randn(20, 2, 5, 3))
    state = through_a_file(published.state_dict(), tmp_path / "file")
    module = kvb.compat.module_from(state)
    assert type(module) is KeyValueBottleneck
    back = kvb.compat.to_published(module.state_dict(), "key_value_bottleneck")
    assert bitwise(back, state)
    core.KeyValueBottleneck(2, 9, 3, 4).load_state_dict(back, strict=True)


@pytest.mark.parametrize("mode", ["chunk", "random_projection", "learned_projection"])
def test_the_authors_encoder(mode, tmp_path):
    sizes = (nn.Linear(3, 12), 12, 4, 16, 3, 6)
    published = core.BottleneckedEncoder(*sizes, splitting_mode=mode)
    published(torch.randn(20, 3))
    state = through_a_file(published.state_dict(), tmp_path / "file")
    module = kvb.BottleneckedEncoder(*sizes, splitting_mode=mode)
    module.load_state_dict(kvb.compat.from_published(state), strict=True)
    assert bitwise(kvb.compat.to_published(module.state_dict(), "key_value_bottleneck"), state)
    published.save(tmp_path / "saved")
    saved = kvb.compat.from_published(torch.load(tmp_path / "saved", weights_only=True))
    assert bitwise(saved, {name: value for name, value in state.items() if not name.startswith("encoder.")})
    assert bitwise(saved, checkpoints.read_state(tmp_path / "saved"))


@pytest.mark.parametrize("package", ["discrete_key_value_bottleneck_pytorch", "discrete_key_value_bottleneck"])
@pytest.mark.parametrize("old_initted", [False, True])
@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("encoder", [False, True])
def test_the_discrete_bottleneck(package, old_initted, projections, encoder, tmp_path):
    def make(**options):
        options |= {} if projections else {"codebook_dim": 4}
        options |= {"encoder": nn.Linear(7, 6)} if encoder else {}
        return lucidrains.DiscreteKeyValueBottleneck(
            4, num_memories=9, dim_embed=6, num_memory_codebooks=3, dim_memory=5, **options
        )

    published = make()
    published(torch.randn(20, 8, 7 if encoder else 6))
    state = published.state_dict()
    assert ("vq.project_in.weight" in state) == projections
    if old_initted:
        state["vq._codebook.initted"] = torch.ones(1)
    state = through_a_file(state, tmp_path / "file")
    module = kvb.compat.module_from(state, **({"encoder": nn.Linear(7, 6)} if encoder else {}))
    assert type(module) is DiscreteKeyValueBottleneck
    back = kvb.compat.to_published(module.state_dict(), package, old_initted=old_initted)
    assert bitwise(back, state)
    twin = make()
    twin.load_state_dict(back, strict=True)
    x = torch.randn(20, 8, 7 if encoder else 6)
    torch.testing.assert_close(module.eval()(x), twin.eval()(x))
    torch.testing.assert_close(module(x), published.eval()(x))
    assert torch.equal(module.encode(x), twin(x, return_intermediates=True)[1][1].movedim(-1, 1))


def test_an_uninitialised_checkpoint_still_waits(tmp_path):
    published = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, kmeans_init=True)
    for old in (False, True):
        state = published.state_dict()
        if old:
            state["vq._codebook.initted"] = torch.zeros(1)
        module = kvb.compat.module_from(state, init_mode="kmeans")
        assert "not initialised" in repr(module)
        assert bitwise(
            kvb.compat.to_published(module.state_dict(), kvb.compat.convert.PACKAGES[1], old_initted=old), state
        )
        module(torch.randn(50, 4))
        assert "not initialised" not in repr(module)


def test_converters_say_what_they_take():
    with pytest.raises(ValueError, match="expected a state_dict with keys_avg, .*, got the names bias, weight"):
        kvb.compat.from_published(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="got the names of an empty one"):
        kvb.compat.module_from({})
    with pytest.raises(ValueError, match="'vq.project_in.0.weight' is no tensor of a checkpoint that kvb can convert"):
        kvb.compat.from_published({"vq._codebook.embed": torch.zeros(1), "vq.project_in.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="package must be one of 'key_value_bottleneck', .*; got 'dkvb'"):
        kvb.compat.to_published({}, "dkvb")
    with pytest.raises(
        ValueError, match="expected the state_dict of a kvb.DiscreteKeyValueBottleneck, got weight, bias"
    ):
        kvb.compat.to_published(nn.Linear(2, 2).state_dict(), "discrete_key_value_bottleneck")
    with pytest.raises(ValueError, match="build a BottleneckedEncoder yourself"):
        kvb.compat.module_from(core.BottleneckedEncoder(nn.Identity(), 12, 4, 16, 3, 6).state_dict())
