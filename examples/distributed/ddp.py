"""Train a bottleneck on several processes: torchrun --nproc-per-node 2 examples/distributed/ddp.py

Each process has its own part of the data. Keys are found in all parts together; values learn with DDP around the model,
each step sending what it fetched instead of the table. Runs on CPUs in seconds; on GPUs where there are any.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kvb
from kvb.distributed import sync_values

CLASSES, CHANNELS, SAMPLES, BATCH = 10, 32, 2000, 100


def blobs(part: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre for each class: a part of a data set that all processes know how to make."""
    centres = 1.5 * torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + part)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return centres[labels] + torch.randn(samples, CHANNELS, generator=generator), labels


def main() -> float:
    """The accuracy on new data."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return train(device)
    finally:
        dist.destroy_process_group()  # when nothing is left that uses it


def train(device: torch.device) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = (part.to(device) for part in blobs(rank, SAMPLES // world))

    torch.manual_seed(0)
    split = kvb.splitters.RandomProjection(CHANNELS, num_codebooks=16, dim_keys=8)
    bottleneck = kvb.KeyValueBottleneck(16, 64, dim_keys=8, dim_values=16, init_mode="kmeans", sparse_grad=True)
    classifier = nn.Sequential(split, bottleneck, Mean(), nn.Linear(16, CLASSES)).to(device)
    report = bottleneck.init_keys(split(x).split(BATCH), epochs=1, progress=False)
    bottleneck.freeze_keys()
    if rank == 0:
        print(f"keys of {world} processes: {report}")

    ddp = DistributedDataParallel(sync_values(classifier), device_ids=[device] if device.type == "cuda" else None)
    optimizer = kvb.optim.RowwiseAdam(kvb.optim.param_groups(ddp, lr=0.01, values_lr=0.05))
    for epoch in range(3):
        for inputs, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp(inputs), labels)
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    ddp.eval()
    x, y = (part.to(device) for part in blobs(1000 + rank, 500))
    with torch.no_grad():
        right = (ddp(x).argmax(-1) == y).float().mean()
    dist.all_reduce(right)
    if rank == 0:
        print(f"accuracy {right.item() / world:.1%}; {int((bottleneck.cluster_size_counter > 0).sum())} pairs in use")
    return right.item() / world


class Mean(nn.Module):
    """Values [B, C, V] -> [B, V]."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.mean(1)


if __name__ == "__main__":
    main()
