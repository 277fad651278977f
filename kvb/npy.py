"""Codes, labels and masks in one file: arrays in NumPy's .npy format, one after the other, written as they come.

``numpy.load(path, mmap_mode="r")`` reads the codes; on an open file ``numpy.load`` reads codes, then labels [N, ...] if
there are any, then a mask [N, *shape] if there is one; codes with a mask and no labels have labels [N, 0]. Here all are
mapped: nothing is read before it is used.
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
_MANY = 10**18  # an upper bound of samples: the codes' header has room for it
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
    """A file's arrays, each a map of it that others do not see written to; and which file that is."""

    codes: Tensor
    labels: Tensor | None
    mask: Tensor | None
    identity: tuple[int, ...]


class _Damage(ValueError):
    """What is wrong with a file, without its name."""


def stores(dtype: torch.dtype) -> bool:
    """Whether labels of this dtype have a name in the format."""
    return dtype in _LABELS.values()


def write(file: BinaryIO, parts: Iterable[Tensor], labels: Sequence[Tensor], masks: Sequence[Tensor] = ()) -> None:
    """Write parts [N, ...] of codes one by one, then labels and masks, which are known when the last part has come.

    Args:
        file: a new file.
        parts: at least one; int16, int32 or int64.
        labels, masks: for all parts, in the same order; empty if there are none.
    """
    samples = room = 0
    for codes in parts:
        if samples == 0:
            room = file.write(_header((_MANY, *codes.shape[1:]), codes.dtype, 0))
        codes = codes.contiguous()
        file.write(files.content(codes))
        samples += len(codes)
    if masks and not labels:
        labels = [torch.empty((samples, 0), dtype=torch.int8)]
    for rest in (labels, masks):
        if rest:
            file.write(_header((samples, *rest[0].shape[1:]), rest[0].dtype, file.tell()))
        for part in rest:
            part = part.contiguous()
            file.write(files.content(part))
    file.seek(0)
    file.write(_header((samples, *codes.shape[1:]), codes.dtype, 0, room))


def read(file: BinaryIO, path: str) -> Mapped:
    """Map a file, which may be closed afterwards; messages call it ``path``.

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
    labels = mask = None
    if codes.dim() < 2:
        raise _Damage(f"got numbers of shape {tuple(codes.shape)} instead of (N, C, *shape)")
    if end < status.st_size:
        labels, end = _array(memory, end, _LABELS, may_be_empty=True)
        if len(labels) != len(codes):
            raise _Damage(f"got {len(labels)} labels of {len(codes)} samples")
    if memory[end : end + len(_MAGIC)] == _MAGIC:
        mask, end = _array(memory, end, {"b1": torch.bool})
        if mask.shape[1:] not in (codes.shape[2:], codes.shape[3:]) or len(mask) != len(codes):
            raise _Damage(f"got a mask {tuple(mask.shape)} of codes {tuple(codes.shape)}")
    if end != status.st_size:
        raise _Damage(f"got {status.st_size - end} bytes after its arrays")
    if labels is not None and labels.numel() == 0:
        if mask is None:
            raise _Damage(f"got labels {tuple(labels.shape)}")
        labels = None
    return Mapped(codes, labels, mask, identity(status))


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Identifies a file with its present content."""
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


def _array(
    memory: mmap.mmap, begin: int, dtypes: dict[str, torch.dtype], *, may_be_empty: bool = False
) -> tuple[Tensor, int]:
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
    if want > len(memory) or (count == 0 and not may_be_empty):
        raise _Damage(f"{shape} asks for {want} bytes, got {len(memory)}")
    if count == 0:
        return torch.empty(shape, dtype=dtype), want
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=end).view(shape), want
