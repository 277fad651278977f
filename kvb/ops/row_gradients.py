"""``gather`` whose gradient is a list of merged rows, never a dense table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from kvb._torch import is_mapped, record_of, transforms_active, transforms_of
from kvb.ops.gradients import _Gather, _in_order, _learns, gather_backward_rows, rows_to_places


class _GatherRows(torch.autograd.Function):
    """Rows that only positions outside ``counted`` [B, S] fetch are not in the gradient."""

    @staticmethod
    def forward(values: Tensor, indices: Tensor, pool: str, layout: str, counted: Tensor | None) -> Tensor:
        return _Gather.forward(values, indices, pool, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Gather.setup_context(ctx, inputs[:-1], output)
        ctx.counted = inputs[-1]

    jvp = _Gather.jvp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_once_rows_of if torch.is_grad_enabled() else _rows_of)(ctx, *grads)  # once: which takes time


def _rows_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,), none = ctx.saved_tensors, (None,) * 4
    grad, pool = _in_order(ctx, grad, indices)
    if is_mapped(grad):
        return torch.ops.kvb.gather_backward(grad, indices, ctx.shape[1], pool), *none
    if ctx.counted is not None:
        grad, indices = grad[ctx.counted][None], indices[ctx.counted][None]
    return sparse_rows(grad, indices, ctx.shape, pool), *none


_once_rows_of = torch.autograd.function.once_differentiable(_rows_of)


def sparse_rows(grad: Tensor, indices: Tensor, shape: torch.Size, pool: str) -> Tensor:
    """The gradient of values of a shape [C, K, V] as a coalesced sparse tensor, C and K its sparse axes."""
    K = shape[1]
    rows, merged, count = gather_backward_rows(grad, indices, K, pool)
    n = int(count)  # on another device the host waits here: a sparse tensor knows its size
    if n < len(rows):
        rows, merged = rows[:n], merged[:n]
    places = rows_to_places(rows, K)
    return torch.sparse_coo_tensor(places, merged, shape, check_invariants=False, is_coalesced=True)


def _must_be_dense(values: Tensor, indices: Tensor) -> bool:
    return is_mapped(values) or is_mapped(indices) or transforms_of(values) > 1


def gather_row_grad(values: Tensor, indices: Tensor, pool: str, layout: str, counted: Tensor | None = None) -> Tensor:
    """``torch.ops.kvb.gather`` whose gradient for ``values`` is a coalesced sparse tensor, C and K its sparse axes.

    Sparse tensors cannot be traced: under ``torch.compile`` this breaks the graph once. Nor can they be mapped or
    differentiated: under ``torch.vmap``, of ``torch.func.jacrev`` and in nested transforms, the gradient is dense.

    Args:
        counted: bool [B, S]; elsewhere the gradient is zero, and names no rows. None where all positions count.
    """
    compiling = is_compiling()
    transformed = not compiling and transforms_active()
    if not _learns(values) or (transformed and _must_be_dense(values, indices)):
        return torch.ops.kvb.gather(values, indices, pool, layout)
    if compiling:
        return torch.compiler.disable(_GatherRows.apply)(values, indices, pool, layout, counted)
    record = _GatherRows.apply if transformed else _record_rows
    return record(values, indices, pool, layout, counted)


_record_rows = record_of(_GatherRows)
