"""Gradients of tables as rows: which rows they have, merged and in order, and what a process has of them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kvb import _torch, ops


def merged(grad: Tensor) -> Tensor:
    """A sparse gradient without repeated rows."""
    if grad.is_coalesced():
        return grad
    # Autograd forgets that the rows are merged and in order; checking is cheaper than sorting them again.
    _, ascending = flat(_torch.coordinates(grad), grad.shape)
    return _torch.call_coalesced(grad) if bool(ascending) else grad.coalesce()


def flat(places: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Places [axes, M] in a table of this shape as row numbers [M], and whether they ascend without repetition, []."""
    if len(places) == 2:
        found: tuple[Tensor, Tensor] = ops.places_to_rows(places, shape[1])
        return found
    rows = places[0]
    for axis in range(1, len(places)):
        rows = torch.add(places[axis], rows, alpha=shape[axis])
    return rows, (rows[1:] > rows[:-1]).all()


def _sparse_rows(param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the table, and their gradients [M, V]."""
    if grad.sparse_dim() != param.dim() - 1:
        raise ValueError(
            f"expected a sparse gradient with the last axis of {tuple(param.shape)} dense, sparse_dim = "
            f"{param.dim() - 1}, got sparse_dim = {grad.sparse_dim()}: a row learns as a whole"
        )
    found = merged(grad)
    return found.indices(), found.values()


def touched_rows(param: Tensor, grad: Tensor, zeros_move: bool) -> tuple[Tensor, Tensor]:
    """The places [A, M] of rows whose gradient is not zero, and those gradients: the same for dense and sparse ones.

    Rows of zeros in a sparse gradient may stay in the list if the optimizer does not move them.
    """
    if grad.is_sparse:
        places, each = _sparse_rows(param, grad)
        if not zeros_move:
            return places, each
        moving = (each != 0).any(-1)
        return (places, each) if bool(moving.all()) else (places[:, moving], each[moving])
    places = (grad != 0).any(-1).nonzero().t()
    return places, grad[tuple(places)]


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is none of ``torch.distributed.tensor``, of which a process has a part."""
    distributed = sys.modules.get("torch.distributed.tensor")  # nobody has made one before it was imported
    return distributed is None or not isinstance(tensor, distributed.DTensor)


def part_of(tensor: Any, like: Any = None) -> Tensor:
    """What this process has of a DTensor, sharing its memory; any other tensor itself.

    Args:
        like: a DTensor whose placements the part shall have.
    """
    if is_whole(tensor):
        return tensor
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    part: Tensor = tensor.to_local()
    return part


def require_whole_rows(param: Any) -> None:
    last = param.dim() - 1
    if not is_whole(param) and any(placement.is_shard(last) for placement in param.placements):
        raise ValueError(
            f"expected a table whose rows are whole in one process, got {param.placements}: shard another axis than "
            "the last, or put the parameter in a group with rowwise=False"
        )
