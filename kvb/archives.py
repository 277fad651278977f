"""Tensors in files, in the two formats of checkpoints: what ``torch.save`` writes, and safetensors.

A file is written as the tensors' bytes are hashed, piece by piece, and read straight into the memory of its tensors: no
second copy of a state is ever in memory. Every byte that is read is checked against the file's own sums, where it has
any, and no code in a file is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvb import _torch, files

ZIP = b"PK\x03\x04"  # how a zip file begins
_PIECE = 1 << 18  # bytes that are copied at a time
_ALIGNED = 64  # bytes that a tensor in a zip file starts at a multiple of, for those who map it
_HEADER = 30 + 20  # bytes before an entry, but for its name: the fixed ones, and two sizes of 64 bits
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_SAFE = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16},
    **{"U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F32": torch.float32, "F64": torch.float64, "C64": torch.complex64},
}


def sha256(state: Mapping[str, Tensor]) -> str:
    """Of the tensors' names, dtypes, shapes and bytes."""
    return _stream(state, lambda name: contextlib.nullcontext(lambda piece: len(piece)))


def _stream(
    state: Mapping[str, Tensor], begin: Callable[[str], AbstractContextManager[Callable[[bytes | memoryview], int]]]
) -> str:
    """Pass every tensor's bytes to what ``begin`` of its name gives, and return the SHA-256 of what was passed."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name!r} {value.dtype} {tuple(value.shape)}\n".encode())
        with begin(name) as write:
            for piece in _pieces(value):
                digest.update(piece)
                write(piece)
    return digest.hexdigest()


def _pieces(value: Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor on any device; each piece is a copy, so that nobody can change it while it is used."""
    flat = value.detach().resolve_conj().resolve_neg().reshape(-1)
    step = _PIECE // value.element_size()
    for start in range(0, len(flat), step):
        part = flat[start : start + step].to("cpu", copy=True)
        yield files.content(part)


# --- torch zip --------------------------------------------------------------------------------------------------------


class _Entry:
    """A tensor whose bytes are an entry of the archive: pickled as ``torch.save`` does."""

    def __init__(self, value: Tensor, key: int) -> None:
        rebuild, (storage, offset, _, _, *rest) = torch.empty(0, dtype=value.dtype).__reduce_ex__(2)
        shape = tuple(value.shape)
        strides = torch.empty(shape, device="meta").stride()
        kind, count = _torch.storage_kind(storage), value.numel()
        if kind is torch.UntypedStorage:
            count *= value.element_size()
        self.reference = ("storage", kind, str(key), "cpu", count)
        self.reduced = rebuild, (_Reference(self.reference), offset, shape, strides, *rest)

    def __reduce__(self) -> Any:
        return self.reduced


class _Reference:
    def __init__(self, reference: tuple[Any, ...]) -> None:
        self.reference = reference


class _Pickler(pickle.Pickler):
    def persistent_id(self, found: Any) -> Any:
        return found.reference if isinstance(found, _Reference) else None


def write_zip(file: BinaryIO, state: Mapping[str, Tensor], content: Callable[[Mapping[str, Any], str], Any]) -> None:
    """Write what ``torch.load`` reads as ``content(state, sha256(state))``, into a new file."""
    keys = {name: key for key, name in enumerate(sorted(state))}
    archive = zipfile.ZipFile(file, "w")
    try:
        digest = _stream(state, lambda name: _opened(archive, file, f"data/{keys[name]}", state[name].nbytes))
        pickled = io.BytesIO()
        _Pickler(pickled, 2).dump(content({name: _Entry(value, keys[name]) for name, value in state.items()}, digest))
        others = {"data.pkl": pickled.getvalue(), "byteorder": sys.byteorder.encode(), "version": b"3\n"}
        for name, data in others.items():
            with _opened(archive, file, name, len(data)) as write:
                write(data)
        archive.close()
    finally:
        archive.fp = None  # after a failure there is nothing to end, and closing it would hide what happened


