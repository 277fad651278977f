"""Codes once: what a frozen model finds for every sample of a data set, kept in a table for training without a search.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3: keys are frozen before
the values learn, so that the codes of a sample never change again.
"""

from __future__ import annotations

import ast
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from kvb import validation

PATIENCE = 1.0  # seconds until encoding shows its progress
_HEADER = 128  # bytes of a .npy file before its numbers: enough for any shape, and a multiple of 64 as .npy asks
_MAGIC = b"\x93NUMPY\x01\x00"
_NAMES = {torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8"}


class CodeDataset(Dataset[Any]):
    """The codes of N samples, and their labels if there are any: an item is ``codes[i]`` or ``(codes[i], labels[i])``.

    Made by ``encode_dataset``; ``decode(batch, pool="mean")`` or ``kvb.training.sgd_step`` trains on it.

    Equivalent to ``torch.utils.data.TensorDataset(codes, labels)``, with whole batches for a DataLoader in one read,
    and ``batches``, which is faster than any DataLoader.

    Args:
        codes: [N, C, *shape] integers; a memory map is never copied.
        labels: [N, ...], or None.
    Raises:
        TypeError: codes that are not integers, labels that are no tensor. ValueError: codes with fewer than two axes,
        or another number of labels.
    """

    def __init__(self, codes: Tensor, labels: Tensor | None = None) -> None:
        validation.integer("CodeDataset", "codes", codes)
        if codes.dim() < 2:
            raise ValueError(f"expected codes of shape (N, C, *shape), got {tuple(codes.shape)}")
        if labels is not None:
            validation.tensor("CodeDataset", "labels", labels)
            if labels.dim() == 0 or len(labels) != len(codes):
                raise ValueError(
                    f"expected labels of shape (N, ...) with one for each of the {len(codes)} samples in codes, "
                    f"got {tuple(labels.shape)}"
                )
        self.codes = codes
        self.labels = labels

    @classmethod
    def open(cls, path: str | os.PathLike[str], labels: Tensor | None = None) -> CodeDataset:
        """Map the codes that ``encode_dataset(..., out=path)`` wrote; nothing is read before it is used.

        The file is a plain .npy: ``numpy.load(path, mmap_mode="r")`` reads it, too. Writing to the tensor does not
        change the file.

        Args:
            path: the .npy file.
            labels: [N, ...], or None: the file holds none.
        Raises:
            ValueError: the file is no .npy of int16, int32 or int64 in C order, or is cut short.
        """
        return cls(_map(Path(path)), labels)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Any:
        return self.codes[index] if self.labels is None else (self.codes[index], self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader calls for a batch: one read for all its samples."""
        rows = torch.as_tensor(indices)
        codes = self.codes[rows].unbind()
        return list(codes) if self.labels is None else list(zip(codes, self.labels[rows].unbind(), strict=True))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Any]:
        """One pass in batches of codes [B, C, *shape], or of ``(codes, labels)``.

        Args:
            batch_size: B.
            shuffle: in an order drawn anew for this pass.
            drop_last: leave out a last batch that is smaller.
            generator: makes the order reproducible.
        Raises:
            TypeError, ValueError: batch_size is no positive integer.
        """
        validation.positive_int("batch_size", batch_size)
        return self._batches(batch_size, shuffle, drop_last, generator)

    def _batches(
        self, batch_size: int, shuffle: bool, drop_last: bool, generator: torch.Generator | None
    ) -> Iterator[Any]:
        N = len(self)
        order = torch.randperm(N, generator=generator).to(self.codes.device) if shuffle else None
        for begin in range(0, N - batch_size + 1 if drop_last else N, batch_size):
            rows = slice(begin, begin + batch_size) if order is None else order[begin : begin + batch_size]
            yield self.codes[rows] if self.labels is None else (self.codes[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> CodeDataset:
        """The same codes and labels on a device."""
        return CodeDataset(self.codes.to(device), None if self.labels is None else self.labels.to(device))

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"labels {tuple(self.labels.shape[1:])}"
        codes = f"codes {tuple(self.codes.shape[1:])} {self.codes.dtype}, {self.codes.nbytes / 1e6:.4g} MB"
        return f"CodeDataset({len(self)} samples, {codes}, {labels})"


# --- encoding ---------------------------------------------------------------------------------------------------------


def split_item(item: Any) -> tuple[Any, Any]:
    """An item of a loader as its inputs and its labels: ``(inputs, labels, ...)``, or inputs alone."""
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


@torch.no_grad()
def encode(
    data: Tensor | Iterable[Any],
    search: Callable[[Any], Tensor],
    *,
    cut: Callable[[Tensor], Sequence[Tensor]],
    out: str | os.PathLike[str] | None,
    inputs_extractor: Callable[[Any], Any] | None,
    progress: bool,
) -> CodeDataset:
    """Run ``search`` over data, read once, and keep its codes.

    Args:
        data: a tensor of inputs, cut into batches, or an iterable of inputs or of (inputs, labels, ...) items.
        search: inputs of one batch -> codes [B, C, *shape] in the dtype to store.
        cut: makes batches of a tensor.
        out: a file for the codes; None keeps them in memory.
        inputs_extractor: takes the inputs out of an item.
        progress: show a progress bar.
    Raises:
        TypeError: data is neither. ValueError: no samples, shapes that change, or labels in some items only.
    """
    if not isinstance(data, (Tensor, Iterable)):
        raise TypeError(f"data must be a Tensor or an iterable of batches, not {type(data).__name__}")
    batches: Iterable[Any] = cut(data) if isinstance(data, Tensor) else data
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(batches, desc="encoding", total=total, disable=not progress, leave=False, delay=PATIENCE)
    labels: list[Tensor | None] = []

    def parts() -> Iterator[Tensor]:
        for item in bar:
            inputs, label = (item, None) if isinstance(data, Tensor) else split_item(item)
            if inputs_extractor is not None:
                inputs = inputs_extractor(item)
            codes = search(inputs).cpu()
            if len(codes) == 0:
                continue
            if label is not None and (not isinstance(label, Tensor) or label.dim() == 0 or len(label) != len(codes)):
                label = None  # the second element of an item that is no label: a mask or a mapping, say
            labels.append(None if label is None else label.cpu())
            yield codes

    codes = _stored(parts()) if out is None else _written(parts(), Path(out))
    if len({label is None for label in labels}) > 1:
        raise ValueError("expected labels in all items of data or in none, got them in some only")
    known = [label for label in labels if label is not None]
    return CodeDataset(codes, torch.cat(known) if known else None)


def _checked(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same parts; at least one, all of one shape."""
    shape = None
    for codes in parts:
        if shape is not None and codes.shape[1:] != shape:
            raise ValueError(
                f"expected codes of one shape for all samples, {tuple(shape)}, got {tuple(codes.shape[1:])}; "
                "pad or crop the inputs to one size"
            )
        shape = codes.shape[1:]
        yield codes
    if shape is None:
        raise ValueError("data yielded no samples")


def _stored(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(_checked(parts)))


# --- the file ---------------------------------------------------------------------------------------------------------


def _header(shape: Sequence[int], dtype: torch.dtype) -> bytes:
    text = f"{{'descr': '{_NAMES[dtype]}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    length = _HEADER - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + text.encode().ljust(length - 1) + b"\n"


def _written(parts: Iterator[Tensor], path: Path) -> Tensor:
    """Append every part to a .npy file, which gets its name when it is whole; its map."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            file.write(bytes(_HEADER))
            _append(_checked(parts), file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return _map(path)


def _append(parts: Iterator[Tensor], file: BinaryIO) -> None:
    samples = 0
    for codes in parts:
        codes = codes.contiguous()
        file.write(ctypes.string_at(codes.data_ptr(), codes.nbytes))  # needs no NumPy
        samples += len(codes)
    file.seek(0)
    file.write(_header((samples, *codes.shape[1:]), codes.dtype))


def _map(path: Path) -> Tensor:
    what = f"expected a .npy file of int16, int32 or int64 codes in {str(path)!r}, as encode_dataset(out=...) writes it"
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(_HEADER)
    if len(begin) < _HEADER or not begin.startswith(_MAGIC):
        raise ValueError(f"{what}, got something else")
    try:
        fields = ast.literal_eval(begin[len(_MAGIC) + 2 :].decode("latin1").strip())
    except SyntaxError as error:
        raise ValueError(f"{what}, got a header that cannot be read") from error
    dtypes = [dtype for dtype, name in _NAMES.items() if isinstance(fields, dict) and fields.get("descr") == name]
    if not dtypes or fields.get("fortran_order") is not False:
        raise ValueError(f"{what}, got {fields}")
    shape, dtype = torch.Size(fields["shape"]), dtypes[0]
    want = _HEADER + shape.numel() * dtype.itemsize
    if size != want:
        raise ValueError(f"{what}: {want} bytes for {tuple(shape)}, got {size}")
    flat = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return flat[_HEADER:].view(dtype).view(shape)
