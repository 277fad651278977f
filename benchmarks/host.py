"""What the host does in a call on a GPU: ``python -m benchmarks.host``, without a GPU.

Kernels are compiled for a GPU that is not there, and launching one does nothing. What is left is Python, Triton's part
of a launch, and the allocator of the CPU: processor time, the least of many runs, as other programs may disturb it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.timing import processor_seconds
from benchmarks.triton_static.offline import TARGETS, Driver, compiling_for
from kvb.kernels import launch

# Microseconds that a call may take, at most: small tensors, so that nothing but the host counts.
BARS = {"nearest, filter": 100, "nearest, small codebook": 90, "gather": 40, "lookup, filter": 120}
CALLS, REPEATS = 50, 40


class Idle(Driver):
    """Kernels load, and launches do nothing."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        # A module, so that the kernel counts as loaded.
        self.utils.load_binary = lambda *_: (object(), 1, 0, 0, 1024)  # type: ignore[method-assign]

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


def calls(N: int = 256, C: int = 8) -> dict[str, Callable[[], Any]]:
    """The calls of BARS, on tensors of the CPU."""

    def search(operator: Callable[..., Any], K: int, D: int, *rest: Any) -> Callable[[], Any]:
        queries, keys = torch.zeros(N, 1, C, D), torch.zeros(C, K, D)
        packed = torch.zeros(C, launch.packed_nbytes(K, D, keys.dtype), dtype=torch.uint8)
        return lambda: operator(queries, keys, packed, *rest)

    values, indices = torch.zeros(C, 4096, 10), torch.zeros(N, 1, C, dtype=torch.int64)
    return {
        "nearest, filter": search(launch.nearest, 4096, 10, None, 1),
        "nearest, small codebook": search(launch.nearest, 200, 32, None, 1),
        "gather": lambda: launch.gather(values, indices, "none", "bscv"),
        "lookup, filter": search(launch.lookup, 4096, 10, values, None, "none"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    above = False
    with compiling_for(options.target, Idle):
        for name, call in calls().items():
            found = 1e6 * processor_seconds(call, CALLS, REPEATS)
            above |= found > BARS[name]
            print(f"{name:<24} {found:6.1f} us of at most {BARS[name]}{'' if found <= BARS[name] else ', above'}")
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