@contextlib.contextmanager
def _opened(archive: zipfile.ZipFile, file: BinaryIO, name: str, size: int) -> Iterator[Callable[[Any], int]]:
    """A new entry, its bytes aligned."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = size
    begin = file.tell() + _HEADER + len(entry.filename) + 4
    entry.extra = b"FB" + (-begin % _ALIGNED).to_bytes(2, "little") + bytes(-begin % _ALIGNED)
    with archive.open(entry, "w", force_zip64=True) as sink:
        yield sink.write


def read_zip(file: BinaryIO) -> Any:
    """What ``torch.load(file, map_location="cpu", weights_only=True)`` reads.

    The archive is taken apart here: PyTorch looks at no CRC, and at no size of an entry.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # torch stores every entry once and compresses none: anything else can only be there to explode.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("compressed entries")
        if len(entries) < len(archive.infolist()) or sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError("entries that overlap")
        root = next(iter(entries), "").partition("/")[0]
        order = bytes(_bytes(archive, entries[f"{root}/byteorder"])) if f"{root}/byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"unknown byte order {order[:9]!r}")
        swapped = order.decode() != sys.byteorder

        def storage(key: str, dtype: torch.dtype, count: int) -> torch.UntypedStorage:
            entry = entries[f"{root}/data/{key}"]
            if count * dtype.itemsize != entry.file_size:
                raise ValueError(f"a tensor claims {count} elements of {dtype}, where {entry.file_size} bytes are")
            found = _tensor(_bytes(archive, entry)).untyped_storage()
            if swapped:
                found.byteswap(dtype)
            return found

        return _torch.unpickled(bytes(_bytes(archive, entries[f"{root}/data.pkl"])), storage)


def _bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """All of an entry, its CRC checked."""
    with archive.open(entry) as source:
        return _exactly(source, entry.file_size)


def _exactly(source: Any, size: int) -> bytearray:
    data, begin = bytearray(size), 0
    with memoryview(data) as view:
        while begin < size:
            piece = source.read(min(_PIECE, size - begin))
            if not piece:
                raise EOFError(f"{begin} bytes instead of {size}")
            view[begin : begin + len(piece)] = piece
            begin += len(piece)
    return data


def _tensor(data: bytearray) -> Tensor:
    """These bytes; a storage that nothing can enlarge, not even for an empty one."""
    return torch.frombuffer(data or bytearray(1), dtype=torch.uint8)


# --- safetensors ------------------------------------------------------------------------------------------------------


def write_safetensors(
    file: BinaryIO, state: Mapping[str, Tensor], metadata: Callable[[str], Mapping[str, str]]
) -> None:
    """Write tensors and ``metadata(sha256(state))``, whose length must not depend on the sum, into a new file.

    Raises:
        TypeError: the format has no name for a dtype.
    """
    names = {dtype: name for name, dtype in _SAFE.items()}
    places: dict[str, Any] = {}
    end = 0
    for name, value in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):  # all aligned
        if value.dtype not in names:
            raise TypeError(f"safetensors cannot hold {name!r}, which is {value.dtype}: save to another name, x.pt say")
        begin, end = end, end + value.nbytes
        places[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}

    def header(digest: str) -> bytes:
        text = json.dumps({"__metadata__": metadata(digest), **places}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    start = file.write(header("0" * hashlib.sha256().digest_size * 2))

    def begin_at(name: str) -> AbstractContextManager[Callable[[Any], int]]:
        file.seek(start + places[name]["data_offsets"][0])
        return contextlib.nullcontext(file.write)

    digest = _stream(state, begin_at)
    file.seek(0)
    file.write(header(digest))


def read_safetensors(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file.

    Raises:
        ValueError: it is not exactly what its header says.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("a header that names no tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is no text")
    places = sorted(((*_place(entry), name) for name, entry in header.items()), key=lambda place: place[:2])
    if [begin for begin, *_ in places] != [0, *(end for _, end, *_ in places)][: len(places)]:
        raise ValueError("tensors with gaps between them, or that overlap")
    if 8 + length + (places[-1][1] if places else 0) != size:
        raise ValueError(f"a file of {size} bytes, where its header says otherwise")
    state = {}
    for begin, end, dtype, shape, name in places:
        data = _tensor(_exactly(file, end - begin))[: end - begin]
        state[name] = data.view(dtype).view(shape)
    return state, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that stands twice in a header")
    return found


def _place(entry: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Begin, end, dtype and shape of a tensor."""
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("sizes that are no positive integers")
    if kind not in _SAFE or end - begin != math.prod(shape) * _SAFE[kind].itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor {shape} of {str(kind)[:_SHOWN]}")
    return begin, end, _SAFE[kind], shape


_SHOWN = 20  # characters of a dtype in a message
