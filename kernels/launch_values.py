"""Launches the kernels of ``gather`` and its gradients: allocation, grids, block sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb.kernels import scatter
from kvb.kernels import values as table
from kvb.kernels.device import ceil_div, power_of_two, require
from kvb.kernels.launch_shared import (
    CHECKED,
    FLAT,
    Block,
    Source,
    accumulator,
    find_rows,
    index_arguments,
    require_codes,
    require_rows,
    tile_of,
)
from kvb.kernels.launcher import MOST_REGISTERS, Options, run

_GATHER = Block(2048, 256)  # 16 elements per thread: four 128-bit loads in flight
_POOLED = Block(1024, 64)  # 8 sums per thread, and the loads of _POOLED_BOOKS codebooks in flight for each
_POOLED_BOOKS = 4
_ATOMICS = Block(2048, 128)

_PRODUCT_KEYS = 256  # codebooks up to here are summed by one-hot products
_PRODUCT_COLUMNS = 64
_PRODUCT_TILE = 8192  # sums of a program: 32 KiB of shared memory when they are stored
_PRODUCT_ROWS = {16: 64, 32: 64, 64: 16}  # rows of one product, by its columns: more would spill registers
_PRODUCT_PROGRAMS = 1024  # the batch is cut into slices until there are so many; no device decides, so no result varies

_RUN = 32, 64  # positions of a chunk, columns of one product
_RUN_ALONE = 16, 16  # the same without matrix units: 4096 products in registers
_JOIN = 32  # chunks that a run is completed by at a time
_PLAIN = Options()
_WARP = Options(warps=1)


def _require_pool(pool: str) -> None:
    require(pool in ("none", "mean", "sum"), lambda: f"expected pool 'none', 'mean' or 'sum', got {pool!r}")


# --- values -----------------------------------------------------------------------------------------------------------


def gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    """values [C, K, V] at indices [B, S, C]: [B, S, C, V] ("bscv") or [B, C, S, V] ("bcsv"), or pooled [B, S, V]."""
    _require_pool(pool)
    require(layout in ("bscv", "bcsv", "bv"), lambda: f"expected layout 'bscv', 'bcsv' or 'bv', got {layout!r}")
    together = layout == "bv"
    require(not together or pool != "none", lambda: f"expected pool 'mean' or 'sum' for the layout 'bv', got {pool!r}")
    require_rows(values, "values", "C, K, V", -1, -1, -1)
    C, K, V = values.shape
    require_codes(indices, C, K, values)
    (B, S, _), values = indices.shape, values.contiguous()
    if together:
        sums = _gather_pooled(values, indices, 1, accumulator(values)).sum(1)
        return (sums / (S * C) if pool == "mean" else sums).to(values.dtype)
    if pool != "none":
        return _gather_pooled(values, indices, C if pool == "mean" else 1, values.dtype)
    out = values.new_empty((B, S, C, V) if layout == "bscv" else (B, C, S, V))
    if out.numel():
        rows, columns = tile_of(_GATHER, V)
        run(
            table.gather_each,
            (ceil_div(out.numel() // V, rows), ceil_div(V, columns)),
            CHECKED,
            values=values,
            **index_arguments(indices),
            out=out,
            count=out.numel() // V,
            K=K,
            V=V,
            TRANSPOSED=layout == "bcsv",
            BLOCK_R=rows,
            BLOCK_V=columns,
        )
    return out


def _gather_pooled(values: Tensor, indices: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    (C, K, V), (B, S, _) = values.shape, indices.shape
    out = values.new_empty((B, S, V), dtype=dtype) if C else values.new_zeros((B, S, V), dtype=dtype)
    if out.numel() and C:
        rows, columns = tile_of(_POOLED, V)
        run(
            table.gather_pooled,
            (ceil_div(B * S, rows), ceil_div(V, columns)),
            # Two sums of float64 for each of float32: left to itself, the assembler spills.
            Options(asserts=True, registers=MOST_REGISTERS if values.dtype == torch.float64 else None),
            values=values,
            **index_arguments(indices),
            out=out,
            N=B * S,
            K=K,
            V=V,
            DIVISOR=divisor,
            BLOCK_N=rows,
            BLOCK_C=_POOLED_BOOKS,
            BLOCK_V=columns,
        )
    return out


# --- sums -------------------------------------------------------------------------------------------------------------


def gather_backward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
    """The gradient of ``gather`` for its table, dense [C, K, V]; grad is [B, S, C, V], pooled [B, S, V]."""
    return _sum_rows(_gradients(grad, indices, K, pool), grad.dtype)


def gather_backward_rows(grad: Tensor, indices: Tensor, K: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradient as merged rows: ascending rows of [C*K] (tail -1), their gradients, and how many there are.

    Their last bits are those of the dense gradient where that is summed by runs, too: with deterministic algorithms and
    more than _PRODUCT_KEYS pairs. Other ways add in another order.
    """
    source = _gradients(grad, indices, K, pool)
    size = min(source.count, indices.shape[2] * K)
    rows = torch.full((size,), -1, dtype=torch.int64, device=grad.device)
    grads = grad.new_zeros((size, source.width))
    if size == 0:
        return rows, grads, rows.new_zeros((1,))
    ordered, order = _sort(source)
    ends = _find_runs(source, ordered)
    _sum_runs(source, ordered, order, ends, grads, rows)
    return rows, grads, ends[-1:].clone()


