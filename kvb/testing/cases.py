"""The problems that operators are tried on. Each case of ``CASES`` names the one thing that it stresses.

What a fast backend may get wrong is decided by shapes, strides and data.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from kvb.reference.values import POOLS
from kvb.testing.data import DATA, MEMORY


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; ``name`` says what it stresses. Letters as in ``kvb/ops``, T nearest keys."""

    name: str
    B: int = 5
    S: int = 3
    C: int = 2
    K: int = 40
    D: int = 8
    V: int = 5
    T: int = 1
    dtype: torch.dtype = torch.float32
    keys: torch.dtype | None = None  # where it differs from that of queries and values
    codes: torch.dtype = torch.int64
    data: str = "normal"  # of ``data.DATA``
    memory: str = "contiguous"  # of ``data.MEMORY``, for queries, indices and gradients
    masked: float = 0.0  # share of the pairs that may not be fetched; from 1 on, no pair of the first codebook may


CASES = (
    Case("plain"),
    Case("B=0", B=0),
    Case("B=1", B=1, S=1),
    Case("S=0", S=0),
    Case("S=1", S=1),
    Case("many queries", B=40, S=20),
    Case("C=1", C=1),
    Case("many codebooks", B=3, S=1, C=70),
    Case("K=1", K=1),
    Case("K=7, below any block", K=7),
    Case("K=16, one group of keys", K=16),
    Case("K=200, small", B=40, K=200, D=32, V=64),
    Case("K=513, one above a block", K=513),
    Case("K=4096, large", B=70, S=1, K=4096, D=10, V=10),
    Case("K=4096, one query", B=1, S=1, K=4096, D=10, V=10),
    Case("D=1", D=1),
    Case("D=12", D=12, K=300),
    Case("D=14", D=14, K=300),
    Case("D=20, no power of two", D=20),
    Case("D=64", D=64, K=300),
    Case("D=200, above 128", D=200),
    Case("V=1", V=1),
    Case("V=64", V=64),
    Case("float16", dtype=torch.float16),
    Case("float16, large K", dtype=torch.float16, B=20, K=1200, D=14),
    Case("bfloat16", dtype=torch.bfloat16, T=2),
    Case("bfloat16, K=200", dtype=torch.bfloat16, B=20, K=200, D=32),
    Case("float64", dtype=torch.float64),
    Case("float64, large K", dtype=torch.float64, K=1200, D=14),
    Case("float16 queries, float32 keys", dtype=torch.float16, keys=torch.float32),
    Case("float32 queries, float64 keys", keys=torch.float64),
    Case("int32 indices", codes=torch.int32),
    Case("int16 indices", codes=torch.int16),
    Case("uint8 indices", codes=torch.uint8),
    Case("codebooks outermost in memory", memory="codebooks_first"),
    Case("codebooks before positions in memory", memory="codebooks_second"),
    Case("batch innermost but for D", memory="rows_last"),
    Case("batch innermost", memory="batch_last"),
    Case("an unaligned slice", memory="a_slice", D=7, V=3),
    Case("an expanded batch", memory="expanded"),
    Case("3 nearest", T=3),
    Case("3 nearest, large K", T=3, K=1200, D=14),
    Case("all K nearest", T=7, K=7),
    Case("masked", masked=0.3),
    Case("masked, large K", masked=0.3, K=1200, D=14, T=2),
    Case("fewer usable pairs than asked for", K=6, T=4, masked=0.6),
    Case("a codebook without a usable pair", masked=1.0, T=2),
    Case("exact ties", data="lattice", D=3),
    Case("exact ties, large K", data="lattice", D=3, K=1200),
    Case("exact ties, 3 nearest", data="lattice", D=3, T=3),
    Case("30 % duplicated keys", data="duplicates"),
    Case("30 % duplicated keys, large K", data="duplicates", K=1200, D=14),
    Case("30 % duplicated keys, masked", data="duplicates", masked=0.5),
    Case("30 % duplicated keys, 2 nearest", data="duplicates", T=2),
    Case("keys that differ in their last bits", data="near_duplicates"),
    Case("queries half-way between two keys", data="bisectors"),
    Case("an offset of 100", data="offset"),
    Case("an offset of 100, large K", data="offset", K=1200, D=14),
    Case("queries of 1e-8 to 1e8 side by side", data="outliers", B=30),
    Case("queries of 1e-8 to 1e8, large K", data="outliers", B=30, K=1200, D=14),
    Case("queries with NaN and Inf", data="broken_queries", T=2),
    Case("queries with NaN and Inf, large K", data="broken_queries", K=1200, D=14),
    Case("keys with NaN and Inf", data="broken_keys"),
    Case("keys with NaN and Inf, large K", data="broken_keys", K=1200, D=14, T=2),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The inputs of all operators for one case, on one device."""

    case: Case
    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    indices: Tensor  # any, for the operators that take them
    grads: dict[str, Tensor]  # of gather's result, by pool


@functools.cache
def problem(case: Case, device: torch.device) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = torch.promote_types(torch.promote_types(case.dtype, case.keys or case.dtype), torch.float32)
        queries, keys = DATA[case.data](case.B * case.S, case.C, case.K, case.D, drawn)
        queries = queries.view(case.B, case.S, case.C, case.D)
        values = torch.randn(case.C, case.K, case.V, dtype=drawn)
        mask = torch.rand(case.C, case.K) >= case.masked if case.masked else None
        # Half of the indices meet in one pair: sums of many rows next to sums of few.
        indices = torch.randint(case.K, (case.B, case.S, case.C)) * (torch.rand(case.B, case.S, case.C) < 0.5)
        books = {"none": (case.C,), "mean": (), "sum": ()}
        grads = {pool: torch.randn(case.B, case.S, *books[pool], case.V, dtype=drawn) for pool in POOLS}
    if mask is not None and case.masked < 1:
        mask[:, 0] = True
    place = MEMORY[case.memory]
    return Problem(
        case,
        place(queries.to(device, case.dtype)),
        keys.to(device, case.keys or case.dtype),
        values.to(device, case.dtype),
        None if mask is None else mask.to(device),
        place(indices.to(device, case.codes)),
        {pool: place(grad.to(device, case.dtype)) for pool, grad in grads.items()},
    )
