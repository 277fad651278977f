"""Who has what: a mesh dimension over which a table is split, and one over which batches are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from kvb import collectives
from kvb.collectives import Group

CODEBOOKS, PAIRS = 0, 1  # the axis of [C, K, ...] that is split


class Layout(NamedTuple):
    """How tables [C, K, ...] are split over processes, and which part is this one's."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]  # one for each dimension of the mesh
    axis: int  # CODEBOOKS or PAIRS
    size: int  # of that axis in the whole table
    shards: Group  # the processes that together have a table; False if this one has all of it
    data: Group  # the processes that have the same part, and other batches; False for none

    @classmethod
    def of(cls, values: DTensor) -> Layout:
        """That of values [C, K, V]."""
        return cls.on(values.device_mesh, values.placements, values.shape)

    @classmethod
    def on(cls, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> Layout:
        """At most one dimension of the mesh splits a table of this shape, and at most one other has other batches."""
        split = [dim for dim, placement in enumerate(placements) if isinstance(placement, Shard)]
        others = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
        axes = [placement.dim for placement in placements if isinstance(placement, Shard)]
        if len(split) + len(others) < mesh.ndim or len(split) > 1 or len(others) > 1 or axes not in ([], [0], [1]):
            raise ValueError(
                "expected values split over codebooks, Shard(0), or over pairs, Shard(1), on one dimension of the mesh "
                f"and replicated on at most one other, got {tuple(placements)}"
            )
        axis = axes[0] if axes else CODEBOOKS
        shards, data = (mesh.get_group(dims[0]) if dims else None for dims in (split, others))
        layout = cls(mesh, tuple(placements), axis, shape[axis], shards or False, data or False)
        if 0 in layout.sizes:
            what = ("codebooks", "pairs")[axis]
            raise ValueError(
                f"{layout.size} {what} in {len(layout.sizes)} processes: with {layout.sizes[0]} in each, "
                f"{layout.sizes.count(0)} would have none; split over fewer processes, or add {what}"
            )
        return layout

    @property
    def sizes(self) -> list[int]:
        """How much of the axis each process has: as ``torch.chunk`` splits it, and DTensor."""
        processes = collectives.world(self.shards)
        largest = -(-self.size // processes)
        return [max(0, min(largest, self.size - rank * largest)) for rank in range(processes)]

    @property
    def begin(self) -> int:
        """Where this process's part begins."""
        return sum(self.sizes[: collectives.rank(self.shards)])

    @property
    def here(self) -> slice:
        """This process's part of the axis."""
        return slice(self.begin, self.begin + self.sizes[collectives.rank(self.shards)])

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor [C, K, ...]: of a DTensor on any mesh, or one that all processes have."""
        if isinstance(whole, DTensor):
            if whole.device_mesh != self.mesh or tuple(whole.placements) != self.placements:
                whole = whole.redistribute(self.mesh, self.placements)
            return whole.to_local()
        return whole[self.here] if self.axis == CODEBOOKS else whole[:, self.here]

    def whole(self, part: Tensor) -> DTensor:
        """The DTensor [C, K, ...] of which this process has a part."""
        sizes = [*part.shape]
        sizes[self.axis] = self.size
        shape = torch.Size(sizes)
        stride = torch.empty(shape, device="meta").stride()
        part = part.contiguous()
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)
