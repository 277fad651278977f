"""What the launches on tables share: checks of their arguments, the rows that are added, and the sizes of tiles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb.kernels import scatter
from kvb.kernels.device import ceil_div, matrix_units, power_of_two, require
from kvb.kernels.launcher import Options, run

CHECKED = Options(asserts=True)
FLAT = 1024  # elements of a one-dimensional tile


class Block(NamedTuple):
    """A tile of rows: its columns are the row's length rounded up to a power of two, ``columns`` at most."""

    elements: int  # its rows are what the columns leave, MOST_ROWS at most
    columns: int


MOST_ROWS = 256  # two per thread: each has its indices, divisions and pointers
COUNT = Block(2048, 128)  # 16 elements per thread


def tile_of(block: Block, length: int) -> tuple[int, int]:
    """Rows and columns of a tile over rows of ``length`` elements."""
    columns = min(block.columns, power_of_two(length))
    return min(MOST_ROWS, block.elements // columns), columns


def require_rows(tensor: Tensor, name: str, letters: str, *sizes: int) -> None:
    """``tensor`` is floating-point, of the rank that ``letters`` have, and of ``sizes`` where they are not -1."""
    require(
        tensor.is_floating_point(),
        lambda: f"expected {name} float16, bfloat16, float32 or float64, got {tensor.dtype}",
    )
    fits = tensor.dim() == len(sizes) and all(want in (-1, got) for want, got in zip(sizes, tensor.shape, strict=False))
    require(fits, lambda: f"expected {name} [{letters}], got {tuple(tensor.shape)}")


def require_codes(indices: Tensor, C: int, K: int, like: Tensor) -> None:
    """Indices [B, S, C] of any integer dtype; their range is for the kernels to assert."""
    require(
        indices.dim() == 3 and indices.shape[2] == C,
        lambda: f"expected indices [B, S, {C}], got {tuple(indices.shape)}",
    )
    require(
        not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool),
        lambda: f"expected integer indices, got {indices.dtype}",
    )
    require(
        indices.device == like.device,
        lambda: f"expected indices on {like.device} like the rest, got {indices.device}",
    )
    require(K > 0 or indices.numel() == 0, lambda: f"expected K of at least 1, got {K}")


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype sums are returned in: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def index_arguments(indices: Tensor) -> dict[str, Any]:
    """The indices [B, S, C], with their strides and sizes."""
    b, s, c = indices.stride()
    return {"indices": indices, "i_b": b, "i_s": s, "i_c": c, "S": indices.shape[1], "C": indices.shape[2]}


@dataclasses.dataclass(frozen=True)
class Source:
    """What is added to a table: rows x [B, S, C, V] under indices [B, S, C], in whatever memory they lie."""

    x: Tensor
    indices: Tensor
    K: int
    divisor: int = 1

    @property
    def count(self) -> int:
        return self.indices.numel()

    @property
    def width(self) -> int:
        return self.x.shape[3]

    @property
    def table(self) -> tuple[int, int, int]:
        return self.indices.shape[2], self.K, self.width

    @property
    def end(self) -> int:
        """The row that stands for none: one behind the last of the table."""
        return self.indices.shape[2] * self.K

    @property
    def matrix(self) -> str:
        """Who multiplies, as ``matrix_units`` says; nobody multiplies float64, as not every GPU could."""
        return "none" if self.x.dtype == torch.float64 else matrix_units(self.x.device)

    def no_rows(self) -> Tensor:
        """Memory for the table row of every position."""
        return self.x.new_empty(self.count, dtype=torch.int32 if self.end < 1 << 31 else torch.int64)

    @property
    def where(self) -> dict[str, Any]:
        """The indices, with their strides."""
        return index_arguments(self.indices)

    @property
    def rows(self) -> dict[str, Any]:
        """x, with its strides and what is known of them; an axis of one element gets 0, so that it spoils no alignment.

        ALIGN divides all strides but the last; UNIT where that is 1.
        """
        b, s, c = (0 if size == 1 else step for size, step in zip(self.x.shape[:3], self.x.stride(), strict=False))
        v = self.x.stride(3)
        return {
            "x": self.x,
            "x_b": b,
            "x_s": s,
            "x_c": c,
            "x_v": v,
            "V": self.width,
            "ALIGN": math.gcd(16, b, s, c),
            "UNIT": self.width == 1 or v == 1,
        }


def find_rows(source: Source, rows: Tensor | None, hits: Tensor | None, peaks: Tensor | None) -> None:
    """The table row of every position; given ``hits`` or ``peaks``, those of the finite rows: see ``table_rows``."""
    block, columns = tile_of(COUNT, source.width)
    if source.count:
        run(
            scatter.table_rows,
            (ceil_div(source.count, block),),
            CHECKED,
            **source.rows,
            **source.where,
            rows=rows,
            hits=hits,
            peaks=peaks,
            count=source.count,
            K=source.K,
            BLOCK_R=block,
            BLOCK_V=columns,
        )
