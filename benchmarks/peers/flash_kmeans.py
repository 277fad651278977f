"""flash-kmeans: its assignment step, a Triton kernel, on float16."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from benchmarks.peers import need
from benchmarks.peers.peer import Peer
from benchmarks.shapes import GPU
from benchmarks.timing import Contestant


def search(given: Any) -> Contestant:
    """Codebooks are its batch; rows are transposed, and rounded to float16, beforehand."""
    assign = need.package("flash_kmeans.assign_euclid_triton", "flash-kmeans").euclid_assign_triton
    need.gpu(given.keys.device, "flash-kmeans")
    B, S, C, D = given.queries.shape
    queries = given.queries.reshape(B * S, C, D).transpose(0, 1).half().contiguous()
    keys, norms = given.keys.half(), queries.float().square().sum(-1)

    def codes(found: Tensor) -> Tensor:
        return found.view(C, B, S).permute(1, 2, 0)

    return given.contestant(functools.partial(assign, queries, keys, norms, use_heuristic=True), codes)


PEERS = (
    Peer(
        "flash-kmeans",
        "on float16, so not exact",
        {"search": search},
        "flash_kmeans",
        "flash-kmeans",
        shapes=tuple(name for name in GPU if name != "paper-1m"),
        quick=False,
    ),
)
