"""scikit-learn: ``pairwise_distances_argmin``, one codebook after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from benchmarks.peers import need


def search(queries: Tensor, keys: Tensor) -> Callable[[], list[np.ndarray]]:
    """Queries are made contiguous beforehand; a run returns C arrays [N]."""
    nearest = need.package("sklearn.metrics", "scikit-learn").pairwise_distances_argmin
    C, D = keys.shape[0], keys.shape[2]
    rows = [row.contiguous().numpy() for row in queries.permute(2, 0, 1, 3).reshape(C, -1, D)]
    books = [key.contiguous().numpy() for key in keys]
    return lambda: [nearest(row, book) for row, book in zip(rows, books, strict=True)]
