"""The Python blocks of the document the author's repository began with, word for word."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest
import torch

import kvb.compat

DOCUMENT = (Path(__file__).parents[1] / "data" / "seed_b.md").read_text()
BLOCK, ENCODERS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def seed_names():
    """``key_value_bottleneck.core`` as the document imports it."""
    kvb.compat.alias("seed")
    yield
    kvb.compat.unalias()


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

    frozen = bottleneck.freeze_keys().keys.clone()
    optimizer = torch.optim.SGD(bottleneck.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = bottleneck(x[:2]).values.square().mean()
        optimizer.zero_grad()
        (1e4 * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]  # values learn
    assert torch.equal(bottleneck.keys, frozen)


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


def test_encoders(seed_names, monkeypatch):
    """The second block, verbatim; the prelude has what it leaves open, and notes the state around every training."""
    names = runpy.run_path(str(Path(__file__).parent / "seed_scripts" / "prelude.py"))
    monkeypatch.setattr(torch.hub, "load", names["hub_load"])
    exec(ENCODERS, names)

    wrapped, model = names["bottlenecked_encoder"], names["model"]
    assert type(wrapped) is kvb.DinoBottleneckedEncoder
    assert wrapped.bottleneck.initted.item() == 1
    images, _ = next(iter(names["get_your_dataloader"]()))
    output = wrapped(images)
    assert output.values.shape == (128, 16, 64, 1, 1)
    assert output.keys.shape == (128, 16, 64, 1, 1)
    assert output.indices.shape == output.distances.shape == (128, 16, 1, 1)
    features = wrapped.encoder(images).flatten(1).view(128, 16, 64)
    gap = (features[:, :, None] - wrapped.bottleneck.keys).square().sum(-1)
    torch.testing.assert_close(output.distances[..., 0, 0], gap.amin(-1))
    assert model(images).shape == (128, 10)

    iid, shifted = names["trained"]
    values = "0.bottleneck.values"
    for run in (iid, shifted):
        assert not torch.equal(run.before[values], run.after[values])
        assert run.losses[-1] < 0.8 * run.losses[0]
        frozen = [name for name in run.before if name.startswith("0.") and name != values and "counter" not in name]
        assert "0.bottleneck.keys" in frozen
        assert "0.encoder.0.weight" in frozen
        assert all(torch.equal(run.before[name], run.after[name]) for name in frozen)
    decoder = [name for name in iid.before if name.startswith("1.")]
    assert not any(torch.equal(iid.before[name], iid.after[name]) for name in decoder)
    assert all(torch.equal(shifted.before[name], shifted.after[name]) for name in decoder)
