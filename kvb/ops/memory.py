"""Derivatives of what memory layers look up: scores of product keys, weighted sums of rows, inner products with rows.

The three are parts of one form, linear in each of values, weights and vectors: so each is the derivative of another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kvb._torch import derivatives_on, is_mapped, saveable, transforms_of
from kvb.ops.gradients import MergedRows, _forward, _learns, _save, differentiate, refusing
from kvb.reference.shared import TILE, accumulator


def _scattered(vectors: Tensor, indices: Tensor, weights: Tensor, K: int) -> Tensor:
    """A table [K, V] to whose rows ``indices[n, t]`` the vectors ``weights[n, t] * vectors[n]`` are added.

    A few columns at a time: what rows gain, [N, T, V], would not fit.
    """
    dtype, width = accumulator(vectors.dtype), max(1, TILE // max(1, indices.numel()))
    scaled, codes = weights.to(dtype)[..., None, None], indices[..., None]
    parts = [
        torch.ops.kvb.gather_backward(scaled * block.to(dtype)[:, None, None], codes, K, "none")[0]
        for block in vectors.split(width, -1)
    ]
    return torch.cat(parts, -1).to(vectors.dtype)


def _scattered_rows(vectors: Tensor, indices: Tensor, weights: Tensor, K: int) -> Tensor:
    """The same as a coalesced sparse tensor."""
    rows, merged, count = torch.ops.kvb.scatter_weighted_rows(vectors, indices, weights, K)
    n = int(count)  # on another device the host waits here: a sparse tensor knows its size
    shape = (K, vectors.shape[-1])
    return torch.sparse_coo_tensor(rows[None, :n], merged[:n], shape, check_invariants=False, is_coalesced=True)


class _GatherWeighted(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return _forward(torch.ops.kvb.gather_weighted.default, values, indices, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, indices, weights = inputs[:3]
        _save(ctx, values, saveable(indices), weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, indices, weights), (grad,) = ctx.saved_tensors, grads
        of_values = _scattered(grad, indices, weights, len(values)) if ctx.needs_input_grad[0] else None
        of_weights = torch.ops.kvb.gather_dot(values, indices, grad) if ctx.needs_input_grad[2] else None
        return of_values, None, of_weights

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return _product_rule(torch.ops.kvb.gather_weighted, _primal(ctx.saved_tensors), tangents)


def _primal(saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Without their tangents, which belong to the level of this derivative, not to those of the outer ones."""
    return tuple(forward_ad.unpack_dual(one, level=0).primal for one in saved)


def _product_rule(operator: Any, saved: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> Tensor | None:
    """Of an operator that is linear in its first and its last argument."""
    (values, indices, other), parts = saved, []
    with derivatives_on():
        if tangents[0] is not None:
            parts.append(operator(tangents[0], indices, other))
        if tangents[2] is not None:
            parts.append(operator(values, indices, tangents[2]))
        return sum(parts[1:], parts[0]) if parts else None


class _GatherWeightedRows(torch.autograd.Function):
    """The same with a row-sparse gradient of the values, never a dense [K, V]."""

    forward = _GatherWeighted.forward
    setup_context = _GatherWeighted.setup_context
    jvp = _GatherWeighted.jvp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, indices, weights), (grad,) = ctx.saved_tensors, grads
        scatter = _scattered if is_mapped(grad) else _scattered_rows
        of_weights = torch.ops.kvb.gather_dot(values, indices, grad) if ctx.needs_input_grad[2] else None
        return scatter(grad, indices, weights, len(values)), None, of_weights


