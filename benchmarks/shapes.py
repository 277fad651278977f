"""The shapes that are measured, by name.

Letters as in ``kvb/ops``: B batch, S positions, C codebooks, K pairs per codebook, D key dim, V value dim; N = B*S.
"""

from __future__ import annotations

from typing import NamedTuple


class Search(NamedTuple):
    """A search of N queries per codebook: queries [N, 1, C, D], keys [C, K, D]."""

    N: int
    C: int
    K: int
    D: int

    @property
    def flops(self) -> int:
        """One multiplication and one addition for every coordinate of every pair of query and key."""
        return 2 * self.N * self.C * self.K * self.D


class Module(NamedTuple):
    """A whole bottleneck: x [B, C, *positions, D], values [C, K, V]."""

    B: int
    C: int
    K: int
    D: int
    V: int
    positions: tuple[int, ...]

    @property
    def S(self) -> int:
        size = 1
        for length in self.positions:
            size *= length
        return size

    @property
    def N(self) -> int:
        return self.B * self.S

    @property
    def search(self) -> Search:
        return Search(self.N, self.C, self.K, self.D)

    def small(self) -> Module:
        """The same shape in everything but size: for a test."""
        positions = tuple(min(length, 3) for length in self.positions)
        return Module(min(self.B, 5), min(self.C, 3), min(self.K, 40), min(self.D, 8), min(self.V, 6), positions)


# The shapes of every suite, and of the tests: both seed documents, the paper's experiments, and two extremes.
SHAPES = {
    "seed_a": Module(B=256, C=4, K=256, D=128, V=128, positions=(64,)),
    "seed_b": Module(B=32, C=64, K=200, D=32, V=64, positions=(4, 8, 16)),
    "paper_cifar10": Module(B=256, C=256, K=4096, D=14, V=10, positions=()),
    "paper_cifar100": Module(B=256, C=256, K=4096, D=14, V=100, positions=()),
    "nlp_dkvb": Module(B=32, C=64, K=4096, D=12, V=12, positions=(256,)),
    "one_sample": Module(B=1, C=256, K=4096, D=14, V=10, positions=()),
    "large_k": Module(B=16384, C=4, K=65536, D=16, V=64, positions=()),
}
FEW = ("seed_a", "seed_b", "paper_cifar10", "one_sample")  # where no peer needs many seconds
PAPER, SEED_B = SHAPES["paper_cifar10"], SHAPES["seed_b"]

SEARCH = {
    "seed-b": Search(16384, 16, 200, 32),
    "k1024-d32": Search(16384, 16, 1024, 32),
    "k4096-d8": Search(16384, 4, 4096, 8),
    "k4096-d16": Search(16384, 4, 4096, 16),
    "k1024-d64": Search(16384, 4, 1024, 64),
    "k1024-d128": Search(16384, 4, 1024, 128),
    "paper": PAPER.search,
    "one-sample": SHAPES["one_sample"].search,
    "one-codebook": Search(16384, 1, 4096, 16),
    "k65536-d16": SHAPES["large_k"].search,
    "topk-d14": Search(512, 8, 4096, 14),
    "topk-d64": Search(4096, 1, 1024, 64),
    "smoke": Search(64, 2, 32, 8),
}


class Lookup(NamedTuple):
    """A search of N queries per codebook and the values of what it finds: values [C, K, V]; all of it float32."""

    N: int
    C: int
    K: int
    D: int
    V: int

    @property
    def query_bytes(self) -> int:
        return 4 * self.N * self.C * self.D

    @property
    def key_bytes(self) -> int:
        return 4 * self.C * self.K * self.D


# On a GPU: the paper's sizes from one small batch to a whole data set, many positions, and few large codebooks.
GPU = {
    "paper-256": Lookup(256, 256, 4096, 10, 10),
    "paper-8k": Lookup(8192, 256, 4096, 12, 10),
    "paper-131k": Lookup(131072, 256, 4096, 14, 10),
    "paper-1m": Lookup(1_000_000, 256, 4096, 10, 10),
    "seed": Lookup(131072, 64, 200, 32, 64),
    "k65536-d64": Lookup(65536, 1, 65536, 64, 64),
    "k4096-d128": Lookup(1 << 20, 1, 4096, 128, 128),
    "k65536-d8": Lookup(131072, 4, 65536, 8, 64),
    "few-queries": Lookup(16, 256, 4096, 10, 10),
}

KMEANS = Search(50_000, 256, 4096, 14)
KMEANS_SCALED = Search(16384, 16, 4096, 14)
