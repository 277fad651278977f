"""A table split over processes: keys from data, codes once, then steps that move only the rows fetched.

    torchrun --nproc-per-node 2 examples/distributed/sharded.py
    torchrun --nproc-per-node 2 examples/distributed/sharded.py --split pairs

No process ever holds more than its part: the module is made on the meta device, and checkpoints are written in parts.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import kvb
from kvb.distributed import parallelize
from kvb.training import sgd_step

CODEBOOKS, PAIRS, DIM, CLASSES = 8, 256, 6, 10


def made(mesh, split):
    """A bottleneck of which every process holds its part."""
    with torch.device("meta"):
        bottleneck = kvb.KeyValueBottleneck(CODEBOOKS, PAIRS, DIM, CLASSES)
    return parallelize(bottleneck, mesh, **{split: "table"}).to_empty(device=mesh.device_type)


def samples(N, device):
    """The same in every process: all that share a table search for the same queries."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, CODEBOOKS, DIM, generator=generator)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    return (centres[labels] + torch.randn(N, CODEBOOKS, DIM, generator=generator) / 2).to(device), labels.to(device)


def main(split):
    """Returns the accuracies before and after training, and whether a checkpoint gives the same back."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("table",))

    bottleneck = made(mesh, split)
    bottleneck.reset_parameters()
    x, labels = samples(2000, device)
    for batch in x.split(500):
        bottleneck.train()(batch)  # keys move to the data
    bottleneck.freeze_keys().eval()
    codes = bottleneck.encode(x)
    before = (bottleneck.decode(codes, "mean").argmax(-1) == labels).float().mean()
    for _ in range(20):
        for batch, targets in zip(codes.split(250), labels.split(250), strict=True):
            step = sgd_step(bottleneck.values, batch, targets, lr=30.0)
    logits = bottleneck.decode(codes, "mean")
    after = (logits.argmax(-1) == labels).float().mean()

    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    dcp.save(get_model_state_dict(bottleneck), checkpoint_id=folder[0])
    again = made(mesh, split)
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder[0])
    set_model_state_dict(again, state)
    same = bool((again.eval().decode(codes, "mean") == logits).all())

    part = bottleneck.values.to_local().shape
    print(f"process {dist.get_rank()}: values {tuple(part)} of {tuple(bottleneck.values.shape)}", flush=True)
    if dist.get_rank() == 0:
        print(f"accuracy {before:.3f} -> {after:.3f}, loss {step.loss:.3f}, the same after loading: {same}", flush=True)
    dist.destroy_process_group()
    return float(before), float(after), same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--split", choices=["codebooks", "pairs"], default="codebooks")
    main(parser.parse_args().split)
