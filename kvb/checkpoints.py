"""Checkpoints: whole modules to files and back, all or nothing; nothing in a file is trusted.

A file holds a state_dict and the SHA-256 of its names, dtypes, shapes and bytes. Files of others load too: a plain
state_dict in either format, checked by the zip's own CRCs.
"""

from __future__ import annotations

import binascii
import collections
import contextlib
import hashlib
import importlib
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kvb import files, safetensors_format
from kvb.modules import legacy

VERSION = 1
_PIECE = 1 << 18  # elements exchanged at a time
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
    """A file that is damaged, hostile, of another version, or of another module; nothing has changed.

    Examples:
        >>> kvb.save(torch.nn.Linear(2, 2), "linear.pt")
        >>> kvb.load(kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10), "linear.pt")
        Traceback (most recent call last):
        kvb.checkpoints.CheckpointError: ...
    """


class _Contents(NamedTuple):
    state: dict[str, Tensor]
    digest: str | None  # None in a file that kvb did not write


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the module's state_dict to one file, all or nothing: a failure leaves the old file.

    The new file keeps mode and owner of the old one; a symbolic link stays, and the file that it names is replaced.
    Nothing may write to the module meanwhile.

    Args:
        module: any ``nn.Module`` whose state_dict holds dense tensors only.
        path: ends in ".safetensors" for that format (the package safetensors must be installed); anything else is a
            torch zip, ``{"kvb_checkpoint", "sha256", "state_dict"}``, which ``torch.load`` reads too.
    Raises:
        TypeError: no module, a state_dict with more than dense tensors, or a dtype that safetensors cannot hold.
        RuntimeError: safetensors is not installed, or the module changed while it was saved. OSError: the file cannot
        be written, or ``path`` is no regular file.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> kvb.save(bottleneck, "memory.pt")
        >>> other = kvb.load(kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10), "memory.pt")
        >>> torch.equal(other.keys, bottleneck.keys)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"save(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    state = _whole(module.state_dict())
    digest = _sha256(state)
    with files.replacing(path) as file:
        if Path(path).suffix == ".safetensors":
            _write_safetensors(file, state, digest)
        else:
            _write_zip(file, state, digest)
        if _sha256(state) != digest:
            raise RuntimeError("the module changed while it was saved: save it when no other thread trains it")


def load(module: _Module, path: str | os.PathLike[str]) -> _Module:
    """``kvb.load`` of a file into a module; its documentation is there."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"load(): argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    state, own = read_state(path), module.state_dict()
    if problems := _misfits(own, state):
        shown = [*problems[:_SHOWN], *([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])]
        raise CheckpointError(f"{path} does not fit {type(module).__name__}:\n\t" + "\n\t".join(shown))
    adopts = can_adopt(module)
    try:
        state = _apart(state, own, copies=not adopts)  # before the old content is copied: the file's is let go
        with all_or_nothing(module, copies=not adopts) as former:
            del own  # which may hold copies
            module.load_state_dict(state, **({"assign": True} if adopts else {}))
            if adopts:
                state.clear()
                former.exchange()
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}: {error}") from error
    return module


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a file of either format, verified as by ``load``; for the converters of ``kvb.compat``.

    A dict of state_dicts, as the authors' ``BottleneckedEncoder.save`` writes it, comes back with dotted names.
    Tensors of a torch zip are maps of the file, which must stay as it is while they are used.

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
            contents = _read_zip(file, path) if zipped else _read_safetensors(path)
            if contents.digest is not None:
                _verify(contents.state, contents.digest)
        except _BROKEN as error:
            _raise_interruption(error)
            detail = str(error).partition("\n")[0][:_LONG]
            raise CheckpointError(f"{path} is damaged or no checkpoint: {type(error).__name__}: {detail}") from error
    return contents.state


# --- formats ----------------------------------------------------------------------------------------------------------


def _whole(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict as files hold them: in the host's memory, of which none shares any or holds more."""
    seen: set[int] = set()
    whole = {}
    for name, value in state.items():
        if problem := _not_plain(value):
            raise TypeError(f"save() writes dense tensors only, but the state_dict holds {problem} as {name!r}")
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        whole[name] = plain.clone() if place in seen or plain.untyped_storage().nbytes() > plain.nbytes else plain
        seen.add(place)
    return whole


def _write_zip(file: BinaryIO, state: dict[str, Tensor], digest: str) -> None:
    try:
        torch.save({_VERSION: VERSION, _DIGEST: digest, _STATE: state}, file)
    except RuntimeError as error:  # which PyTorch makes of what the file raised
        _raise_interruption(error)
        raise _cause(error, OSError) or error from None


def _write_safetensors(file: BinaryIO, state: dict[str, Tensor], digest: str) -> None:
    _safetensors()  # or nobody here could load it
    header, tensors = safetensors_format.parts(state, {_VERSION: str(VERSION), _DIGEST: digest})
    file.write(header)
    for value in tensors:
        file.write(files.content(value))


def _safetensors() -> ModuleType:
    try:
        library = importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise RuntimeError("safetensors is not installed: pip install safetensors, or use a name like x.pt") from error
    version = importlib.import_module("safetensors").__version__
    if tuple(map(int, version.split(".")[:2])) < (0, 8):
        raise RuntimeError(f"kvb needs safetensors 0.8 or later, and this is {version}: pip install -U safetensors")
    return library


