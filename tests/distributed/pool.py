"""Several processes on this machine: each runs a function of the test's file, and gives its result back."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4  # processes of a test
TIMEOUT = 120.0  # seconds until a test that hangs is ended


def _serve(rank: int, tasks: Any, results: Any) -> None:
    """Run one task after the other, each in a process group of its own; without a store it makes one itself."""
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        world, store, function, arguments = task
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        limit = timedelta(seconds=TIMEOUT / 4)
        torch.manual_seed(rank)  # what is random differs, unless kvb sees to it
        faulthandler.dump_traceback_later(0.9 * TIMEOUT, file=sys.__stderr__)  # a process that hangs says where
        try:
            if store is not None:
                method = f"file://{store}"
                dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=limit)
                dist.barrier()  # whoever leaves early closes connections that others are still making
            results.put((rank, function(*arguments), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        tasks.get()  # until all are done: another may still need this one's connections
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """Processes that are started once, since importing torch takes seconds."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.tasks = [context.SimpleQueue() for _ in range(MOST)]
        self.processes = [
            context.Process(target=_serve, args=(rank, tasks, self.results), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def run(self, world: int, store: str | None, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        """What each process found: rank, result, and the error if there was one."""
        for tasks in self.tasks[:world]:
            tasks.put((world, store, function, arguments))
        found = [self.results.get(timeout=TIMEOUT) for _ in range(world)]
        for tasks in self.tasks[:world]:
            tasks.put("done")
        return sorted(found, key=lambda each: each[0])

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
