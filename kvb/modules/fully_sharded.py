"""Values that ``fully_shard`` splits over processes: brought together also for methods other than ``forward``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

SPLIT = (
    "the values are split by fully_shard around another module: call {name} within that module's forward; or wrap the "
    "bottleneck in fully_shard, too, before the module around it; or write a method of that module that calls {name}, "
    "and register it with torch.distributed.fsdp.register_fsdp_forward_method(module, 'that_method')"
)


def is_split(table: Tensor) -> bool:
    """Whether other processes have parts of it: a DTensor."""
    return hasattr(table, "device_mesh")


def registered(module: nn.Module, name: str) -> bool:
    """Whether the method has only now become one for which ``fully_shard`` brings the module's parameters together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever calls fully_shard
    if fsdp is None or not isinstance(module, fsdp.FSDPModule) or name in vars(module):
        return False
    fsdp.register_fsdp_forward_method(module, name)
    return True


def draw(table: Any, generator: torch.Generator | None) -> Any:
    """Fill with standard normal numbers: others in every part of a split table, by a generator that all have."""
    if generator is None or not is_split(table):
        return table.normal_(generator=generator)
    part, place = table.to_local(), 0
    for axis, placement in enumerate(table.placements):
        if placement.is_shard():
            place = place * table.device_mesh.size(axis) + table.device_mesh.get_local_rank(axis)
    part.normal_(generator=torch.Generator(part.device).manual_seed(generator.initial_seed() + 1 + place))
    return table