def _read_zip(file: BinaryIO, path: str | os.PathLike[str]) -> _Contents:
    if Path(path).suffix == ".safetensors":  # whose content PyTorch does not look at
        raise ValueError("a torch zip file that is called .safetensors: rename it to x.pt, say")
    sizes = _checked_sizes(file)
    # Mapped, a tensor that claims more than its entry holds never reaches beyond the file.
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(found, Mapping) and _VERSION in found:
        contents = _contents(found.get(_STATE), found[_VERSION], found.get(_DIGEST))
    else:
        contents = _contents(found, None, None)
    storages = (value.untyped_storage() for value in contents.state.values())
    claimed = collections.Counter({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if any(claimed[size] > sizes[size] for size in claimed if size):
        raise ValueError("a tensor claims other memory than an entry holds")
    return contents


def _checked_sizes(file: BinaryIO) -> collections.Counter[int]:
    """The sizes of a zip's entries, whose CRCs are right: PyTorch looks at none."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch stores every entry once, uncompressed: anything else is an attack.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries")
        if len({entry.filename for entry in entries}) < len(entries) or sum(e.file_size for e in entries) > size:
            raise ValueError("entries that overlap")
        if damaged := archive.testzip():
            raise ValueError(f"a wrong CRC of {_quoted(damaged)}")
    return collections.Counter(entry.file_size for entry in entries)


def _read_safetensors(path: str | os.PathLike[str]) -> _Contents:
    library = importlib.import_module("safetensors")
    broken = library.SafetensorError
    try:
        # Read, not mapped: what is mapped changes with the file.
        with library.safe_open(path, framework="pt", backend="pread") as file:
            header, state = file.metadata() or {}, file.get_tensors()
    except broken as error:
        raise ValueError(str(error)) from error
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


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first of this kind among an error and those it came from."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kind):
        found = found.__context__
    return found


def _sha256(state: Mapping[str, Tensor]) -> str:
    """Of the tensors' names, dtypes, shapes and bytes."""
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


def _apart(state: dict[str, Tensor], own: Mapping[str, Tensor], *, copies: bool) -> dict[str, Tensor]:
    """The same state, which is emptied, and no tensor for the module shares memory with another.

    Args:
        copies: for code that nobody here knows, which may keep a tensor longer than the file stays as it is.
    """
    seen: set[int] = set()
    apart = {}
    for name in list(state):
        value = state.pop(name)
        place, fits = value.untyped_storage().data_ptr(), name in own and own[name].shape == value.shape
        apart[name] = value.clone() if fits and (copies or place in seen) else value
        seen.add(place)
    return apart


def can_adopt(module: nn.Module) -> bool:
    """Whether nothing but code of PyTorch and kvb loads this module, and leaves its tensors alone with ``assign``."""

    def foreign(part: nn.Module) -> bool:
        kind = type(part)
        loaders = kind.load_state_dict, kind._load_from_state_dict, kind.__setattr__
        hooked = part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks
        return bool(hooked) or any(loader.__module__.partition(".")[0] not in _KNOWN for loader in loaders)

    plain = all(type(tensor.data) is Tensor for tensor in (*module.parameters(), *module.buffers()))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    return plain and not swaps and not any(map(foreign, module.modules()))


_KNOWN = ("torch", "kvb")


@contextlib.contextmanager
def all_or_nothing(module: nn.Module, *, copies: bool) -> Iterator[_Former]:
    """Undo whatever happens to the module inside, unless it ends well.

    Args:
        copies: of all tensors, where code that nobody here knows may write to them.
    """
    former = _Former(module, copies)
    done = False
    try:
        yield former
        done = True
    finally:
        if not done:
            former.put_back()


class _Former:
    """What a module was: its attributes, its tensors, and what they held."""

    def __init__(self, module: nn.Module, copies: bool) -> None:
        self.parts = [
            (part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in module.modules()
        ]
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        # Each a tensor, where its old content is, and a copy of that while both change.
        self.written: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if copies:
            self.written = [(tensor, tensor.detach().clone(), None) for tensor in tensors.values()]

    def put_back(self) -> None:
        for part, attributes, parameters, buffers in self.parts:
            vars(part).clear()
            vars(part).update(attributes)
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)
        with torch.no_grad():
            for tensor, content, copy in reversed(self.written):
                # An inference tensor cannot have changed, nor be written to.
                if not tensor.is_inference() or torch.is_inference_mode_enabled():
                    tensor.copy_(content if copy is None else copy)

    @torch.no_grad()
    def exchange(self) -> None:
        """Bring what the module was given into the tensors that it had, and the old content into those given."""
        for part, _, parameters, buffers in self.parts:
            tables: list[tuple[dict[str, Any], dict[str, Any]]]
            tables = [(part._parameters, parameters), (part._buffers, buffers)]
            for own, old in tables:
                for name, tensor in old.items():
                    given = own.get(name)
                    if tensor is None or given is None or given is tensor:
                        continue
                    if tensor.is_meta:  # which holds nothing: the module keeps what it was given
                        given.data = given.data.to(tensor.dtype, copy=True)  # no part of the file
                        continue
                    fits = given.dtype == tensor.dtype and given.device == tensor.device and given.is_contiguous()
                    # One tensor at a time is converted.
                    given = given.detach() if fits else given.detach().to(tensor).contiguous()
                    own[name] = tensor
                    self._swap(tensor, given)

    def _swap(self, tensor: Tensor, given: Tensor) -> None:
        mine, theirs = tensor.detach(), given
        for one, other in zip(
            mine.view(-1).split(_PIECE) if mine.is_contiguous() else (mine,),
            theirs.view(-1).split(_PIECE) if mine.is_contiguous() else (theirs,),
            strict=True,
        ):
            self.written.append((one, other, one.clone()))
            one.copy_(other)
            other.copy_(self.written[-1][2])
            self.written[-1] = one, other, None
