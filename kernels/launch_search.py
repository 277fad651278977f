"""Launches the kernels of ``pack_keys``, ``nearest`` and ``lookup``: layout, allocation, grids, block sizes.

Which kernels search:
    ``scan``: float64; more than one neighbour; few queries a codebook, where reading the keys is all there is to do;
        keys of one or two coordinates that lie too close together for a filter; GPUs without matrix units
    ``resident``, ``refine``, ``rescan``: small codebooks, whose packed keys stay on the chip
    ``prepare``, ``search``, ``settle``, ``rescan``: everything else
``rescan`` runs through the rows that the filter is not sure of. How many they are, only the device knows: it never
makes the host wait, nor does anything else here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb.kernels import pack, resident, scan, search
from kvb.kernels.device import ceil_div, matrix_units, multiple, power_of_two, processors, require, run, target
from kvb.kernels.launch_values import gather

# --- the launch table -------------------------------------------------------------------------------------------------


class Filter(NamedTuple):
    """Block sizes of ``search``: BN rows times BK keys."""

    BN: int
    BK: int
    warps: int
    stages: int


class Group(NamedTuple):
    """How the scores of a row lie in registers: J * E next to each other in a thread, L threads sharing the row."""

    J: int
    L: int
    E: int


LANES = Group(4, 4, 2)  # the accumulators of mma and wgmma
ROWS = Group(1, 1, 8)  # a row a thread, as tcgen05 leaves them


class Target(NamedTuple):
    """A column of the table: the layout of scores, and ``search`` by the columns of a packed row.

    Large tiles feed the matrix units; registers and shared memory bound them. ``resident`` is the largest key dim for
    which ``resident`` keeps a whole small codebook on the chip: where products take both factors from registers, the
    keys do not fit beside the scores of a row.
    """

    group: Group
    filters: dict[int, Filter]  # by DP; 0 for more than 128, which come in pieces
    resident: int


SEARCH = {
    "sm_75": Target(LANES, {}, resident=0),  # without matrix units no filter is faster than ``scan``
    "sm_80": Target(
        LANES,
        {
            16: Filter(128, 128, 4, 3),
            32: Filter(128, 64, 4, 3),
            64: Filter(128, 64, 4, 3),
            128: Filter(128, 32, 4, 2),
            0: Filter(128, 64, 8, 2),
        },
        resident=0,
    ),
    "sm_90": Target(
        LANES,
        {
            16: Filter(128, 128, 4, 3),
            32: Filter(256, 128, 8, 3),
            64: Filter(256, 128, 8, 3),
            128: Filter(128, 128, 8, 2),
            0: Filter(128, 128, 8, 2),
        },
        resident=32,
    ),
    "sm_100": Target(
        ROWS,
        {
            16: Filter(128, 64, 4, 3),
            32: Filter(128, 64, 4, 3),
            64: Filter(128, 64, 4, 3),
            128: Filter(128, 64, 4, 2),
            0: Filter(128, 64, 8, 2),
        },
        resident=30,
    ),
    "sm_120": Target(
        LANES,
        {
            16: Filter(128, 128, 4, 3),
            32: Filter(128, 64, 4, 3),
            64: Filter(128, 64, 4, 2),
            128: Filter(64, 64, 4, 2),
            0: Filter(64, 64, 4, 2),
        },
        resident=0,
    ),
    "gfx942": Target(
        LANES,
        {
            16: Filter(128, 64, 4, 2),
            32: Filter(128, 64, 4, 2),
            64: Filter(64, 64, 4, 2),
            128: Filter(64, 64, 4, 2),
            0: Filter(64, 64, 4, 2),
        },
        resident=32,
    ),
    "gfx950": Target(
        LANES,
        {
            16: Filter(128, 64, 4, 2),
            32: Filter(128, 64, 4, 2),
            64: Filter(128, 64, 4, 2),
            128: Filter(64, 64, 4, 2),
            0: Filter(64, 64, 4, 2),
        },
        resident=32,
    ),
}
PIECE = 64  # columns at a time of rows with more than 128
SMALL_ROWS = 64  # BN for batches that fit into it, with 4 warps

RESIDENT_K = 256  # codebooks up to here may stay on the chip
RESIDENT_ROWS, RESIDENT_WARPS = 64, 4
RESIDENT_PROGRAMS = 8  # for each processor: they take turns at memory and arithmetic
REFINE_ROWS, REFINE_COLUMNS = 32, 4  # one thread a row: more would repeat its addresses
REFINE_PROGRAMS = 4  # for each program of ``resident``

FEW = 2  # queries a codebook up to which ``scan`` has no rival
SCAN_ROWS = 16  # at once, where there are so many
SCAN_ELEMENTS, SCAN_COLUMNS, SCAN_WARPS = 4096, 16, 8  # of a tile of rows, keys and columns
SCAN_LEAST = 1024  # keys that a part of a codebook should have
MOST_SPLITS = 64
PREPARE_ROWS = 64
SETTLE_ROWS, SETTLE_COLUMNS = 128, 2  # one thread a row: more would repeat its addresses
RESCAN_KEYS, RESCAN_COLUMNS, RESCAN_WARPS = 256, 16, 8
RESCAN_PROGRAMS = 8  # for each processor

BOOKS = 8  # codebooks searched side by side: their packed keys share the cache
PACK_KEYS, PACK_COLUMNS = 64, 64
SLICE = 256  # keys that one program of ``survey`` sums up, or more, so that there are 64 slices at most
CHUNK = 1 << 24  # rows times codebooks of one launch: what is kept about them in between stays below a few hundred MB
CHUNK_BYTES = 1 << 28
WHOLE = 256  # rows of the largest tile


# Where threads share a sum of squares, each adds what it gets from another to its own square. A multiply-add does not
# round its own, so the threads would disagree about the last bit of what must be one number.
SYMMETRIC = {"enable_fp_fusion": False}


# --- packed keys ------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where things lie in one packed codebook: floats first, counted in float32, then parts of keys, in float16.

    scale | centre [D] | radii [TILES], squared | NORMS: half norms [Kp] | HIGH: [Kp, DP] | LOW: [Kp, DP]
    """

    FORM: int
    DP: int
    Kp: int
    TILES: int
    RADII: int
    NORMS: int
    HIGH: int
    LOW: int
    NBYTES: int

    def constants(self, *names: str) -> dict[str, int]:
        return {name: getattr(self, name) for name in names}


