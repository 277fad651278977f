"""``parallelize``: split the tables of a model over a mesh of devices, in place, as ``fully_shard`` does."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from kvb.distributed.codebooks import ByCodebooks
from kvb.distributed.layout import CODEBOOKS, PAIRS, Layout
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
    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> from kvb.distributed import parallelize
        >>> mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("table",))
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> parallelize(bottleneck, mesh, codebooks="table")(torch.randn(5, 4, 8), pool="mean").shape
        torch.Size([5, 10])
        >>> dist.destroy_process_group()
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"parallelize(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    wanted = _wanted(mesh, codebooks, pairs, data)
    found = [each for each in module.modules() if isinstance(each, KeyValueBottleneck)]
    if not found:
        raise ValueError(f"{type(module).__name__} holds no KeyValueBottleneck")
    if any(isinstance(each, Sharded) for each in found):
        raise ValueError("a bottleneck in the module is split already: split each once")
    axis, way = (PAIRS, ByPairs) if pairs is not None else (CODEBOOKS, ByCodebooks)
    used = mesh[wanted]
    placements = [Replicate() if name == data else Shard(axis) for name in wanted]
    layouts = [Layout.on(used, placements, each.values.shape) for each in found]
    for each in found:
        way.require(each)
    for each, layout in zip(found, layouts, strict=True):
        each.__class__ = _kind(way, each.__class__)
        way.place(each, layout)  # type: ignore[arg-type]  # which it is by now
    return module


def _wanted(mesh: DeviceMesh, codebooks: str | None, pairs: str | None, data: str | None) -> tuple[str, ...]:
    """The names given, each of a dimension of the mesh, in its order."""
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
    return tuple(name for name in names if name in wanted.values())


_kinds: dict[tuple[Any, Any], Any] = {}  # the classes made so far


def _kind(way: Any, of: Any) -> Any:
    """The class of bottlenecks of a class that are split in a way."""
    if (way, of) not in _kinds:
        _kinds[way, of] = type(f"{way.__name__}{of.__name__}", (way, of), {"__doc__": way.__doc__})
    return _kinds[way, of]
