"""``join``: ``DistributedDataParallel.join`` for models whose keys learn, or whose hits are counted, in the forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from kvb import _torch
from kvb.modules.bottleneck import KeyValueBottleneck


@contextlib.contextmanager
def join(model: DistributedDataParallel, **options: Any) -> Iterator[None]:
    """``model.join(**options)``, where a process whose data has ended goes on learning from the others' batches.

    Equivalent to empty batches for the rest of the loop in a process whose loader is short. Within ``model.join()``
    itself a forward in which keys learn, or hits are counted, raises: the processes that have joined would not answer.

    Args:
        model: a model in ``DistributedDataParallel`` that runs each ``KeyValueBottleneck`` in it once a forward, in the
            order of ``model.modules()``.
        options: those of ``DistributedDataParallel.join``.
    Raises:
        TypeError: no ``DistributedDataParallel``. ValueError: a bottleneck of ``sync_values``.
    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> from kvb.distributed import join
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> ddp = torch.nn.parallel.DistributedDataParallel(bottleneck)
        >>> with join(ddp):
        ...     ddp(torch.randn(5, 4, 8)).sum().backward()
        >>> del ddp
        >>> dist.destroy_process_group()
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"join(): argument 'model' must be DistributedDataParallel, not {type(model).__name__}")
    bottlenecks = [each for each in model.modules() if isinstance(each, KeyValueBottleneck)]
    if any(each.shares_values for each in bottlenecks):
        raise ValueError(
            "expected a model without sync_values(...), whose backward passes need all processes: give those without "
            "data empty batches instead"
        )

    @torch.no_grad()
    def empty_forward() -> None:
        for each in bottlenecks:
            if each.training:
                each(torch.empty(0, each.num_codebooks, each.dim_keys, device=each.keys.device))

    with _torch.joined_forward(model, empty_forward), model.join(**options):
        yield
