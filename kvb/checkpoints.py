"""Checkpoints: whole modules to files and back, all or nothing; nothing in a file is trusted.

A file holds a state_dict and the SHA-256 of its names, dtypes, shapes and bytes. Files of others load too: a plain
state_dict in either format, checked by the zip's own CRCs.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kvb import files
from kvb.modules import legacy

VERSION = 1
_PIECE = 1 << 20  # bytes copied at a time
_SHOWN = 10  # problems named in one message
_LONG = 200  # characters of what a file holds in one message
_VERSION, _DIGEST, _STATE = "kvb_checkpoint", "sha256", "state_dict"
# Flags and mask of a bottleneck, which may be absent: together in one tensor of varying length in kvb 0.1, then apart.
FLAGS, MASK = "kvb_flags", "kvb_mask"
STATE_NAMES = (legacy.NAME, FLAGS, MASK)
_Module = TypeVar("_Module", bound=nn.Module)

# What torch, zipfile, pickle and json raise on damaged files.
_BROKEN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, binascii.Error, EOFError, MemoryError),
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, ImportError, OSError),
    *(AssertionError,),
)


class CheckpointError(RuntimeError):
    """A file that is damaged, hostile, of another version, or of another module; nothing has changed."""


class _Contents(NamedTuple):
    state: dict[str, Tensor]
    digest: str | None  # None in a file that kvb did not write


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the module's state_dict to one file, all or nothing: a failure leaves the old file.

    The new file keeps mode and owner of the old one; a symbolic link stays, and the file that it names is replaced.

    Args:
        module: any ``nn.Module`` whose state_dict holds dense tensors only.
        path: ends in ".safetensors" for that format (the package safetensors must be installed); anything else is a
            torch zip, ``{"kvb_checkpoint", "sha256", "state_dict"}``, which ``torch.load`` reads too.
    Raises:
        TypeError: no module, or a state_dict with more than dense tensors. RuntimeError: safetensors is not installed.
        OSError: the file cannot be written, or ``path`` is no regular file.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"save(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    state = {}
    for name, value in module.state_dict().items():
        if problem := _not_plain(value):
            raise TypeError(f"save() writes dense tensors only, but the state_dict holds {problem} as {name!r}")
        plain = value.detach().resolve_conj().resolve_neg()
        state[name] = plain.to("cpu", copy=True, memory_format=torch.contiguous_format)
    data = _encode(state, safe=Path(path).suffix == ".safetensors")
    del state
    with files.replacing(path) as file:
        file.write(data)


def load(module: _Module, path: str | os.PathLike[str]) -> _Module:
    """Load a file into the module, all or nothing; returns the module.

    Reads files of ``save`` and plain state_dicts of others, in both formats, whatever the file's name. Never runs code
    in a file. Names and shapes must match the module's (as ``strict=True``); the tensors take its dtypes and
    devices.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint, is of another version, or does not fit the module; the
        module is as it was. TypeError: no module. OSError: the file cannot be read.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"load(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    state = read_state(path)
    if problems := _misfits(module.state_dict(), state):
        shown = [*problems[:_SHOWN], *([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])]
        raise CheckpointError(f"{path} does not fit {type(module).__name__}:\n\t" + "\n\t".join(shown))
    try:
        with _all_or_nothing(module):
            module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}: {error}") from error
    return module


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a file of either format, verified as by ``load``; for the converters of ``kvb.compat``.

    A dict of state_dicts, as the authors' ``BottleneckedEncoder.save`` writes it, comes back with dotted names.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint, or is of another version. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        begin = file.read(9)
        zipped = begin[:4] == b"PK\x03\x04"
        if not zipped and begin[8:] != b"{":
            raise CheckpointError(f"{path} is neither a torch zip file nor safetensors; it starts with {begin[:8]!r}")
        if not zipped:
            _safetensors()
        try:
            contents = _unzip(file) if zipped else _unpack(begin + file.read())
            if contents.digest is not None:
                _verify(contents.state, contents.digest)
        except _BROKEN as error:
            _raise_interruption(error)
            detail = str(error).partition("\n")[0][:_LONG]
            raise CheckpointError(f"{path} is damaged or no checkpoint: {type(error).__name__}: {detail}") from error
    return contents.state


# --- formats ----------------------------------------------------------------------------------------------------------


def _encode(state: dict[str, Tensor], *, safe: bool) -> bytes | memoryview:
    header = {_VERSION: VERSION, _DIGEST: _sha256(state)}
    if safe:
        data: bytes = _safetensors().save(state, {name: str(value) for name, value in header.items()})
        return data
    file = io.BytesIO()  # PyTorch aborts the process if writing to a Python file fails (full disk, Ctrl-C)
    torch.save({**header, _STATE: state}, file)
    return file.getbuffer()


def _safetensors() -> ModuleType:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise RuntimeError("safetensors is not installed: pip install safetensors, or use a name like x.pt") from error


def _unzip(file: BinaryIO) -> _Contents:
    found = torch.load(_clean(file), map_location="cpu", weights_only=True)
    if isinstance(found, Mapping) and _VERSION in found:
        return _contents(found.get(_STATE), found[_VERSION], found.get(_DIGEST))
    return _contents(found, None, None)


