"""What the tests of interpreted kernels share: a look at every launch, and the reference as the judge of a search."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb import reference
from kvb.kernels import (
    launch_filter,
    launch_keys,
    launch_pack,
    launch_scan,
    launch_search,
    launch_shared,
    launch_statistics,
    launch_training,
    launch_values,
    launcher,
)

op = torch.ops.kvb
LAUNCHERS = (
    *(launch_filter, launch_keys, launch_pack, launch_scan, launch_shared, launch_statistics, launch_training),
    launch_values,
)
FEW = launch_search.FEW


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, int]  # numbers only; ``count``, of listed rows, and ``opened`` as the kernel left them


class Spy(list[Launch]):
    """Every launch, in order."""

    def run(self, kernel: Any, grid: tuple[int, ...], *options: launcher.Options, **arguments: Any) -> None:
        launcher.run(kernel, grid, *options, **arguments)
        for name in ("count", "opened"):
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = int(arguments[name].sum())
        numbers = {name: value for name, value in arguments.items() if type(value) is int}
        self.append(Launch(kernel.fn.__name__, grid, numbers))

    @property
    def names(self) -> list[str]:
        return [launch.kernel for launch in self]

    def listed(self) -> int:
        """How many rows the filter left to ``rescan``."""
        return sum(launch.arguments["count"] for launch in self if launch.kernel == "rescan")

    def opened(self) -> int:
        """How many rows ``resident`` left to ``refine``."""
        return sum(launch.arguments["opened"] for launch in self if launch.kernel == "refine")


def require_the_nearest(queries, keys, mask=None, topk=1, packed=None) -> None:
    """The kernels find what the reference finds: the same indices, and distances up to their last rounding."""
    packed = op.pack_keys(keys) if packed is None else packed
    indices, distances = op.nearest(queries, keys, packed, mask, topk)
    want = reference.nearest(queries, keys, reference.pack_keys(keys), mask, topk)
    assert torch.equal(indices, want[0]), f"{int((indices != want[0]).sum())} of {indices.numel()} differ"
    unit = torch.finfo(distances.dtype).eps
    rounding = unit if distances.dtype == torch.float32 else 4 * unit
    torch.testing.assert_close(distances, want[1], rtol=rounding, atol=0, equal_nan=True)
