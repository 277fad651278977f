"""``gather`` whose gradient is that of all processes: each sends what it fetched, and all add up the same rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb import collectives
from kvb.collectives import Group
from kvb.ops.gradients import _Gather, _in_order, _learns
from kvb.ops.row_gradients import sparse_rows


class _GatherTogether(torch.autograd.Function):
    """Sends codes and gradients of the output, [B, S, C] and [B, S, V] where pooled, never rows of a table."""

    @staticmethod
    def forward(
        values: Tensor,
        indices: Tensor,
        pool: str,
        layout: str,
        sparse: bool,
        group: Group,
        counted: Tensor | None,
        sent: list[Tensor] | None,
    ) -> Tensor:
        return _Gather.forward(values, indices, pool, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Gather.setup_context(ctx, inputs[:4], output)
        ctx.sparse, ctx.group, ctx.counted, ctx.sent = inputs[4:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The mean over processes, as ``DistributedDataParallel`` has it."""
        (indices,), K = ctx.saved_tensors, ctx.shape[1]
        grad, pool = _in_order(ctx, grads[0], indices)
        places = slice(None) if ctx.counted is None else ctx.counted.flatten()
        grad, sent = grad.flatten(0, 1)[places], ctx.sent
        if sent is None:
            codes = collectives.as_codes(indices.flatten(0, 1)[places], K)
            sent, parts = collectives.parts((codes, grad), ctx.group)
        else:
            (parts,) = collectives.parts((grad,), ctx.group, [len(part) for part in sent])
        codes, grad = torch.cat(sent)[None], torch.cat(parts)[None] / collectives.world(ctx.group)
        codes = torch.where(codes < 0, ~codes, codes)
        none = (None,) * 7
        if ctx.sparse:
            return sparse_rows(grad, codes, ctx.shape, pool), *none
        return torch.ops.kvb.gather_backward(grad, codes, K, pool), *none


def gather_together(
    values: Tensor,
    indices: Tensor,
    pool: str,
    layout: str,
    sparse: bool,
    group: Group,
    counted: Tensor | None = None,
    sent: list[Tensor] | None = None,
) -> Tensor:
    """``torch.ops.kvb.gather``, whose gradient for ``values`` is the mean over the processes of a group.

    Every process runs the backward pass, with whatever batch; two collectives, or one where codes were sent before.
    Under ``torch.compile`` this breaks the graph once.

    Args:
        sparse: the gradient is a coalesced sparse tensor, C and K its sparse axes.
        counted: bool [B, S]; elsewhere the gradient is zero, and nothing is sent. None where all positions count.
        sent: codes [M, C] of those positions of each process, or ``~code``, that all of them know; None for unknown.
    """
    if not _learns(values):
        return torch.ops.kvb.gather(values, indices, pool, layout)
    apply = _GatherTogether.apply
    apply = torch.compiler.disable(apply) if torch.compiler.is_compiling() else apply
    return apply(values, indices, pool, layout, sparse, group, counted, sent)
