"""Launches the kernels of ``pack_keys``: allocation, grids, block sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb.kernels import layout, pack
from kvb.kernels.device import ceil_div, multiple, power_of_two
from kvb.kernels.launcher import MOST_REGISTERS, Options, run

COLUMNS = 64  # of a tile of keys, at most: 32 numbers per thread, with its 64 keys
SLICE = 256  # keys that one program of ``survey`` sums up, or more, so that there are 64 slices at most
MOST_SLICES = 64  # ``pack`` reads all of them at once
SURVEY = Options(registers=MOST_REGISTERS)
PACK = Options(registers=MOST_REGISTERS, contract=False)


def pack_keys(keys: Tensor) -> Tensor:
    """Keys [C, K, D] in the layout that ``nearest`` searches: uint8 [C, nbytes]."""
    return packed(keys.contiguous(), None)


def packed(keys: Tensor, mask: Tensor | None) -> Tensor:
    """The same of contiguous keys, of which those may win that mask [C, K] allows."""
    if keys.dtype == torch.float64:
        return unpacked(keys)
    packing = Packing(keys)
    packing.survey(mask)
    return packing.finish(mask)


def unpacked(keys: Tensor) -> Tensor:
    """What stands for packed float64 keys."""
    C, K, D = keys.shape
    return keys.new_zeros((C, layout.packed_nbytes(K, D, keys.dtype)), dtype=torch.uint8)


def allowed(mask: Tensor | None, unread: Tensor) -> Tensor:
    """The mask as bytes; where there is none, some tensor to stand in its place."""
    return unread if mask is None else mask.contiguous().view(torch.uint8)


def slicing(K: int) -> tuple[int, int]:
    """Keys of one slice of a codebook, and how many slices it has."""
    size = max(SLICE, multiple(ceil_div(K, MOST_SLICES), layout.TILE))
    return size, ceil_div(K, size)


class Packing:
    """The packing of keys [C, K, D] that may still change: all memory is there; ``survey`` them, then ``finish``.

    Attributes:
        packed: uint8 [C, nbytes].
        surveys: float64 [C, slices, 4, D], what ``survey`` found of every slice.
        table: int32 [C, 2, SLOTS], where equal keys meet: the lowest index that claimed a slot.
    """

    def __init__(self, keys: Tensor) -> None:
        C, K, D = keys.shape
        self.keys, self.layout = keys, layout.layout(K, D)
        self.slice, self.slices = slicing(K)
        slots = 4 * power_of_two(K)  # a quarter of them taken at most: few keys that are not equal share one
        self.packed = keys.new_empty((C, self.layout.NBYTES), dtype=torch.uint8)
        self.packed[:, : 4 * self.layout.NORMS].zero_()
        self.surveys = keys.new_empty((C, self.slices, 4, D), dtype=torch.float64)
        self.table = torch.full((C, 2, slots), (1 << 31) - 1, dtype=torch.int32, device=keys.device)
        self.columns = min(COLUMNS, power_of_two(D))
        self.constants: dict[str, Any] = {"D": D, "SLICES": self.slices, "SLOTS": slots, "BK": layout.TILE}

    def survey(self, mask: Tensor | None) -> None:
        C, K, D = self.keys.shape
        run(
            pack.survey,
            (C * self.slices, ceil_div(D, self.columns)),
            SURVEY,
            keys=self.keys,
            mask=allowed(mask, self.table),
            surveys=self.surveys,
            table=self.table,
            K=K,
            **self.constants,
            BD=self.columns,
            SLICE=self.slice,
            MASKED=mask is not None,
        )

    def finish(self, mask: Tensor | None) -> Tensor:
        facts = self.layout
        run(
            pack.pack,
            (len(self.packed) * facts.TILES,),
            PACK,
            keys=self.keys,
            mask=allowed(mask, self.table),
            surveys=self.surveys,
            table=self.table,
            floats=self.packed.view(torch.float32),
            words=self.packed.view(torch.float16),
            K=self.keys.shape[1],
            **self.constants,
            NBYTES=facts.NBYTES,
            TILES=facts.TILES,
            RADII=facts.RADII,
            NORMS=facts.NORMS,
            HIGH=facts.HIGH,
            LOW=facts.LOW,
            FORM=facts.FORM,
            DP=facts.DP,
            KP=facts.Kp,
            WIDTH=power_of_two(self.slices),
            BD=min(COLUMNS, facts.DP) if facts.FORM == layout.ADDED else self.columns,
            MASKED=mask is not None,
        )
        return self.packed
