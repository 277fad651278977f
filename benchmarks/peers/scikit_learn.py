"""scikit-learn: ``pairwise_distances_argmin``, one codebook after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers import need
from benchmarks.peers.peer import Peer
from benchmarks.timing import Contestant


def search(given: Any) -> Contestant:
    """Queries are made contiguous beforehand; a run returns C arrays [N]."""
    nearest = need.package("sklearn.metrics", "scikit-learn").pairwise_distances_argmin
    need.cpu(given.keys.device, "scikit-learn")
    C, D = given.keys.shape[0], given.keys.shape[2]
    rows = [row.contiguous().numpy() for row in given.queries.permute(2, 0, 1, 3).reshape(C, -1, D)]
    books = [key.contiguous().numpy() for key in given.keys]

    def run() -> list[np.ndarray]:
        return [nearest(row, book) for row, book in zip(rows, books, strict=True)]

    return given.contestant(run, given.by_codebook)


PEERS = (Peer("scikit-learn", "pairwise_distances_argmin", {"search": search}, "sklearn", "scikit-learn", quick=False),)
