"""``encode_dataset``: the codes of a data set in one file, found by many processes; a stopped run goes on later."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from kvb import bars, collectives, files, items, npy, validation
from kvb.collectives import Group
from kvb.data import CodeDataset
from kvb.modules.datasets import ReadsData

_RECORD = 8  # bytes of a block in the file of progress: 1 when it is done, and the checksum of what was written
_TOLD = 4096  # bytes of what the first process tells the others about the file


class _Reader(NamedTuple):
    """What an item holds, and what becomes of it."""

    model: ReadsData
    dtype: torch.dtype
    inputs_extractor: Callable[[Any], Any] | None
    labels: bool
    labels_extractor: Callable[[Any], Any] | None
    mask_extractor: Callable[[Any], Any] | None

    def read(self, item: Any) -> list[Tensor]:
        """The arrays of a batch, on the host: codes [n, C, *shape], labels and a mask if there are any."""
        kept = items.Labels(self.labels, self.inputs_extractor, self.labels_extractor)
        inputs = items.inputs_of(item, self.inputs_extractor)
        mask = None if self.mask_extractor is None else self.mask_extractor(item)
        found, move = kept.find(item, inputs), self.model._moved
        codes, used = self.model._codes(move(inputs), move(mask), self.dtype)
        kept.add(found, len(codes))
        if kept.parts and not npy.stores(kept.parts[0].dtype):
            raise TypeError(f"a .npy file cannot hold labels of {kept.parts[0].dtype}: convert them first")
        labels = kept.parts or [npy.NO_LABELS.expand(len(codes), 0)] * (used is not None)
        return [array.cpu().contiguous() for array in (codes, *labels, *([] if used is None else [used]))]


class _Plan(NamedTuple):
    """The file to write, in blocks of samples."""

    arrays: list[Tensor]  # [1, ...], like all samples
    samples: int
    block: int
    keys: int  # a checksum
    places: list[npy.Place]

    @classmethod
    def of(cls, arrays: list[Tensor], samples: int, block: int, keys: int) -> _Plan:
        return cls(arrays, samples, block, keys, npy.layout(arrays, samples))

    def described(self) -> bytes:
        """What a plan must have in common with another to go on with its file."""
        like = [[str(array.dtype).removeprefix("torch."), *array.shape[1:]] for array in self.arrays]
        return json.dumps({"arrays": like, "samples": self.samples, "block": self.block, "keys": self.keys}).encode()

    @classmethod
    def read(cls, description: bytes) -> _Plan:
        told = json.loads(description)
        arrays = [torch.empty(1, *shape, dtype=getattr(torch, dtype)) for dtype, *shape in told["arrays"]]
        return cls.of(arrays, told["samples"], told["block"], told["keys"])

    @property
    def blocks(self) -> int:
        return -(-self.samples // self.block)

    @property
    def size(self) -> int:
        return self.places[-1].end

    def parts(self, block: int) -> Iterator[tuple[int, int]]:
        """Where the arrays of a block begin, and how many bytes each is."""
        begin, size = block * self.block, min(self.block, self.samples - block * self.block)
        for place, array in zip(self.places, self.arrays, strict=True):
            yield place.begin + begin * array.nbytes, size * array.nbytes


@torch.no_grad()
def encode_dataset(
    model: ReadsData,
    data: Tensor | Dataset[Any] | DataLoader[Any],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    dtype: torch.dtype | Literal["auto"] = "auto",
    inputs_extractor: Callable[[Any], Any] | None = None,
    labels: bool = True,
    labels_extractor: Callable[[Any], Any] | None = None,
    mask_extractor: Callable[[Any], Any] | None = None,
    process_group: Group = None,
    progress: bool = True,
) -> CodeDataset:
    """The codes of a whole data set in one file, of which every process finds its share; called by all of them.

    Equivalent to ``model.encode_dataset(loader, out=out)`` in one process, byte for byte. The order is that of the data
    set. A run that was stopped or killed goes on where it was when this is called again, with any number of processes,
    the same keys, data and ``batch_size``: beside ``out`` two hidden files hold what is done, with checksums, until
    ``out`` itself appears as a whole. Encoders are not compared: remove the hidden files when yours has changed.

    Args:
        model: a ``KeyValueBottleneck``, or a module around one, whose keys are the same in all processes.
        data: inputs [N, ...]; a map-style data set; or a ``DataLoader`` of one that does not shuffle, whose workers,
            ``collate_fn`` and ``batch_size`` are used. Items are as for ``model.encode_dataset``.
        out: a .npy file, in a folder that all processes share.
        batch_size: samples of a batch, each of which is written as one block.
        dtype, inputs_extractor, labels, labels_extractor, mask_extractor, progress: as for ``model.encode_dataset``.
        process_group: the default one if None; False for this process alone, which can then be stopped, too.
    Returns:
        a ``CodeDataset`` that maps the file, in every process.
    Raises:
        as ``model.encode_dataset``; TypeError: data of no known size. ValueError: a loader in another order, or no
        samples. RuntimeError: another process failed, or did not call this in time; another run writes ``out``.
    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> from kvb.distributed import encode_dataset
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> len(encode_dataset(bottleneck, torch.randn(100, 4, 8), "codes.npy", progress=False))
        100
        >>> dist.destroy_process_group()
    """
    storage = validation.code_dtype(dtype, model._target().key_value_pairs_per_codebook)
    reader = _Reader(model, storage, inputs_extractor, labels, labels_extractor, mask_extractor)
    load, samples, block = _loader_of(data, validation.positive_int("batch_size", batch_size))
    group, device = process_group, model._target()._device
    collectives.meet("encode_dataset", group, device=device)
    with _begin(reader, load, samples, block, Path(os.path.realpath(out)), group) as work:
        left, rank, world = work.left(), collectives.rank(group), collectives.world(group)
        own = left[len(left) * rank // world : len(left) * (rank + 1) // world]
        for _ in collectives.in_step(work.write(reader, load, own, progress and rank == 0), group, device):
            pass
        with collectives.FailingTogether(group, device):
            if rank == 0:
                work.finish()
    return CodeDataset.open(out)


def _begin(
    reader: _Reader, load: Callable[[list[int]], Any], samples: int, block: int, target: Path, group: Group
) -> _Work:
    """Find out what codes are like, and which blocks are done: the first process does, and tells the others."""
    device, work = reader.model._target()._device, None
    told = torch.zeros(_TOLD, dtype=torch.uint8)
    with collectives.FailingTogether(group, device):
        if collectives.rank(group) == 0:
            plan = _Plan.of(reader.read(next(iter(load([0])))), samples, block, _checksum_of_keys(reader.model))
            description = plan.described()
            told[: len(description)] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
            work = _Work.begin(target, plan)
    told = told.to(device)
    collectives.of_the_first([told], group)
    work = work or _Work.join(target, _Plan.read(bytes(told.tolist()).rstrip(b"\0")))
    done = work.done.to(device)
    collectives.of_the_first([done], group)
    work.done = done.cpu()
    return work


def _checksum_of_keys(model: ReadsData) -> int:
    """Of what decides which codes are found."""
    target, found = model._target(), 0
    for part in (target.keys, target.kvb_mask, target.kvb_flags, target.cluster_size_counter):
        found = zlib.crc32(files.content(part.detach().cpu().contiguous()), found)
    return found


def _loader_of(data: Any, batch_size: int) -> tuple[Callable[[list[int]], Any], int, int]:
    """A function from samples to a loader of them, the number of samples, and how many a batch has."""
    options: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        if data.batch_size is None or not isinstance(data.sampler, SequentialSampler):
            raise ValueError("expected a DataLoader with a batch_size that does not shuffle, as codes keep their order")
        batch_size = data.batch_size
        options = {"num_workers": data.num_workers, "collate_fn": data.collate_fn, "pin_memory": data.pin_memory}
        data = data.dataset
    if isinstance(data, IterableDataset) or not (isinstance(data, Sized) and hasattr(data, "__getitem__")):
        raise TypeError(
            f"data must be a Tensor, a map-style data set or a DataLoader of one, so that every process can read its "
            f"share, not {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError("data yielded no samples")

    def load(samples: list[int]) -> Any:
        if isinstance(data, Tensor):
            return (data[part] for part in torch.tensor(samples).split(batch_size))
        return DataLoader(Subset(data, samples), batch_size, **options)  # type: ignore[arg-type]

    return load, len(data), batch_size


class _Work:
    """The two files beside ``out``: numbers, and which blocks of them are done."""

    def __init__(self, target: Path, plan: _Plan, numbers: BinaryIO, progress: BinaryIO, done: Tensor) -> None:
        self.target, self.plan, self.numbers, self.progress, self.done = target, plan, numbers, progress, done

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *error: Any) -> None:
        self.numbers.close()
        self.progress.close()

    @classmethod
    def begin(cls, target: Path, plan: _Plan) -> _Work:
        """In the first process: what an earlier run of the same plan has left, or new files."""
        paths = _paths(target)
        for path in paths:
            path.touch()
        numbers, progress = (path.open("r+b", buffering=0) for path in paths)
        if not files.lock(progress.fileno()) and files.fcntl is not None:
            raise RuntimeError(f"another run writes {str(target)!r}: wait for it, or end it")
        description = plan.described() + b"\n"
        records = len(description) + plan.blocks * _RECORD
        known = progress.read(len(description))
        work = cls(target, plan, numbers, progress, torch.zeros(plan.blocks, dtype=torch.uint8))
        if known == description and os.fstat(numbers.fileno()).st_size == plan.size:
            work.done = torch.tensor([work._is_done(block) for block in range(plan.blocks)], dtype=torch.uint8)
            return work
        if known:
            warnings.warn(f"{str(target)!r} is encoded again: what was begun has other keys or data", stacklevel=4)
        for file, size in ((numbers, plan.size), (progress, records)):
            file.truncate(0)
            file.truncate(size)
        _put(progress, 0, description)
        for place in plan.places:
            _put(numbers, place.at, place.header)
        return work

    @classmethod
    def join(cls, target: Path, plan: _Plan) -> _Work:
        """In every other process: the files of the first."""
        numbers, progress = (path.open("r+b", buffering=0) for path in _paths(target))
        return cls(target, plan, numbers, progress, torch.zeros(plan.blocks, dtype=torch.uint8))

    def left(self) -> list[int]:
        """The blocks that were not done when this began."""
        return [block for block, done in enumerate(self.done.tolist()) if not done]

    def _record(self, block: int) -> int:
        """Where the record of a block begins."""
        return len(self.plan.described()) + 1 + block * _RECORD

    def _is_done(self, block: int) -> bool:
        """Whether a block was written as its record says: a machine that went down may have kept only one of them."""
        found = 0
        for begin, size in self.plan.parts(block):
            self.numbers.seek(begin)
            found = zlib.crc32(self.numbers.read(size), found)
        self.progress.seek(self._record(block))
        return self.progress.read(_RECORD) == _done(found)

    def write(self, reader: _Reader, load: Callable[[list[int]], Any], blocks: list[int], shown: bool) -> Iterator[int]:
        """Encode blocks, one by one."""
        if not blocks:
            return
        plan = self.plan
        sizes = [range(block * plan.block, min((block + 1) * plan.block, plan.samples)) for block in blocks]
        loaded = load([sample for each in sizes for sample in each])
        read = bars.of(loaded, "encoding", len(blocks), shown=shown)
        for block, size, item in zip(blocks, sizes, read, strict=True):
            arrays = reader.read(item)
            _require_like(arrays, plan.arrays, len(size))
            found, contents = 0, map(files.content, arrays)
            for (begin, _), content in zip(plan.parts(block), contents, strict=True):
                _put(self.numbers, begin, content)
                found = zlib.crc32(content, found)
            _put(self.progress, self._record(block), _done(found))
            yield block

    def finish(self) -> None:
        """Everything is written: let ``out`` appear."""
        os.fsync(self.numbers.fileno())
        numbers, progress = _paths(self.target)
        numbers.replace(self.target)
        progress.unlink()


def _paths(target: Path) -> tuple[Path, Path]:
    name = files.stem(target)
    return target.with_name(f".{name}.numbers"), target.with_name(f".{name}.progress")


def _done(checksum: int) -> bytes:
    return (1 << 32 | checksum).to_bytes(_RECORD, "little")


def _put(file: BinaryIO, begin: int, content: bytes | memoryview) -> None:
    file.seek(begin)
    while content:
        content = content[file.write(content) :]


def _require_like(arrays: list[Tensor], first: list[Tensor], samples: int) -> None:
    """As the first sample has them."""
    if len(arrays) != len(first):
        raise ValueError("expected labels, and a mask, in all items of data or in none, got them in some only")
    for what, array, like in zip(("codes", "labels", "masks"), arrays, first, strict=False):
        if array.dtype != like.dtype or array.shape[1:] != like.shape[1:] or len(array) != samples:
            raise ValueError(
                f"expected {what} of one dtype and shape for all samples, {samples} of {like.dtype} "
                f"{tuple(like.shape[1:])}, got {len(array)} of {array.dtype} {tuple(array.shape[1:])}"
            )
