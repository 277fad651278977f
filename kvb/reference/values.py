"""Values fetched by index: their gradients, and a step of training on codes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kvb.reference.arithmetic import widest
from kvb.reference.shared import (
    Tile,
    accumulator,
    flat_rows,
    require,
    require_apart,
    require_classes,
    require_codes,
    require_floating,
    require_shape,
    require_tensors,
    tiles,
)

Pool = Literal["none", "mean", "sum"]
Layout = Literal["bscv", "bcsv"]
POOLS: tuple[Pool, ...] = get_args(Pool)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TOGETHER = "bv"  # the layout of what is pooled over positions, too


def _require_choice(name: str, value: str, options: tuple[str, ...]) -> None:
    *most, last = map(repr, options)
    require(value in options, f"expected {name} {', '.join(most)} or {last}, got {value!r}")


def gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    """values [C, K, V] at indices [B, S, C]: [B, S, C, V] ("bscv") or [B, C, S, V] ("bcsv"), or pooled [B, S, V].

    In the layout "bv" they are pooled over positions as well, [B, V].
    """
    require_tensors(values=values, indices=indices)
    require_floating(values=values)
    _require_choice("pool", pool, POOLS)
    together = layout == TOGETHER
    _require_choice("layout", layout, (*LAYOUTS, TOGETHER))
    require(not together or pool != "none", f"expected pool 'mean' or 'sum' for the layout {TOGETHER!r}, got {pool!r}")
    require_shape("values", values, "C", "K", "V")
    C, K, V = values.shape
    require_codes(indices, C, K)
    B, S, _ = indices.shape
    table = values.reshape(C * K, V)
    if pool == "none":
        rows = flat_rows(indices, K)
        rows = rows if layout == "bscv" else rows.transpose(1, 2)
        return table.index_select(0, rows.flatten()).view(*rows.shape, V)
    out = values.new_zeros((B, S, V), dtype=accumulator(values.dtype))
    for b, s, c in tiles(B, S, C, V):
        rows = flat_rows(indices[b, s, c], K, c.start)
        out[b, s] += table.index_select(0, rows.flatten()).view(*rows.shape, V).sum(2, dtype=out.dtype)
    if together:
        out = out.sum(1)
    return (out / (C * S if together else C) if pool == "mean" else out).to(values.dtype)


def _tile_grad(grad: Tensor, tile: Tile, C: int, pool: str) -> Tensor:
    """[rows, V] in the accumulator's dtype: the gradient of every fetched value of one tile."""
    b, s, c = tile
    if pool == "none":
        part = grad[tile]
    else:
        books = len(range(C)[c])
        part = grad[b, s, None].expand(-1, -1, books, -1)
    part = part.to(accumulator(grad.dtype)).flatten(0, 2)
    return part / C if pool == "mean" else part


def _require_grad(grad: Tensor, indices: Tensor, K: int, pool: str) -> None:
    require_tensors(grad=grad, indices=indices)
    require_floating(grad=grad)
    _require_choice("pool", pool, POOLS)
    require_shape("indices", indices, "B", "S", "C")
    B, S, C = indices.shape
    require_shape("grad", grad, *((B, S, C, "V") if pool == "none" else (B, S, "V")))
    require_codes(indices, C, K)


def gather_backward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
    """The gradient of ``gather`` for its table, dense [C, K, V]; grad is [B, S, C, V], pooled [B, S, V]."""
    _require_grad(grad, indices, K, pool)
    (B, S, C), V = indices.shape, grad.shape[-1]
    table = grad.new_zeros((C * K, V), dtype=accumulator(grad.dtype))
    for tile in tiles(B, S, C, V):
        rows = flat_rows(indices[tile], K, tile[2].start)
        table.index_add_(0, rows.flatten(), _tile_grad(grad, tile, C, pool))
    return table.view(C, K, V).to(grad.dtype)


