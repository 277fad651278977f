"""Launches the kernels of ``gather``, its gradients, ``accumulate`` and ``count``: allocation, grids, block sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb.kernels import scatter
from kvb.kernels import values as table
from kvb.kernels.device import ceil_div, matrix_units, power_of_two, require
from kvb.kernels.launcher import Options, run

# --- block sizes ------------------------------------------------------------------------------------------------------
# A tile is ROWS x COLUMNS elements; its columns are the row's length rounded up to a power of two, COLUMNS at most.


class _Block(NamedTuple):
    elements: int  # of one tile: its rows are what the columns leave, _MOST_ROWS at most
    columns: int


_MOST_ROWS = 256  # two a thread: each has its indices, divisions and pointers
_GATHER = _Block(2048, 256)  # 16 elements a thread: four 128-bit loads in flight
_POOLED = _Block(1024, 64)  # 8 sums a thread, and the loads of _POOLED_BOOKS codebooks in flight for each
_POOLED_BOOKS = 4
_ATOMICS = _Block(2048, 128)
_COUNT = _Block(2048, 128)

_PRODUCT_KEYS = 256  # codebooks up to here are summed by one-hot products
_PRODUCT_COLUMNS = 64
_PRODUCT_TILE = 8192  # sums of a program: 32 KiB of shared memory when they are stored
_PRODUCT_ROWS = {16: 64, 32: 64, 64: 16}  # rows of one product, by its columns: more would spill registers
_PRODUCT_PROGRAMS = 1024  # the batch is cut into slices until there are so many; no device decides, so no result varies

_RUN = 32, 64  # positions of a chunk, columns of one product
_RUN_ALONE = 16, 16  # the same without matrix units
_JOIN = 32  # chunks that a run is completed by at a time
_FLAT = 1024  # elements of a one-dimensional tile
_CHECKED = Options(asserts=True)
_PLAIN = Options()
_WARP = Options(warps=1)


def _tile(block: _Block, length: int) -> tuple[int, int]:
    """Rows and columns of a tile over rows of ``length`` elements."""
    columns = min(block.columns, power_of_two(length))
    return min(_MOST_ROWS, block.elements // columns), columns


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _require_rows(tensor: Tensor, name: str, letters: str, *sizes: int) -> None:
    """``tensor`` is floating-point, of the rank that ``letters`` have, and of ``sizes`` where they are not -1."""
    require(
        tensor.is_floating_point(),
        lambda: f"expected {name} float16, bfloat16, float32 or float64, got {tensor.dtype}",
    )
    fits = tensor.dim() == len(sizes) and all(want in (-1, got) for want, got in zip(sizes, tensor.shape, strict=False))
    require(fits, lambda: f"expected {name} [{letters}], got {tuple(tensor.shape)}")


def _require_codes(indices: Tensor, C: int, K: int, like: Tensor) -> None:
    """Indices [B, S, C] of any integer dtype; their range is for the kernels to assert."""
    require(
        indices.dim() == 3 and indices.shape[2] == C,
        lambda: f"expected indices [B, S, {C}], got {tuple(indices.shape)}",
    )
    require(
        not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool),
        lambda: f"expected integer indices, got {indices.dtype}",
    )
    require(
        indices.device == like.device,
        lambda: f"expected indices on {like.device} like the rest, got {indices.device}",
    )
    require(K > 0 or indices.numel() == 0, lambda: f"expected K of at least 1, got {K}")


def _require_pool(pool: str) -> None:
    require(pool in ("none", "mean", "sum"), lambda: f"expected pool 'none', 'mean' or 'sum', got {pool!r}")


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is added to a table: rows x [B, S, C, V] under indices [B, S, C], in whatever memory they lie."""

    x: Tensor
    indices: Tensor
    K: int
    divisor: int = 1

    @property
    def count(self) -> int:
        return self.indices.numel()

    @property
    def width(self) -> int:
        return self.x.shape[3]

    @property
    def table(self) -> tuple[int, int, int]:
        return self.indices.shape[2], self.K, self.width

    @property
    def matrix(self) -> str:
        """Who multiplies, as ``matrix_units`` says; nobody multiplies float64, as not every GPU could."""
        return "none" if self.x.dtype == torch.float64 else matrix_units(self.x.device)

    @property
    def chunk(self) -> tuple[int, int]:
        """Positions of a chunk and columns of a tile for ``add_runs``."""
        return _RUN_ALONE if self.matrix == "none" else _RUN

    @property
    def where(self) -> dict[str, Any]:
        """The indices, with their strides."""
        b, s, c = self.indices.stride()
        return {"indices": self.indices, "i_b": b, "i_s": s, "i_c": c, "S": self.x.shape[1], "C": self.indices.shape[2]}

    @property
    def rows(self) -> dict[str, Any]:
        """x, with its strides and what is known of them; an axis of one element gets 0, so that it spoils no alignment.

        ALIGN divides all strides but the last; UNIT where that is 1.
        """
        b, s, c = (0 if size == 1 else step for size, step in zip(self.x.shape[:3], self.x.stride(), strict=False))
        v = self.x.stride(3)
        return {
            "x": self.x,
            "x_b": b,
            "x_s": s,
            "x_c": c,
            "x_v": v,
            "V": self.width,
            "ALIGN": math.gcd(16, b, s, c),
            "UNIT": self.width == 1 or v == 1,
        }


