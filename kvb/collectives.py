"""What the processes of a group know together: sums, gathered rows, shared random numbers, loaders of unequal length.

Every function is the identity in a single process. The number of collectives depends on arguments alone, never on data,
so that no process waits for one that another skips. Results are bitwise the same in all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
Group = dist.ProcessGroup | None  # None: the default group


def world(group: Group = None) -> int:
    """How many processes take part; 1 without ``torch.distributed``, and for a process that is not in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return max(1, dist.get_world_size(group))


def rank(group: Group = None) -> int:
    """This process's number in the group; 0 where there is no other."""
    return dist.get_rank(group) if world(group) > 1 else 0


def total(tensors: tuple[Tensor, ...], group: Group = None) -> tuple[Tensor, ...]:
    """The sums of tensors of one dtype over all processes, in one ``all_reduce``."""
    if world(group) == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def gathered(tensor: Tensor, group: Group = None) -> list[Tensor]:
    """The tensors of all processes, of one shape, in the order of their ranks."""
    size = world(group)
    if size == 1:
        return [tensor]
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)  # as bytes: backends lack small integers
    parts = [torch.empty_like(raw) for _ in range(size)]
    dist.all_gather(parts, raw, group=group)
    return [part.view(tensor.dtype).view(tensor.shape) for part in parts]


def joined(rows: Tensor, group: Group = None) -> Tensor:
    """Rows [n, ...] of all processes, in the order of their ranks; n may differ. Two collectives: sizes, then rows.

    Equivalent to ``torch.cat`` over the processes.
    """
    if world(group) == 1:
        return rows
    sizes = [int(size) for size in gathered(torch.tensor([len(rows)], device=rows.device), group)]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = gathered(padded, group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def shared_seed(
    group: Group = None, generator: torch.Generator | None = None, device: torch.device | None = None
) -> int:
    """A random seed drawn by the first process, known to all of them."""
    where = "cpu" if generator is None else generator.device
    seed = torch.randint(1 << 62, (1,), generator=generator, device=where).to(device or "cpu")
    return int(gathered(seed, group)[0])


def in_step(items: Iterable[Item], group: Group = None, device: torch.device | None = None) -> Iterator[Item | None]:
    """This process's items, then None until the process with the most items is through: one ``all_reduce`` per step."""
    source = iter(items)
    while True:
        item = next(source, None)
        if world(group) == 1:
            if item is None:
                return
        else:
            left = torch.tensor([float(item is not None)], device=device)
            dist.all_reduce(left, group=group)
            if not left.item():
                return
        yield item


def meet(
    what: str, group: Group = None, *, device: torch.device | None = None, timeout: timedelta | None = None
) -> None:
    """Return when all processes are here.

    Raises:
        RuntimeError: another process did not come within the timeout of the group: it did not call ``what``.
    """
    if world(group) == 1:
        return
    here = torch.ones(1, device=device)
    try:
        work = dist.all_reduce(here, group=group, async_op=True)
        work.wait(timeout) if timeout else work.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} waited for the {world(group)} processes of its group, and not all of them called it: call it on "
            f"every process, or pass sync=False to leave the others out ({error})"
        ) from error
