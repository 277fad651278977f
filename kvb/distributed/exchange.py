"""What goes between processes in a forward and a backward pass: sums, joined parts, and gradients of what all share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kvb import _torch, collectives
from kvb.collectives import Group


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Every process goes on with the same sum, and has the same gradient of it."""
        return grads[0], None


def summed(part: Tensor, group: Group) -> Tensor:
    """The sum over the processes of a group, float32 or wider."""
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    return part if collectives.world(group) == 1 else _Sum.apply(part, group)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.begin, ctx.size = sum(sizes[: collectives.rank(group)]), part.shape[1]
        padded = part.new_zeros((part.shape[0], max(sizes), *part.shape[2:]))
        padded[:, : part.shape[1]] = part
        parts = collectives.gathered(padded, group)
        return torch.cat([each[:, :size] for each, size in zip(parts, sizes, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].narrow(1, ctx.begin, ctx.size), None, None


def joined(part: Tensor, sizes: list[int], group: Group) -> Tensor:
    """The parts [B, c, ...] of all processes as [B, C, ...], in one collective; ``sizes`` has the c of each."""
    return part if len(sizes) == 1 else _Join.apply(part, sizes, group)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def shared(whole: Tensor, group: Group) -> Tensor:
    """A tensor that all processes of a group have: each uses a part of it, and its gradient is the sum of theirs."""
    if collectives.world(group) == 1 or not (torch.is_grad_enabled() and whole.requires_grad):
        return whole
    return _Shared.apply(whole, group)


# --- values -----------------------------------------------------------------------------------------------------------


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Any, data: Group, flat: bool) -> Tensor:
        ctx.values, ctx.data = values, data
        local = part_of(values)
        return local.view(1, -1, local.shape[-1]) if flat else local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        """As DTensor; autograd cannot add up those of sparse parts, so that this sees to it."""
        values, grad = ctx.values, averaged(grads[0], ctx.data)
        if not grad.is_sparse:
            return whole_of(values, grad.view(part_of(values).shape)), None, None
        if values.grad is not None:
            grad = part_of(values.grad) + _reshaped(grad, part_of(values).shape)
        values.grad = _torch.sparse_whole_of(values, _reshaped(grad, part_of(values).shape).coalesce())
        return None, None, None


def _reshaped(grad: Tensor, shape: torch.Size) -> Tensor:
    """Rows of a table [1, C*k, V] or [C, k, V], in order, as those of a table of the latter shape."""
    if grad.shape == shape:
        return grad
    places = _torch.coordinates(grad)[1]
    both = torch.stack([places // shape[1], places % shape[1]])
    return torch.sparse_coo_tensor(both, _torch.rows_of(grad), shape, check_invariants=False)


def local(values: DTensor, data: Group) -> Tensor:
    """This process's part [C, K, V] of the values; its gradient is averaged over the group ``data``."""
    return _local(values, data, flat=False)


def local_rows(values: DTensor, data: Group) -> Tensor:
    """The same as [1, C*K, V]."""
    return _local(values, data, flat=True)


def _local(values: DTensor, data: Group, *, flat: bool) -> Tensor:
    if torch.is_grad_enabled() and values.requires_grad:
        return _Local.apply(values, data, flat)
    part = part_of(values)
    return part.view(1, -1, part.shape[-1]) if flat else part


@torch.no_grad()
def part_of(whole: DTensor) -> Tensor:
    """What of a DTensor is here, dense or sparse."""
    return whole.to_local()


@torch.no_grad()
def whole_of(like: DTensor, part: Tensor) -> DTensor:
    """The DTensor, placed as another one, of which this process has a part."""
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=tuple(stride)
    )


def averaged(grad: Tensor, group: Group) -> Tensor:
    """The mean of gradients over the processes of a group; of sparse ones, merged."""
    processes = collectives.world(group)
    if processes == 1:
        return grad
    if not grad.is_sparse:
        mean = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=group)
        return mean.div_(processes)
    grad = grad.coalesce()
    places = collectives.joined(grad.indices().T.contiguous(), group)
    rows = collectives.joined(grad.values(), group)
    return torch.sparse_coo_tensor(places.T, rows / processes, grad.shape, check_invariants=False).coalesce()