def _clean(file: BinaryIO) -> io.BytesIO:
    """Rewrites the archive from entries whose CRCs are right: torch checks none, and parses differently."""
    clean, size = io.BytesIO(), os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(clean, "w") as copy:
        entries = archive.infolist()
        # torch stores every entry once, uncompressed: anything else is an attack.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries")
        if len({entry.filename for entry in entries}) < len(entries) or sum(e.file_size for e in entries) > size:
            raise ValueError("entries that overlap")
        for entry in entries:
            new = zipfile.ZipInfo(entry.filename)
            new.file_size = entry.file_size
            with archive.open(entry) as source, copy.open(new, "w") as sink:
                shutil.copyfileobj(source, sink, _PIECE)
    clean.seek(0)
    return clean


def _unpack(data: bytes) -> _Contents:
    library, broken = _safetensors(), importlib.import_module("safetensors").SafetensorError
    try:
        state = library.load(data)
    except broken as error:
        raise ValueError(str(error)) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    version = header.get(_VERSION)
    return _contents(state, version if version is None else int(version), header.get(_DIGEST))


def _contents(state: Any, version: Any, digest: Any) -> _Contents:
    if version is not None and (type(version) is not int or version != VERSION):
        shown = version if type(version) is int and abs(version) < 1 << 31 else f"of type {type(version).__name__}"
        raise ValueError(f"version {shown}, but this kvb reads version {VERSION}: upgrade kvb")
    if version is not None and not isinstance(digest, str):
        raise ValueError(f"expected a {_DIGEST}, got {type(digest).__name__}")
    return _Contents(_flat(state, ""), digest)


def _flat(state: Any, prefix: str) -> dict[str, Tensor]:
    """A state_dict, or a dict of them, with dotted names."""
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a state_dict{prefix and ' as ' + _quoted(prefix[:-1])}, got {type(state).__name__}")
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"expected names of tensors, got {type(name).__name__}")
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, name + ".")
        elif problem := _not_plain(value):
            raise TypeError(f"expected dense tensors, got {problem} as {_quoted(prefix + name)}")
        else:
            flat[prefix + name] = value.detach()
    return flat


def _raise_interruption(error: BaseException | None) -> None:
    """Raise what stopped the program (Ctrl-C, say) where a library turned it into its own error."""
    while error is not None:
        if not isinstance(error, Exception):
            raise error
        error = error.__context__


def _quoted(name: str) -> str:
    """Shortens a name, which may come from a file, for a message."""
    return repr(name if len(name) <= _LONG else name[:_LONG] + "...")


def _not_plain(value: Any) -> str:
    """What this is instead of a dense tensor with data; empty if it is one."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value.detach()) is not Tensor or value.is_nested or value.is_quantized or value.is_meta:
        return f"a tensor of another kind ({type(value).__name__}, {value.dtype}, {value.device})"
    return "" if value.layout == torch.strided else f"a tensor of layout {value.layout}"


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name!r} {value.dtype} {tuple(value.shape)}\n".encode())
        value = value.resolve_conj().resolve_neg().contiguous()
        digest.update(files.content(value))
    return digest.hexdigest()


def _verify(state: Mapping[str, Tensor], digest: str) -> None:
    for name, value in state.items():
        # An expanded tensor may claim any size, which hashing would allocate.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{_quoted(name)} claims more elements than it holds")
    if digest != _sha256(state):
        raise ValueError("the tensors do not match their SHA-256")


# --- into the module --------------------------------------------------------------------------------------------------


def _misfits(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Why a state_dict cannot be loaded in place of another."""

    def optional(name: str) -> bool:
        return name.rpartition(".")[2] in STATE_NAMES

    problems = [f"missing {name!r}" for name in mine if name not in theirs and not optional(name)]
    for name, value in theirs.items():
        if name not in mine:
            problems += (
                [] if optional(name) else [f"unexpected {_quoted(name)}"]
            )  # its module raises if it must not be there
        elif value.shape != mine[name].shape and not (optional(name) and value.dim() == 1):
            problems.append(f"{name!r}: expected shape {tuple(mine[name].shape)}, got {tuple(value.shape)}")
        elif not (torch.can_cast(value.dtype, mine[name].dtype) or _are_counts(value, mine[name])):
            problems.append(f"{name!r}: expected {mine[name].dtype}, got {value.dtype}")
    return problems


def _are_counts(given: Tensor, wanted: Tensor) -> bool:
    """Published files hold counts as floating-point numbers."""
    return given.is_floating_point() and wanted.dtype == torch.int64


@contextlib.contextmanager
def _all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Undo whatever happens to the module inside, unless it ends well."""
    parts = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for part, attributes, parameters, buffers in parts:
                vars(part).clear()
                vars(part).update(attributes)
                part._parameters.clear()
                part._parameters.update(parameters)
                part._buffers.clear()
                part._buffers.update(buffers)
            with torch.no_grad():
                for tensor, copy in copies:
                    # An inference tensor cannot have changed, nor be written to.
                    if not tensor.is_inference() or torch.is_inference_mode_enabled():
                        tensor.copy_(copy)
