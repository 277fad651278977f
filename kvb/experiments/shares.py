"""Work shared out to the processes that torchrun starts: each does its part, and the first one gets all results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
PATIENCE = timedelta(days=30)  # of a process that is done, for the others; torchrun ends all when one fails


def results(jobs: Sequence[_Job], run: Callable[[_Job], _Result]) -> list[_Result] | None:
    """Equivalent to ``[run(job) for job in jobs]`` in the first process; None in the others.

    Job i runs in process i modulo their number. No process group exists meanwhile: what one learns is its own.
    """
    rank, world = _launched()
    own = [run(job) for job in jobs[rank::world]]
    if world == 1:
        return own
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        found: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(own, found)
    finally:
        dist.destroy_process_group()
    return None if found is None else [found[number % world][number // world] for number in range(len(jobs))]


def _launched() -> tuple[int, int]:
    """This process's number, and how many torchrun has started."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
