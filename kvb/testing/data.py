"""Kinds of data that a search may stumble over, and ways in which a tensor lies in memory.

``DATA``: functions of (N, C, K, D) and a dtype that draw queries [N, 1, C, D] and keys [C, K, D].
``MEMORY``: functions that give [B, S, C, ...] the same numbers at other strides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOAT = torch.float32


def normal(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 1, C, D, dtype=dtype), torch.randn(C, K, D, dtype=dtype)


def _some(keys: Tensor, N: int, last: int | None = None) -> Tensor:
    """N queries [N, 1, C, D], each one of the first ``last`` keys."""
    C, K, _ = keys.shape
    return keys[torch.arange(C), torch.randint(last or K, (N, C))][:, None]


def offset(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    queries, keys = normal(N, C, K, D, dtype)
    return queries + 100, keys + 100


def lattice(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Small integers: distances are exact, and most of them tied."""
    queries, keys = normal(N, C, K, D, dtype)
    return queries.round().clamp(-2, 2), keys.round().clamp(-2, 2)


def duplicates(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Three keys of ten stand twice, one of ten three times; every other query is one of those, or lies next to one."""
    queries, keys = normal(N, C, K, D, dtype)
    twins, triplets = max(1, K * 3 // 10), K // 10
    keys[:, K - twins :] = keys[:, :twins]
    keys[:, twins : twins + triplets] = keys[:, :triplets]
    near = queries / 100 * (torch.rand(N, 1, C, 1) < 0.5)
    queries[::2] = (_some(keys, N, twins) + near)[::2]
    return queries, keys


def near_duplicates(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Eight keys each differ from one another in their last bits only; every other query is one of them."""
    queries, keys = normal(N, C, K, D, dtype)
    keys = keys[:, torch.randint(max(1, K // 8), (K,))]
    keys *= 1 + torch.randint(-2, 3, keys.shape) * torch.finfo(dtype).eps
    queries[::2] = _some(keys, N)[::2]
    return queries, keys


def clusters(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Few tight clusters: one product of float16 cannot tell their keys apart, three can."""
    queries, keys = normal(N, C, K, D, dtype)
    places = torch.randn(4, D, dtype=dtype)
    return places[torch.arange(N) % 4][:, None, None] + queries / 300, places[torch.arange(K) % 4] + keys / 300


def bisectors(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Queries half-way between two keys, up to rounding."""
    _, keys = normal(N, C, K, D, dtype)
    return (_some(keys, N) + _some(keys, N)) / 2, keys


def outliers(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Neighbouring queries from 1e-8 to 1e8 times as large as the keys."""
    queries, keys = normal(N, C, K, D, dtype)
    exponents = torch.arange(N * C).view(N, 1, C, 1) % 17 - 8
    return queries * 10.0 ** exponents.to(dtype), keys


def far_key(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """The same queries, and one key that is 1e4 times as large as the others."""
    queries, keys = outliers(N, C, K, D, dtype)
    keys[:, 0] *= 1e4
    return queries, keys


def magnitudes(N: int, C: int, K: int, D: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries of all magnitudes and keys of one: 1e-300 to 1e300, for float64 alone."""
    queries, keys = normal(N, C, K, D, dtype)
    scale = 10.0 ** torch.randint(-300, 301, (N, 1, C, 1)).to(dtype)
    return queries * scale, keys * float(10.0 ** torch.randint(-300, 301, ()).double())


def scaled(factor: float) -> Callable[..., tuple[Tensor, Tensor]]:
    def make(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
        queries, keys = normal(N, C, K, D, dtype)
        return queries * factor, keys * factor

    return make


def overflowing(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """Queries whose squares, or products with a scaled key, are more than float32 holds; the first key is broken."""
    queries, keys = normal(N, C, K, D, dtype)
    queries *= 10.0 ** (20 + torch.arange(N) % 19)[:, None, None, None]
    keys[:, 0] = torch.nan
    return queries, keys / 100


def broken_queries(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    queries, keys = normal(N, C, K, D, dtype)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    place = torch.rand(queries.shape) < 0.1
    return torch.where(place, bad[torch.randint(3, queries.shape)], queries), keys


def broken_keys(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    queries, keys = normal(N, C, K, D, dtype)
    keys[:, ::3, 0], keys[:, 1::5, -1] = torch.nan, torch.inf
    keys[:, 2::7, -1] = -torch.inf
    return queries, keys


def broken(N: int, C: int, K: int, D: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    """NaN and Inf in queries and keys, and a codebook without any usable key."""
    queries, _ = broken_queries(N, C, K, D, dtype)
    _, keys = broken_keys(N, C, K, D, dtype)
    keys[-1, :, 0] = torch.nan
    return queries, keys


_KINDS = (
    *(normal, offset, lattice, duplicates, near_duplicates, clusters, bisectors, outliers, far_key),
    *(magnitudes, overflowing, broken_queries, broken_keys, broken),
)
DATA: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {kind.__name__: kind for kind in _KINDS}


# --- memory -----------------------------------------------------------------------------------------------------------


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def _in_order(tensor: Tensor, *axes: int) -> Tensor:
    """The same shape, of which memory holds the given axes from the outermost to the innermost."""
    return tensor.permute(axes).contiguous().permute([axes.index(axis) for axis in range(len(axes))])


def codebooks_first(tensor: Tensor) -> Tensor:
    """[C, B, S, ...] in memory."""
    return _in_order(tensor, 2, 0, 1, *range(3, tensor.dim()))


def codebooks_second(tensor: Tensor) -> Tensor:
    """[B, C, S, ...] in memory: no one stride leads from row to row."""
    return _in_order(tensor, 0, 2, 1, *range(3, tensor.dim()))


def rows_last(tensor: Tensor) -> Tensor:
    """[S, C, B, ...] in memory."""
    return _in_order(tensor, 1, 2, 0, *range(3, tensor.dim()))


def batch_last(tensor: Tensor) -> Tensor:
    """[S, C, ..., B] in memory: the last axis is strided too."""
    return _in_order(tensor, *range(1, tensor.dim()), 0)


def expanded(tensor: Tensor) -> Tensor:
    """The first batch entry for all."""
    return tensor[:1].expand_as(tensor)


def one_codebook(tensor: Tensor) -> Tensor:
    """The entries of the first codebook for all."""
    return tensor[:, :, :1].expand_as(tensor)


def a_slice(tensor: Tensor) -> Tensor:
    """Unaligned, amid numbers that no one may read."""
    amid = torch.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    view = tensor.new_full([size + 3 for size in tensor.shape], amid)[(slice(2, -1),) * tensor.dim()]
    return view.copy_(tensor)


_PLACES = (contiguous, codebooks_first, codebooks_second, rows_last, batch_last, expanded, one_codebook, a_slice)
MEMORY: dict[str, Callable[[Tensor], Tensor]] = {place.__name__: place for place in _PLACES}
