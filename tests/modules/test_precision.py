"""Codes and counts do not depend on autocast, half precision, the default dtype or inference mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kvb import BottleneckedEncoder, DiscreteKeyValueBottleneck, KeyValueBottleneck
from kvb.splitters import LearnedProjection, RandomProjection, SparseProjection

pytestmark = pytest.mark.fallback

PROJECTIONS = [RandomProjection, SparseProjection, LearnedProjection]
STATISTICS = ("keys", "keys_avg", "cluster_size")


# --- splitters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_autocast_changes_no_projection(kind):
    splitter, x = kind(24, 4, 5), torch.randn(50, 24) + 100
    want = splitter(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(splitter(x), want)
            assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_half_features_are_projected_as_the_numbers_that_they_are(kind, dtype):
    splitter, x = kind(24, 4, 5), (torch.randn(50, 24) + 100).to(dtype)
    assert torch.equal(splitter(x), splitter(x.float()))
    torch.testing.assert_close(splitter(x).double(), copy.deepcopy(splitter).double()(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["random_projection", "sparse_projection", "learned_projection"])
def test_autocast_changes_no_code_of_an_encoder(mode):
    model = BottleneckedEncoder(nn.Identity(), 24, 4, 60, 5, 3, splitting_mode=mode).eval()
    x = torch.randn(400, 24) + 100
    with torch.no_grad():
        model.keys.copy_(model.forward_splitter(x[:60]).transpose(0, 1))
    want = model.encode(x)
    assert want[:, 0].unique().numel() > 20
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(x), want)
        assert torch.equal(model(x), model.decode(want))
    other = DiscreteKeyValueBottleneck(5, num_memories=60, dim_embed=24, num_memory_codebooks=4).eval()
    want = other.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(other.encode(x), want)


def test_projections_learn_under_autocast():
    splitter, x = LearnedProjection(6, 2, 3), torch.randn(9, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        splitter(x).square().sum().backward()
    assert splitter.proj.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


# --- default dtypes and inference mode --------------------------------------------------------------------------------


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", ["random", "kmeans"])
def test_keys_and_statistics_are_float32_under_every_default(default, mode):
    module = KeyValueBottleneck(2, 9, 3, 4, init_mode=mode, threshold_ema_dead_code=0.5)
    assert {name: getattr(module, name).dtype for name in STATISTICS} == dict.fromkeys(STATISTICS, torch.float32)
    assert module.values.dtype == default
    x = torch.randn(700, 2, 3, dtype=torch.float32)
    for _ in range(3):
        module(x).sum().backward()
    module.freeze_keys()
    for _ in range(3):
        module(x)
    assert module.cluster_size_counter.sum(1).tolist() == [2100, 2100]  # bfloat16 stops at 256
    assert {getattr(module, name).dtype for name in STATISTICS} == {torch.float32}
    exact = (x[..., None, :].double() - module.keys.double()).square().sum(-1).argmin(-1)
    assert torch.equal(module.encode(x), exact)
    assert module.usage().sum(-1).tolist() == pytest.approx([1, 1])
    assert RandomProjection(4, 2, 3).rand_proj.dtype == torch.float32


def test_a_module_built_in_inference_mode_trains():
    with torch.inference_mode():
        modules = [
            KeyValueBottleneck(2, 9, 3, 4, threshold_ema_dead_code=0.5),
            KeyValueBottleneck(2, 9, 3, 4, init_mode="kmeans"),
            DiscreteKeyValueBottleneck(3, num_memories=9, num_memory_codebooks=2, dim_embed=6),
            *(
                BottleneckedEncoder(nn.Identity(), 6, 2, 9, 3, 4, splitting_mode=mode)
                for mode in ("chunk", "random_projection", "learned_projection")
            ),
        ]
    for module in modules:
        shape = (2, 3) if isinstance(module, KeyValueBottleneck) else (6,)
        x = torch.randn(40, *shape, requires_grad=True)
        for _ in range(2):
            module(x).square().sum().backward()
        module.freeze_keys()
        out = module(x)
        out.square().sum().backward()
        assert module.values.grad.abs().sum() > 0
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        module.mask_pairs(torch.ones(2, 9, dtype=torch.bool)).unfreeze_keys()
        module(x)


def test_a_module_converted_in_inference_mode_still_searches_and_has_modes():
    module = KeyValueBottleneck(2, 9, 3, 4)
    with torch.inference_mode():
        module.double()
    assert module.freeze_keys().keys_frozen
    assert not module.unfreeze_keys().keys_frozen
    x = torch.randn(30, 2, 3)
    exact = (x[..., None, :].double() - module.keys).square().sum(-1).argmin(-1)
    assert torch.equal(module.eval().encode(x), exact)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert", [lambda m: m, lambda m: m.half(), lambda m: m.bfloat16()], ids=["float", "half", "bfloat16"]
)
def test_counts_go_on_beyond_what_float32_holds(convert):
    module = convert(KeyValueBottleneck(1, 2, 3, 4).freeze_keys())
    start = (1 << 24) + 1
    module.cluster_size_counter.fill_(start)
    for _ in range(5):
        module(module.keys[:, :1].transpose(0, 1))
    assert module.cluster_size_counter.tolist() == [[start + 5, start]]
    assert module.cluster_size_counter.dtype == torch.int64


def test_published_counts_load_as_whole_numbers():
    module = KeyValueBottleneck(2, 9, 3, 4)
    state = module.state_dict()
    state["cluster_size_counter"] = torch.arange(18.0).view(2, 9)
    for assign in (False, True):
        module.load_state_dict(state, assign=assign)
        assert module.cluster_size_counter.dtype == torch.int64
        assert module.cluster_size_counter.flatten().tolist() == list(range(18))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_assigned_half_keys_become_float32(dtype):
    module, other = KeyValueBottleneck(2, 9, 3, 4), KeyValueBottleneck(2, 9, 3, 4)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in other.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    for name in STATISTICS:
        assert torch.equal(getattr(module, name), state[name].float())
    module(torch.randn(9, 2, 3))
