"""From the same seed, the published packages' numbers (tests/data/golden_seeds.pt): draws, learning, replacement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import kvb
from kvb.compat import discrete_key_value_bottleneck_pytorch as v01
from kvb.compat import discrete_key_value_bottleneck_pytorch_0_0 as v00
from kvb.compat.key_value_bottleneck import core
from kvb.compat.quantize import VectorQuantize

pytestmark = pytest.mark.fallback

GOLDEN = torch.load(Path(__file__).parents[1] / "data" / "golden_seeds.pt", weights_only=True)
SEED = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def names(prefix):
    return [name for name in GOLDEN if name.startswith(prefix)]


def assert_state(got, want):
    assert want.keys() <= got.keys()
    for name, value in want.items():
        found = got[name].to(value.dtype)  # counts are integers here
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", names("author"))
def test_the_authors_package(name):
    case = GOLDEN[name]
    torch.manual_seed(SEED)
    network = [] if case["encoder"] is None else [getattr(nn, case["encoder"][0])(*case["encoder"][1])]
    module = getattr(core, case["kind"])(*network, *case["sizes"], **case["options"], bugs=tuple(core.BUGS))
    for x in case["x"][:-1]:
        module(x)
    if case["frozen"]:
        module.freeze_keys()
    output = module(case["x"][-1])
    assert [part.shape for part in output] == [part.shape for part in case["out"]]
    for part, want in zip(output, case["out"], strict=True):
        torch.testing.assert_close(part, want, rtol=1e-4, atol=1e-4)
    assert_state(module.state_dict(), case["state"])
    assert torch.equal(torch.rand(2), case["drawn"])  # nothing else was drawn


@pytest.mark.parametrize("name", names("v01") + names("v00"))
def test_both_versions_of_the_other_package(name):
    case = GOLDEN[name]
    torch.manual_seed(SEED)
    kind = v01 if name.startswith("v01") else v00
    module = kind.DiscreteKeyValueBottleneck(6, **case["options"])
    assert list(module.state_dict()) == list(case["state"])
    for x in case["x"]:
        memories, (_, indices, loss) = module(x, return_intermediates=True)
    assert torch.equal(indices, case["indices"])
    torch.testing.assert_close(memories, case["memories"], **CLOSE)
    torch.testing.assert_close(loss, case["loss"], **CLOSE)
    assert_state(module.state_dict(), case["state"])
    assert torch.equal(torch.rand(2), case["drawn"])


def test_masked_positions_of_the_quantiser():
    case = GOLDEN["quantize_mask"]
    torch.manual_seed(SEED)
    module = VectorQuantize(6, 12)
    quantized, indices, loss = module(case["x"], mask=case["mask"])
    assert torch.equal(indices, case["out"][1])
    for part, want in ((quantized, case["out"][0]), (loss, case["out"][2])):
        torch.testing.assert_close(part, want, **CLOSE)
    assert_state(module.state_dict(), case["state"])
    torch.testing.assert_close(module.get_codes_from_indices(indices.clamp(min=0)), case["codes"], **CLOSE)


# --- whole modules, pickled by the published packages -----------------------------------------------------------------


def unpickled(case, tmp_path):
    (tmp_path / "whole").write_bytes(bytes(case["pickle"].tolist()))
    return torch.load(tmp_path / "whole", weights_only=False)


@pytest.mark.parametrize("name", [name for name in names("") if "pickle" in GOLDEN[name]])
def test_whole_modules_load_and_run(name, aliased, tmp_path):
    case = GOLDEN[name]
    aliased("published-0.0" if "00_" in name else "published")
    module = unpickled(case, tmp_path)
    assert type(module).__module__.startswith("kvb.compat.")
    assert {type(part).__module__.split(".")[0] for part in module.modules()} <= {"kvb", "torch"}
    x = case["x"][-1]
    output, want = module(x), case["again"]
    for part, right in zip(output, want, strict=True) if isinstance(output, tuple) else [(output, want)]:
        torch.testing.assert_close(part, right, rtol=1e-4, atol=1e-4)

    values = module.bottleneck.values if name.startswith("author") else module.values
    output = module.train()(x)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    assert values.grad.abs().sum() > 0
    torch.save(module, tmp_path / "again")
    again = torch.load(tmp_path / "again", weights_only=False)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())
    kvb.compat.unalias()
    assert type(torch.load(tmp_path / "again", weights_only=False)) is type(module)


def test_a_pickled_encoder_stays_frozen(aliased, tmp_path):
    aliased()
    module = unpickled(GOLDEN["author_channel_first"], tmp_path)
    assert isinstance(module.splitter, core.RandomDownProjection)
    assert (module.splitter.num_channels, module.splitter.num_codebooks, module.splitter.dim_keys) == (8, 4, 5)
    assert not module.bottleneck.update_keys
    assert module.num_codebooks == 4
    assert module.bottleneck.threshold_ema_dead_code == 0.2
    before = module.bottleneck.keys.clone()
    module(torch.randn(6, 2, 3, 4))
    assert torch.equal(module.bottleneck.keys, before)


@pytest.mark.parametrize(("name", "contract", "right"), [("v00", "published", "0.0"), ("v01", "published-0.0", "")])
def test_a_pickle_of_the_other_version_says_so(name, contract, right, aliased, tmp_path):
    aliased(contract)
    with pytest.raises(ValueError, match=rf'call kvb.compat.alias\("published-?{right}"\) before loading it'):
        unpickled(GOLDEN[f"{name}_plain"], tmp_path)
