"""The packed form of a module's keys, kept between calls, and never searched after somebody wrote to the keys.

``_version`` does not count every write: ``.data``, NumPy, DLPack, collectives and other processes write without it. But
nobody writes to memory without a way to it. So packed keys are used as they are only while nobody but the module can
have had a way to the keys since they were last looked at; else they are compared with the keys by their fingerprint.

A graph of ``torch.compile`` holds the keys while it runs, and its makers decide how often. So it takes a twin of the
keys as well, which nobody else has, wherever it takes the keys: who holds the keys more often is somebody else.

What this cannot see: an address that outlives every reference (``data_ptr`` kept as a number and written through
``ctypes``), and a tensor found by a walk over ``gc.get_objects()``. ``forget`` is for them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb import _torch
from kvb.ops import kept as kept_keys


class WatchedBuffers(dict[str, Any]):
    """The buffers of a module, which know whether somebody took one out of them since that was last asked.

    The module itself takes them out with ``dict.__getitem__``, which goes unnoticed.
    """

    read: bool
    taken: bool

    __slots__ = ("read", "taken")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._note()

    def _note(self) -> None:
        self.taken = True  # the keys
        self.read = True  # any buffer

    def __getitem__(self, name: str) -> Any:
        self.read = True
        if name == "keys":
            self.taken = True
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # an iterator of its own makes dict(self) and {**self} come through __getitem__

    def __setitem__(self, name: str, value: Any) -> None:
        self._note()
        super().__setitem__(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        self._note()
        return super().get(name, default)

    def items(self) -> Any:
        self._note()
        return list(super().items())  # a view would let somebody read later, unnoticed

    def values(self) -> Any:
        self._note()
        return list(super().values())

    def pop(self, *args: Any) -> Any:
        self._note()
        return super().pop(*args)

    def popitem(self) -> Any:
        self._note()
        return super().popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        self._note()
        return super().setdefault(name, default)

    def copy(self) -> WatchedBuffers:
        self._note()
        return WatchedBuffers(self)

    def __or__(self, other: Any) -> Any:
        self._note()
        return super().__or__(other)

    def __ror__(self, other: Any) -> Any:
        self._note()
        return super().__ror__(other)

    def __reduce__(self) -> Any:
        self._note()
        return WatchedBuffers, (dict(self),)


class _Place(NamedTuple):
    """The keys as an object and as memory."""

    keys: Tensor
    alias: Tensor  # for the operators: a search in another thread does not look like somebody who holds the keys
    storage: torch.UntypedStorage
    address: int  # of the storage
    private: bool  # the memory belongs to PyTorch, and to this process alone
    cuda: bool


class _Kept(NamedTuple):
    place: _Place
    version: int  # of the keys, as PyTorch counts
    alone: bool  # nobody else held the keys when this was packed or compared
    packed: Tensor | None


def _holders(buffers: dict[str, Any], place: _Place) -> tuple[int, ...]:
    """How many hold the keys and their storage, as Python and PyTorch count them."""
    keys, storage = dict.__getitem__(buffers, "keys"), place.storage
    return (
        sys.getrefcount(keys),
        weakref.getweakrefcount(keys),
        _torch.users_of(keys),
        sys.getrefcount(storage),
        weakref.getweakrefcount(storage),
        _torch.users_of_storage(place.address),
    )


def _place(buffers: dict[str, Any]) -> _Place:
    keys = dict.__getitem__(buffers, "keys")
    storage = keys.untyped_storage()
    # Memory of NumPy or of a file cannot be resized by PyTorch; others write to it without a trace.
    private = storage.resizable() and not storage.is_shared()
    return _Place(keys, keys.detach(), storage, _torch.address_of(storage), private, keys.is_cuda)


def _is_at(place: _Place, keys: Tensor) -> bool:
    same = keys is place.keys and _torch.address_of(keys.untyped_storage()) == place.address
    return same and keys.data_ptr() == place.alias.data_ptr() and keys.stride() == place.alias.stride()


def _observed() -> bool:
    """Whether something records the operators of this call: then nothing kept may end in the record as a constant."""
    return _torch.dispatch_modes() > 0 or _torch.trace() is not None


def _can_be_kept(keys: Any) -> bool:
    """Whether the counts mean what they should, and nothing records this call.

    A torch.func transform wraps all that is computed within it, also of plain keys, and the wrapping dies with it.
    """
    plain = type(keys) is Tensor and not _torch.transforms_active() and not keys.is_inference()
    return plain and not (_observed() or (keys.is_cuda and torch.cuda.is_current_stream_capturing()))


class PackedKeys:
    """Keeps the packed form of the ``keys`` among a module's buffers.

    On the CPU, keys that somebody may have written are compared, and packed if they differ. Elsewhere they are packed,
    without a look that the host would have to wait for; also while a CUDA graph is captured, so that it packs at every
    replay. Safe for threads that search.
    """

    def __init__(self, buffers: dict[str, Any]) -> None:
        self._kept: _Kept | None = None
        self._buffers = buffers
        # Only the module has it, and a graph takes it wherever it takes the keys: so it is held as often as they are.
        self._twin = WatchedBuffers({"keys": kept_keys.number_of(self)})
        self._place_of_twin = _place(self._twin)

    def forget(self) -> None:
        self._kept = None

    def release(self) -> None:
        """Free the memory of the packed form, and still know who held the keys."""
        if self._kept is not None:
            self._kept = self._kept._replace(packed=None)

    def current(self, buffers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The keys and their packed form. Not for what Dynamo traces: see ``traced``."""
        kept = self._untouched(buffers)
        if kept is None or kept.packed is None or _observed():
            return self._look(buffers)
        if kept.place.cuda and torch.cuda.is_current_stream_capturing():
            return self._look(buffers)
        return kept.place.alias, kept.packed

    def traced(self, buffers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The keys, and what stands for their packed form in a graph that is traced: it is looked up when that runs."""
        keys: Tensor = dict.__getitem__(buffers, "keys")
        if not keys.is_cpu:
            return keys, torch.ops.kvb.pack_keys(keys)
        if torch.compiler.is_exporting():
            return keys, kept_keys.nobody()
        return keys, dict.__getitem__(self._twin, "keys")

    def packed_in_graph(self, keys: Tensor, number: Tensor) -> Tensor:
        """The packed form of the keys that a graph passes to an operator, together with their twin."""
        buffers = self._buffers
        if dict.__getitem__(buffers, "keys") is not keys:  # the graph changed them, and will write them at its end
            return torch.ops.kvb.pack_keys(keys)
        kept = self._untouched(buffers)
        if kept is None or kept.packed is None or kept.version != _torch.version_of(keys):  # the graph may have written
            return self._look(buffers)[1]
        return kept.packed

    def _untouched(self, buffers: dict[str, Any]) -> _Kept | None:
        """What is kept; None where somebody may have written to the keys since they were last looked at."""
        kept = self._kept
        if kept is None or not kept.alone or getattr(buffers, "taken", True) or not self._alone(buffers, kept.place):
            return None
        return kept

    def _alone(self, buffers: dict[str, Any], place: _Place) -> bool:
        """Whether nobody holds the keys but the module, and the graphs that hold their twin as often."""
        held = _holders(buffers, place)
        return held == _ALONE or held == _holders(self._twin, self._place_of_twin)

    def _look(self, buffers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if not _can_be_kept(dict.__getitem__(buffers, "keys")):
            keys = dict.__getitem__(buffers, "keys")
            return keys, torch.ops.kvb.pack_keys(keys)
        # In this order: who takes or writes the keys from now on is seen by the next look, whatever is read here.
        if isinstance(buffers, WatchedBuffers):
            buffers.taken = False
        kept = self._kept
        known = kept is not None and _is_at(kept.place, dict.__getitem__(buffers, "keys"))
        place = kept.place if kept is not None and known else _place(buffers)
        alone = place.private and self._alone(buffers, place)
        version = _torch.version_of(place.keys)
        packed = kept.packed if kept is not None and known else None
        if packed is None or not kept_keys.matches(place.alias, packed):
            packed = torch.ops.kvb.pack_keys(place.alias)
        self._kept = _Kept(place, version, alone, packed)
        return place.alias, packed

    def keep(self, buffers: dict[str, Any], packed: Tensor) -> None:
        """Take what an operator packed as it wrote the keys."""
        kept = self._kept
        self._kept = None
        if not _can_be_kept(dict.__getitem__(buffers, "keys")):
            return
        if kept is None or not _is_at(kept.place, dict.__getitem__(buffers, "keys")):
            kept = _Kept(_place(buffers), -1, False, packed)
        alone = kept.alone and not getattr(buffers, "taken", True) and self._alone(buffers, kept.place)
        self._kept = _Kept(kept.place, _torch.version_of(kept.place.keys), alone, packed)


def _count_alone() -> tuple[int, ...]:
    """What ``_holders`` finds where nobody else holds the keys: versions of Python and PyTorch count differently."""
    buffers = WatchedBuffers({"keys": torch.empty(1, device="cpu")})
    return _holders(buffers, _place(buffers))


_ALONE = _count_alone()
