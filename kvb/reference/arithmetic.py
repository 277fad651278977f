"""Arithmetic in which nothing that matters is lost, on devices with float64 and on those without.

Where a device has no float64, a number is the sum of two float32 numbers, of which the second is what rounding took off
the first (Dekker, A floating-point technique for extending the available precision, 1971). Numbers whose squares
would overflow or underflow are scaled by a power of two, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps", "npu"}  # device types

# One number per row, as tensors that are in order if the first are, or the later ones where the first are equal:
# (size,), or (power, size), or (power, size, lost), which stands for (size + lost) * 2^power.
Parts = tuple[Tensor, ...]
_LOWEST = -(1 << 20)  # the power of zero


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype that a device has."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


# --- powers of two ----------------------------------------------------------------------------------------------------


def _bits(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """The integer of its size, the bits of its significand, and the bias of its exponent."""
    return (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)


def exponent(x: Tensor) -> Tensor:
    """int64 e with 2^(e-1) <= x < 2^e, for finite x >= 0 in float32 or float64; of no meaning for zero."""
    integer, significand, bias = _bits(x.dtype)
    small = x < torch.finfo(x.dtype).tiny  # subnormal
    up = significand + 1
    normal = torch.where(small, x * 2.0**up, x)
    power = (normal.contiguous().view(integer) >> significand).to(torch.int64) - (bias - 1)
    return torch.where(small, power - up, power)


def scaled(x: Tensor, power: Tensor) -> Tensor:
    """x * 2^power, rounded once where that is subnormal: in two steps, as 2^power alone may overflow."""
    integer, significand, bias = _bits(x.dtype)
    power = power.clamp(-2 * (bias - 1), 2 * bias)
    half = power >> 1
    for step in (half, power - half):
        x = x * ((step + bias).to(integer) << significand).view(x.dtype)
    return x


# --- pairs of numbers -------------------------------------------------------------------------------------------------


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, and what rounding took off it (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _add_pairs(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    total, lost = _two_sum(a[0], b[0])
    return _two_sum(total, torch.where(total.isfinite(), lost + (a[1] + b[1]), 0))  # an infinite sum loses nothing


def _square_pair(a: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The square of a float32 pair: halves of its significand have exact products."""
    shifted = a[0] * 4097.0  # 2^12 + 1
    high = shifted - (shifted - a[0])
    low = a[0] - high
    square = a[0] * a[0]
    lost = ((high * high - square) + 2 * high * low) + low * low
    return _two_sum(square, lost + 2 * a[0] * a[1])


# --- squared distances ------------------------------------------------------------------------------------------------


def squared_distances(q: Tensor, k: Tensor) -> Parts:
    """sum((q - k)^2) over the last axis, by halving: one summation order for all keys, everywhere.

    Whatever float32 numbers or smaller ones are given, float64 neither overflows nor underflows.
    """
    work = widest(q.device)
    if work == torch.float64 and torch.float64 not in (q.dtype, k.dtype):
        return (_fold(((q.double() - k.double()).square_(),))[0],)
    q, k = q.to(work), k.to(work)
    overflows = ~(q - k).isfinite().all(-1, keepdim=True)
    quarter = torch.where(overflows, 0.25, 1.0).to(work)
    apart = _two_sum(q * quarter, k * -quarter)
    power = exponent(apart[0].abs().amax(-1, keepdim=True))
    parts = tuple(scaled(part, -power) for part in apart)
    squares = (parts[0].square(),) if work == torch.float64 else _square_pair((parts[0], parts[1]))
    total = _fold(squares)
    shift = exponent(total[0])
    power = (power + 2 * overflows)[..., 0] * 2 + shift
    return torch.where(total[0] == 0, _LOWEST, power), *(scaled(part, -shift) for part in total)


def _fold(terms: Parts) -> Parts:
    """Sums over the last axis: of numbers, or of pairs."""
    while terms[0].shape[-1] > 1:
        size = terms[0].shape[-1]
        half = size // 2
        lower, upper = (tuple(part[..., at : at + half] for part in terms) for at in (0, half))
        if len(terms) == 1:
            folded: Parts = (lower[0] + upper[0],)
        else:
            folded = _add_pairs((lower[0], lower[1]), (upper[0], upper[1]))
        if size % 2:
            folded = tuple(torch.cat([one, part[..., 2 * half :]], -1) for one, part in zip(folded, terms, strict=True))
        terms = folded
    return tuple(part[..., 0] for part in terms)


def value(parts: Parts) -> Tensor:
    """The number that parts stand for, rounded; +inf or 0 where its dtype holds nothing closer."""
    if len(parts) == 1:
        return parts[0]
    return scaled(parts[1], parts[0])


# --- sums of rows -----------------------------------------------------------------------------------------------------


class RowSums:
    """A table [rows, width] of sums that are rounded once, however many rows are added.

    Sums of float32 numbers are kept in float64. Those of float64 numbers, and of float32 numbers where there is no
    float64, are kept in pairs.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.paired: bool = dtype == widest(device)
        self.total: Tensor = torch.zeros((rows, width), dtype=dtype if self.paired else torch.float64, device=device)
        self.lost: Tensor | None = torch.zeros_like(self.total) if self.paired else None

    def add(self, row: Tensor, part: Tensor) -> None:
        """Add part[i] [n, width] to row[i] of the table."""
        if self.lost is None:
            self.total.index_add_(0, row, part.to(self.total.dtype))
        elif row.numel():
            row, *pair = _sum_equal_rows(row, part.to(self.dtype))
            both = _add_pairs((self.total[row], self.lost[row]), (pair[0], pair[1]))
            self.total[row], self.lost[row] = both

    def rounded(self) -> Tensor:
        total = self.total if self.lost is None else self.total + self.lost
        return torch.where(total.isfinite(), total, self.total).to(self.dtype)  # not NaN, where they overflow


def _sum_equal_rows(row: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row once, and the sum of its parts as a pair: neighbours are added, then neighbours of those, and so on."""
    row, order = row.sort(stable=True)
    total, lost = part[order], torch.zeros_like(part)
    place = torch.arange(row.numel(), device=row.device)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    rank = place - torch.where(first, place, 0).cummax(0).values
    while bool((rank > 0).any()):
        kept = (rank % 2 == 0).nonzero()[:, 0]
        following = (kept + 1).clamp(max=rank.numel() - 1)
        partner = (rank[following] % 2 == 1)[:, None]  # of the same row
        other = torch.where(partner, total[following], 0), torch.where(partner, lost[following], 0)
        total, lost = _add_pairs((total[kept], lost[kept]), other)
        row, rank = row[kept], rank[kept] // 2
    return row, total, lost
