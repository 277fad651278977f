"""The state of a split table: checkpoints of other numbers of processes, whole state dicts, files, the meta device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding_cases import CASES, GIANT, mesh, module, pair, queries, same_state, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import kvb
from kvb.distributed import exchange, parallelize

CASE = CASES[8]._replace(B=16, options={"return_values_only": True})


class Model(nn.Module):
    """A bottleneck that is no root, and a parameter beside it."""

    def __init__(self, bottleneck: kvb.KeyValueBottleneck) -> None:
        super().__init__()
        self.bottleneck, self.scale = bottleneck, nn.Parameter(torch.ones(CASE.V))

    def forward(self, x):
        return self.bottleneck(x, pool="mean") * self.scale


def _taught(model, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (model(queries(CASE, seed=step)) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


def _split(world, split):
    there = module(CASE)
    there.process_group = False
    model = Model(there)
    return model if world == 1 else parallelize(model, mesh(world), **{split: "table"})


def _saved(path, split):
    model = _split(4, split)
    optimizer = _taught(model, 3)
    tables, moments = get_state_dict(model, optimizer)
    dcp.save({"model": tables, "optimizer": moments}, checkpoint_id=path)
    assert isinstance(tables["bottleneck.keys"], DTensor)
    assert isinstance(moments["state"]["bottleneck.values"]["exp_avg"], DTensor)


def _loaded(path, split):
    """Bitwise what was saved; and it goes on."""
    world = dist.get_world_size()
    wanted = _split(1, split)
    kept = _taught(wanted, 3)
    model = _split(world, split)
    optimizer = _taught(model, 1)
    with torch.no_grad():
        for buffer in model.bottleneck.buffers():
            buffer.zero_()
    tables, moments = get_state_dict(model, optimizer)
    state = {"model": tables, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    same_state(model.bottleneck, wanted.bottleneck, "loaded")
    found = optimizer.state[model.bottleneck.values]["exp_avg_sq"]
    torch.testing.assert_close(whole(found), kept.state[wanted.bottleneck.values]["exp_avg_sq"])
    model(queries(CASE))
    wanted(queries(CASE))
    same_state(model.bottleneck, wanted.bottleneck, "after a step more")


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_a_checkpoint_of_four_processes_loads_in_fewer(processes, tmp_path, split):
    processes(4, _saved, tmp_path / "checkpoint", split)
    for world, into in ((1, split), (2, split), (3, {"codebooks": "pairs", "pairs": "codebooks"}[split])):
        if (world, into) != (3, "codebooks"):  # four codebooks
            processes(world, _loaded, tmp_path / "checkpoint", into)


def _whole(path):
    alone, there = pair(CASE, (4,), codebooks="table")
    for one in (alone, there):
        one.freeze_keys().mask_pairs(torch.arange(44).view(4, 11) % 3 > 0)
        one(queries(CASE))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(there, options=options)
    assert bool(state) == (dist.get_rank() == 0)
    if dist.get_rank() == 0:
        plain = module(CASE, seed=9)
        plain.load_state_dict(state)
        same_state(plain, alone, "whole")
        kvb.save(plain, path / "table.pt")
    dist.barrier()
    from_file = parallelize(module(CASE, seed=11), mesh(4), pairs="table")
    kvb.load(from_file, path / "table.pt")
    same_state(from_file, alone, "from a file")
    assert from_file.keys_frozen
    sent = parallelize(module(CASE, seed=12), mesh(4), codebooks="table")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sent, state, options=options)
    same_state(sent, alone, "from the first process")
    sent.load_state_dict(alone.state_dict())
    before = {name: whole(tensor).clone() for name, tensor in sent.state_dict().items()}
    for name in ("keys", "values"):
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            sent.load_state_dict({**alone.state_dict(), name: torch.zeros(4, 12, 2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        sent.load_state_dict({})
    with pytest.raises(TypeError, match="DTensor"):
        kvb.save(sent, path / "split.pt")
    for name, tensor in sent.state_dict().items():
        assert torch.equal(whole(tensor), before[name])


def test_whole_state_dicts_and_files(processes, tmp_path):
    processes(4, _whole, tmp_path)


def _from_meta(split):
    """No process ever allocates more than its part."""
    case = (CASES if split == "codebooks" else GIANT)[8]
    with torch.device("meta"):
        made = kvb.KeyValueBottleneck(case.C, case.K, case.D, case.V)
    made.process_group = False
    sizes = (2, 2) if dist.get_world_size() == 4 else (dist.get_world_size(),)
    there = parallelize(made, mesh(*sizes), **{split: "table"}, **({"data": "data"} if len(sizes) > 1 else {}))
    assert there.keys.is_meta
    there.to_empty(device="cpu")
    there.reset_parameters()
    there.eval()(queries(case))
    parts = {name: exchange.part_of(t) if isinstance(t, DTensor) else t for name, t in there.state_dict().items()}
    assert parts["values"].untyped_storage().nbytes() == parts["values"].nbytes
    return parts, there.keys_initialised


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_the_meta_device(processes, split):
    found = processes(4, _from_meta, split)
    for parts, initialised in found:
        assert initialised
        assert parts["cluster_size"].eq(1).all()
        assert parts["kvb_mask"].eq(1).all()
        assert 0.3 < parts["values"].std() < 3
    for name in ("keys", "values"):
        assert torch.equal(found[0][0][name], found[2][0][name])
        assert not torch.equal(found[0][0][name].flatten()[:4], found[1][0][name].flatten()[:4])