def gather_weighted_row_grad(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """``torch.ops.kvb.gather_weighted`` whose gradient for ``values`` is a coalesced sparse tensor, K its sparse axis.

    As with ``gather_row_grad``, this breaks a compiled graph once, and the gradient is dense under ``torch.vmap`` and
    in nested transforms.
    """
    compiling = torch.compiler.is_compiling()
    mapped = not compiling and (is_mapped(values) or is_mapped(indices) or transforms_of(values) > 1)
    if not _learns(values) or mapped:
        return torch.ops.kvb.gather_weighted(values, indices, weights)
    apply = torch.compiler.disable(_GatherWeightedRows.apply) if compiling else _GatherWeightedRows.apply
    return apply(values, indices, weights)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, vectors: Tensor) -> Tensor:
        return _forward(torch.ops.kvb.gather_dot.default, values, indices, vectors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, indices, vectors = inputs
        _save(ctx, values, saveable(indices), vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, indices, vectors), (grad,) = ctx.saved_tensors, grads
        of_values = _scattered(vectors, indices, grad, len(values)) if ctx.needs_input_grad[0] else None
        of_vectors = torch.ops.kvb.gather_weighted(values, indices, grad) if ctx.needs_input_grad[2] else None
        return of_values, None, of_vectors

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return _product_rule(torch.ops.kvb.gather_dot, _primal(ctx.saved_tensors), tangents)


class _ProductNearest(torch.autograd.Function):
    """Which pairs are best does not change almost everywhere; their scores are inner products with two half keys."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        return _forward(torch.ops.kvb.product_nearest.default, queries, keys, topk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        queries, keys, _ = inputs
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)
        _save(ctx, queries, keys, saveable(output[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[1] is None:
            return None, None, None
        queries, keys, indices = ctx.saved_tensors
        rows = _rows_of_halves(indices, keys)
        grad = grads[1].to(keys.dtype)[:, :, None].expand(-1, -1, 2, -1).flatten(0, 2)
        of_queries, of_keys = None, None
        if ctx.needs_input_grad[0]:
            of_queries = torch.ops.kvb.gather_weighted(keys.flatten(0, 2), rows, grad).view(queries.shape)
        if ctx.needs_input_grad[1]:
            halves = _halves(queries, keys)
            of_keys = _scattered(halves, rows, grad, keys.shape[:3].numel()).view(keys.shape)
        return of_queries, of_keys, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, Tensor | None]:
        queries, keys, indices = _primal(ctx.saved_tensors)
        saved = keys.flatten(0, 2), _rows_of_halves(indices, keys), _halves(queries, keys)
        with derivatives_on():
            moved = tangents[1] if tangents[1] is None else tangents[1].flatten(0, 2)
            turned = tangents[0] if tangents[0] is None else _halves(tangents[0], keys)
            each = _product_rule(torch.ops.kvb.gather_dot, saved, (moved, None, turned))
            shape = (*queries.shape[:2], 2, indices.shape[-1])
            return None, None if each is None else each.view(shape).sum(2).to(accumulator(keys.dtype))


class _ScatterWeightedRows(MergedRows):
    backward = jvp = refusing("scatter_weighted_rows")

    @staticmethod
    def forward(vectors: Tensor, indices: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(torch.ops.kvb.scatter_weighted_rows.default, vectors, indices, weights, K)


def _halves(queries: Tensor, keys: Tensor) -> Tensor:
    """Queries [N, C, D] as [N * C * 2, D / 2]."""
    return queries.reshape(-1, keys.shape[-1])


def _rows_of_halves(indices: Tensor, keys: Tensor) -> Tensor:
    """The two half keys of each pair, as rows of all half keys [C * 2 * K, D / 2]: [N * C * 2, T]."""
    C, K = keys.shape[0], keys.shape[2]
    first = torch.arange(2 * C, device=indices.device).view(C, 2, 1) * K
    return (torch.stack([indices // K, indices % K], 2) + first).flatten(0, 2)


differentiate("product_nearest", _ProductNearest, learns=(0, 1))
differentiate("gather_weighted", _GatherWeighted, learns=(0, 2))
differentiate("gather_dot", _GatherDot, learns=(0, 2))
differentiate("scatter_weighted_rows", _ScatterWeightedRows, learns=(0, 2))