@functools.lru_cache(maxsize=256)
def layout(K: int, D: int) -> Layout:
    if D <= 10:
        form, DP = 0, 32
    elif D <= 128:
        DP = power_of_two(max(16, D))
        form = 1 if D + 2 <= DP else 2
    else:
        form, DP = 2, multiple(D, PIECE)
    Kp = multiple(K, 64 if K <= 1024 else 128)
    tiles = ceil_div(Kp, PACK_KEYS)
    radii = multiple(1 + D, 16)
    norms = radii + multiple(tiles, 16)
    high = 2 * (norms + Kp)
    low = high if form == 0 else high + Kp * DP
    return Layout(form, DP, Kp, tiles, radii, norms, high, low, multiple(2 * (low + Kp * DP), 64))


def packed_nbytes(K: int, D: int, dtype: torch.dtype) -> int:
    """Bytes of one packed codebook; float64 keys are searched as they are."""
    return 64 if dtype == torch.float64 else layout(int(K), int(D)).NBYTES  # of a tracer's sizes too


def pack_keys(keys: Tensor) -> Tensor:
    """Keys [C, K, D] in the layout that ``nearest`` searches: uint8 [C, nbytes]."""
    return _pack(keys.contiguous(), None)


def _allowed(mask: Tensor | None, unread: Tensor) -> Tensor:
    """The mask as bytes; where there is none, some tensor to stand in its place."""
    return unread if mask is None else mask.contiguous().view(torch.uint8)


def slicing(K: int) -> tuple[int, int]:
    """Keys of one slice of a codebook, and how many slices it has."""
    size = max(SLICE, multiple(ceil_div(K, 64), PACK_KEYS))
    return size, ceil_div(K, size)