# --- values -----------------------------------------------------------------------------------------------------------


def gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    """values [C, K, V] at indices [B, S, C]: [B, S, C, V] ("bscv") or [B, C, S, V] ("bcsv"), or pooled [B, S, V]."""
    _require_pool(pool)
    require(layout in ("bscv", "bcsv"), lambda: f"expected layout 'bscv' or 'bcsv', got {layout!r}")
    _require_rows(values, "values", "C, K, V", -1, -1, -1)
    C, K, V = values.shape
    _require_codes(indices, C, K, values)
    (B, S, _), values = indices.shape, values.contiguous()
    if pool != "none":
        return _gather_pooled(values, indices, C if pool == "mean" else 1)
    out = values.new_empty((B, S, C, V) if layout == "bscv" else (B, C, S, V))
    if out.numel():
        rows, columns = _tile(_GATHER, V)
        b, s, c = indices.stride()
        run(
            table.gather_each,
            (ceil_div(B * S * C, rows), ceil_div(V, columns)),
            _CHECKED,
            values=values,
            indices=indices,
            out=out,
            count=B * S * C,
            S=S,
            i_b=b,
            i_s=s,
            i_c=c,
            C=C,
            K=K,
            V=V,
            TRANSPOSED=layout == "bcsv",
            BLOCK_R=rows,
            BLOCK_V=columns,
        )
    return out


