"""What tests of checkpoints share: both formats, a model with a state of every kind, and whether two states are one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvb import KeyValueBottleneck

try:
    import safetensors.torch as safetensors
except ModuleNotFoundError:
    safetensors = None
with_safetensors = pytest.mark.skipif(safetensors is None, reason="safetensors is not installed")
FORMATS = ["file.pt", pytest.param("file.safetensors", marks=with_safetensors)]


def make():
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3)), KeyValueBottleneck(2, 9, 3, 4))


def trained():
    module = make()
    module[-1].freeze_keys().mask_pairs(torch.rand(2, 9) < 0.5)
    module(torch.randn(20, 6))
    return module


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