def gather_backward_rows(grad: Tensor, indices: Tensor, K: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradient as merged rows: ascending rows of [C*K] (tail -1), their gradients, and how many there are."""
    _require_grad(grad, indices, K, pool)
    (B, S, C), V = indices.shape, grad.shape[-1]
    size = min(B * S * C, C * K)
    flat = flat_rows(indices, K)
    ordered, _ = flat.flatten().sort()
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    place = starts.cumsum(0) - 1
    rows = torch.full((size,), -1, dtype=torch.int64, device=grad.device).scatter_(0, place, ordered)
    # Where each table row went: the inverse of ``rows``, so that the sums run in batch order like the dense gradient's.
    slot = torch.zeros(C * K, dtype=torch.int64, device=grad.device).scatter_(0, ordered, place)
    grads = grad.new_zeros((size, V), dtype=accumulator(grad.dtype))
    for tile in tiles(B, S, C, V):
        grads.index_add_(0, slot[flat[tile].flatten()], _tile_grad(grad, tile, C, pool))
    return rows, grads.to(grad.dtype), starts.sum().view(1)


def sgd_step_(
    values: Tensor, indices: Tensor, targets: Tensor, lr: float, max_norm: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of clipped SGD on values [C, K, V], in place; loss [], gradient norm [] and logits [B, V] before it.

    The logits are the mean value over the S positions and C codebooks of indices [B, S, C]; the loss is the mean
    cross entropy with the classes targets [B]. Rows that no index names are neither read nor written, and a step whose
    norm is not finite writes nothing.
    """
    require_tensors(values=values, indices=indices, targets=targets)
    require_floating(values=values)
    require_shape("values", values, "C", "K", "V")
    require(values.is_contiguous(), f"expected contiguous values, got strides {values.stride()}")
    require_apart({"values": values}, indices=indices, targets=targets)
    C, K, V = values.shape
    require_codes(indices, C, K)
    B, S, _ = indices.shape
    require(
        targets.shape == (B,) and targets.dtype == torch.int64,
        f"expected targets torch.int64 {(B,)}, got {targets.dtype} {tuple(targets.shape)}",
    )
    logits = gather(values, indices, "mean", "bscv").to(accumulator(values.dtype)).mean(1)
    loss, grad = cross_entropy(logits, targets, label_smoothing)
    rows, grads, count = gather_backward_rows((grad / S)[:, None].expand(B, S, V), indices, K, "mean")
    return loss, clipped_step_(values, rows, grads, count, lr, max_norm), logits


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean loss [] of logits [B, V] with the classes targets [B], and its gradient [B, V]."""
    B, V = logits.shape
    require_classes(targets, V)
    shares = logits.log_softmax(-1)
    fit = torch.full_like(shares, label_smoothing / max(1, V))
    fit.scatter_add_(1, targets[:, None], fit.new_full((B, 1), 1 - label_smoothing))
    return -(fit * shares).sum(-1).mean(), (shares.exp() - fit) / B


def clipped_step_(
    values: Tensor,
    rows: Tensor,
    grads: Tensor,
    count: Tensor,
    lr: float,
    max_norm: float,
    norm: Tensor | None = None,
) -> Tensor:
    """Move rows of values [C, K, V], in place, by merged gradients; their norm [].

    Args:
        rows, grads, count: of ``gather_backward_rows``.
        norm: of all gradients, where these are a part of them.
    """
    C, K, V = values.shape
    exact = grads.dtype
    norm = grads.to(widest(grads.device)).square().sum().sqrt() if norm is None else norm
    step = lr * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # The tail names no row: let it repeat the last one, which then is written several times with the same numbers.
    last = torch.arange(len(rows), device=rows.device).clamp(max=(count - 1).clamp(min=0))
    rows, grads = rows[last], grads[last]
    table = values.view(C * K, V)
    before = table.index_select(0, rows)
    moved = (before.to(exact) - step.to(exact) * grads).to(values.dtype)
    table.index_copy_(0, rows, torch.where(norm.isfinite(), moved, before))
    return norm.to(exact)
