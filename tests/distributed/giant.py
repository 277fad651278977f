"""Train a table of which every process holds so many megabytes of values; prints each one's peak memory and its part.

Run by torchrun: a process of its own, so that nothing else has used memory.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import kvb
from kvb.distributed import parallelize
from kvb.training import sgd_step

C, D, V, B, STEPS = 8, 8, 4096, 16, 50


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def trained(split: str, pairs: int, steps: int) -> tuple[kvb.KeyValueBottleneck, list[float]]:
    """A table of bfloat16 values, from the meta device on, and the losses of its steps."""
    with torch.device("meta"):
        table = kvb.KeyValueBottleneck(C, pairs, D, V)
    table.values.data = table.values.data.to(torch.bfloat16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("table",))
    parallelize(table, mesh, **{split: "table"}).to_empty(device="cpu").reset_parameters()
    table.freeze_keys().eval()
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step % 5)
        x, targets = torch.randn(B, C, D, generator=generator), torch.arange(B)
        losses.append(float(sgd_step(table.values, table.encode(x), targets, lr=300.0, max_norm=None).loss))
    return table, losses


def main(split: str, megabytes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trained(split, 64, 1)  # PyTorch imports what it needs
    start = peak()
    table, losses = trained(split, megabytes * dist.get_world_size() * 1_000_000 // (C * V * 2), STEPS)
    print(
        f"rank {dist.get_rank()} start {start} peak {peak()} part {table.values.to_local().nbytes} "
        f"first {losses[0]} last {losses[-1]}\n",
        end="",
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
