"""What the processes of a group know together: sums, gathered rows, shared random numbers, loaders of unequal length.

Every function is the identity in a single process. The number of collectives depends on arguments alone, never on data,
so that no process waits for one that another skips. Results are bitwise the same in all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvb import _torch

Item = TypeVar("Item")
Group = dist.ProcessGroup | Literal[False] | None  # None: the default group; False: this process alone


class Members:
    """A process group as an attribute of a module: copies of the module share it, and its pickles leave it behind."""

    __slots__ = ("group",)

    def __init__(self, group: Group = None) -> None:
        if not (group is None or group is False or isinstance(group, dist.ProcessGroup | int)):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, None for the default one or False for this "
                f"process alone, got {type(group).__name__}"
            )
        self.group = group

    def __deepcopy__(self, memo: Any) -> Members:
        return self

    def __reduce__(self) -> Any:
        return Members, (False if self.group is False else None,)


def world(group: Group = None) -> int:
    """How many processes take part; 1 without ``torch.distributed``, and for a process that is not in the group."""
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return 1
    return max(1, dist.get_world_size(group))


def rank(group: Group = None) -> int:
    """This process's number in the group; 0 where there is no other."""
    return dist.get_rank(group or None) if world(group) > 1 else 0


def total(tensors: tuple[Tensor, ...], group: Group = None) -> tuple[Tensor, ...]:
    """The sums of tensors of one dtype over all processes, in one ``all_reduce``."""
    if world(group) == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group or None)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def gathered(tensor: Tensor, group: Group = None) -> list[Tensor]:
    """The tensors of all processes, of one shape, in the order of their ranks."""
    size = world(group)
    if size == 1:
        return [tensor]
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)  # as bytes: backends lack small integers
    parts = [torch.empty_like(raw) for _ in range(size)]
    dist.all_gather(parts, raw, group=group or None)
    return [part.view(tensor.dtype).view(tensor.shape) for part in parts]


def parts(tensors: Sequence[Tensor], group: Group = None, sizes: Sequence[int] | None = None) -> list[list[Tensor]]:
    """Of each tensor [n, ...], what every process has, in the order of their ranks; n may differ among processes.

    Two collectives: sizes, then the rows of all tensors. The host waits for the sizes, unless all processes know them.
    """
    if world(group) == 1:
        return [[tensor] for tensor in tensors]
    n = len(tensors[0])
    if sizes is None:
        sizes = [int(size) for size in gathered(torch.tensor([n], device=tensors[0].device), group)]
    raw = [tensor.contiguous().view(n, tensor.shape[1:].numel()).view(torch.uint8) for tensor in tensors]
    padded = raw[0].new_zeros((max(sizes), sum(part.shape[1] for part in raw)))
    padded[:n] = torch.cat(raw, 1)
    found: list[list[Tensor]] = [[] for _ in tensors]
    for size, each in zip(sizes, gathered(padded, group), strict=True):
        columns = each[:size].split([part.shape[1] for part in raw], 1)
        for place, tensor, column in zip(found, tensors, columns, strict=True):
            place.append(column.contiguous().view(tensor.dtype).view(size, *tensor.shape[1:]))
    return found


def joined(rows: Tensor, group: Group = None) -> Tensor:
    """Rows [n, ...] of all processes, in the order of their ranks; n may differ. Two collectives: sizes, then rows.

    Equivalent to ``torch.cat`` over the processes.
    """
    return rows if world(group) == 1 else torch.cat(parts((rows,), group)[0])


def same(first: Group, second: Group) -> bool:
    """Whether two groups, neither of which is False, are one: None is the default group."""
    return (first or dist.group.WORLD) is (second or dist.group.WORLD)


def as_codes(indices: Tensor, K: int) -> Tensor:
    """Integers from -1 to K - 1 in as few bytes as they take."""
    return indices.to(torch.int16 if K <= 1 << 15 else torch.int32)


def best(rows: Tensor, priority: Tensor, group: Group = None) -> tuple[Tensor, Tensor]:
    """Of the rows [C, R, D] of all processes the R with the highest priority [C, R], best first, and their priorities.

    Two collectives: the priorities, then the rows, each from the process that has it. A row that is not finite, and
    whose priority is therefore lower than any other, may come back as zeros.
    """
    if world(group) == 1:
        return rows, priority
    R = priority.shape[1]
    top = torch.cat(gathered(priority, group), 1).topk(R)
    owner, place = top.indices // R, top.indices % R
    found = rows.gather(1, place[..., None].expand_as(rows))
    mine = (owner == rank(group))[..., None] & found.isfinite()
    return total((torch.where(mine, found, 0),), group)[0], top.values


