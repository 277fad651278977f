"""Programs written for the published packages: run as they are after ``alias``, and with one import line changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
SCRIPTS = sorted((HERE / "user_scripts").glob("*.py"))


def check(source: str, capsys) -> None:
    """Run it: what it learned stays learned, and its keys stayed where they were."""
    names: dict = {}
    exec(source, names)
    module = names.get("loaded", names.get("model"))
    module = getattr(module, "bottleneck", module)
    keys = module.vq._codebook.embed if hasattr(module, "vq") else module.keys
    assert torch.equal(keys, names["frozen"])
    assert names["accuracy"] > 0.97
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_unchanged_under_the_published_contract(script, aliased, capsys):
    aliased("published")
    check(script.read_text(), capsys)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_with_the_import_line_changed(script, capsys):
    source, changes = re.subn(r"(?m)^from (\w*key_value_bottleneck)", r"from kvb.compat.\1", script.read_text())
    assert changes == 1
    check(source, capsys)


def test_both_contracts_have_users():
    users = [re.search(r"(?m)^from (\w*key_value_bottleneck\w*)", script.read_text())[1] for script in SCRIPTS]
    assert users.count("key_value_bottleneck") >= 5
    assert users.count("discrete_key_value_bottleneck_pytorch") >= 3


# --- the usage example of the other seed document, word for word ------------------------------------------------------

EXAMPLE = (DATA / "seed_a.py").read_text()


@pytest.mark.parametrize("contract", ["seed", "published"])
def test_seed_a(contract, aliased, capsys):
    aliased(contract)
    names: dict = {}
    exec(EXAMPLE, names)
    assert capsys.readouterr().out == "torch.Size([2, 64, 128])\n"
    module, output = names["bottleneck"], names["output"]
    assert output.shape == (2, 64, 128)
    output.square().sum().backward()
    values = module.values
    hit = values.grad.abs().sum(-1) > 0
    assert 0 < hit.float().mean() < 1
    before = values.detach().clone()
    torch.optim.SGD([values], lr=0.1).step()
    assert torch.equal((values != before).any(-1), hit)
    trained = sum(parameter.numel() for parameter in module.parameters())
    assert trained == (131_072 if contract == "seed" else 2_230_784)


def test_seed_a_keys_stay_bitwise_once_frozen(aliased):
    aliased("seed")
    names: dict = {}
    exec(EXAMPLE, names)
    module, x = names["bottleneck"], names["input_tensor"]
    assert torch.equal(module.freeze_keys()(x), module(x))
    before = module.bottleneck.keys.clone()
    for _ in range(3):
        module(torch.randn(2, 64, 128)).sum().backward()
    assert torch.equal(module.bottleneck.keys, before)
