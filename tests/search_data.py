"""What searches on a GPU are tried on: every form of packed keys, and every column of the launch table."""

from __future__ import annotations

import torch

from kvb.testing.data import (
    a_slice,
    batch_last,
    broken,
    clusters,
    codebooks_first,
    codebooks_second,
    contiguous,
    duplicates,
    lattice,
    near_duplicates,
    normal,
    offset,
    one_codebook,
    outliers,
    overflowing,
)


def two_positions(queries):
    """[N / 2, 2, C, D], of which memory holds [N / 2, C, 2, D]."""
    N, _, C, D = queries.shape
    return codebooks_second(queries.view(N // 2, 2, C, D))


# Every value of every column at least twice, and every form of packed keys with every kind of data that may break it.
GRID = [
    # K, D, dtype, data, memory
    (1, 1, torch.float32, normal, contiguous),
    (31, 5, torch.float16, broken, a_slice),
    (31, 64, torch.float32, duplicates, one_codebook),
    (200, 1, torch.float32, lattice, two_positions),
    (200, 11, torch.bfloat16, normal, batch_last),
    (200, 32, torch.float32, outliers, codebooks_first),
    (200, 33, torch.float16, offset, contiguous),
    (256, 10, torch.float32, broken, codebooks_first),
    (256, 64, torch.float32, offset, a_slice),
    (200, 100, torch.float32, outliers, contiguous),
    (257, 5, torch.float32, lattice, one_codebook),
    (257, 14, torch.float16, normal, codebooks_first),
    (257, 30, torch.bfloat16, duplicates, a_slice),
    (257, 130, torch.float32, broken, batch_last),
    (600, 1, torch.float16, outliers, contiguous),
    (600, 10, torch.float32, outliers, two_positions),
    (600, 15, torch.float32, offset, batch_last),
    (600, 32, torch.float32, broken, contiguous),
    (600, 130, torch.float16, duplicates, two_positions),
    (1100, 10, torch.bfloat16, offset, one_codebook),
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
    ("sm_90", 2, 32, torch.float32, near_duplicates),
    ("sm_100", 33, 14, torch.float32, clusters),
    ("sm_90", 200, 32, torch.float32, near_duplicates),
    ("sm_90", 200, 32, torch.float32, clusters),
    ("sm_100", 200, 8, torch.float32, clusters),
    ("gfx942", 256, 32, torch.float32, duplicates),
    ("sm_100", 97, 30, torch.bfloat16, lattice),
    ("sm_90", 256, 20, torch.float16, clusters),
    ("sm_90", 130, 32, torch.float16, outliers),
]
