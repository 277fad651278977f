"""The cost model against counted bytes, and against the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharding_cases import mesh
from wire import Counted

import kvb
from kvb.distributed import cost, costs, parallelize, sync_values
from kvb.training import sgd_step

B, C, K, V, D = 32, 8, 96, 10, 14


def _counted(way):
    """Bytes of this process in a step of each kind."""
    torch.manual_seed(0)
    table = kvb.KeyValueBottleneck(C, K, D, V, process_group=False).eval()
    world = torch.distributed.get_world_size()
    if way == "sync_values":
        sync_values(table)
    else:
        parallelize(table, mesh(world), **{way: "table"})
    x, found = torch.randn(B, C, D), {}
    with Counted() as autograd:
        table(x, pool="mean").sum().backward()
    found["autograd"] = autograd
    codes = table.encode(x)
    with Counted() as decoded:
        table.decode(codes, "mean").sum().backward()
    found["decode"] = decoded
    if way != "sync_values":
        with Counted() as fused:
            sgd_step(table.values, codes, torch.zeros(B, dtype=torch.int64))
        found["fused"] = fused
    return {name: (dict(each.bytes), dict(each.calls)) for name, each in found.items()}


@pytest.mark.parametrize("way", ["codebooks", "pairs", "sync_values"])
def test_bytes_are_those_that_are_sent(processes, way):
    model = cost(B, C, K, V, D=D, processes=4)[way]
    for found in processes(4, _counted, way):
        bytes_, calls = found["autograd"]
        assert bytes_.get("all_reduce", 0) == model.all_reduce
        assert bytes_.get("all_gather", 0) == model.all_gather
        assert sum(calls.values()) <= 2
        if way == "sync_values":
            assert found["decode"][0] == bytes_
            continue
        for name in ("decode", "fused"):  # without a search
            bytes_, calls = found[name]
            assert bytes_ == {"all_reduce": model.all_reduce}
            assert sum(calls.values()) <= 2  # and a norm


def test_the_model_by_hand():
    """Paper's size on two processes: 42 MB of gradients, or what was fetched."""
    found = cost(256, 256, 4096, 10, processes=2)
    assert found["dense"].sent == 256 * 4096 * 10 * 4
    assert found["sync_values"].sent == 256 * (256 * 2 + 10 * 4)
    assert found["sync_values"].sent * 100 < found["dense"].sent
    assert found["codebooks"].held * 2 == found["dense"].held
    assert found["codebooks"].sent == 256 * 10 * 4
    assert found["dense"].seconds(25) == found["dense"].sent / 25e9
    with pytest.raises(ValueError, match="processes must be a positive integer, got 0"):
        cost(1, 1, 1, 1, processes=0)


@pytest.mark.parametrize("way", ["codebooks", "pairs"])
def test_what_is_held(processes, way):
    for held in processes(4, _held, way):
        assert held == cost(B, C, K, V, D=D, processes=4)[way].held


def _held(way):
    table = parallelize(kvb.KeyValueBottleneck(C, K, D, V), mesh(4), **{way: "table"})
    tables = [tensor for tensor in (*table.buffers(), table._table().detach()) if tensor.dim() > 1]
    return sum(tensor.untyped_storage().nbytes() for tensor in tables)


def test_the_page_shows_the_model():
    page = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text()
    assert costs.as_markdown() in page
