"""Train a bottleneck whose values are split by fully_shard: torchrun --nproc-per-node 2 examples/distributed/fsdp.py

The model is made on the meta device, so that no process ever allocates more than its part. Keys move to the data, are
frozen, and values learn, each process with its own batches. The trained model is saved twice: in parts, as
torch.distributed.checkpoint does it, and as one file for a plain module. Runs on CPUs in seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import kvb

CODEBOOKS, PAIRS, DIM, CLASSES, BATCH = 8, 64, 6, 10, 100


class Classifier(nn.Module):
    """Queries [B, C, D] -> logits [B, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.bottleneck = kvb.KeyValueBottleneck(CODEBOOKS, PAIRS, DIM, dim_values=16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bottleneck(x, pool="mean"))


def made(device: str) -> Classifier:
    """A model of which every process holds its part."""
    with torch.device("meta"):
        model = Classifier()
    fully_shard(model.bottleneck)
    fully_shard(model).to_empty(device=device)
    model.bottleneck.reset_parameters()
    model.head.reset_parameters()
    return model


def samples(part: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """1000 points around one centre for each class."""
    centres = torch.randn(CLASSES, CODEBOOKS, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + part)
    labels = torch.randint(CLASSES, (1000,), generator=generator)
    x = centres[labels] + torch.randn(1000, CODEBOOKS, DIM, generator=generator) / 2
    return x.to(device), labels.to(device)


def train(model: Classifier, x: torch.Tensor, labels: torch.Tensor) -> None:
    for batch in x.split(BATCH):
        model(batch)  # keys move to the data of all processes
    model.bottleneck.freeze_keys()
    optimizer = kvb.optim.RowwiseAdam(model.parameters(), lr=0.05)
    for _ in range(3):
        for batch, targets in zip(x.split(BATCH), labels.split(BATCH), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), targets).backward()
            kvb.optim.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()


def shared_folder() -> Path:
    """One of the first process, which the others get to know."""
    found = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(found)
    return Path(found[0])


def main() -> tuple[float, bool, bool]:
    """The accuracy on new data; whether the parts, and the file, give the same logits again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())

    model, folder = made(device), shared_folder()
    train(model, *samples(rank, device))
    x, labels = samples(1000, device)
    with torch.no_grad():
        logits = model(x)
    accuracy = float((logits.argmax(-1) == labels).float().mean())

    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "parts")
    again = made(device)
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder / "parts")
    set_model_state_dict(again, state)
    with torch.no_grad():
        same_parts = torch.equal(again.eval()(x), logits)

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        plain = Classifier()
        plain.load_state_dict(whole)
        kvb.save(plain, folder / "model.pt")
    dist.barrier()
    plain = kvb.load(Classifier(), folder / "model.pt").to(device).eval()
    with torch.no_grad():
        same_file = torch.equal(plain(x), logits)

    part = tuple(model.bottleneck.values.to_local().shape)
    print(f"process {rank}: values {part} of {tuple(model.bottleneck.values.shape)}", flush=True)
    if rank == 0:
        print(f"accuracy {accuracy:.1%}; the same from parts: {same_parts}, from the file: {same_file}", flush=True)
    dist.destroy_process_group()
    return accuracy, same_parts, same_file


if __name__ == "__main__":
    main()
