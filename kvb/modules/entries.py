"""What the entries of a bottleneck's state_dict must be, and become."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb.checkpoints import FLAGS, MASK

VERSION = 2
STATISTICS = ("keys", "keys_avg", "cluster_size")  # float32, or float64 after ``double()``
WIDE = {*STATISTICS, "initted", FLAGS, MASK}


def widened(name: str, value: Tensor) -> Tensor:
    """In the dtype that the buffer must have where it becomes the buffer itself (``assign=True``)."""
    if name in WIDE:
        return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)
    return value.to(torch.int64)


def problems(name: str, value: Any, current: Tensor) -> list[str]:
    """Why an entry cannot be loaded."""
    if not isinstance(value, Tensor):
        return [f'While copying "{name}", expected torch.Tensor but received {type(value)}']
    if value.shape != current.shape:
        return [
            f"size mismatch for {name}: copying a param with shape {value.shape} from checkpoint, "
            f"the shape in current model is {current.shape}."
        ]
    if value.is_meta:
        return []
    if name in ("keys", "keys_avg") and not torch.stack(value.to(current.dtype).aminmax()).isfinite().all():
        finite = value.to(current.dtype).isfinite().all(-1)
        return [f"{name} contains NaN or Inf in {int((~finite).sum())} of {finite.numel()} pairs as {current.dtype}"]
    most = 2.0**63 if name == "cluster_size_counter" else torch.inf  # where int64 ends
    if name in ("cluster_size", "cluster_size_counter") and not ((value >= 0) & (value.double() < most)).all():
        return [f"{name} holds negative or NaN counts, or infinite ones"]
    if name == FLAGS:
        version, *flags = value.tolist()
        if version > VERSION + 0.5:
            return [f"{FLAGS} has version {version:g}, but this kvb reads version {VERSION}: upgrade kvb"]
        if not (version > 0 and all(0 <= flag <= 1 for flag in flags)):
            return [f"{FLAGS} is damaged: expected a version and flags from 0 to 1, got {value.tolist()}"]
    return []