class Packing:
    """The packing of keys [C, K, D] that may still change: all memory is there; ``survey`` them, then ``finish``."""

    def __init__(self, keys: Tensor) -> None:
        C, K, D = keys.shape
        self.keys, self.facts = keys, layout(K, D)
        self.slice, self.slices = slicing(K)
        slots = 4 * power_of_two(K)
        self.packed = keys.new_empty((C, self.facts.NBYTES), dtype=torch.uint8)
        self.packed[:, : 4 * self.facts.NORMS].zero_()
        self.surveys = keys.new_empty((C, self.slices, 4, D), dtype=torch.float64)
        self.table = torch.full((C, 2, slots), (1 << 31) - 1, dtype=torch.int32, device=keys.device)
        self.columns = min(PACK_COLUMNS, power_of_two(D))
        self.constants = {"D": D, "SLICES": self.slices, "SLOTS": slots, "BK": PACK_KEYS}

    def survey(self, mask: Tensor | None) -> None:
        C, K, D = self.keys.shape
        run(
            pack.survey,
            (C * self.slices, ceil_div(D, self.columns)),
            *(self.keys, _allowed(mask, self.table), self.surveys, self.table, K),
            **self.constants,
            **{"BD": self.columns, "SLICE": self.slice, "MASKED": mask is not None, "registers": 255},
        )

    def finish(self, mask: Tensor | None) -> Tensor:
        facts, packed = self.facts, self.packed
        run(
            pack.pack,
            (len(packed) * facts.TILES,),
            *(self.keys, _allowed(mask, self.table), self.surveys, self.table),
            *(packed.view(torch.float32), packed.view(torch.float16), self.keys.shape[1]),
            **facts.constants("NBYTES", "TILES", "RADII", "NORMS", "HIGH", "LOW", "FORM", "DP"),
            **self.constants,
            **{"BD": min(PACK_COLUMNS, facts.DP) if facts.FORM == 2 else self.columns, "MASKED": mask is not None},
            WIDTH=power_of_two(self.slices),
            KP=facts.Kp,
            registers=255,
            **SYMMETRIC,
        )
        return packed


def unpacked(keys: Tensor) -> Tensor:
    """What stands for packed float64 keys."""
    C, K, D = keys.shape
    return keys.new_zeros((C, packed_nbytes(K, D, keys.dtype)), dtype=torch.uint8)


def _pack(keys: Tensor, mask: Tensor | None) -> Tensor:
    if keys.dtype == torch.float64:
        return unpacked(keys)
    packing = Packing(keys)
    packing.survey(mask)
    return packing.finish(mask)


# --- search -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some batches of the queries, as the kernels read them, and where their results go."""

    queries: Tensor
    indices: Tensor
    distances: Tensor

    @property
    def count(self) -> int:
        return self.queries.shape[0] * self.queries.shape[1]

    @property
    def cells(self) -> int:
        return self.count * self.queries.shape[2]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """S, and strides of batches, positions and codebooks; where one stride leads from row to row, it is the second.

        An axis of one element gets 0, so that it spoils no alignment.
        """
        _, S, C, _ = self.queries.shape
        batch, position, book, _ = self.queries.stride()
        book = book if C > 1 else 0
        if S == 1:
            return S, 0, batch, book
        return S, 0 if self.flat else batch, position, book

    @property
    def flat(self) -> bool:
        B, S, _, _ = self.queries.shape
        return B == 1 or S == 1 or self.queries.stride(0) == S * self.queries.stride(1)

    @property
    def wide(self) -> bool:
        """Whether a thread loads at least two coordinates of a row at once, so that it holds a sum of their squares."""
        return math.gcd(2, *self.strides[1:]) == 2 and self.queries.data_ptr() % 16 == 0

    @property
    def constants(self) -> dict[str, Any]:
        return {"FLAT": self.flat, "ALIGN": math.gcd(16, *self.strides[1:]), "D": self.queries.shape[3]}


