"""``parallelize``: split the tables of a model over a mesh of devices, in place, as ``fully_shard`` does."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from kvb.distributed.codebooks import ByCodebooks
from kvb.distributed.layout import ALONE, CODEBOOKS, PAIRS, Layout
from kvb.distributed.pairs import ByPairs
from kvb.distributed.sharding import Sharded
from kvb.modules.bottleneck import KeyValueBottleneck

_Module = TypeVar("_Module", bound=nn.Module)


def parallelize(
    module: _Module,
    mesh: DeviceMesh,
    *,
    codebooks: str | None = None,
    pairs: str | None = None,
    data: str | None = None,
) -> _Module:
    """Split every ``KeyValueBottleneck`` in a module over dimensions of a mesh, in place; returns the module.

    Equivalent to the module in one process: the same indices bit for bit, outputs and steps within the rounding of
    sums. ``values`` becomes a DTensor, which optimizers, ``torch.distributed.checkpoint`` and
    ``torch.nn.utils.clip_grad_norm_`` know. All processes get the tables of the mesh's first process; on the meta
    device nothing is sent or allocated: then ``to_empty(device=...)`` and ``reset_parameters()``, or load a checkpoint.

    Args:
        module: a bottleneck, or a model with some. Call this before an optimizer gets its parameters.
        mesh: with names of its dimensions, as ``init_device_mesh(..., mesh_dim_names=...)`` makes it.
        codebooks: the dimension whose n processes have C/n codebooks each, as ``torch.chunk`` deals them out.
            Everything stays in the process but one ``all_reduce`` of pooled values [B, *shape, V]; without pooling, and
            for indices, an ``all_gather``. Keys learn as in one process.
        pairs: the dimension whose n processes have K/n pairs of every codebook each, for few giant codebooks. Each
            process finds its nearest pairs, and the nearest of those win, the lowest index where several are as near.
            Keys move by averages; ``init_keys``, dead-code replacement and sampling have to come before.
        data: the dimension whose processes have batches of their own, and the same part of the table: gradients of
            values are averaged over it, statistics of keys added.
    Raises:
        TypeError: no module, or no mesh. ValueError: no bottleneck in it, or one that is split already; a dimension
        that the mesh does not have, or that leaves a process without any codebook or pair; both codebooks and pairs, or
        nothing at all. NotImplementedError: an option of the bottleneck that goes with no split over pairs.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"parallelize(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"parallelize(): argument 'mesh' must be DeviceMesh, not {type(mesh).__name__}")
    if codebooks is not None and pairs is not None:
        raise ValueError("give either codebooks or pairs: a table is split over one of them")
    given = {"codebooks": codebooks, "pairs": pairs, "data": data}
    wanted = {argument: name for argument, name in given.items() if name is not None}
    if not wanted:
        raise ValueError("give the name of a dimension of the mesh as codebooks=, pairs= or data=")
    names = mesh.mesh_dim_names or ()
    for argument, name in wanted.items():
        if name not in names:
            raise ValueError(f"{argument}={name!r} is no dimension of the mesh, whose dimensions are {names}")
    if len(set(wanted.values())) < len(wanted):
        raise ValueError(f"expected a dimension of its own for each, got {wanted}")
    found = [each for each in module.modules() if isinstance(each, KeyValueBottleneck)]
    if not found:
        raise ValueError(f"{type(module).__name__} holds no KeyValueBottleneck")
    for each in found:
        _split(each, mesh, wanted)
    return module


def _split(bottleneck: KeyValueBottleneck, mesh: DeviceMesh, wanted: dict[str, str]) -> None:
    if isinstance(bottleneck, Sharded):
        raise ValueError("the bottleneck is split already; split a module once")
    axis = PAIRS if "pairs" in wanted else CODEBOOKS
    used = mesh[tuple(name for name in mesh.mesh_dim_names or () if name in wanted.values())]
    placements = tuple(Replicate() if name == wanted.get("data") else Shard(axis) for name in used.mesh_dim_names or ())
    split = wanted.get("pairs", wanted.get("codebooks"))
    shards = ALONE if split is None else mesh.get_group(split)
    data = mesh.get_group(wanted["data"]) if "data" in wanted else ALONE
    layout = Layout(used, placements, axis, bottleneck.values.shape[axis], shards, data)
    if 0 in layout.sizes:
        what = "pairs" if axis == PAIRS else "codebooks"
        raise ValueError(
            f"{layout.size} {what} in {len(layout.sizes)} processes: with {layout.sizes[0]} in each, "
            f"{layout.sizes.count(0)} would have none; split over fewer processes, or add {what}"
        )
    way = ByPairs if axis == PAIRS else ByCodebooks
    way.require(bottleneck)
    bottleneck.__class__ = _kind(way, type(bottleneck))
    way.place(bottleneck, layout)  # type: ignore[arg-type]  # which it is by now


@functools.cache
def _kind(way: Any, of: Any) -> Any:
    """The class of bottlenecks of a class that are split in a way."""
    return type(f"{way.__name__}{of.__name__}", (way, of), {"__doc__": way.__doc__})
