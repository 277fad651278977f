"""Launches the kernels of ``gather``, its gradients, ``accumulate`` and ``count``: allocation, grids, block sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb.kernels import scatter
from kvb.kernels import values as table
from kvb.kernels.device import ceil_div, matrix_units, power_of_two, require, run

# --- block sizes ------------------------------------------------------------------------------------------------------
# A tile is ROWS x COLUMNS elements; its columns are the row's length rounded up to a power of two, COLUMNS at most.


class _Block(NamedTuple):
    elements: int  # of one tile: its rows are what the columns leave, _MOST_ROWS at most
    columns: int
    warps: int


_MOST_ROWS = 256  # two a thread: each has its indices, divisions and pointers
_GATHER = _Block(2048, 256, 4)  # 16 elements a thread: four 128-bit loads in flight
_POOLED = _Block(1024, 64, 4)  # 8 sums a thread, and the loads of _POOLED_BOOKS codebooks in flight for each
_POOLED_BOOKS = 4
_ATOMICS = _Block(2048, 128, 4)
_COUNT = _Block(2048, 128, 4)

_PRODUCT_KEYS = 256  # codebooks up to here are summed by one-hot products
_PRODUCT_COLUMNS = 64
_PRODUCT_TILE = 8192  # sums of a program: 32 KiB of shared memory when they are stored
_PRODUCT_ROWS = {16: 64, 32: 64, 64: 16}  # rows of one product, by its columns: more would spill registers
_PRODUCT_PROGRAMS = 1024  # the batch is cut into slices until there are so many; no device decides, so no result varies

_RUN = 32, 64  # positions of a chunk, columns of one product
_RUN_ALONE = 16, 16  # the same without matrix units
_JOIN = 32  # chunks that a run is completed by at a time
_FLAT = 1024  # elements of a one-dimensional tile


def _tile(block: _Block, length: int) -> tuple[int, int]:
    """Rows and columns of a tile over rows of ``length`` elements."""
    columns = min(block.columns, power_of_two(length))
    return min(_MOST_ROWS, block.elements // columns), columns


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _require_rows(tensor: Tensor, name: str, letters: str, *sizes: int) -> None:
    """``tensor`` is floating-point, of the rank that ``letters`` have, and of ``sizes`` where they are not -1."""
    require(tensor.is_floating_point(), f"expected {name} float16, bfloat16, float32 or float64, got {tensor.dtype}")
    fits = tensor.dim() == len(sizes) and all(want in (-1, got) for want, got in zip(sizes, tensor.shape, strict=False))
    require(fits, f"expected {name} [{letters}], got {tuple(tensor.shape)}")


def _require_codes(indices: Tensor, C: int, K: int, beside: Tensor) -> None:
    """Indices [B, S, C] of any integer dtype; their range is for the kernels to assert."""
    require(indices.dim() == 3 and indices.shape[2] == C, f"expected indices [B, S, {C}], got {tuple(indices.shape)}")
    require(
        not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool),
        f"expected integer indices, got {indices.dtype}",
    )
    require(indices.device == beside.device, f"expected indices on {beside.device} like the rest, got {indices.device}")
    require(K > 0 or indices.numel() == 0, f"expected K of at least 1, got {K}")


def _require_pool(pool: str) -> None:
    require(pool in ("none", "mean", "sum"), f"expected pool 'none', 'mean' or 'sum', got {pool!r}")


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run with assertions about indices, which no build of Triton leaves in unasked."""
    run(kernel, grid, *arguments, **constants, debug=True, sanitize_overflow=False)


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
    def run_block(self) -> tuple[int, int]:
        """Positions of a chunk and columns of a tile for ``add_runs``."""
        return _RUN_ALONE if self.matrix == "none" else _RUN

    @property
    def strides(self) -> tuple[int, ...]:
        """Of x; an axis of one element gets 0, so that it spoils no alignment."""
        *rows, column = zip(self.x.shape, self.x.stride(), strict=True)
        return (*(0 if size == 1 else stride for size, stride in rows), column[1])

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "C": self.indices.shape[2],
            "V": self.width,
            "ALIGN": math.gcd(16, *self.strides[:3]),
            "UNIT": self.width == 1 or self.strides[3] == 1,
        }


# --- values -----------------------------------------------------------------------------------------------------------


def gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    """values [C, K, V] at indices [B, S, C]: [B, S, C, V] ("bscv") or [B, C, S, V] ("bcsv"), or pooled [B, S, V]."""
    _require_pool(pool)
    require(layout in ("bscv", "bcsv"), f"expected layout 'bscv' or 'bcsv', got {layout!r}")
    _require_rows(values, "values", "C, K, V", -1, -1, -1)
    C, K, V = values.shape
    _require_codes(indices, C, K, values)
    (B, S, _), values = indices.shape, values.contiguous()
    if pool != "none":
        return _gather_pooled(values, indices, C if pool == "mean" else 1)
    out = values.new_empty((B, S, C, V) if layout == "bscv" else (B, C, S, V))
    if out.numel():
        rows, columns = _tile(_GATHER, V)
        _launch(
            table.gather_each,
            (ceil_div(B * S * C, rows), ceil_div(V, columns)),
            *(values, indices, out, B * S * C, S, *indices.stride()),
            **{"C": C, "K": K, "V": V, "TRANSPOSED": layout == "bcsv"},
            **{"BLOCK_R": rows, "BLOCK_V": columns, "num_warps": _GATHER.warps},
        )
    return out


