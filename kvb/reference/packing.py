"""Keys in the layout that the search reads: centred on the mean of each codebook, with half their squared norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvb.reference import shared
from kvb.reference.arithmetic import widest
from kvb.reference.shared import (
    accumulator,
    finite_rows,
    require,
    require_keys,
    require_tensors,
)

LANES = 16  # keys per group: the filter looks at group minima first, which is 16 times less to scan

_HEADER = 64  # bytes of the layout id, and the alignment of a packed codebook


class Layout(NamedTuple):
    """Where things lie in one packed codebook, in bytes: id | rows [Kp, D + 1] | centre [D] | radius."""

    K: int
    D: int
    dtype: torch.dtype

    @property
    def padded(self) -> int:
        return -(-self.K // LANES) * LANES

    @property
    def ends(self) -> tuple[int, int, int]:
        size = self.dtype.itemsize
        rows = _HEADER + self.padded * (self.D + 1) * size
        centre = rows + self.D * size
        return rows, centre, centre + size

    @property
    def nbytes(self) -> int:
        return -(-self.ends[-1] // _HEADER) * _HEADER

    @property
    def name(self) -> str:
        return f"kvb reference 1: K={self.K} D={self.D} {self.dtype}"[:_HEADER]


class Packed(NamedTuple):
    rows: Tensor  # [C, Kp, D + 1] centred key (zero if not finite, or padding), then half its squared norm:
    #               +inf there bars the key, NaN forces its rescore
    centre: Tensor  # [C, D] mean of the finite keys
    radius: Tensor  # [C, 1] largest norm of a centred key


def layout_of(K: int, D: int, dtype: torch.dtype) -> Layout:
    return Layout(K, D, accumulator(dtype))


def packed_nbytes(K: int, D: int, dtype: torch.dtype) -> int:
    """Bytes of one packed codebook; the operator's fake uses it too."""
    return layout_of(K, D, dtype).nbytes


@functools.lru_cache(maxsize=64)
def _layout_id(layout: Layout, device: torch.device) -> Tensor:
    return torch.tensor(list(layout.name.encode().ljust(_HEADER)), dtype=torch.uint8, device=device)


def unpack(packed: Tensor, layout: Layout) -> Packed:
    C, (a, b, c) = packed.shape[0], layout.ends
    return Packed(
        packed[:, _HEADER:a].view(layout.dtype).view(C, layout.padded, layout.D + 1),
        packed[:, a:b].view(layout.dtype),
        packed[:, b:c].view(layout.dtype),
    )


def pack_keys(keys: Tensor) -> Tensor:
    """Keys [C, K, D] in the layout that ``nearest`` searches: uint8 [C, nbytes]."""
    require_keys(keys)
    C, K, D = keys.shape
    layout = layout_of(K, D, keys.dtype)
    packed = keys.new_zeros((C, layout.nbytes), dtype=torch.uint8)
    packed[:, :_HEADER] = _layout_id(layout, keys.device)
    view = unpack(packed, layout)
    books = max(1, shared.TILE // max(1, 4 * K * D))
    for c in range(0, C, books):
        tile = slice(c, c + books)
        finite = finite_rows(keys[tile])
        wide = widest(keys.device)
        exact = torch.where(finite[..., None], keys[tile], 0).to(wide)
        centre = (exact.sum(1) / finite.sum(1, keepdim=True).clamp(min=1)).to(layout.dtype)
        centre = torch.where(centre.isfinite(), centre, 0)
        centred = torch.where(finite[..., None], exact - centre[:, None].to(wide), 0).to(layout.dtype)
        halves = (centred.to(wide).square().sum(-1) / 2).to(layout.dtype)
        # A norm that overflows must not look like a barred key: NaN sends the key to the rescore.
        halves = torch.where(halves.isfinite(), halves, torch.nan)
        view.rows[tile, :K, :D] = centred
        view.rows[tile, :K, D] = torch.where(finite, halves, torch.inf)
        view.rows[tile, K:, D] = torch.inf
        view.centre[tile] = centre
        view.radius[tile] = (2 * torch.where(finite, halves, 0).amax(1, keepdim=True)).sqrt()
    return packed


def packed_matches(keys: Tensor, packed: Tensor, pack: Callable[[Tensor], Tensor] = pack_keys) -> Tensor:
    """Whether ``packed`` was made by ``pack`` of keys [C, K, D] as they are now: a bool [].

    Here all of it is made again and compared. A backend may compare a fingerprint of the keys instead, to which the
    sign of a zero is nothing, and leave the rest of ``packed`` alone.
    """
    again = pack(keys)
    require_tensors(keys=keys, packed=packed)
    if packed.dtype != again.dtype or packed.shape != again.shape:
        return torch.zeros((), dtype=torch.bool, device=keys.device)
    return (packed == again).all()


def require_packed(packed: Tensor, layout: Layout, C: int) -> None:
    same_size = packed.dtype == torch.uint8 and packed.shape == (C, layout.nbytes) and packed.is_contiguous()
    # Reading the id on another device would make the host wait; there the size alone is checked.
    same_id = packed.device.type != "cpu" or (
        same_size and bool((packed[:, :_HEADER] == _layout_id(layout, packed.device)).all())
    )
    require(
        same_size and same_id,
        f"packed keys do not match: expected the layout '{layout.name}', {layout.nbytes} bytes for each of "
        f"{C} codebooks, got {packed.dtype} {tuple(packed.shape)}; pack the keys again with pack_keys(keys)",
    )
