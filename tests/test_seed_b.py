"""The first Python block of the document the author's repository began with, word for word."""

from __future__ import annotations

import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import kvb

DOCUMENT = (Path(__file__).parent / "data" / "seed_b.md").read_text()
BLOCK = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0]


@pytest.fixture
def seed_names(monkeypatch):
    """``key_value_bottleneck.core`` as the document imports it."""
    core = types.ModuleType("key_value_bottleneck.core")
    core.KeyValueBottleneck = kvb.KeyValueBottleneck
    monkeypatch.setitem(sys.modules, "key_value_bottleneck", types.ModuleType("key_value_bottleneck"))
    monkeypatch.setitem(sys.modules, "key_value_bottleneck.core", core)


def check(block: str, batch: int) -> None:
    names: dict = {}
    exec(block, names)
    values, keys, indices, distances = (names[n] for n in ("quantized_values", "quantized_keys", "keys_ind", "dists"))
    shape = (batch, 64, 4, 8, 16)
    assert values.shape == (*shape, 64)
    assert keys.shape == (*shape, 32)
    assert indices.shape == distances.shape == shape
    bottleneck, x = names["bottleneck"], names["x"]
    assert torch.equal(values[-1, 5, 3, 7], bottleneck.values[5, indices[-1, 5, 3, 7]])
    torch.testing.assert_close(distances[-1], (x[-1] - keys[-1]).square().sum(-1))
    assert (bottleneck.cluster_size.sum(-1) > 200).all()  # keys learn: the module is in training mode


def test_scaled_twin(seed_names):
    twin, changes = re.subn(r"batch_size = 256", "batch_size = 2", BLOCK)
    assert changes == 1
    check(twin, 2)


def gigabytes() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


# 4.4 GB of tensors: only on demand on a small machine.
on_large_machines = pytest.mark.slow if gigabytes() < 12 else lambda test: test


@on_large_machines
def test_verbatim(seed_names):
    check(BLOCK, 256)
