"""Row-wise optimizers and clipping of parameters that ``fully_shard`` spreads over processes, as DTensors."""

from __future__ import annotations

import copy

import pytest
import scenarios
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import kvb
import kvb.distributed

OPTIMIZERS = {
    "RowwiseSGD": lambda params: kvb.optim.RowwiseSGD(params, lr=0.3, weight_decay=0.1),
    "RowwiseAdam": lambda params: kvb.optim.RowwiseAdam(params, lr=0.1, weight_decay=0.1),
    "RowwiseAdagrad": lambda params: kvb.optim.RowwiseAdagrad(params, lr=0.1, initial_accumulator_value=0.1),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {
        "values": torch.randn(3, 8, 5, generator=generator),
        "weight": torch.randn(7, 2, generator=generator),
        "bias": torch.randn(4, generator=generator),
    }


def gradients(step):
    generator = torch.Generator().manual_seed(1 + step)
    found = {name: torch.randn(start.shape, generator=generator) for name, start in parameters().items()}
    found["values"][torch.rand(3, 8, generator=generator) < 0.6] = 0
    return found


def trained(optimizer, placed):
    """placed: puts a tensor where it shall be."""
    params = {name: nn.Parameter(placed(name, start)) for name, start in parameters().items()}
    stepper, norms = OPTIMIZERS[optimizer](list(params.values())), []
    for step in range(3):
        for name, grad in gradients(step).items():
            params[name].grad = placed(name, grad)
        norms.append(kvb.optim.clip_grad_norm_(list(params.values()), 2.0))
        stepper.step()
        if step == 1:  # and on from what was saved
            stepper.load_state_dict(copy.deepcopy(stepper.state_dict()))
    return params, norms


def _sharded(optimizer, axis):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def placed(name, tensor):
        return tensor if name == "bias" else distribute_tensor(tensor, mesh, [Shard(axis if name == "values" else 0)])

    params, norms = trained(optimizer, placed)
    whole = {
        name: getattr(param, "full_tensor", lambda param=param: param)().detach() for name, param in params.items()
    }
    return {**whole, "norms": torch.stack(norms)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("axis", "world"), [(0, 2), (0, 4), (1, 3)])
def test_steps_are_those_of_one_process(processes, optimizer, axis, world):
    """Three codebooks in two processes, and in four: one has none."""
    found = scenarios.same(processes(world, _sharded, optimizer, axis))
    params, norms = trained(optimizer, lambda name, tensor: tensor)
    want = {**{name: param.detach() for name, param in params.items()}, "norms": torch.stack(norms)}
    scenarios.close(found, want)


def _other_gradients():
    mesh = init_device_mesh("cpu", (2,))
    start, grad = parameters()["values"], gradients(0)["values"]
    param = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    param.grad = distribute_tensor(grad, mesh, [Replicate()])
    kvb.optim.RowwiseSGD([param], lr=0.5).step()
    try:
        across = nn.Parameter(distribute_tensor(start, mesh, [Shard(2)]))
        across.grad = distribute_tensor(grad, mesh, [Shard(2)])
        kvb.optim.RowwiseSGD([across], lr=0.5).step()
    except ValueError as error:
        return {"values": param.full_tensor().detach()}, str(error)
    return None


def test_gradients_placed_otherwise_and_rows_in_pieces(processes):
    (first, error), (second, _) = processes(2, _other_gradients)
    found = scenarios.same([first, second])
    scenarios.close(found, {"values": parameters()["values"] - 0.5 * gradients(0)["values"]})
    assert "expected a table whose rows are whole in one process" in error


# --- fully_shard ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bottleneck = kvb.KeyValueBottleneck(4, 8, 3, 5).freeze_keys()
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.bottleneck(x, pool="mean"))


def batch(step, rank):
    return torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def _fully_sharded(optimizer):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Model())
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for step in range(3):
        stepper.zero_grad()
        model(batch(step, torch.distributed.get_rank())).square().sum().backward()
        kvb.optim.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
    whole = {name: param.full_tensor().detach() for name, param in model.named_parameters()}
    return {**whole, **scenarios.state(model.bottleneck)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_with_fully_shard(processes, optimizer):
    found = scenarios.same(processes(2, _fully_sharded, optimizer))
    model = Model()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for step in range(3):
        stepper.zero_grad()
        (model(torch.cat([batch(step, rank) for rank in range(2)])).square().sum() / 2).backward()
        kvb.optim.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
    want = {**{name: param.detach() for name, param in model.named_parameters()}, **scenarios.state(model.bottleneck)}
    scenarios.close(found, want)


def _whole_values(sparse):
    """Values stay whole, and share their gradients by what was fetched."""
    from torch.distributed.fsdp import fully_shard

    model = Model()
    model.bottleneck.sparse_grad = sparse
    fully_shard(kvb.distributed.sync_values(model), ignored_params={model.bottleneck.values})
    stepper = kvb.optim.RowwiseSGD(model.parameters(), lr=0.3)
    for step in range(3):
        stepper.zero_grad()
        model(batch(step, torch.distributed.get_rank())).square().sum().backward()
        kvb.optim.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
    whole = {name: getattr(param, "full_tensor", lambda p=param: p)() for name, param in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in whole.items()}


@pytest.mark.parametrize("sparse", [False, True])
def test_fully_shard_beside_values_by_rows(processes, sparse):
    found = scenarios.same(processes(2, _whole_values, sparse))
    model = Model()
    stepper = kvb.optim.RowwiseSGD(model.parameters(), lr=0.3)
    for step in range(3):
        stepper.zero_grad()
        (model(torch.cat([batch(step, rank) for rank in range(2)])).square().sum() / 2).backward()
        kvb.optim.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
    scenarios.close(found, {name: param.detach() for name, param in model.named_parameters()})


def _decoded():
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = fully_shard(Model().bottleneck)
    register_fsdp_forward_method(model, "decode")
    codes = model.encode(batch(0, 0))
    out = model.decode(codes, pool="mean")
    out.sum().backward()
    return {"out": out.detach(), "grad": model.values.grad.full_tensor()}


def test_codes_of_fully_shard(processes):
    found = scenarios.same(processes(2, _decoded))
    model = Model().bottleneck
    out = model.decode(model.encode(batch(0, 0)), pool="mean")
    out.sum().backward()
    scenarios.close(found, {"out": out.detach(), "grad": model.values.grad})
