"""faiss: one ``IndexFlatL2`` per codebook, and its own k-means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import need
from benchmarks.peers.finders import fetch
from benchmarks.peers.peer import Peer
from benchmarks.shapes import SHAPES
from benchmarks.timing import Contestant, quickest

# Small searches go one query at a time, and large ones in blocks; this threshold tells them apart.
FAISS_PATHS = {"in blocks": 1, "one by one": 1 << 30}


def faiss() -> ModuleType:
    """faiss, on as many threads as torch."""
    module = need.package("faiss", "faiss-cpu")
    module.omp_set_num_threads(torch.get_num_threads())
    return module


class FaissSearch:
    """One ``IndexFlatL2`` per codebook, queries made contiguous beforehand; a call returns indices [C, N, T].

    faiss has two ways to search, and its choice between them is poor at some shapes: the faster one, tried on two
    codebooks, is taken. ``path`` names it.

    The C++ method is called directly: with one query and 256 codebooks faiss' Python wrapper would count. Pointers do
    not keep memory alive; the attributes do.
    """

    def __init__(self, queries: Tensor, keys: Tensor, topk: int = 1) -> None:
        self.module = module = faiss()
        (C, _, D), self.N, self.topk = keys.shape, queries.shape[0] * queries.shape[1], topk
        self.rows = queries.permute(2, 0, 1, 3).reshape(C, self.N, D).contiguous()
        self.indices = torch.empty(C, self.N, topk, dtype=torch.int64)
        self.distances = torch.empty(C, self.N, topk)
        self.books = [module.IndexFlatL2(D) for _ in range(C)]
        self.update(keys)
        arrays = zip(self.rows, self.distances, self.indices, strict=True)
        self.pointers = [tuple(module.swig_ptr(part.numpy()) for part in parts) for parts in arrays]
        self.path = quickest({path: functools.partial(self._search, path, 2) for path in FAISS_PATHS})

    def update(self, keys: Tensor) -> None:
        """Other keys of the same shape."""
        for book, key in zip(self.books, keys, strict=True):
            book.reset()
            book.add(key.numpy())

    def _search(self, path: str, books: int) -> Tensor:
        self.module.cvar.distance_compute_blas_threshold = FAISS_PATHS[path]
        for book, (rows, distances, indices) in zip(self.books[:books], self.pointers, strict=False):
            book.search_c(self.N, rows, self.topk, distances, indices)
        return self.indices

    def __call__(self) -> Tensor:
        return self._search(self.path, len(self.books))


def faiss_kmeans(queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """One iteration of faiss' own k-means in every codebook, from the given keys; a run returns [C, K, D]."""
    module = faiss()
    (C, K, D), N = keys.shape, queries.shape[0] * queries.shape[1]
    rows = queries.permute(2, 0, 1, 3).reshape(C, N, D).contiguous().numpy()
    start = keys.numpy()
    options = {"min_points_per_centroid": 1, "max_points_per_centroid": N, "check_input_data_for_NaNs": False}

    def run() -> Tensor:
        module.cvar.distance_compute_blas_threshold = FAISS_PATHS["in blocks"]
        means = torch.empty(C, K, D)
        for c in range(C):
            learner = module.Kmeans(D, K, niter=1, **options)
            learner.train(rows[c], init_centroids=start[c])
            means[c] = torch.from_numpy(learner.centroids)
        return means

    return run


def search(given: Any) -> Contestant:
    need.cpu(given.keys.device, "faiss-cpu")
    return given.contestant(FaissSearch(given.queries, given.keys), given.by_codebook)


def forward(given: Any) -> Contestant:
    B, S, C, _ = given.queries.shape
    index = FaissSearch(given.queries, given.keys)

    def run() -> tuple[Tensor, Tensor]:
        found = index().view(C, B, S).permute(1, 2, 0)
        return fetch(given.values, found), found

    return given.contestant(run)


PEERS = (
    Peer(
        "faiss",
        "IndexFlatL2, one per codebook",
        {"search": search, "forward": forward},
        "faiss",
        "faiss-cpu",
        shapes=tuple(SHAPES),
    ),
)
