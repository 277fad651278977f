"""The published packages' names, when kvb takes their place."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import kvb
from kvb.compat import discrete_key_value_bottleneck as configured
from kvb.compat import discrete_key_value_bottleneck_pytorch as lucidrains
from kvb.compat import discrete_key_value_bottleneck_pytorch_0_0 as lucidrains_0_0
from kvb.compat.key_value_bottleneck import core, splitters, utils

pytestmark = pytest.mark.fallback


def test_the_seed_documents_contract_is_kvb_itself(aliased):
    aliased("seed")
    from discrete_key_value_bottleneck import DiscreteKeyValueBottleneck, DiscreteKeyValueBottleneckConfig
    from key_value_bottleneck.core import BottleneckedEncoder, DinoBottleneckedEncoder, KeyValueBottleneck

    assert KeyValueBottleneck is kvb.KeyValueBottleneck
    assert BottleneckedEncoder is kvb.BottleneckedEncoder
    assert DinoBottleneckedEncoder is kvb.DinoBottleneckedEncoder
    assert DiscreteKeyValueBottleneck is kvb.DiscreteKeyValueBottleneck
    assert DiscreteKeyValueBottleneckConfig is kvb.DiscreteKeyValueBottleneckConfig


def test_the_published_contract_is_the_default(aliased):
    aliased("seed")
    aliased()
    import discrete_key_value_bottleneck
    import discrete_key_value_bottleneck_pytorch
    import key_value_bottleneck.core
    from discrete_key_value_bottleneck_pytorch.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck
    from key_value_bottleneck.splitters import RandomDownProjection
    from key_value_bottleneck.utils import kmeans

    assert key_value_bottleneck.core.KeyValueBottleneck is core.KeyValueBottleneck
    assert key_value_bottleneck.core is core
    assert discrete_key_value_bottleneck.DiscreteKeyValueBottleneck is configured.DiscreteKeyValueBottleneck
    assert discrete_key_value_bottleneck_pytorch.DiscreteKeyValueBottleneck is lucidrains.DiscreteKeyValueBottleneck
    assert DiscreteKeyValueBottleneck is lucidrains.DiscreteKeyValueBottleneck
    assert RandomDownProjection is splitters.RandomDownProjection
    assert kmeans is utils.kmeans
    output = key_value_bottleneck.core.KeyValueBottleneck(3, 9, 4, 2)(torch.randn(5, 3, 7, 4))
    assert isinstance(output, tuple)
    assert torch.equal(output[-1], output[0])  # where kvb's own returns a tensor, whose last sample this would be


def test_the_older_version(aliased):
    aliased("published-0.0")
    from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck
    from key_value_bottleneck.core import KeyValueBottleneck

    assert DiscreteKeyValueBottleneck is lucidrains_0_0.DiscreteKeyValueBottleneck
    assert KeyValueBottleneck is core.KeyValueBottleneck


@pytest.mark.parametrize("installed", [False, True])
def test_the_quantiser_stands_in_only_where_it_is_not_installed(installed, aliased, tmp_path, monkeypatch):
    for name in ("vector_quantize_pytorch", "vector_quantize_pytorch.vector_quantize_pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if installed:
        (tmp_path / "vector_quantize_pytorch.py").write_text("")
    importlib.invalidate_caches()
    aliased()
    assert ("vector_quantize_pytorch" in sys.modules) != installed
    kvb.compat.unalias()
    assert "vector_quantize_pytorch" not in sys.modules


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
    with pytest.raises(ValueError, match="contract must be one of 'published', 'published-0.0', 'seed'; got 'legacy'"):
        aliased("legacy")
    assert not sys.modules.keys() & set(kvb.compat.aliases.NAMES)
