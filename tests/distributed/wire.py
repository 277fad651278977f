"""Counts what is handed to collectives, and in which."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"allreduce_": "all_reduce", "allgather_": "all_gather", "_allgather_base_": "all_gather"}


class Counted(TorchDispatchMode):
    """Within: bytes and calls of this process by kind; ``all_gather`` counts what a process gives.

    Messages of fewer than 64 bytes, sizes and single numbers, count as calls only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            kind = KINDS.get(name, name)
            given = tree_leaves(args[1] if kind == "all_gather" else args[0])
            size = sum(each.nbytes for each in given)
            self.calls[kind] += 1
            self.bytes[kind] += size if size >= 64 else 0
        return func(*args, **(kwargs or {}))