def _gradients(grad: Tensor, indices: Tensor, K: int, pool: str) -> Source:
    _require_pool(pool)
    require(indices.dim() == 3, lambda: f"expected indices [B, S, C], got {tuple(indices.shape)}")
    B, S, C = indices.shape
    if pool == "none":
        require_rows(grad, "grad", f"{B}, {S}, {C}, V", B, S, C, -1)
        require_codes(indices, C, K, grad)
        return Source(grad, indices, K)
    require_rows(grad, "grad", f"{B}, {S}, V", B, S, -1)
    require_codes(indices, C, K, grad)
    return Source(grad[:, :, None].expand(-1, -1, C, -1), indices, K, C if pool == "mean" else 1)


def _sum_rows(source: Source, dtype: torch.dtype) -> Tensor:
    """[C, K, V] of ``dtype``: the sums of all rows."""
    x, K = source.x, source.K
    if x.numel() == 0 or K == 0:
        return x.new_zeros(source.table, dtype=dtype)
    if K <= _PRODUCT_KEYS and source.matrix != "none":
        return _sum_by_product(source, dtype)
    if not torch.are_deterministic_algorithms_enabled():
        return _sum_by_atomics(source).to(dtype)
    out = x.new_zeros(source.table, dtype=dtype)
    ordered, order = _sort(source)
    _sum_runs(source, ordered, order, None, out, None)
    return out


def _sum_by_product(source: Source, dtype: torch.dtype) -> Tensor:
    (C, K, V), N = source.table, source.x.shape[0] * source.x.shape[1]
    columns = max(16, min(_PRODUCT_COLUMNS, power_of_two(V)))
    keys = max(16, min(_PRODUCT_TILE // columns, power_of_two(K)))
    tiles, programs = ceil_div(N, _PRODUCT_ROWS[columns]), C * ceil_div(K, keys) * ceil_div(V, columns)
    steps = ceil_div(tiles, max(1, _PRODUCT_PROGRAMS // programs))
    slices = ceil_div(tiles, steps)
    parts = source.x.new_empty((slices, C, K, V), dtype=dtype if slices == 1 else torch.float32)
    run(
        scatter.check_pairs,
        (ceil_div(source.count, FLAT),),
        CHECKED,
        **source.where,
        count=source.count,
        K=K,
        BLOCK=FLAT,
    )
    run(
        scatter.add_by_product,
        (programs, slices),
        Options(warps=8 if keys * columns >= _PRODUCT_TILE // 2 else 4),
        **source.rows,
        **source.where,
        out=parts,
        N=N,
        steps=steps,
        K=K,
        DIVISOR=source.divisor,
        MATRIX=source.matrix,
        BLOCK_N=_PRODUCT_ROWS[columns],
        BLOCK_K=keys,
        BLOCK_V=columns,
    )
    if slices == 1:
        return parts[0]
    out = torch.empty_like(parts[0], dtype=dtype)
    run(
        scatter.add_slices,
        (ceil_div(out.numel(), FLAT),),
        _PLAIN,
        parts=parts,
        out=out,
        slices=slices,
        SIZE=out.numel(),
        BLOCK=FLAT,
    )
    return out


def _sum_by_atomics(source: Source) -> Tensor:
    out = source.x.new_zeros(source.table, dtype=accumulator(source.x))
    rows, columns = tile_of(_ATOMICS, source.width)
    run(
        scatter.add_by_atomics,
        (ceil_div(source.count, rows), ceil_div(source.width, columns)),
        CHECKED,
        **source.rows,
        **source.where,
        table=out,
        count=source.count,
        K=source.K,
        DIVISOR=source.divisor,
        BLOCK_R=rows,
        BLOCK_V=columns,
    )
    return out


def _sort(source: Source) -> tuple[Tensor, Tensor]:
    """The table rows of all positions, ascending, and those positions; equal rows stay in the order of the batch."""
    rows = source.no_rows()
    find_rows(source, rows, None, None)
    ordered, order = rows.sort(stable=True)
    return ordered, order


def _chunk(source: Source) -> tuple[int, int]:
    """Positions of a chunk and columns of a tile for ``add_runs``."""
    return _RUN_ALONE if source.matrix == "none" else _RUN


def _find_runs(source: Source, ordered: Tensor) -> Tensor:
    """How many runs of equal rows begin up to the end of every chunk."""
    chunk, _ = _chunk(source)
    chunks = ceil_div(source.count, chunk)
    starts = torch.empty(chunks, dtype=torch.int64, device=ordered.device)
    run(
        scatter.find_runs,
        (chunks,),
        _WARP,
        ordered=ordered,
        starts=starts,
        count=source.count,
        END=source.end,
        BLOCK=chunk,
    )
    return starts.cumsum(0)


def _sum_runs(
    source: Source, ordered: Tensor, order: Tensor, ends: Tensor | None, out: Tensor, rows: Tensor | None
) -> None:
    """Every run's sum into its row of ``out``: all table rows, or with ``ends`` and ``rows`` the touched ones."""
    V, count = source.width, source.count
    chunk, columns = _chunk(source)
    columns = max(16, min(columns, power_of_two(V)))
    chunks = ceil_div(count, chunk)
    edges = out.new_empty((chunks, 2, V), dtype=accumulator(source.x))
    grid = (chunks, ceil_div(V, columns))
    shared: dict[str, Any] = {
        "ordered": ordered,
        "ends": ends,
        "out": out,
        "edges": edges,
        "count": count,
        "V": V,
        "END": source.end,
        "DIVISOR": source.divisor,
        "BLOCK": chunk,
        "BLOCK_V": columns,
    }
    run(
        scatter.add_runs,
        grid,
        _PLAIN,
        **source.rows | shared,
        order=order,
        rows=rows,
        S=source.x.shape[1],
        C=source.indices.shape[2],
        MATRIX=source.matrix,
    )
    run(scatter.join_runs, grid, _WARP, **shared, BLOCK_J=_JOIN)
