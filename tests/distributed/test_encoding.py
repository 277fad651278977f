"""One file of codes by several processes: byte for byte that of one, also after a run that was stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kvb
from kvb.distributed import encode_dataset

N = 50


def bottleneck() -> kvb.KeyValueBottleneck:
    torch.manual_seed(4)
    return kvb.KeyValueBottleneck(3, 9, 2, 2).freeze_keys()


class Samples(Dataset):
    """Fails at a sample, if it is told to; knows what was read."""

    def __init__(self, fails_at=None, labels=True, waits=0.0):
        self.x = torch.randn(N, 3, 2, generator=torch.Generator().manual_seed(1))
        self.fails_at, self.labels, self.waits, self.read = fails_at, labels, waits, []

    def __len__(self):
        return N

    def __getitem__(self, index):
        if index == self.fails_at:
            raise OSError("the disk is gone")
        time.sleep(self.waits)
        self.read.append(index)
        return (self.x[index], index % 5) if self.labels else self.x[index]


def by_one(path, labels=True) -> bytes:
    bottleneck().encode_dataset(DataLoader(Samples(labels=labels), batch_size=7), out=path, progress=False)
    return path.read_bytes()


def _encoded(path, kind, fails_at=None, labels=True, batch_size=7, keys=None):
    samples, own = Samples(fails_at, labels), bottleneck()
    if keys is not None:
        own.keys.fill_(keys)
    data = {"data set": samples, "loader": DataLoader(samples, batch_size=batch_size), "tensor": samples.x}[kind]
    try:
        found = encode_dataset(own, data, path, batch_size=batch_size, progress=False)
    except (OSError, RuntimeError) as error:
        return type(error).__name__, samples.read
    assert len(found) == N
    return "done", samples.read


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "labels"), [("data set", True), ("loader", True), ("loader", False), ("tensor", False)]
)
def test_the_file_is_that_of_one_process(processes, tmp_path, world, kind, labels):
    found = processes(world, _encoded, tmp_path / "codes.npy", kind, None, labels)
    assert [how for how, _ in found] == ["done"] * world
    assert (tmp_path / "codes.npy").read_bytes() == by_one(tmp_path / "one.npy", labels)
    read = [sample for _, samples in found for sample in samples]
    assert kind == "tensor" or sorted(read) == sorted([0, *range(N)]), "each once, and the first to see what codes are"
    assert [path.name for path in tmp_path.glob("*code*")] == ["codes.npy"], "nothing is left beside it"


def test_more_processes_than_batches(processes, tmp_path):
    processes(4, _encoded, tmp_path / "codes.npy", "data set", None, True, 30)
    assert (tmp_path / "codes.npy").read_bytes() == by_one(tmp_path / "one.npy")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_that_failed_goes_on(processes, tmp_path, world):
    """Two processes stop when one cannot read sample 40; others, however many, read what is missing."""
    first, second = processes(2, _encoded, tmp_path / "codes.npy", "data set", 40)
    assert (first[0], second[0]) == ("RuntimeError", "OSError")
    assert not (tmp_path / "codes.npy").exists()
    written = len(first[1]) - 1 + len(second[1]) // 7 * 7  # without the look at the first sample
    assert written >= 14
    found = processes(world, _encoded, tmp_path / "codes.npy", "data set")
    assert {how for how, _ in found} == {"done"}
    assert sum(len(read) for _, read in found) - 1 == N - written
    assert (tmp_path / "codes.npy").read_bytes() == by_one(tmp_path / "one.npy")


def test_what_does_not_belong_together_is_not_mixed(processes, tmp_path):
    """Other keys, other batches, damaged numbers: read again, all of it or that block."""
    path = tmp_path / "codes.npy"
    one = by_one(tmp_path / "one.npy")
    processes(2, _encoded, path, "data set", 49, True, 7, 0.0)
    with pytest.warns(UserWarning, match="encoded again: what was begun has other keys or data"):
        encode_dataset(bottleneck(), Samples(), path, batch_size=7, progress=False)
    assert path.read_bytes() == one
    path.unlink()
    processes(2, _encoded, path, "data set", 49)
    numbers = tmp_path / ".codes.npy.numbers"
    content = bytearray(numbers.read_bytes())
    content[200] ^= 1
    numbers.write_bytes(content)
    again = Samples()
    encode_dataset(bottleneck(), again, path, batch_size=7, progress=False)
    assert path.read_bytes() == one
    assert sorted(again.read) == [0, *range(7, 14), 49], "the damaged block, and the last one"


def test_what_cannot_be_shared_is_refused(tmp_path):
    path = tmp_path / "codes.npy"
    with pytest.raises(ValueError, match="that does not shuffle"):
        encode_dataset(bottleneck(), DataLoader(Samples(), batch_size=7, shuffle=True), path)
    with pytest.raises(TypeError, match="map-style data set or a DataLoader of one, .* not generator"):
        encode_dataset(bottleneck(), (x for x in range(3)), path)
    with pytest.raises(ValueError, match="no samples"):
        encode_dataset(bottleneck(), TensorDataset(torch.zeros(0, 3, 2)), path)
    with pytest.raises(ValueError, match="expected codes of one shape|expected codes of one dtype and shape"):
        encode_dataset(bottleneck(), _Growing(), path, batch_size=1, progress=False)
    assert not path.exists()


class _Growing(Samples):
    def __getitem__(self, index):
        return self.x[index][:, None].expand(-1, 1 + index // 9, -1)


class Padded(Dataset):
    """Sequences of five positions, of which some count; (sequence, label, mask) or without a label."""

    def __init__(self, labels):
        generator = torch.Generator().manual_seed(2)
        self.x, self.mask = torch.randn(N, 3, 5, 2, generator=generator), torch.rand(N, 5, generator=generator) > 0.3
        self.labels = labels

    def __len__(self):
        return N

    def __getitem__(self, index):
        item = {"x": self.x[index], "mask": self.mask[index]}
        return {**item, "y": index % 5} if self.labels else item


OPTIONS = {"inputs_extractor": lambda item: item["x"], "mask_extractor": lambda item: item["mask"]}


def _padded(path, labels):
    return len(encode_dataset(bottleneck(), Padded(labels), path, batch_size=7, progress=False, **OPTIONS))


@pytest.mark.parametrize("labels", [False, True])
def test_masks_are_kept(processes, tmp_path, labels):
    assert processes(2, _padded, tmp_path / "codes.npy", labels) == [N, N]
    loader = DataLoader(Padded(labels), batch_size=7)
    one = bottleneck().encode_dataset(loader, out=tmp_path / "one.npy", progress=False, **OPTIONS)
    assert (one.labels is None) != labels
    assert one.mask is not None
    assert (tmp_path / "codes.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()


def _killed(rank, path, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    encode_dataset(bottleneck(), Samples(waits=0.05), path, batch_size=5, progress=False)


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    context = multiprocessing.get_context("spawn")
    running = [
        context.Process(target=_killed, args=(rank, tmp_path / "codes.npy", tmp_path / "store")) for rank in (0, 1)
    ]
    for process in running:
        process.start()
    progress, deadline = tmp_path / ".codes.npy.progress", time.monotonic() + 120
    while time.monotonic() < deadline and not (progress.exists() and progress.read_bytes().count(b"\1\0\0\0") >= 4):
        time.sleep(0.01)
    os.kill(running[1].pid, signal.SIGKILL)
    for process in running:
        process.join(120)
    assert running[0].exitcode != 0, "it is told that the other is gone"
    assert not (tmp_path / "codes.npy").exists()
    done = progress.read_bytes().count(b"\1\0\0\0")
    again = Samples()
    encode_dataset(bottleneck(), again, tmp_path / "codes.npy", batch_size=5, progress=False)
    assert 4 <= done < 10
    assert len(again.read) == 1 + N - 5 * done
    assert (tmp_path / "codes.npy").read_bytes() == by_one(tmp_path / "one.npy")
