"""``device=``, ``dtype=`` and ``pool=`` of constructors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kvb
from kvb.compat.key_value_bottleneck import core
from kvb.counting import ClassCounts
from kvb.decoders import MLP, CodebookVoting, LinearProbe
from kvb.splitters import LearnedProjection, RandomProjection, SparseProjection

SIZES = 3, 5, 4, 2  # C, K, D, V


def encoder(**options):
    return kvb.BottleneckedEncoder(nn.Identity(), 8, *SIZES, **options)


def memory(**options):
    return kvb.DiscreteKeyValueBottleneck(8, num_memories=5, num_memory_codebooks=3, **options)


def bottleneck(**options):
    return kvb.KeyValueBottleneck(*SIZES, **options)


WITH_DTYPE = {
    "KeyValueBottleneck": bottleneck,
    "BottleneckedEncoder": encoder,
    "DiscreteKeyValueBottleneck": memory,
    "LearnedProjection": lambda **options: LearnedProjection(8, 3, 4, **options),
    "LinearProbe": lambda **options: LinearProbe(6, 2, **options),
    "MLP": lambda **options: MLP(6, 2, **options),
}
WITHOUT_PARAMETERS = {
    "RandomProjection": lambda **options: RandomProjection(8, 3, 4, **options),
    "SparseProjection": lambda **options: SparseProjection(8, 3, 4, **options),
    "CodebookVoting": lambda **options: CodebookVoting(2, topk=3, **options),
    "ClassCounts": lambda **options: ClassCounts(3, 5, 2, **options),
}


@pytest.mark.parametrize("name", [*WITH_DTYPE, *WITHOUT_PARAMETERS])
@pytest.mark.parametrize("device", ["meta", torch.device("cpu")])
def test_every_tensor_is_where_it_is_wanted(name, device):
    module = (WITH_DTYPE | WITHOUT_PARAMETERS)[name](device=device)
    assert {tensor.device for tensor in module.state_dict().values()} == {torch.device(device)}
    with torch.device("cpu"):
        assert next(iter(module.state_dict().values())).device == torch.device(device)


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_parameters_have_the_dtype_and_statistics_stay_exact(name):
    module = WITH_DTYPE[name](dtype=torch.bfloat16)
    expected = {"encoder", "splitter"} if name == "BottleneckedEncoder" else set()
    found = {name: one.dtype for name, one in module.named_parameters() if name.split(".")[0] not in expected}
    assert set(found.values()) == {torch.bfloat16}
    floats = {one.dtype for one in module.buffers() if one.is_floating_point()}
    assert floats <= {torch.float32}
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch.dtype, got torch.int64"):
        WITH_DTYPE[name](dtype=torch.int64)
    with pytest.raises(TypeError, match="dtype must be a floating-point torch.dtype, got 'float32'"):
        WITH_DTYPE[name](dtype="float32")
    with pytest.raises(RuntimeError, match="device type"):
        WITH_DTYPE[name](device="nowhere")


def test_numbers_do_not_depend_on_how_a_module_got_its_place_and_dtype():
    for build in (bottleneck, encoder, memory):
        torch.manual_seed(0)
        plain = build()
        torch.manual_seed(0)
        chosen = build(device="cpu", dtype=torch.float64)
        assert all(torch.equal(one.to(two), two) for one, two in zip(plain.buffers(), chosen.buffers(), strict=True))
        assert chosen.state_dict().keys() == plain.state_dict().keys()
    drawn = [
        RandomProjection(8, 3, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
        for dtype in (None, torch.float16)
    ]
    assert torch.equal(drawn[0].rand_proj.half(), drawn[1].rand_proj)
    assert RandomProjection(8, 3, 4, generator=torch.Generator(), device="meta").rand_proj.is_meta


@pytest.mark.contract
@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_a_module_pools_unless_a_call_says_otherwise(pool):
    module, x = bottleneck(pool=pool).eval(), torch.randn(6, 3, 4)
    each = module(x, pool="none")
    assert torch.equal(module(x), module(x, pool=pool))
    torch.testing.assert_close(module(x), getattr(each, pool)(1))
    codes = module.encode(x)
    assert torch.equal(module.decode(codes), module.decode(codes, pool))
    assert module.decode(codes, "none").shape == each.shape
    assert module(x, return_values_only=False).values.shape == (6, 2)


def test_encoders_pool_too(tmp_path):
    model, x = encoder(pool="mean").eval(), torch.randn(6, 8)
    assert torch.equal(model(x), model(x, pool="mean"))
    assert model(x).shape == (6, 2)
    assert model(x, pool="none").shape == (6, 3, 2)
    assert model.decode(model.encode(x)).shape == (6, 2)
    model.save_pretrained(tmp_path)
    again = kvb.BottleneckedEncoder.from_pretrained(tmp_path, encoder=nn.Identity())
    assert torch.equal(again(x), model(x))


def test_a_wrong_pool_is_refused():
    for build in (bottleneck, encoder):
        with pytest.raises(ValueError, match="pool must be one of 'none', 'mean', 'sum'; got 'max'"):
            build(pool="max")
    with pytest.raises(ValueError, match="pool must be one of 'none'; got 'mean'"):
        core.KeyValueBottleneck(*SIZES, pool="mean")


def test_a_module_pickled_before_there_was_a_choice_does_not_pool():
    module = bottleneck().eval()
    del module.__dict__["pool"]
    assert module(torch.randn(6, 3, 4)).shape == (6, 3, 2)
