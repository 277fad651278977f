"""Modules under ``torch.fx.symbolic_trace``: one node each, which is the module itself."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import CHANNELS, C, D, V, build, make
from torch import nn

import kvb

MODULES = {
    "bottleneck": lambda: (make(C=C, D=D, V=V).freeze_keys(), (C, D)),
    "chunk": lambda: (kvb.splitters.Chunk(CHANNELS, C), (CHANNELS,)),
    "random": lambda: (kvb.splitters.RandomProjection(CHANNELS, C, D), (CHANNELS,)),
    "learned": lambda: (kvb.splitters.LearnedProjection(CHANNELS, C, D), (CHANNELS,)),
    "voting": lambda: (kvb.decoders.CodebookVoting(V), (C, V)),
    "probe": lambda: (kvb.decoders.LinearProbe(C * V, 3), (C, V)),
    "mlp": lambda: (kvb.decoders.MLP(C * V, 3), (C, V)),
    "encoder": lambda: (build(), (6,)),
    "discrete": lambda: (kvb.DiscreteKeyValueBottleneck(6, num_memories=8, num_memory_codebooks=C), (6,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_alone(name):
    module, shape = MODULES[name]()
    module.eval()
    traced = torch.fx.symbolic_trace(module)
    assert traced.itself is module
    for B in (2, 5):
        x = torch.randn(B, *shape)
        assert torch.equal(traced(x), module(x))
    assert torch.equal(copy.deepcopy(traced)(x), module(x))


def test_a_model_of_them():
    parts = (
        nn.Linear(6, CHANNELS),
        kvb.splitters.Chunk(CHANNELS, C),
        make(C=C, D=D, V=V),
        kvb.decoders.CodebookVoting(V),
    )
    model = nn.Sequential(*parts).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert traced.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(5, 6)
    assert torch.equal(traced(x), model(x))
    traced(x).sum().backward()
    assert model[2].values.grad is not None
    again = torch.fx.symbolic_trace(traced)
    assert torch.equal(again(x), model(x))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory, self.voting = build(), kvb.decoders.CodebookVoting(V)

    def forward(self, x, mask, scale):
        return self.voting(self.memory(x, mask=mask, scale=scale), mask) + 1


def test_masks_and_arguments_of_the_encoder_are_passed_on():
    model = Padded().eval()
    x, mask = torch.randn(5, 7, 6), torch.rand(5, 7) < 0.6
    assert torch.equal(torch.fx.symbolic_trace(model)(x, mask, 0.5), model(x, mask, 0.5))


def test_a_trace_that_begins_at_the_module_takes_its_own_arguments():
    module, x = build().eval(), torch.randn(5, 6)
    traced = torch.fx.symbolic_trace(module)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    assert torch.equal(traced(x, pool="mean"), module(x, pool="mean"))
    with pytest.raises(TypeError, match="takes no more arguments for its encoder, got 'scale'"):
        traced(x, scale=0.5)


def test_keys_learn_in_a_trace():
    module = make()
    twin = copy.deepcopy(module)
    x = torch.randn(20, 3, 5)
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(x), twin(x))
    assert torch.equal(module.keys, twin.keys)
    traced.eval()
    assert not module.training