def _gather_pooled(values: Tensor, indices: Tensor, divisor: int) -> Tensor:
    (C, K, V), (B, S, _) = values.shape, indices.shape
    out = values.new_empty((B, S, V)) if C else values.new_zeros((B, S, V))
    if out.numel() and C:
        rows, columns = _tile(_POOLED, V)
        _launch(
            table.gather_pooled,
            (ceil_div(B * S, rows), ceil_div(V, columns)),
            *(values, indices, out, B * S, S, *indices.stride()),
            **{"C": C, "K": K, "V": V, "DIVISOR": divisor},
            **{"BLOCK_N": rows, "BLOCK_C": _POOLED_BOOKS, "BLOCK_V": columns, "num_warps": _POOLED.warps},
            registers=255 if values.dtype == torch.float64 else None,
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
    require(indices.dim() == 3, f"expected indices [B, S, C], got {tuple(indices.shape)}")
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
        f"expected indices {tuple(queries.shape[:3])} for queries {tuple(queries.shape)}, got {tuple(indices.shape)}",
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
    _launch(
        scatter.check_pairs,
        (ceil_div(source.count, _FLAT),),
        *(source.indices, source.count, source.x.shape[1], *source.indices.stride()),
        **{"C": C, "K": K, "BLOCK": _FLAT, "num_warps": 4},
    )
    run(
        scatter.add_by_product,
        (programs, slices),
        *(source.x, source.indices, parts, hits, N, source.x.shape[1], steps),
        *(*source.strides, *source.indices.stride()),
        **source.constants,
        K=K,
        DIVISOR=source.divisor,
        MATRIX=source.matrix,
        **{"BLOCK_N": _PRODUCT_ROWS[columns], "BLOCK_K": keys, "BLOCK_V": columns},
        num_warps=8 if keys * columns >= _PRODUCT_TILE // 2 else 4,
    )
    if slices == 1:
        return parts[0]
    out = torch.empty_like(parts[0], dtype=dtype)
    grid = (ceil_div(out.numel(), _FLAT),)
    _launch(scatter.add_slices, grid, parts, out, slices, SIZE=out.numel(), BLOCK=_FLAT, num_warps=4)
    return out


def _sum_by_atomics(source: _Rows, hits: Tensor | None) -> Tensor:
    out = source.x.new_zeros(source.table, dtype=_sum_dtype(source.x))
    rows, columns = _tile(_ATOMICS, source.width)
    _launch(
        scatter.add_by_atomics,
        (ceil_div(source.count, rows), ceil_div(source.width, columns)),
        *(source.x, source.indices, out, hits, source.count, source.x.shape[1]),
        *(*source.strides, *source.indices.stride()),
        **source.constants,
        **{"K": source.K, "DIVISOR": source.divisor},
        **{"BLOCK_R": rows, "BLOCK_V": columns, "num_warps": _ATOMICS.warps},
    )
    return out


def _find_rows(source: _Rows, rows: Tensor | None, hits: Tensor | None) -> None:
    """The table row of every position, and the hits of the finite ones."""
    block, columns = _tile(_COUNT, source.width)
    if source.count:
        _launch(
            scatter.table_rows,
            (ceil_div(source.count, block),),
            *(source.x, source.indices, rows, hits, source.count, source.x.shape[1]),
            *(*source.strides, *source.indices.stride()),
            **source.constants,
            **{"K": source.K, "BLOCK_R": block, "BLOCK_V": columns, "num_warps": _COUNT.warps},
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
    chunk, _ = source.run_block
    chunks, end = ceil_div(source.count, chunk), source.indices.shape[2] * source.K
    starts = torch.empty(chunks, dtype=torch.int64, device=ordered.device)
    _launch(scatter.find_runs, (chunks,), ordered, starts, source.count, END=end, BLOCK=chunk, num_warps=1)
    return starts.cumsum(0)


def _sum_runs(
    source: _Rows, ordered: Tensor, order: Tensor, ends: Tensor | None, out: Tensor, rows: Tensor | None
) -> None:
    """Every run's sum into its row of ``out``: all table rows, or with ``ends`` and ``rows`` the touched ones."""
    V, count = source.width, source.count
    chunk, columns = source.run_block
    columns = max(16, min(columns, power_of_two(V)))
    chunks = ceil_div(count, chunk)
    edges = out.new_empty((chunks, 2, V), dtype=_sum_dtype(source.x))
    grid = (chunks, ceil_div(V, columns))
    shared = {"END": source.indices.shape[2] * source.K, "DIVISOR": source.divisor, "BLOCK": chunk}
    _launch(
        scatter.add_runs,
        grid,
        *(source.x, order, ordered, ends, out, rows, edges, count, source.x.shape[1], *source.strides),
        **source.constants,
        **shared,
        MATRIX=source.matrix,
        **{"BLOCK_V": columns, "num_warps": 4},
    )
    _launch(
        scatter.join_runs,
        grid,
        *(ordered, ends, out, edges, count),
        **shared,
        **{"V": V, "BLOCK_J": _JOIN, "BLOCK_V": columns, "num_warps": 1},
    )
