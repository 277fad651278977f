"""Packed keys as no ``pack_keys`` makes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def damaged(packed: Tensor, count: int) -> Iterator[Tensor]:
    """Copies with random bytes, flipped bits, NaN, Inf and huge numbers after the 64 bytes of their id."""
    for i in range(count):
        other = packed.clone()
        body = other[:, 64:]
        if body.numel() == 0:
            return
        kind = i % 6
        place = torch.rand(body.shape) < (1.0, 0.1, 0.001)[i % 3]
        if kind == 0:
            body.copy_(torch.where(place, torch.randint(256, body.shape, dtype=torch.uint8), body))
        elif kind == 1:
            body.copy_(torch.where(place, body ^ 128, body))
        elif kind == 2:
            body.fill_(255)  # NaN as a float, all keys usable
        elif kind == 3:
            body.zero_()
        else:
            floats = body[:, : body.shape[1] // 4 * 4].contiguous().view(torch.float32)
            value = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45)[i // 6 % 6]
            floats[torch.rand(floats.shape) < (1.0, 0.05)[kind - 4]] = value
            body[:, : body.shape[1] // 4 * 4] = floats.view(torch.uint8)
        yield other
