"""Queries and keys that a filter of float16 products may stumble over, and ways in which queries lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(N: int, C: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 1, C, D), torch.randn(C, K, D)


def near_ties(N, C, K, D):
    """Pairs of keys one unit in the last place apart, and queries between them."""
    queries, keys = normal(N, C, K, D)
    half = K // 2
    keys[:, half : 2 * half] = keys[:, :half]
    keys[:, half : 2 * half, 0] = keys[:, :half, 0].nextafter(torch.tensor(torch.inf))
    queries[:, 0] = keys[torch.arange(C), torch.randint(K, (N, C))]
    return queries, keys


def clusters(N, C, K, D):
    """Few tight clusters: one product cannot tell their keys apart, three can."""
    queries, keys = normal(N, C, K, D)
    places = torch.randn(4, D)
    return places[torch.arange(N) % 4][:, None, None] + queries / 300, places[torch.arange(K) % 4] + keys / 300


def offset(N, C, K, D):
    return tuple(part + 100 for part in normal(N, C, K, D))


def ties(N, C, K, D):
    """Small integers: all distances are exact, most of them equal."""
    return tuple(part.round().clamp(-2, 2) for part in normal(N, C, K, D))


def duplicates(N, C, K, D):
    """Three keys of ten stand twice, and every other query lies next to one of those."""
    queries, keys = normal(N, C, K, D)
    twins = max(1, K * 3 // 10)
    keys[:, K - twins :] = keys[:, :twins]
    queries[::2, 0] = (keys[torch.arange(C), torch.randint(twins, (N, C))] + queries[:, 0] / 100)[::2]
    return queries, keys


def outliers(N, C, K, D):
    """From 1e-8 to 1e8 times as large as the keys, in one tile."""
    queries, keys = normal(N, C, K, D)
    return queries * (10.0 ** (torch.arange(N) % 17 - 8))[:, None, None, None], keys


def broken(N, C, K, D):
    """NaN and Inf in queries and keys, and a codebook without any usable key."""
    queries, keys = normal(N, C, K, D)
    queries[::5, 0, 0, 0], queries[1::7, 0, -1, -1] = torch.nan, torch.inf
    keys[:, ::3, 0], keys[:, 1::5, -1] = torch.nan, -torch.inf
    keys[-1, :, 0] = torch.nan
    return queries, keys


def overflowing(N, C, K, D):
    """Queries whose squares, or products with a scaled key, are more than float32 holds; the first key is broken."""
    queries, keys = normal(N, C, K, D)
    queries *= 10.0 ** (20 + torch.arange(N) % 19)[:, None, None, None]
    keys[:, 0] = torch.nan
    return queries, keys / 100


def contiguous(queries):
    return queries


def codebooks_first(queries):
    return queries.transpose(1, 2).contiguous().transpose(1, 2)


def codebooks_first_in_every_batch(queries):
    """[B, C, S, D] seen as [B, S, C, D]: no one stride leads from row to row."""
    N, _, C, D = queries.shape
    return queries.view(N // 2, 2, C, D).transpose(1, 2).contiguous().transpose(1, 2)


def batch_last(queries):
    return queries.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def expanded(queries):
    return queries[:, :, :1].expand_as(queries)


def a_slice(queries):
    padded = torch.full([size + 3 for size in queries.shape], torch.nan, dtype=queries.dtype)
    view = padded[1:-2, 2:-1, 1:-2, 2:-1]
    return view.copy_(queries)


# Every value of every column at least twice, and every form of packed keys with every kind of data that may break it.
GRID = [
    # K, D, dtype, data, memory
    (1, 1, torch.float32, normal, contiguous),
    (31, 5, torch.float16, broken, a_slice),
    (31, 64, torch.float32, duplicates, expanded),
    (200, 1, torch.float32, ties, codebooks_first_in_every_batch),
    (200, 11, torch.bfloat16, normal, batch_last),
    (200, 32, torch.float32, outliers, codebooks_first),
    (200, 33, torch.float16, offset, contiguous),
    (256, 10, torch.float32, broken, codebooks_first),
    (256, 64, torch.float32, offset, a_slice),
    (200, 100, torch.float32, outliers, contiguous),
    (257, 5, torch.float32, ties, expanded),
    (257, 14, torch.float16, normal, codebooks_first),
    (257, 30, torch.bfloat16, duplicates, a_slice),
    (257, 130, torch.float32, broken, batch_last),
    (600, 1, torch.float16, outliers, contiguous),
    (600, 10, torch.float32, outliers, codebooks_first_in_every_batch),
    (600, 15, torch.float32, offset, batch_last),
    (600, 32, torch.float32, broken, contiguous),
    (600, 130, torch.float16, duplicates, codebooks_first_in_every_batch),
    (1100, 10, torch.bfloat16, offset, expanded),
    (1100, 14, torch.float32, duplicates, contiguous),
    (1100, 33, torch.float32, outliers, a_slice),
    (257, 11, torch.float64, offset, a_slice),
    (257, 14, torch.float32, overflowing, contiguous),
    (31, 100, torch.float64, broken, codebooks_first),
]

# Small codebooks of which a first product leaves many rows open, and the column of the launch table that searches them.
OPEN = [
    # target, K, D, dtype, data
    ("sm_90", 1, 3, torch.float32, outliers),
    ("sm_90", 2, 32, torch.float32, near_ties),
    ("sm_100", 33, 14, torch.float32, clusters),
    ("sm_90", 200, 32, torch.float32, near_ties),
    ("sm_90", 200, 32, torch.float32, clusters),
    ("sm_100", 200, 8, torch.float32, clusters),
    ("gfx942", 256, 32, torch.float32, duplicates),
    ("sm_100", 97, 30, torch.bfloat16, ties),
    ("sm_90", 256, 20, torch.float16, clusters),
    ("sm_90", 130, 32, torch.float16, outliers),
]
