"""``clip_grad_norm_``: one norm over dense and sparse gradients, and over those that processes share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from kvb import _torch, ops
from kvb.optim_gradients import is_whole, merged, part_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for dense and sparse gradients together: one norm over all of them.

    Equivalent to ``torch.nn.utils.clip_grad_norm_`` on ``grad.to_dense()``, without the dense table: scales gradients
    in place by ``min(1, max_norm / (norm + 1e-6))``. Sparse gradients are coalesced first, and stay so.

    Args:
        parameters: one or many; those without a gradient are skipped. DTensors, as of ``fully_shard``, count as a
            whole: every process calls this, and gets the same norm.
        max_norm: the largest norm allowed.
        norm_type: p of the norm, float("inf") for the largest absolute value.
        error_if_nonfinite: raise if the norm is NaN or Inf.
        foreach: as for ``torch.nn.utils.clip_grad_norm_``.
    Returns:
        the norm before clipping, [].
    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``; gradients on different devices.
    Examples:
        >>> table = torch.zeros(2, 3, 4, requires_grad=True)
        >>> table.sum().backward()
        >>> kvb.optim.clip_grad_norm_(table, 1.0)
        tensor(4.8990)
    """
    owners = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if len(owners) == 1 and norm_type == 2 and not error_if_nonfinite:
        norm = _clip_alone(owners[0], max_norm)
        if norm is not None:
            return norm
    numbers, parts = [], []
    for owner in owners:
        if owner.grad is None:
            continue
        part = part_of(owner.grad)
        if not part.is_sparse:
            numbers.append(owner.grad)
            parts.append(part)
            continue
        rows = merged(part)
        if is_whole(owner.grad):
            owner.grad = rows
        parts.append(rows.values())
        numbers.append(parts[-1] if is_whole(owner.grad) else _norms_of_parts(owner.grad, parts[-1], norm_type))
    norm = _norm(numbers, norm_type, error_if_nonfinite, foreach)
    if norm.is_cpu and not is_compiling():
        own = float(norm)  # numbers of Python take no time beside tensors of one number
        if not max_norm / (own + 1e-6) >= 1:
            for part in parts:
                part.mul_(max_norm / (own + 1e-6))
        return norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor.to(part.device))
    return norm


def _clip_alone(owner: Tensor, max_norm: float) -> Tensor | None:
    """The same for one sparse gradient on the CPU, in one pass over it; None where that is not what it is."""
    grad = owner.grad
    if grad is None or not grad.is_sparse or not grad.is_cpu or not is_whole(grad) or is_compiling():
        return None
    rows = _torch.rows_of(grad)
    if rows.dim() != 2 or not rows.is_contiguous() or rows.dtype not in (torch.float32, torch.float64):
        return None
    norm, ascending = ops.clip_rows_(rows, _torch.coordinates(grad), max_norm)
    if not ascending:  # their sums have another norm
        return None
    owner.grad = _torch.call_coalesced(grad)
    return norm


def _norms_of_parts(grad: Any, rows: Tensor, norm_type: float) -> Any:
    """A DTensor of one norm for each process that has a part of a sparse gradient, whose norm is that of the whole."""
    placements = [type(each)(0) if each.is_shard() else each for each in grad.placements]
    norm = torch.linalg.vector_norm(rows, norm_type).view(1)
    return type(grad).from_local(norm, grad.device_mesh, placements, run_check=False)


def _norm(numbers: list[Any], norm_type: float, error_if_nonfinite: bool, foreach: bool | None) -> Tensor:
    """One norm over all tensors; those of a mesh are one tensor with all its processes."""
    if len(numbers) == 1 and is_whole(numbers[0]) and not error_if_nonfinite:
        return torch.linalg.vector_norm(numbers[0], norm_type)  # most of what one table takes are the steps to here
    by_mesh: dict[Any, list[Any]] = {}
    for each in numbers:
        by_mesh.setdefault(None if is_whole(each) else each.device_mesh, []).append(each)
    if set(by_mesh) <= {None}:
        return nn.utils.get_total_norm(numbers, norm_type, error_if_nonfinite, foreach)
    norms: list[Any] = [nn.utils.get_total_norm(each, norm_type, False, foreach) for each in by_mesh.values()]
    norms = [norm if is_whole(norm) else norm.full_tensor() for norm in norms]
    return nn.utils.get_total_norm(norms, norm_type, error_if_nonfinite, foreach)
