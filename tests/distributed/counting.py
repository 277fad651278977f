"""Counts what a process sends in its collectives, and in those of DDP's reducer: as many bytes as rings take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


class Sent:
    """calls: how many collectives; bytes: what each process sends in them."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0.0

    def all_reduce(self, tensor: torch.Tensor, world: int) -> None:
        self.calls += 1
        self.bytes += 2 * tensor.nbytes * (world - 1) / world

    def all_gather(self, tensor: torch.Tensor, world: int) -> None:
        self.calls += 1
        self.bytes += tensor.nbytes * (world - 1)


@contextlib.contextmanager
def counted(model: torch.nn.Module | None = None) -> Iterator[Sent]:
    """``model``: in ``DistributedDataParallel``, for the gradients that its reducer sends."""
    sent, reduce, gather = Sent(), dist.all_reduce, dist.all_gather

    def counted_reduce(tensor, *args, group=None, **options):
        sent.all_reduce(tensor, dist.get_world_size(group))
        return reduce(tensor, *args, group=group, **options)

    def counted_gather(parts, tensor, group=None, **options):
        sent.all_gather(tensor, dist.get_world_size(group))
        return gather(parts, tensor, group=group, **options)

    if model is not None:  # without a hook the reducer sends from C++, unseen
        model.register_comm_hook(model.process_group, allreduce_hook)
    with mock.patch.object(dist, "all_reduce", counted_reduce), mock.patch.object(dist, "all_gather", counted_gather):
        yield sent
