"""Adding rows to tables: the kernels of ``gather_backward``, ``gather_backward_rows`` and ``count``.

They add the rows of x [B, S, C, V] to the rows of a table [C, K, V] that indices [B, S, C] name; x is a gradient (a
pooled one has stride 0 over the codebooks); sums of queries, which must not lose a bit, are in statistics.py. There are
three ways:

* ``check_pairs`` and ``add_by_product``, for small K: a one-hot matrix product for every codebook and slice of the
  batch, then ``add_slices``. Every sum has a fixed order.
* ``add_by_atomics``: float atomics, whose order is not fixed.
* ``find_runs`` and ``add_runs``, then ``join_runs``: the positions stand sorted by table row, in chunks of fixed size.
  Every sum has a fixed order, and the touched rows come out in ascending order: ``move_rows`` takes them and moves
  the rows of a table by them.

The strides of x and of the indices, and all sizes that depend on the batch, are plain arguments that are never
specialised; ALIGN says which power of two divides every stride of x but the last, and UNIT that the last is 1: with
them loads are 128 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvb.kernels.named import kernel
from kvb.kernels.scores import finite
from kvb.kernels.values import INTERPRETED, average, pair_indices, require_pairs, store_sums

# What the parts of a product are stored as; the interpreter would multiply the bits of a bfloat16 as an integer.
PART = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def source_offsets(n, c, S, x_b, x_s, x_c, ALIGN: tl.constexpr):
    """Where the rows (n, c) of x begin, n = b * S + s."""
    return tl.multiple_of(n // S * x_b + n % S * x_s + c * x_c, ALIGN)


@triton.jit
def load_rows(x, offsets, inside, v, x_v, V: tl.constexpr, UNIT: tl.constexpr):
    """Rows of x at the columns v; zero where not ``inside``."""
    columns = v if UNIT else v * x_v
    return tl.load(x + offsets[:, None] + columns[None, :], mask=inside[:, None] & (v < V)[None, :], other=0)


@triton.jit
def _broken(rows):
    """How many elements of every row are not finite."""
    return tl.sum(tl.where(finite(rows), 0, 1), axis=1)


@triton.jit
def _finite_rows(x, offsets, inside, x_v, V: tl.constexpr, UNIT: tl.constexpr, BLOCK_V: tl.constexpr):
    """The rows ``inside`` whose V elements are all finite."""
    broken = tl.zeros(offsets.shape, tl.int32)
    for first in range(0, V, BLOCK_V):
        broken += _broken(load_rows(x, offsets, inside, first + tl.arange(0, BLOCK_V), x_v, V, UNIT))
    return inside & (broken == 0)


@triton.jit
def _magnitude(x):
    """The bits of |x| as an integer, which has the order of the numbers: of float64 there, else of float32."""
    if x.dtype == tl.float64:
        return tl.abs(x).to(tl.int64, bitcast=True)
    else:
        return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def _upper_half(x):
    """The float32 x cut, not rounded, to the 8 significant bits of a bfloat16: x minus this is exact."""
    bits = x.to(tl.int32, bitcast=True) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _product(hot, x, MATRIX: tl.constexpr):
    """``_sum_where`` as a matrix product with a factor of exact zeros and ones, summed in float32.

    float32 goes in as three bfloat16 parts that sum to it exactly, and so does float16 where matrix units flush small
    ones; of bfloat16 they only flush what is below 2^-126. 0 * Inf would spoil every sum, so what is not finite
    stays out of the product and is counted apart: a sum over a NaN, or over both infinities, is NaN.
    """
    SHAPE: tl.constexpr = x.shape
    HALF: tl.constexpr = x.dtype == tl.float16 and MATRIX == "full"
    PARTS: tl.constexpr = 1 if HALF or x.dtype == tl.bfloat16 else 3
    EXACT: tl.constexpr = tl.float16 if HALF else PART
    ones = tl.where(hot, 1.0, 0.0).to(EXACT)
    total = tl.zeros([hot.shape[0], x.shape[1]], tl.float32)
    # Flat while it is split: else every warp would do that work for all of x, in the product's layout.
    x = tl.reshape(x, [SHAPE[0] * SHAPE[1]]).to(tl.float32)
    whole = finite(x)
    if tl.max(tl.where(whole, 0, 1)) > 0:
        # A NaN counts as both infinities, and their sum is NaN.
        above = tl.reshape(tl.where(whole | (x < 0), 0.0, 1.0).to(EXACT), SHAPE)
        below = tl.reshape(tl.where(whole | (x > 0), 0.0, 1.0).to(EXACT), SHAPE)
        total += tl.where(tl.dot(ones, above, out_dtype=tl.float32) > 0, float("inf"), 0.0)
        total += tl.where(tl.dot(ones, below, out_dtype=tl.float32) > 0, float("-inf"), 0.0)
        x = tl.where(whole, x, 0.0)
    if PARTS == 3:
        upper = _upper_half(x)
        middle = _upper_half(x - upper)
        lower = x - upper - middle
        total = tl.dot(ones, tl.reshape(lower.to(EXACT), SHAPE), total, out_dtype=tl.float32)  # the smallest first
        total = tl.dot(ones, tl.reshape(middle.to(EXACT), SHAPE), total, out_dtype=tl.float32)
        x = upper
    return tl.dot(ones, tl.reshape(x.to(EXACT), SHAPE), total, out_dtype=tl.float32)


@triton.jit
def _sum_where(hot, x, MATRIX: tl.constexpr):
    """[J, V]: for every row of ``hot`` [J, N] the sum of those rows of x [N, V] that it marks."""
    if MATRIX == "none":
        x = x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)
        return tl.sum(tl.where(hot[:, :, None], x[None, :, :], 0.0), axis=1)
    else:
        return _product(hot, x, MATRIX)


# --- one-hot products -------------------------------------------------------------------------------------------------


@kernel("kvb_scatter_check", do_not_specialize=["count", "S", "i_b", "i_s", "i_c"])
def check_pairs(
    indices,  # [B, S, C] with the strides i_b, i_s, i_c
    count,  # B * S * C
    S,
    i_b,
    i_s,
    i_c,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Assert that every index is one of a pair.

    ``add_by_product`` cannot: where a kernel calls a function, its products on Hopper wait for one another.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, c = r // C, r % C
    _, usable = pair_indices(indices + n // S * i_b + n % S * i_s + c * i_c, r < count, K)
    require_pairs((r < count) & ~usable)


@kernel("kvb_scatter_product", do_not_specialize=["N", "S", "steps", "x_b", "x_s", "x_c", "x_v", "i_b", "i_s", "i_c"])
def add_by_product(
    x,  # [B, S, C, V] with the strides x_b, x_s, x_c, x_v
    indices,  # [B, S, C] with the strides i_b, i_s, i_c
    out,  # [slices, C, K, V]
    N,
    S,
    steps,  # tiles of BLOCK_N rows in a slice
    x_b,
    x_s,
    x_c,
    x_v,
    i_b,
    i_s,
    i_c,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DIVISOR: tl.constexpr,
    MATRIX: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The table of one slice of the batch: a program sums BLOCK_K x BLOCK_V of one codebook, tile after tile."""
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = BLOCKS_K * ((V + BLOCK_V - 1) // BLOCK_V)
    block = tl.program_id(0) % BLOCKS  # blocks of a codebook read the same rows, codebooks next to it the same lines
    c = (tl.program_id(0) // BLOCKS).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    k = block % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    v = block // BLOCKS_K * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for step in range(steps):
        n = (part * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        pointers = indices + n // S * i_b + n % S * i_s + c * i_c
        index, usable = pair_indices(pointers, n < N, K)
        offsets = source_offsets(n, c, S, x_b, x_s, x_c, ALIGN)
        rows = load_rows(x, offsets, n < N, v, x_v, V, UNIT)
        hot = (index.to(tl.int32)[None, :] == k[:, None]) & usable[None, :]
        total += _sum_where(hot, rows, MATRIX)  # apart from the product: tensor cores cut where they add, this rounds
    pointers = out + ((part * C + c) * K + k[:, None]) * V + v[None, :]
    store_sums(pointers, average(total, DIVISOR), (k < K)[:, None] & (v < V)[None, :])


@kernel("kvb_scatter_slices", do_not_specialize=["slices"])
def add_slices(
    parts,  # [slices, SIZE]
    out,  # [SIZE]
    slices,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of all parts, first to last."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(slices):
        total += tl.load(parts + tl.cast(part, tl.int64) * SIZE + i, mask=i < SIZE, other=0)
    store_sums(out + i, total, i < SIZE)


# --- float atomics ----------------------------------------------------------------------------------------------------


@kernel("kvb_scatter_atomics", do_not_specialize=["count", "S", "x_b", "x_s", "x_c", "x_v", "i_b", "i_s", "i_c"])
def add_by_atomics(
    x,  # [B, S, C, V] with the strides x_b, x_s, x_c, x_v
    indices,  # [B, S, C] with the strides i_b, i_s, i_c
    table,  # [C, K, V], zero
    count,  # B * S * C
    S,
    x_b,
    x_s,
    x_c,
    x_v,
    i_b,
    i_s,
    i_c,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DIVISOR: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add BLOCK_R rows of x, in the order of [B, S, C], to the table; contiguous columns become one wide atomic."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    n, c = r // C, r % C
    index, usable = pair_indices(indices + n // S * i_b + n % S * i_s + c * i_c, r < count, K)
    require_pairs((r < count) & ~usable)
    offsets = source_offsets(n, c, S, x_b, x_s, x_c, ALIGN)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = load_rows(x, offsets, r < count, v, x_v, V, UNIT)
    row = c * K + index
    rows = average(rows.to(table.dtype.element_ty), DIVISOR)
    pointers = table + (row * V)[:, None] + v[None, :]
    tl.atomic_add(pointers, rows, mask=usable[:, None] & (v < V)[None, :], sem="relaxed")


# --- sorted runs ------------------------------------------------------------------------------------------------------


@kernel("kvb_scatter_rows", do_not_specialize=["count", "S", "x_b", "x_s", "x_c", "x_v", "i_b", "i_s", "i_c"])
def table_rows(
    x,  # [B, S, C, V] with the strides x_b, x_s, x_c, x_v
    indices,  # [B, S, C] with the strides i_b, i_s, i_c
    rows,  # [B * S * C] or None
    hits,  # [C, K] int64, zero, or None
    peaks,  # [C, K, V] the bits of the largest magnitude of every column, zero, or None
    count,  # B * S * C
    S,
    x_b,
    x_s,
    x_c,
    x_v,
    i_b,
    i_s,
    i_c,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The table row c * K + index of every position; given ``hits``, C * K where x is not finite.

    Also the hits of every row of the table, and the ``peaks`` of what adds to it.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    n, c = r // C, r % C
    index, usable = pair_indices(indices + n // S * i_b + n % S * i_s + c * i_c, r < count, K)
    require_pairs((r < count) & ~usable)
    row = c * K + index
    if hits is not None:
        offsets = source_offsets(n, c, S, x_b, x_s, x_c, ALIGN)
        usable = _finite_rows(x, offsets, usable, x_v, V, UNIT, BLOCK_V)
        tl.atomic_add(hits + row, tl.full(row.shape, 1, tl.int64), mask=usable, sem="relaxed")
        if peaks is not None:
            for first in range(0, V, BLOCK_V):
                v = first + tl.arange(0, BLOCK_V)
                bits = _magnitude(load_rows(x, offsets, usable, v, x_v, V, UNIT))
                at = peaks + (row * V)[:, None] + v[None, :]
                inside = usable[:, None] & (v < V)[None, :]
                higher = inside & (bits > tl.load(at, mask=inside, other=0))  # most are not, and take no atomic
                tl.atomic_max(at, bits, mask=higher, sem="relaxed")
    if rows is not None:
        tl.store(rows + r, tl.where(usable, row, C * K), mask=r < count)


@triton.jit
def _row_at(ordered, i, count, END: tl.constexpr):
    """The sorted table row at position i; END on either side of all positions."""
    return tl.load(ordered + i, mask=(i >= 0) & (i < count), other=END)


@triton.jit
def _begins(here, before, END: tl.constexpr):
    """Where a run begins: another row than before, and not a skipped one."""
    return (here != END) & (here != before)


@kernel("kvb_scatter_find_runs", do_not_specialize=["count"])
def find_runs(
    ordered,  # [count] the table rows, sorted; END where skipped
    starts,  # [chunks]
    count,  # B * S * C
    END: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many runs of equal rows start in every chunk of BLOCK sorted positions; END marks skipped ones."""
    chunk = tl.program_id(0).to(tl.int64)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    begins = _begins(_row_at(ordered, i, count, END), _row_at(ordered, i - 1, count, END), END)
    tl.store(starts + chunk, tl.sum(begins.to(tl.int64)))


@kernel("kvb_scatter_add_runs", do_not_specialize=["count", "S", "x_b", "x_s", "x_c", "x_v"])
def add_runs(
    x,  # [B, S, C, V] with the strides x_b, x_s, x_c, x_v
    order,  # [count] the position of every sorted row
    ordered,  # [count] the table rows, sorted; END where skipped
    ends,  # [chunks] how many runs start up to the end of every chunk, or None
    out,  # [C * K, V], or [touched, V] with ``rows``; zero
    rows,  # [touched] the touched rows, or None
    edges,  # [chunks, 2, V] the part of a run from before a chunk, and of one that goes on behind it
    count,  # B * S * C
    S,
    x_b,
    x_s,
    x_c,
    x_v,
    C: tl.constexpr,
    V: tl.constexpr,
    END: tl.constexpr,
    DIVISOR: tl.constexpr,
    MATRIX: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum the runs of one chunk: those inside it go to ``out``, parts of those that cross its ends to ``edges``."""
    chunk = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    i = chunk * BLOCK + j
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    here = _row_at(ordered, i, count, END)
    behind = _row_at(ordered, (chunk + 1) * BLOCK, count, END)
    usable = here != END
    begins = _begins(here, _row_at(ordered, i - 1, count, END), END)
    position = tl.load(order + i, mask=usable, other=0)
    offsets = source_offsets(position // C, position % C, S, x_b, x_s, x_c, ALIGN)
    leads = begins | (usable & (j == 0))  # one position speaks for its run in this chunk
    hot = (here[:, None] == here[None, :]) & leads[:, None]
    total = _sum_where(hot, load_rows(x, offsets, usable, v, x_v, V, UNIT), MATRIX)

    inside = begins & (here != behind)
    columns = (v < V)[None, :]
    if rows is None:
        run = here.to(tl.int64)
    else:
        started = begins.to(tl.int64)
        run = tl.load(ends + chunk) - tl.sum(started) + tl.cumsum(started, 0) - 1
        if tl.program_id(1) == 0:
            tl.store(rows + run, here.to(tl.int64), mask=begins)
    store_sums(out + (run * V)[:, None] + v[None, :], average(total, DIVISOR), inside[:, None] & columns)
    edge = (chunk * 2 + begins.to(tl.int64)) * V
    tl.store(edges + edge[:, None] + v[None, :], total, mask=(leads & ~inside)[:, None] & columns)


@kernel("kvb_scatter_join_runs", do_not_specialize=["count"])
def join_runs(
    ordered,  # [count], as for ``add_runs``, and so are the others
    ends,  # [chunks] or None
    out,  # [C * K, V] or [touched, V]
    edges,  # [chunks, 2, V]
    count,  # B * S * C
    V: tl.constexpr,
    END: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,  # as for ``add_runs``
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Complete the run that begins in a chunk and goes on behind it: its parts in order, BLOCK_J chunks at a time."""
    chunk = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = chunk * BLOCK
    row = _row_at(ordered, first + BLOCK - 1, count, END)
    goes_on = (row != END) & (row == _row_at(ordered, first + BLOCK, count, END))
    begins_here = (row != _row_at(ordered, first, count, END)) | (row != _row_at(ordered, first - 1, count, END))
    mine = goes_on & begins_here
    columns = v < tl.where(mine, V, 0)
    total = tl.load(edges + (chunk * 2 + 1) * V + v, mask=columns, other=0)
    later = chunk + 1 + tl.arange(0, BLOCK_J)
    more = mine
    while more:
        same = _row_at(ordered, later * BLOCK, count, END) == row
        part = tl.load(edges + (later * 2 * V)[:, None] + v[None, :], mask=same[:, None] & (v < V)[None, :], other=0)
        total += tl.sum(part, axis=0)
        later += BLOCK_J
        more = tl.min(same.to(tl.int32)) == 1
    run = row.to(tl.int64) if ends is None else tl.load(ends + chunk) - 1
    store_sums(out + run * V + v, average(total, DIVISOR), columns)


# --- rows moved by their gradients ------------------------------------------------------------------------------------


@kernel("kvb_sgd_step", do_not_specialize=["count"])
def move_rows(
    table,  # [C * K, V]
    rows,  # [count] of the table, each once; -1 for none
    grads,  # [count, V] float32, or float64
    step,  # [] float64
    count,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Subtract ``step`` times its gradient from every named row of the table, in the precision of gradients."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.load(rows + i, mask=i < count, other=-1)
    inside = (row >= 0)[:, None] & (v < V)[None, :]
    grad = tl.load(grads + (i * V)[:, None] + v[None, :], mask=inside, other=0)
    pointers = table + (row * V)[:, None] + v[None, :]
    before = tl.load(pointers, mask=inside, other=0).to(grad.dtype)
    store_sums(pointers, before - tl.load(step).to(grad.dtype) * grad, inside)
