"""``grow``: an optimizer follows a table that has grown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def grow(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    """Let an optimizer train ``new`` in place of ``old``, and keep what it remembers of the rows that were there.

    Equivalent, for momentum, averages and the steps of single rows, to zeros of the shape of ``new`` with the old state
    in their first rows and columns; sums of Adagrad start at ``initial_accumulator_value``. A step count of the whole
    table stays. So the old part of the table moves on as if nothing had grown, whatever the optimizer's class::

        old = module.values
        module.expand_values(20)
        kvb.optim.grow(optimizer, old, module.values)

    Gradients do not follow: call it between steps. Learning rates and schedulers stay those of the group.

    Args:
        optimizer: any of ``torch.optim`` and ``kvb.optim`` whose state is like its parameters.
        old: a parameter of it. new: what ``expand_values``, ``expand_pairs`` or ``expand_codebooks`` made of it.
    Raises:
        TypeError: not an optimizer, or not parameters. ValueError: ``old`` is not in the optimizer, or ``new`` already
        is; ``new`` is smaller, or of another dtype or device; a state that is not like the parameter. Then nothing
        changes. NotImplementedError: a table that is split over processes.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> optimizer, old = kvb.optim.RowwiseAdam([bottleneck.values]), bottleneck.values
        >>> kvb.optim.grow(optimizer, old, bottleneck.expand_values(12).values)
        >>> optimizer.param_groups[0]["params"][0].shape
        torch.Size([4, 16, 12])
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    _check(old, new)
    places = [
        (group, at) for group in optimizer.param_groups for at, param in enumerate(group["params"]) if param is old
    ]
    if not places:
        raise ValueError("expected old to be a parameter of the optimizer, but it trains no such tensor")
    if any(param is new for group in optimizer.param_groups for param in group["params"]):
        raise ValueError("expected new to be no parameter of the optimizer yet: grow(...) puts it in the place of old")
    group, at = places[0]
    owner = type(optimizer).__name__
    state = {name: _grown(owner, name, kept, old, new, group) for name, kept in optimizer.state.get(old, {}).items()}
    group["params"][at] = new
    optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = state


def _check(old: Any, new: Any) -> None:
    for name, param in (("old", old), ("new", new)):
        if not isinstance(param, Tensor):
            raise TypeError(f"{name} must be a parameter, got {type(param).__name__}")
        if hasattr(param, "placements"):
            raise NotImplementedError(f"{name} is split over processes: grow the module before it is split")
    fits = old.dim() == new.dim() and all(map(int.__le__, old.shape, new.shape))
    if not fits or (old.dtype, old.device) != (new.dtype, new.device):
        raise ValueError(
            f"expected new to be like old, {old.dtype} {tuple(old.shape)} on {old.device}, and larger; got {new.dtype} "
            f"{tuple(new.shape)} on {new.device}"
        )


def _grown(owner: str, name: str, kept: Any, old: Tensor, new: Tensor, group: dict[str, Any]) -> Any:
    """One entry of the state."""
    if not isinstance(kept, Tensor) or kept.dim() == 0:
        return kept
    like = kept.dim() == old.dim() and all(size in (1, full) for size, full in zip(kept.shape, old.shape, strict=True))
    if not like:
        raise ValueError(f"{owner} keeps {name!r} of shape {tuple(kept.shape)}, which is not like {tuple(old.shape)}")
    # Steps are counted for rows; any other axis of size 1 stands for all of the parameter's.
    rows = name == "step"
    shape = [
        int(wide if size == full and not (rows and axis == old.dim() - 1) else size)
        for axis, (size, full, wide) in enumerate(zip(kept.shape, old.shape, new.shape, strict=True))
    ]
    if kept.is_sparse:
        return _grown_sparse(kept, shape)
    start = group.get("initial_accumulator_value", 0) if name == "sum" else 0
    table = kept.new_full(shape, start)
    table[tuple(map(slice, kept.shape))] = kept
    return table


def _grown_sparse(kept: Tensor, shape: list[int]) -> Tensor:
    """The momentum of sparse gradients, whose last axis is dense."""
    merged = kept.coalesce()
    values = torch.nn.functional.pad(merged.values(), (0, shape[-1] - kept.shape[-1]))
    return torch.sparse_coo_tensor(merged.indices(), values, shape, is_coalesced=True, check_invariants=False)