def _gather_pooled(values: Tensor, indices: Tensor, divisor: int) -> Tensor:
    (C, K, V), (B, S, _) = values.shape, indices.shape
    out = values.new_empty((B, S, V)) if C else values.new_zeros((B, S, V))
    if out.numel() and C:
        rows, columns = _tile(_POOLED, V)
        b, s, c = indices.stride()
        run(
            table.gather_pooled,
            (ceil_div(B * S, rows), ceil_div(V, columns)),
            # Two sums of float64 for each of float32: left to itself, the assembler spills.
            Options(asserts=True, registers=255 if values.dtype == torch.float64 else None),
            values=values,
            indices=indices,
            out=out,
            N=B * S,
            S=S,
            i_b=b,
            i_s=s,
            i_c=c,
            C=C,
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
    return _sum_rows(_gradients(grad, indices, K, pool), grad.dtype, None)


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
    ordered, order = _sort(source, None)
    ends = _find_runs(source, ordered)
    _sum_runs(source, ordered, order, ends, grads, rows)
    return rows, grads, ends[-1:].clone()


def accumulate(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Hits int64 [C, K] and sums [C, K, D] of the finite queries assigned to every pair by indices [B, S, C]."""
    source = _queries(queries, indices, K)
    hits = torch.zeros(source.table[:2], dtype=torch.int64, device=queries.device)
    return hits, _sum_rows(source, _sum_dtype(queries), hits)


def count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    """Hits int64 [C, K] of the finite queries assigned to every pair by indices [B, S, C]."""
    source = _queries(queries, indices, K)
    hits = torch.zeros(source.table[:2], dtype=torch.int64, device=queries.device)
    _find_rows(source, None, hits)
    return hits


def _gradients(grad: Tensor, indices: Tensor, K: int, pool: str) -> _Rows:
    _require_pool(pool)
    require(indices.dim() == 3, lambda: f"expected indices [B, S, C], got {tuple(indices.shape)}")
    B, S, C = indices.shape
    if pool == "none":
        _require_rows(grad, "grad", f"{B}, {S}, {C}, V", B, S, C, -1)
        _require_codes(indices, C, K, grad)
        return _Rows(grad, indices, K)
    _require_rows(grad, "grad", f"{B}, {S}, V", B, S, -1)
    _require_codes(indices, C, K, grad)
    return _Rows(grad[:, :, None].expand(-1, -1, C, -1), indices, K, C if pool == "mean" else 1)


def _queries(queries: Tensor, indices: Tensor, K: int) -> _Rows:
    _require_rows(queries, "queries", "B, S, C, D", -1, -1, -1, -1)
    _require_codes(indices, queries.shape[2], K, queries)
    require(
        indices.shape == queries.shape[:3],
        lambda: (
            f"expected indices {tuple(queries.shape[:3])} for queries {tuple(queries.shape)}, "
            f"got {tuple(indices.shape)}"
        ),
    )
    return _Rows(queries, indices, K)


def _sum_rows(source: _Rows, dtype: torch.dtype, hits: Tensor | None) -> Tensor:
    """[C, K, V] of ``dtype``: the sums of all rows. Given ``hits``, count the finite rows and sum only them."""
    x, K = source.x, source.K
    if x.numel() == 0 or K == 0:
        return x.new_zeros(source.table, dtype=dtype)
    if K <= _PRODUCT_KEYS and source.matrix != "none":
        return _sum_by_product(source, dtype, hits)
    if not torch.are_deterministic_algorithms_enabled():
        return _sum_by_atomics(source, hits).to(dtype)
    out = x.new_zeros(source.table, dtype=dtype)
    ordered, order = _sort(source, hits)
    _sum_runs(source, ordered, order, None, out, None)
    return out


def _sum_by_product(source: _Rows, dtype: torch.dtype, hits: Tensor | None) -> Tensor:
    (C, K, V), N = source.table, source.x.shape[0] * source.x.shape[1]
    columns = max(16, min(_PRODUCT_COLUMNS, power_of_two(V)))
    keys = max(16, min(_PRODUCT_TILE // columns, power_of_two(K)))
    tiles, programs = ceil_div(N, _PRODUCT_ROWS[columns]), C * ceil_div(K, keys) * ceil_div(V, columns)
    steps = ceil_div(tiles, max(1, _PRODUCT_PROGRAMS // programs))
    slices = ceil_div(tiles, steps)
    parts = source.x.new_empty((slices, C, K, V), dtype=dtype if slices == 1 else torch.float32)
    run(
        scatter.check_pairs,
        (ceil_div(source.count, _FLAT),),
        _CHECKED,
        **source.where,
        count=source.count,
        K=K,
        BLOCK=_FLAT,
    )
    run(
        scatter.add_by_product,
        (programs, slices),
        Options(warps=8 if keys * columns >= _PRODUCT_TILE // 2 else 4),
        **source.rows,
        **source.where,
        out=parts,
        hits=hits,
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
        (ceil_div(out.numel(), _FLAT),),
        _PLAIN,
        parts=parts,
        out=out,
        slices=slices,
        SIZE=out.numel(),
        BLOCK=_FLAT,
    )
    return out


def _sum_by_atomics(source: _Rows, hits: Tensor | None) -> Tensor:
    out = source.x.new_zeros(source.table, dtype=_sum_dtype(source.x))
    rows, columns = _tile(_ATOMICS, source.width)
    run(
        scatter.add_by_atomics,
        (ceil_div(source.count, rows), ceil_div(source.width, columns)),
        _CHECKED,
        **source.rows,
        **source.where,
        table=out,
        hits=hits,
        count=source.count,
        K=source.K,
        DIVISOR=source.divisor,
        BLOCK_R=rows,
        BLOCK_V=columns,
    )
    return out


def _find_rows(source: _Rows, rows: Tensor | None, hits: Tensor | None) -> None:
    """The table row of every position, and the hits of the finite ones."""
    block, columns = _tile(_COUNT, source.width)
    if source.count:
        run(
            scatter.table_rows,
            (ceil_div(source.count, block),),
            _CHECKED,
            **source.rows,
            **source.where,
            rows=rows,
            hits=hits,
            count=source.count,
            K=source.K,
            BLOCK_R=block,
            BLOCK_V=columns,
        )


def _sort(source: _Rows, hits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The table rows of all positions, ascending, and those positions; equal rows stay in the order of the batch."""
    end = source.indices.shape[2] * source.K
    dtype = torch.int32 if end < 1 << 31 else torch.int64
    rows = torch.empty(source.count, dtype=dtype, device=source.x.device)
    _find_rows(source, rows, hits)
    ordered, order = rows.sort(stable=True)
    return ordered, order


def _find_runs(source: _Rows, ordered: Tensor) -> Tensor:
    """How many runs of equal rows begin up to the end of every chunk."""
    chunk, _ = source.chunk
    chunks, end = ceil_div(source.count, chunk), source.indices.shape[2] * source.K
    starts = torch.empty(chunks, dtype=torch.int64, device=ordered.device)
    run(scatter.find_runs, (chunks,), _WARP, ordered=ordered, starts=starts, count=source.count, END=end, BLOCK=chunk)
    return starts.cumsum(0)


def _sum_runs(
    source: _Rows, ordered: Tensor, order: Tensor, ends: Tensor | None, out: Tensor, rows: Tensor | None
) -> None:
    """Every run's sum into its row of ``out``: all table rows, or with ``ends`` and ``rows`` the touched ones."""
    V, count = source.width, source.count
    chunk, columns = source.chunk
    columns = max(16, min(columns, power_of_two(V)))
    chunks = ceil_div(count, chunk)
    edges = out.new_empty((chunks, 2, V), dtype=_sum_dtype(source.x))
    grid = (chunks, ceil_div(V, columns))
    shared: dict[str, Any] = {
        "ordered": ordered,
        "ends": ends,
        "out": out,
        "edges": edges,
        "count": count,
        "V": V,
        "END": source.indices.shape[2] * source.K,
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