def of_the_first(tensors: Sequence[Tensor], group: Group = None) -> None:
    """Write the tensors of the first process over those of the others: one ``broadcast`` each."""
    if world(group) > 1:
        for tensor in tensors:
            dist.broadcast(tensor, group=group or None, group_src=0)


class Chance(NamedTuple):
    """Random numbers: those that all processes draw alike, and those that each draws for itself."""

    shared: torch.Generator | None
    own: torch.Generator | None


def chance(group: Group, generator: torch.Generator | None, device: torch.device) -> Chance:
    """Generators that follow from that of the first process; a single process keeps its own. One collective."""
    if world(group) == 1:
        return Chance(generator, generator)
    seed = shared_seed(group, generator, device)
    seeds = (seed, seed + 1 + rank(group))
    return Chance(*(torch.Generator(device).manual_seed(each) for each in seeds))


def shared_seed(
    group: Group = None, generator: torch.Generator | None = None, device: torch.device | None = None
) -> int:
    """A random seed drawn by the first process, known to all of them."""
    where = "cpu" if generator is None else generator.device
    seed = torch.randint(1 << 62, (1,), generator=generator, device=where).to(device or "cpu")
    return int(gathered(seed, group)[0])


def in_step(items: Iterable[Item], group: Group = None, device: torch.device | None = None) -> Iterator[Item | None]:
    """This process's items, then None until the process with the most items is through: one ``all_reduce`` per step.

    Raises:
        whatever ``items`` raise; RuntimeError: those of another process did.
    """
    if world(group) == 1:
        yield from items
        return
    source = iter(items)
    while True:
        with FailingTogether(group, device) as status:
            item = next(source, None)
            status.count = int(item is not None)
        if status.count == 0:
            return
        yield item


class Status:
    """What the processes tell one another at the end of ``FailingTogether``: a count, which is then their sum."""

    count = 0


class FailingTogether:
    """A block that each process runs for itself, and that ends well in all of them or in none: one ``all_reduce``.

    Raises:
        whatever the block raises; RuntimeError: the block of another process raised.
    """

    device: torch.device | None
    status: Status

    def __init__(self, group: Group, device: torch.device | None) -> None:
        self.group, self.device, self.status = group, device, Status()

    def __enter__(self) -> Status:
        return self.status

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if world(self.group) == 1 or not (error is None or isinstance(error, Exception)):
            return  # Ctrl-C waits for nobody
        told = torch.tensor([self.status.count, int(error is not None)], device=self.device)
        count, failed = total((told,), self.group)[0].tolist()
        if failed and error is None:
            raise RuntimeError(
                f"{failed} of {world(self.group)} processes failed while they read their data: see there"
            )
        self.status.count = count


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
        work = dist.all_reduce(here, group=group or None, async_op=True)
        work.wait(timeout) if timeout else work.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} waited for the {world(group)} processes of its group, and not all of them called it: call it on "
            f"every process, or pass sync=False to leave the others out ({error})"
        ) from error


def agree(
    modes: dict[int, str], mine: int, count: int, group: Group, device: torch.device, *, wait: bool
) -> list[int] | None:
    """The counts of all processes, all of which are in one mode: one small ``all_gather``.

    Args:
        modes: what the modes are called in the message.
        wait: read what the others told; None is returned otherwise, and the host waits for nothing.
    Raises:
        RuntimeError: modes differ, or a process did not come within the timeout of the group.
    """
    try:
        told = torch.stack(gathered(torch.tensor([mine, count], device=device), group))
        if not wait:
            return None
        found, counts = told.T.tolist()
    except RuntimeError as error:
        raise RuntimeError(
            f"a forward in training mode waited for the {world(group)} processes that learn together, and not all of "
            "them ran one: run it on every process, with an empty batch where there is no data, or set "
            f"process_group=False to learn alone ({error})"
        ) from error
    if len(set(found)) > 1:
        each = ", ".join(f"{modes.get(mode, mode)} in {found.count(mode)}" for mode in sorted(set(found)))
        raise RuntimeError(
            f"the {len(found)} processes that learn together do different things: {each}; call freeze_keys() and its "
            "like on every process, or set process_group=False to learn alone"
        )
    return [int(each) for each in counts]


def current(group: Group) -> Group:
    """The group that a forward takes part in: the given one, that of the DDP around it, or the default one.

    False where there is no other process.

    Raises:
        RuntimeError: within ``DistributedDataParallel.join``, where processes that have joined take no part.
    """
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return False
    if group is None and (wrapper := _torch.active_ddp()) is not None:
        group = wrapper.process_group
        if _torch.has_lone_joins(wrapper):
            raise RuntimeError(
                "keys that learn, or whose hits are counted, need kvb.distributed.join(model) instead of model.join(): "
                "a process that has joined would not answer"
            )
    return group if world(group) > 1 else False
