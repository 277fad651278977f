"""``kvb_state``, the flags and the mask of files that kvb 0.1 wrote, as one uint8 tensor."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "kvb_state"
_VERSION = 1
_HEADER = 8  # bytes before the mask bits: version, initialised, learning, counting, has a mask, 3 unused


def problem(state: Tensor, pairs: int) -> str | None:
    """Why it cannot be read for a module of this many pairs; None if it can."""
    if state.dtype != torch.uint8 or state.dim() != 1 or len(state) < _HEADER:
        return f"expected {NAME} of at least {_HEADER} bytes, got {state.dtype} {tuple(state.shape)}"
    version, *flags = state[: _HEADER - 3].tolist()
    if version != _VERSION:
        return f"{NAME} has version {version}, but this kvb reads version {_VERSION}: upgrade kvb"
    want = _HEADER + (-(-pairs // 8) if flags[3] else 0)
    if max(flags) > 1 or len(state) != want:
        got = f"{flags} and {len(state)} bytes"
        return f"{NAME} is damaged: expected flags of 0 or 1 and {want} bytes, got {got}"
    return None


def flags_and_mask(state: Tensor, shape: torch.Size) -> tuple[list[int], Tensor]:
    """Whether keys learn and hits are counted, and the mask [C, K]."""
    _, _, learning, counting, masked = state[: _HEADER - 3].tolist()
    if not masked:
        return [learning, counting], torch.ones(shape, dtype=torch.bool, device="cpu")
    bits = (state[_HEADER:, None].cpu() >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return [learning, counting], bits.flatten()[: shape.numel()].view(shape).bool()
