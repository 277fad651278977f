"""Training whose process is killed: from the last checkpoint on, the result is that of a run that nobody killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import kvb
from kvb.distributed import sync_values

WORLD, STEPS, EVERY, FROZEN = 2, 40, 4, 10
LIMIT = 120.0  # seconds


def made() -> nn.Module:
    torch.manual_seed(3)
    options = {"init_mode": "sample", "threshold_ema_dead_code": 0.5, "sparse_grad": True}
    return nn.Sequential(kvb.KeyValueBottleneck(4, 16, 3, 5, **options), nn.Flatten(1), nn.Linear(20, 2))


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One file, complete or not there."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def trained(rank: int, folder: Path, store: Path, waits: float) -> None:
    """Keys learn, with dead codes replaced; then they are frozen and hits counted; values learn throughout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    model, begin = made(), 0
    ddp = DDP(sync_values(model))
    optimizer = kvb.optim.RowwiseAdam(ddp.parameters(), lr=0.05)
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    for step in range(begin, STEPS):
        torch.manual_seed(step * WORLD + rank)  # batches and draws are those of the step, not of what came before
        if step == FROZEN:
            model[0].freeze_keys()
        optimizer.zero_grad()
        ddp(torch.randn(5 + rank, 4, 3)).square().mean().backward()
        optimizer.step()
        time.sleep(waits)
        if rank == 0 and (step + 1) % EVERY == 0:
            save(folder / "checkpoint.pt", model, optimizer, step + 1)
    save(folder / f"end{rank}.pt", model, optimizer, STEPS)
    dist.destroy_process_group()


def started(folder: Path, store: str, waits: float = 0.0) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=trained, args=(r, folder, folder / store, waits)) for r in range(WORLD)]
    for process in running:
        process.start()
    return running


def finished(running: list[multiprocessing.Process]) -> list[int | None]:
    for process in running:
        process.join(LIMIT)
        process.kill()
    return [process.exitcode for process in running]


def leaves(state):
    return torch.utils._pytree.tree_leaves(state)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("least", [EVERY, FROZEN + EVERY])
def test_a_killed_process_changes_no_result(tmp_path, killed, least):
    """While keys learn, and while they are frozen."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    alone.mkdir()
    stopped.mkdir()
    assert finished(started(alone, "store")) == [0, 0]

    running, checkpoint, deadline = started(stopped, "store", 0.05), stopped / "checkpoint.pt", time.monotonic() + LIMIT
    while time.monotonic() < deadline and not (checkpoint.exists() and torch.load(checkpoint)["step"] >= least):
        time.sleep(0.01)
    os.kill(running[killed].pid, signal.SIGKILL)
    codes = finished(running)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1, "the other is told, and ends by itself"
    saved = torch.load(checkpoint)["step"]
    assert least <= saved < STEPS
    assert not list(stopped.glob("end*"))

    assert finished(started(stopped, "second store")) == [0, 0]
    ends = [torch.load(folder / f"end{rank}.pt") for folder in (alone, stopped) for rank in range(WORLD)]
    assert torch.equal(ends[0]["model"]["0.cluster_size_counter"].sum(1), torch.full((4,), (STEPS - FROZEN) * 11))
    for one in ends[1:]:
        for first, other in zip(leaves(ends[0]), leaves(one), strict=True):
            assert torch.equal(first, other) if isinstance(first, torch.Tensor) else first == other
