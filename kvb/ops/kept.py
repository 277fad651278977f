"""Packed keys that a compiled graph asks for as it runs: it makes none, and holds none that could be stale.

In place of ``packed`` such a graph passes ``number_of(keeper)``, int64 of one axis: the keeper, a module, has packed
keys and knows whether they are up to date. An exported program, which runs in other processes and on other machines,
passes ``nobody()``, int64 [0]: then the first call packs, and later ones do where PyTorch says that the keys were
written. ``unpacked(keys)``, uint8 [C, 0], stands for keys that nobody packed.
"""

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvb import _torch
from kvb.ops.schemas import library


class Keeper(Protocol):
    def packed_in_graph(self, keys: Tensor, number: Tensor) -> Tensor:
        """The packed form of keys that a graph passes to an operator together with the keeper's number."""


class _Known(NamedTuple):
    version: int
    address: int
    packed: Tensor


_LENGTH = 1009  # of what stands for packed keys: of 1 or 2 numbers a compiled graph looks at the keys once more
_numbers = itertools.count()
_keepers: weakref.WeakValueDictionary[int, Keeper] = weakref.WeakValueDictionary()
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the keys of exported programs


def number_of(keeper: Keeper) -> Tensor:
    """What stands for the packed keys of a new keeper."""
    number = next(_numbers)
    _keepers[number] = keeper
    return torch.full((_LENGTH,), number, device="cpu")


def nobody() -> Tensor:
    """What stands for packed keys that the operators keep themselves."""
    return torch.empty(0, dtype=torch.int64, device="cpu")


def unpacked(keys: Tensor) -> Tensor:
    """What stands for keys that were not packed: the operators read them as they lie, or pack them themselves."""
    return keys.new_empty((keys.shape[0], 0), dtype=torch.uint8)


def matches(keys: Tensor, packed: Tensor) -> bool:
    """Whether these keys were packed: one read of them. On another device than the CPU the host would have to wait."""
    return keys.device.type == "cpu" and bool(torch.ops.kvb.packed_matches(keys, packed))


def _kept_packed(keys: Tensor, number: Tensor) -> Tensor:
    keeper = _keepers.get(int(number[0])) if number.numel() else None
    return _of_program(keys) if keeper is None else keeper.packed_in_graph(keys, number)


def _of_program(keys: Tensor) -> Tensor:
    if keys.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.ops.kvb.pack_keys(keys)
    known = _known.get(keys)
    version, address = -1 if keys.is_inference() else _torch.version_of(keys), keys.data_ptr()
    if known is not None and (version, address) == known[:2] and version >= 0:
        return known.packed
    packed = known.packed if known is not None and matches(keys, known.packed) else torch.ops.kvb.pack_keys(keys)
    _known[keys] = _Known(version, address, packed)
    return packed


library.define("kept_packed(Tensor keys, Tensor number) -> Tensor")
library.impl("kept_packed", _kept_packed, "CompositeExplicitAutograd")
