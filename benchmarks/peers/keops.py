"""KeOps: the formula on symbolic tensors, compiled for each D; the first search of a D takes many seconds."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import need
from benchmarks.peers.peer import Peer
from benchmarks.timing import Contestant


def search(given: Any) -> Contestant:
    """A run returns indices [C, N, 1]."""
    need.compiler("KeOps")
    need.package("pybind11", "pybind11")  # its build needs it, and would fail later
    lazy = need.package("pykeops.torch", "pykeops").LazyTensor
    need.cpu(given.keys.device, "KeOps")
    C, D = given.keys.shape[0], given.keys.shape[2]
    rows = given.queries.permute(2, 0, 1, 3).reshape(C, -1, 1, D).contiguous()
    distances = ((lazy(rows) - lazy(given.keys[:, None].contiguous())) ** 2).sum(-1)
    distances.argmin(2)  # compiles
    return given.contestant(lambda: distances.argmin(2), given.by_codebook)


PEERS = (
    Peer(
        "pykeops",
        "LazyTensor, compiled for each D",
        {"search": search},
        "pykeops",
        "pykeops pybind11",
        shapes=("one_sample",),  # half a minute of compiling for each D
        quick=False,
        compiles=True,
    ),
)
