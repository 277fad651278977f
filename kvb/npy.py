"""Codes and their labels in one file: two arrays in NumPy's .npy format, one after the other, written as they come.

``numpy.load(path, mmap_mode="r")`` reads the codes; on an open file ``numpy.load`` reads codes, then labels. Here both
are mapped: nothing is read before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from kvb import files

_MAGIC = b"\x93NUMPY\x01\x00"  # of version 1.0; two bytes with the header's length follow
_ALIGNED = 64  # bytes that the numbers of an array start at a multiple of
_MANY = 10**18  # more samples than there can be: the codes' header has room for so many
_CODES = {"i2": torch.int16, "i4": torch.int32, "i8": torch.int64}
_LABELS = {
    **_CODES,
    **{"b1": torch.bool, "i1": torch.int8, "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32},
    **{"u8": torch.uint64, "f2": torch.float16, "f4": torch.float32, "f8": torch.float64},
    **{"c8": torch.complex64, "c16": torch.complex128},
}
_HEADER = re.compile(
    rb"\{ *'descr' *: *'([<>|=]?)([a-z]\d{1,2})' *, *'fortran_order' *: *False *,"
    rb" *'shape' *: *\( *((?:(?:0|[1-9]\d{0,17}) *, *)+(?:0|[1-9]\d{0,17})?) *\) *,? *\} *\n?"
)
_SHOWN = 100  # characters of a header in a message


class Mapped(NamedTuple):
    """A file's codes and labels, each a map of it that others do not see written to; and which file that is."""

    codes: Tensor
    labels: Tensor | None
    identity: tuple[int, ...]


class _Damage(ValueError):
    """What is wrong with a file, without its name."""


def stores(dtype: torch.dtype) -> bool:
    """Whether labels of this dtype have a name in the format."""
    return dtype in _LABELS.values()


def write(file: BinaryIO, parts: Iterable[Tensor], labels: Sequence[Tensor]) -> None:
    """Write parts [N, ...] of codes one by one, then the labels that are known when the last part has come.

    Args:
        file: a new file.
        parts: at least one; int16, int32 or int64.
        labels: for all parts, in the same order; empty if there are none.
    """
    samples = room = 0
    for codes in parts:
        if samples == 0:
            room = file.write(_header((_MANY, *codes.shape[1:]), codes.dtype, 0))
        codes = codes.contiguous()
        file.write(files.content(codes))
        samples += len(codes)
    if labels:
        file.write(_header((samples, *labels[0].shape[1:]), labels[0].dtype, file.tell()))
        for part in labels:
            part = part.contiguous()
            file.write(files.content(part))
    file.seek(0)
    file.write(_header((samples, *codes.shape[1:]), codes.dtype, 0, room))


class Layout(NamedTuple):
    """Where what ``write`` writes lies in the file, if all sizes are known before: headers, and where numbers begin."""

    header: bytes  # at 0
    codes: int
    label_header: bytes  # after the codes; empty if there are no labels
    labels: int
    size: int


def layout(codes: Tensor, labels: Tensor | None, samples: int) -> Layout:
    """The layout for so many samples like these.

    Args:
        codes: [1, C, *shape]. labels: [1, ...] or None.
    """
    room = len(_header((_MANY, *codes.shape[1:]), codes.dtype, 0))
    header = _header((samples, *codes.shape[1:]), codes.dtype, 0, room)
    end = len(header) + samples * codes[0].nbytes
    if labels is None:
        return Layout(header, len(header), b"", end, end)
    label_header = _header((samples, *labels.shape[1:]), labels.dtype, end)
    begin = end + len(label_header)
    return Layout(header, len(header), label_header, begin, begin + samples * labels[0].nbytes)


def read(file: BinaryIO, path: str) -> Mapped:
    """Map a file, which may be closed afterwards; ``path`` is its name in messages.

    Raises:
        ValueError: it is not exactly what ``write`` or ``numpy.save`` writes.
    """
    try:
        return _read(file)
    except _Damage as error:
        raise ValueError(
            f"expected a .npy file of int16, int32 or int64 codes in {path!r}, as encode_dataset(out=...) writes it, "
            f"{error}"
        ) from error


def _read(file: BinaryIO) -> Mapped:
    status = os.fstat(file.fileno())
    if status.st_size < len(_MAGIC) + 2:
        raise _Damage("got something else")
    memory = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_COPY)
    codes, end = _array(memory, 0, _CODES)
    labels = None
    if codes.dim() < 2:
        raise _Damage(f"got numbers of shape {tuple(codes.shape)} instead of (N, C, *shape)")
    if end < status.st_size:
        labels, end = _array(memory, end, _LABELS)
        if len(labels) != len(codes):
            raise _Damage(f"got {len(labels)} labels of {len(codes)} samples")
    if end != status.st_size:
        raise _Damage(f"got {status.st_size - end} bytes after its arrays")
    return Mapped(codes, labels, identity(status))


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What no other file has, nor this one with other content."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _name(dtype: torch.dtype) -> str:
    (name,) = (name for name, known in _LABELS.items() if known == dtype)
    order = "<" if sys.byteorder == "little" else ">"
    return ("|" if dtype.itemsize == 1 else order) + name


def _header(shape: Sequence[int], dtype: torch.dtype, begin: int, room: int = 0) -> bytes:
    """A header for ``begin``, at least ``room`` bytes and so long that the array's numbers are aligned."""
    text = f"{{'descr': '{_name(dtype)}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode()
    fixed = len(_MAGIC) + 2
    length = max(room, fixed + len(text) + 1)
    length += -(begin + length) % _ALIGNED
    return _MAGIC + (length - fixed).to_bytes(2, "little") + text.ljust(length - fixed - 1) + b"\n"


def _array(memory: mmap.mmap, begin: int, dtypes: dict[str, torch.dtype]) -> tuple[Tensor, int]:
    """One array, and where the next begins."""
    start = begin + len(_MAGIC) + 2
    if memory[begin : begin + len(_MAGIC)] != _MAGIC:
        raise _Damage("got something else")
    end = start + int.from_bytes(memory[start - 2 : start], "little")
    header = memory[start:end]
    found = _HEADER.fullmatch(header)
    if not found or end > len(memory):
        raise _Damage(f"got the header {header[:_SHOWN]!r}")
    dtype = dtypes.get(found[2].decode())
    shape = tuple(map(int, found[3].replace(b" ", b"").strip(b",").split(b",")))
    if dtype is None or found[1] + found[2] != _name(dtype).encode():
        raise _Damage(f"got numbers of type {(found[1] + found[2]).decode()!r}")
    count = math.prod(shape)
    want = end + count * dtype.itemsize
    if count == 0 or want > len(memory):
        raise _Damage(f"{shape} asks for {want} bytes, got {len(memory)}")
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=end).view(shape), want