def _chunks(queries: Tensor, indices: Tensor, distances: Tensor, bytes_a_cell: int) -> list[_Rows]:
    """All rows, in as few pieces as the limits allow; B*S of any size becomes rows below 2^31."""
    B, S, C, _ = queries.shape
    most = max(1, min(CHUNK, CHUNK_BYTES // bytes_a_cell) // C)
    most = most // WHOLE * WHOLE or most  # no tile of rows but the last is padded
    pieces = [(queries, indices, distances)]
    if most < B * S:
        batches = max(1, most // S)
        pieces = list(zip(*(part.split(batches) for part in pieces[0]), strict=True))
        if batches == 1 and most < S:
            pieces = [cut for piece in pieces for cut in zip(*(part.split(most, 1) for part in piece), strict=True)]
    return [_Rows(*piece) for piece in pieces]


def _check(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> None:
    C, K, D = keys.shape
    require(
        queries.dim() == 4 and queries.shape[2:] == (C, D),
        f"expected queries [B, S, {C}, {D}] for keys {tuple(keys.shape)}, got {tuple(queries.shape)}",
    )
    require(
        queries.device == keys.device == packed.device,
        f"expected queries, keys and packed on one device, got {queries.device}, {keys.device} and {packed.device}",
    )
    nbytes = packed_nbytes(K, D, keys.dtype)
    require(
        packed.dtype == torch.uint8 and packed.shape == (C, nbytes),
        f"packed keys do not match: expected {nbytes} bytes for each of {C} codebooks (K={K} D={D} {keys.dtype}), "
        f"got {packed.dtype} {tuple(packed.shape)}; pack the keys again with pack_keys(keys)",
    )
    require(
        mask is None or (mask.dtype == torch.bool and mask.shape == (C, K) and mask.device == keys.device),
        f"expected mask torch.bool {(C, K)} on {keys.device}, "
        + ("" if mask is None else f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"),
    )
    require(1 <= topk <= K, f"expected topk between 1 and {K}, got {topk}")


def nearest(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` nearest keys of every query and codebook: indices and squared distances, both [B, S, C, T]."""
    _check(queries, keys, packed, mask, topk)
    return _nearest(queries, keys, packed, mask, topk, None)


def lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """Search and gather: values [B, S, C, V] (pooled [B, S, V]) and indices [B, S, C]; one kernel for few queries."""
    _check(queries, keys, packed, mask, 1)
    fetched = None
    if pool == "none" and _few(queries) and _splits(queries, keys) == 1:
        fetched = values.new_empty((*queries.shape[:3], values.shape[2]))
    indices = _nearest(queries, keys, packed, mask, 1, None if fetched is None else (values.contiguous(), fetched))[0][
        ..., 0
    ]
    return (gather(values, indices, pool, "bscv") if fetched is None else fetched), indices


def _few(queries: Tensor) -> bool:
    return queries.shape[0] * queries.shape[1] <= FEW


def _crowded(K: int, D: int) -> bool:
    """Whether the filter would leave more than about a quarter of the rows to ``rescan``.

    The keys next to a query are about K^(-1/D) apart, so their scores by the square of that; normal and uniform keys
    were counted: it leaves about 16 times the error of a score over that. For a row left over, ``rescan`` costs about
    four times what ``scan`` does, and ``scan`` many times what the filter does.
    """
    return 64 * (depth(layout(K, D)) + 9) * 2.0**-23 * K ** (2 / D) > 1


def _splits(queries: Tensor, keys: Tensor) -> int:
    """Parts of a codebook that ``scan`` takes in different programs, where codebooks alone do not occupy the device."""
    C, K, _ = keys.shape
    return max(1, min(MOST_SPLITS, 2 * processors(keys.device) // C, K // SCAN_LEAST))


def _nearest(
    queries: Tensor,
    keys: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    topk: int,
    fetch: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    B, S, C, D = queries.shape
    K = keys.shape[1]
    wide = torch.float64 in (queries.dtype, keys.dtype)
    indices = queries.new_empty((B, S, C, topk), dtype=torch.int64)
    distances = queries.new_empty((B, S, C, topk), dtype=torch.float64 if wide else torch.float32)
    if indices.numel() == 0:
        return indices, distances
    keys = keys.contiguous()
    if queries.stride(3) != 1:
        queries = queries.contiguous()
    if wide or topk > 1 or _few(queries):
        splits = _splits(queries, keys) if _few(queries) and topk == 1 else 1
        for rows in _chunks(queries, indices, distances, 1):
            _scan(rows, keys, mask, wide, splits, fetch)
        return indices, distances
    column = SEARCH[target(keys.device)]
    small = K <= RESIDENT_K and column.resident >= D
    if not small and (_crowded(K, D) or not column.filters):
        for rows in _chunks(queries, indices, distances, 1):
            _scan(rows, keys, mask, wide, 1, None)
        return indices, distances
    packed = packed if mask is None else _pack(keys, mask)
    facts = layout(K, D)
    for rows in _chunks(queries, indices, distances, 24 if small else 16 + 4 * facts.DP):
        listed = indices.new_empty(rows.cells, dtype=torch.int32)
        count = (_resident if small else _filter)(rows, keys, packed, facts, listed)
        run(
            scan.rescan,
            (min(rows.cells, RESCAN_PROGRAMS * processors(keys.device)),),
            *(rows.queries, keys, _allowed(mask, listed), listed, count),
            *(rows.indices, rows.distances, *rows.strides, C, K),
            **rows.constants,
            MASKED=mask is not None,
            BK=RESCAN_KEYS,
            BD=min(RESCAN_COLUMNS, power_of_two(D)),
            num_warps=RESCAN_WARPS,
            registers=255,
            **SYMMETRIC,
        )
    return indices, distances


def _scan(
    rows: _Rows, keys: Tensor, mask: Tensor | None, wide: bool, splits: int, fetch: tuple[Tensor, Tensor] | None
) -> None:
    C, K, D = keys.shape
    indices, distances = rows.indices, rows.distances
    if splits > 1:
        indices = rows.indices.new_empty((rows.cells, splits), dtype=torch.int32)
        distances = rows.distances.new_empty((rows.cells, splits), dtype=torch.float64)
    values, fetched = fetch or (keys, rows.distances)
    V = values.shape[2]
    block = min(SCAN_ROWS, power_of_two(rows.count))
    run(
        scan.scan,
        (ceil_div(rows.count, block) * C, splits),
        *(rows.queries, keys, _allowed(mask, keys), values),
        *(indices, distances, fetched, rows.count, *rows.strides, C, K, rows.indices.shape[3], splits),
        multiple(ceil_div(K, splits), SCAN_ELEMENTS // SCAN_COLUMNS),
        **rows.constants,
        **{"V": V, "WIDE": wide, "MASKED": mask is not None},
        **{
            "PARTIAL": splits > 1,
            "FETCH": fetch is not None,
            "BR": block,
            "BK": SCAN_ELEMENTS // SCAN_COLUMNS // block,
        },
        BD=min(SCAN_COLUMNS, power_of_two(D)),
        BV=min(64, power_of_two(V)),
        num_warps=SCAN_WARPS,
        registers=255,
        **SYMMETRIC,
    )
    if splits > 1:
        run(
            scan.merge,
            (ceil_div(rows.cells, 32),),
            *(indices, distances, rows.indices, rows.distances, rows.cells, K, splits),
            BR=32,
            WIDTH=MOST_SPLITS,
        )


def _resident(rows: _Rows, keys: Tensor, packed: Tensor, facts: Layout, listed: Tensor) -> Tensor:
    """Search a small codebook; how many rows it listed."""
    C, K, D = keys.shape
    _, L, E = SEARCH[target(keys.device)].group
    group = Group(math.isqrt(RESIDENT_K // L) // E, L, E)  # as many groups as places in one
    if K <= 224:
        parts = [part for part in (128, 64, 32) if multiple(K, 32) & part]
    else:  # smaller parts where half norms take registers, too
        parts = [128, 64, 64] if facts.FORM == 2 else [128, 128]
    parts += [0] * (3 - len(parts))
    tiles = ceil_div(rows.count, RESIDENT_ROWS)
    workers = min(tiles, ceil_div(RESIDENT_PROGRAMS * processors(keys.device), C))
    capacity = min(ceil_div(tiles, workers) * RESIDENT_ROWS, rows.count)  # rows of one program
    counts = torch.zeros(1 + workers * C, dtype=torch.int32, device=keys.device)
    count, opened = counts[:1], counts[1:]
    open_rows = listed.new_empty(workers * C * capacity)
    open_words = listed.new_empty(workers * C * capacity * L)
    floats = packed.view(torch.float32)
    run(
        resident.resident,
        (workers * C,),
        *(rows.queries, keys, floats, packed.view(torch.float16), rows.indices, rows.distances),
        *(open_rows, open_words, opened, rows.count, *rows.strides, C, K, workers, capacity),
        **facts.constants("NBYTES", "TILES", "RADII", "NORMS", "HIGH", "FORM", "DP"),
        **rows.constants,
        **{"DEPTH": depth(facts), "RADII_WIDTH": power_of_two(facts.TILES)},
        MATRIX=matrix_units(keys.device),
        **{"P0": parts[0], "P1": parts[1], "P2": parts[2]},
        **{"BN": RESIDENT_ROWS, **group._asdict()},
        num_warps=RESIDENT_WARPS,
        num_stages=1,
        **({} if rows.wide else SYMMETRIC),
    )
    run(
        resident.refine,
        (workers * C, REFINE_PROGRAMS),
        *(rows.queries, keys, floats, open_rows, open_words, opened, rows.indices, rows.distances, listed, count),
        *(*rows.strides, C, K, capacity),
        **facts.constants("NBYTES", "NORMS"),
        **rows.constants,
        **{"BR": REFINE_ROWS, "BD": min(REFINE_COLUMNS, power_of_two(D)), **group._asdict()},
        num_warps=1,
    )
    return count


def depth(facts: Layout) -> int:
    """Products summed one after the other at full size: the small ones of parts come first, if they come apart."""
    return 3 * facts.DP if facts.DP > 128 else facts.DP + 8


def _filter(rows: _Rows, keys: Tensor, packed: Tensor, facts: Layout, listed: Tensor) -> Tensor:
    """Search a large codebook; how many rows it listed."""
    C, K, _ = keys.shape
    group, filters, _ = SEARCH[target(keys.device)]
    BN, BK, warps, stages = filters.get(facts.DP, filters[0])
    BK = min(BK, 64) if K <= 1024 else BK
    if rows.count <= SMALL_ROWS and facts.DP <= 64:
        BN, warps = SMALL_ROWS, 4
    tiles = ceil_div(K, BK)
    row_tiles = ceil_div(rows.count, BN)
    splits = max(1, min(MOST_SPLITS, 2 * processors(keys.device) // (row_tiles * C), tiles // 4))
    per_split = ceil_div(tiles, splits)
    splits = ceil_div(tiles, per_split)
    count = torch.empty(1, dtype=torch.int32, device=keys.device)
    words = torch.empty((C, rows.count, 1 if facts.FORM == 0 else 2, facts.DP), dtype=torch.float16, device=keys.device)
    scales = torch.empty((C, rows.count, 2), dtype=torch.float32, device=keys.device)
    groups = listed.new_empty(rows.cells * splits)
    floats, halves = packed.view(torch.float32), packed.view(torch.float16)
    run(
        search.prepare,
        (ceil_div(rows.count, PREPARE_ROWS) * C,),
        *(rows.queries, floats, words, scales, count, rows.count, *rows.strides, C),
        **facts.constants("NBYTES", "TILES", "RADII", "FORM", "DP"),
        **rows.constants,
        **{"DEPTH": depth(facts), "RADII_WIDTH": power_of_two(facts.TILES)},
        MATRIX=matrix_units(keys.device),
        **{"BR": PREPARE_ROWS, "BD": min(PIECE, facts.DP)},
        registers=168,
        **({} if rows.wide else SYMMETRIC),
    )
    run(
        search.search,
        (row_tiles * C, splits),
        *(words, scales, floats, halves, groups, rows.count, C, K, per_split, splits),
        **facts.constants("NBYTES", "NORMS", "HIGH", "LOW", "FORM", "DP"),
        **{"BN": BN, "BK": BK, "BD": PIECE if facts.DP > 128 else facts.DP, "BOOKS": BOOKS, **group._asdict()},
        num_warps=warps,
        num_stages=stages,
        registers=255,
    )
    run(
        search.settle,
        (ceil_div(rows.cells, SETTLE_ROWS),),
        *(rows.queries, keys, floats, groups, rows.indices, rows.distances, listed, count),
        *(rows.count, *rows.strides, C, K, splits),
        **facts.constants("NBYTES", "NORMS"),
        **rows.constants,
        **{"BR": SETTLE_ROWS, "BD": SETTLE_COLUMNS, **group._asdict()},
        registers=255,
    )
    return count
