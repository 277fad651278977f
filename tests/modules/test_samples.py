"""Samples of a stream: of all of it, in whatever order it comes, read once."""

from __future__ import annotations

import pytest
import torch

import kvb
from kvb.modules import samples
from kvb.modules.samples import Reservoir, Share

pytestmark = pytest.mark.fallback


def test_every_position_is_as_likely_to_be_taken():
    x = torch.arange(40.0).view(20, 2, 1, 1)
    seen = torch.zeros(40)
    for _ in range(400):
        share = Share(10, lasting=False)
        for part in x.split([3, 1, 0, 4, 12]):
            share.add(part, None)
        rows = torch.cat([batch.flatten(0, 1) for batch in share.batches()]).flatten().long()
        assert rows.unique().numel() == 10
        seen[rows] += 1
    assert (seen - 100).abs().max() < 40  # 4 standard deviations


def test_a_generator_makes_shares_reproducible():
    x = torch.randn(60, 1, 2, 3)
    found = []
    for _ in range(2):
        torch.rand(3)  # the global state must not matter
        share, chance = Share(20, lasting=True), torch.Generator().manual_seed(3)
        for part in x.split(7):
            share.add(part, chance)
        found.append(torch.cat(list(share.batches())))
    assert torch.equal(*found)


def test_all_of_few_rows_is_kept_without_a_copy_where_it_lasts():
    x = torch.randn(6, 1, 2, 3)
    for lasting in (True, False):
        share = Share(6, lasting=lasting)
        for part in x.split(3):
            share.add(part, None)
        first = share.batches()[0]
        assert torch.equal(torch.cat(list(share.batches())), x)
        assert (first.data_ptr() == x.data_ptr()) == lasting


def test_reservoirs_sort_in_what_is_new(monkeypatch):
    """The best of all rows by priority, best first, however many came at a time."""
    rows, weights, numbers = torch.randn(2, 50, 3), torch.rand(2, 50), torch.rand(2, 50)
    best = (numbers.log() / weights).topk(16).indices
    for parts in ([50], [20, 30], [10] * 5, [1] * 50):
        reservoir, start = Reservoir(16, torch.zeros(2, 1, 3)), 0
        for size in parts:
            here = slice(start, start + size)
            monkeypatch.setattr(samples, "draw", lambda *others, here=here: numbers[:, here])
            reservoir.add(rows[:, here], weights[:, here], None)
            start += size
        assert reservoir.filled.all()
        assert torch.equal(reservoir.rows, rows.gather(1, best[..., None].expand(-1, -1, 3)))


class Reused:
    """A loader that writes every batch to the same memory."""

    def __init__(self, x, size):
        self.parts, self.memory = x.split(size), torch.empty_like(x[:size])

    def __iter__(self):
        for part in self.parts:
            yield self.memory.copy_(part)


def test_loaders_may_reuse_their_memory():
    x = torch.randn(48, 2, 3)
    made = [kvb.KeyValueBottleneck(2, 4, 3, 2) for _ in range(2)]
    for module, data in zip(made, (Reused(x, 12), list(x.split(12))), strict=True):
        module.init_keys(data, "kmeans", epochs=0, progress=False, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made[0].keys, made[1].keys)


@pytest.mark.parametrize("kind", ["tensor", "loader", "encoder"])
def test_sorted_data_gives_keys_of_all_classes(kind):
    """1600 rows of eight classes, one after the other: the first 512, as many as k-means takes, hold three."""
    centres = 10 * torch.randn(8, 2, 3)
    x = centres.repeat_interleave(200, 0) + 0.01 * torch.randn(1600, 2, 3)
    if kind == "encoder":
        model = kvb.BottleneckedEncoder(torch.nn.Identity(), 6, 2, 8, 3, 2, splitting_mode="chunk")
        model.init_keys(x.flatten(1).split(100), "kmeans++", epochs=0, progress=False)
        keys = model.bottleneck.keys
    else:
        model = kvb.KeyValueBottleneck(2, 8, 3, 2)
        model.init_keys(x if kind == "tensor" else list(x.split(100)), "kmeans++", epochs=0, progress=False)
        keys = model.keys
    assert (torch.cdist(centres.transpose(0, 1), keys).amin(-1) < 1).all()
