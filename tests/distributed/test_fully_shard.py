"""``fully_shard`` around a model with a bottleneck: from the meta device to files, with the results of one process."""

from __future__ import annotations

import pytest
import scenarios
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import kvb

C, K, D, V = 6, 16, 3, 5
WAYS = ["whole model", "bottleneck too"]


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.bottleneck = kvb.KeyValueBottleneck(C, K, D, V, **options)
        self.head = nn.Linear(V, 2)

    def forward(self, x):
        return self.head(self.bottleneck(x, pool="mean"))


def batch(step, rank):
    return torch.randn(6, C, D, generator=torch.Generator().manual_seed(10 * step + rank))


def split(model, way, **options):
    if way == "bottleneck too":
        fully_shard(model.bottleneck, **options)
    return fully_shard(model, **options)


def taught(model, batches, steps, world=1):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(steps):
        if step == 2:
            model.bottleneck.freeze_keys()
        optimizer.zero_grad()
        (model(batches(step)).square().sum() / world).backward()
        optimizer.step()
    return optimizer


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def state_of(model):
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


# --- the meta device --------------------------------------------------------------------------------------------------


def _from_meta(way, replicas):
    with torch.device("meta"):
        model = Model()
    world = dist.get_world_size()
    sizes = {"replicas": replicas, "shards": world // replicas} if replicas > 1 else {"shards": world}
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    split(model, way, mesh=mesh).to_empty(device="cpu")
    torch.manual_seed(7)  # of which the parts make nothing equal
    model.bottleneck.reset_parameters()
    model.head.reset_parameters()
    assert isinstance(model.bottleneck.values, DTensor)
    assert model.bottleneck.keys_initialised
    model(batch(0, dist.get_rank())).sum().backward()
    return scenarios.state(model.bottleneck), model.bottleneck.values.to_local().detach().clone()


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_the_meta_device(processes, world, replicas):
    found = processes(world, _from_meta, WAYS[world % 2], replicas)
    scenarios.same([state for state, _ in found])
    parts = [values for _, values in found]
    shards = world // replicas
    assert torch.cat(parts[:shards]).shape == (C, K, V)
    assert torch.cat(parts[:shards]).unique().numel() > 0.99 * C * K * V
    assert 0.9 < torch.cat(parts[:shards]).std() < 1.1
    if replicas > 1:
        assert torch.equal(torch.cat(parts[:shards]), torch.cat(parts[shards:]))


def _drawn_again(way):
    model = split(Model(), way)
    model.bottleneck.reset_parameters(torch.Generator().manual_seed(dist.get_rank()))
    first = whole(model.bottleneck.values)
    model.bottleneck.reset_parameters(torch.Generator().manual_seed(dist.get_rank()))
    assert torch.equal(first, whole(model.bottleneck.values))
    return {"values": first, "keys": model.bottleneck.keys}


def test_a_generator_gives_the_same_again(processes):
    """That of the first process."""
    scenarios.same(processes(2, _drawn_again, "whole model"))


# --- mixed precision --------------------------------------------------------------------------------------------------


def _mixed():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own = fully_shard(Model(return_values_only=False).bottleneck.freeze_keys(), mp_policy=policy)
    x = batch(0, dist.get_rank())
    out = own(x, pool="mean")
    out.values.sum().backward()
    assert out.values.dtype == torch.bfloat16
    assert own.values.dtype == own.values.grad.dtype == torch.float32
    assert own.keys.dtype == torch.float32
    assert torch.equal(out.indices, own.encode(x))
    codes = Model(return_values_only=False).bottleneck.freeze_keys()(x).indices
    return torch.equal(out.indices, codes), torch.equal(own.decode(codes, pool="mean"), out.values)


def test_mixed_precision_changes_no_code(processes):
    """With inputs left as they are, as the page has it."""
    assert processes(2, _mixed) == [(True, True)] * 2


# --- methods ----------------------------------------------------------------------------------------------------------


def _methods(way):
    torch.manual_seed(1)
    whole_one = kvb.KeyValueBottleneck(C, K, D, V, init_mode="kmeans")
    own = fully_shard(kvb.KeyValueBottleneck(C, K, D, V, init_mode="kmeans")) if way == "bottleneck too" else None
    model = own if own is not None else fully_shard(Wrapper())
    bottleneck = own if own is not None else model.bottleneck
    x = torch.cat([batch(step, dist.get_rank()) for step in range(4)])
    bottleneck.init_keys(x.split(6), progress=False)
    bottleneck.freeze_keys()
    whole_one.load_state_dict(state_of(bottleneck))
    codes = bottleneck.encode(x)
    assert torch.equal(codes, whole_one.encode(x))
    assert torch.equal(bottleneck.encode_dataset(x, progress=False).codes.long(), codes)
    for _ in range(2):
        bottleneck.zero_grad()
        out = model.decode(codes, pool="mean")
        assert torch.equal(out, whole_one.decode(codes, pool="mean"))
        out.square().sum().backward()
    found = {"grad": whole(bottleneck.values.grad), "out": out.detach()}
    whole_one.decode(codes, pool="mean").square().sum().backward()
    return found, whole_one.values.grad


class Wrapper(kvb.DiscreteKeyValueBottleneck):
    """Pools by itself; only its ``fully_shard`` knows the values."""

    def __init__(self):
        super().__init__(dim=D, num_memories=K, num_memory_codebooks=C, dim_memory=V, init_mode="kmeans")


@pytest.mark.parametrize("way", ["bottleneck too", "wrapper"])
def test_methods_work_without_registration(processes, way):
    found = processes(2, _methods, way)
    grads = [own for _, own in found]
    for state, _ in found:
        torch.testing.assert_close(state["grad"], torch.stack(grads).mean(0))


def _outside():
    model = fully_shard(Model())
    codes = model.bottleneck.encode(batch(0, 0))
    try:
        model.bottleneck.decode(codes)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_decoding_outside_of_the_module_that_split_says_what_to_do(processes):
    for message in processes(2, _outside):
        assert "call decode within that module's forward; or wrap the bottleneck in fully_shard" in message


# --- state ------------------------------------------------------------------------------------------------------------


def _saved(path, way):
    model = split(Model(), way)
    optimizer = taught(model, lambda step: batch(step, dist.get_rank()), 4)
    tensors, moments = get_state_dict(model, optimizer)
    dcp.save({"model": tensors, "optimizer": moments}, checkpoint_id=path)
    assert isinstance(tensors["bottleneck.values"], DTensor)
    return state_of(model)


def _loaded(path, way):
    """Into a model of another seed, which knows nothing; and one step more."""
    model = Model()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    model = model if dist.get_world_size() == 1 else split(model, way)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    tensors, moments = get_state_dict(model, optimizer)
    state = {"model": tensors, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert model.bottleneck.keys_frozen
    moment = whole(optimizer.state[model.bottleneck.values]["exp_avg"])
    loaded = state_of(model)
    optimizer.zero_grad()
    (model(torch.cat([batch(5, rank) for rank in range(4)])).square().sum() / 4).backward()  # the same everywhere
    optimizer.step()
    return loaded, {"moment": moment, "values": whole(model.bottleneck.values)}


def test_a_checkpoint_of_four_processes_loads_in_fewer(processes, tmp_path):
    path = tmp_path / "checkpoint"
    saved = scenarios.same(processes(4, _saved, path, "bottleneck too"))
    one = Model()
    taught(one, lambda step: torch.cat([batch(step, rank) for rank in range(4)]), 4, world=4)
    scenarios.close(saved, state_of(one))
    ends = []
    for world, way in ((1, None), (2, "bottleneck too"), (3, "bottleneck too")):
        found = processes(world, _loaded, path, way)
        loaded = scenarios.same([state for state, _ in found])
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        ends.append(scenarios.same([end for _, end in found]))
    for end in ends[1:]:
        assert torch.equal(end["moment"], ends[0]["moment"])
        scenarios.close({"values": end["values"]}, {"values": ends[0]["values"]})


def _gathered(folder, way):
    model = split(Model(), way)
    taught(model, lambda step: batch(step, dist.get_rank()), 4)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) == (dist.get_rank() == 0)
    if dist.get_rank() == 0:
        plain = Model()
        plain.load_state_dict(state)
        kvb.save(plain, folder / "model.pt")
    dist.barrier()
    with pytest.raises(TypeError, match="DTensor"):
        kvb.save(model, folder / "split.pt")
    again = split(Model(), way)
    full = kvb.load(Model(), folder / "model.pt").state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(again, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert again.bottleneck.keys_frozen
    found = state_of(again)
    assert all(torch.equal(found[name], tensor) for name, tensor in state_of(model).items())
    return found


@pytest.mark.parametrize("way", WAYS)
def test_whole_state_dicts_and_files(processes, tmp_path, way):
    found = scenarios.same(processes(2, _gathered, tmp_path, way))
    loaded = kvb.load(Model(), tmp_path / "model.pt").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items())
