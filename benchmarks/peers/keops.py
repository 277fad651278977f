"""KeOps: the formula on symbolic tensors, compiled for each D; the first search of a D takes many seconds."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers import need


def search(queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """A run returns indices [C, N, 1]."""
    need.compiler("KeOps")
    need.package("pybind11", "pybind11")  # its build needs it, and would fail later
    lazy = need.package("pykeops.torch", "pykeops").LazyTensor
    C, D = keys.shape[0], keys.shape[2]
    rows = queries.permute(2, 0, 1, 3).reshape(C, -1, 1, D).contiguous()
    distances = ((lazy(rows) - lazy(keys[:, None].contiguous())) ** 2).sum(-1)
    distances.argmin(2)  # compiles
    return lambda: distances.argmin(2)
