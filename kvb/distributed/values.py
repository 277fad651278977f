"""``sync_values``: the gradient of value tables of all processes, from what was fetched instead of whole tables."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from kvb import _torch, collectives
from kvb.collectives import Group, Members
from kvb.modules.bottleneck import KeyValueBottleneck

_Module = TypeVar("_Module", bound=nn.Module)


def sync_values(module: _Module, process_group: Group = None) -> _Module:
    """Share the gradients of all value tables in a module, and leave its bottlenecks out of PyTorch's own sharing.

    Equivalent to what ``DistributedDataParallel`` does with ``values``, the mean of the processes' gradients, within
    the rounding of sums; but in the backward pass every process sends its codes and the gradient of what it fetched,
    instead of a table. For B samples, C codebooks and pooled values of V numbers ``B * (2 * C + 4 * V)`` bytes,
    whatever K is. All processes add up the same rows, so that optimizers take the same steps. With ``sparse_grad`` the
    gradient is sparse, otherwise dense.

    Values, keys and statistics become those of the first process here, and ``DistributedDataParallel`` then ignores
    them: bottlenecks keep them alike by themselves. All processes run the same number of backward passes through each
    bottleneck, on batches of any size. Without ``DistributedDataParallel`` it works as well.

    Args:
        module: what ``DistributedDataParallel`` will wrap, or any other module with a ``KeyValueBottleneck`` in it; for
            ``fully_shard`` name its values as ``ignored_params``.
        process_group: the default one if None; False to share no longer.
    Returns:
        the module.
    Raises:
        TypeError: not a module. ValueError: a module without a ``KeyValueBottleneck``.
    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> from kvb.distributed import sync_values
        >>> model = sync_values(kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys())
        >>> model(torch.randn(5, 4, 8), pool="mean").square().mean().backward()
        >>> dist.destroy_process_group()
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"sync_values(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    found = {name: each for name, each in module.named_modules() if isinstance(each, KeyValueBottleneck)}
    if not found:
        raise ValueError(f"expected a module with a KeyValueBottleneck in it, got {type(module).__name__} without one")
    ignored = _torch.ignored_in_ddp(module)
    for name, bottleneck in found.items():
        bottleneck._shares_values = None if process_group is False else Members(process_group)
        own = {**dict(bottleneck.named_buffers(recurse=False)), "values": bottleneck.values}
        collectives.of_the_first([tensor.data for tensor in own.values()], process_group)
        ignored |= {f"{name}.{tensor}" for tensor in own} | {f"{name}.{tensor}".lstrip(".") for tensor in own}
    # ``torch.compile`` hands what is noted here on to its wrapper, in which all names begin so.
    _torch.ignore_in_ddp(module, ignored | {f"_orig_mod.{name}" for name in ignored})
    return module
