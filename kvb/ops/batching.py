"""``torch.vmap`` over the operators: a mapped axis becomes part of the batch or of the values, or is looped over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvb.ops.schemas import IN_PLACE, NAMES, library

# Which arguments take one more axis in, and by which of theirs: the batch, the first, or the value, the last.
_FOLDS: dict[str, dict[int, int]] = {
    "nearest": {0: 0},
    "lookup": {0: 0, 3: -1},
    "gather": {0: -1, 1: 0},
    "gather_backward": {0: -1},
}


def _fold(arg: Tensor, dim: int, axis: int) -> Tensor:
    """The mapped axis ``dim``, moved before ``axis`` and made one with it."""
    moved = arg.movedim(dim, 0 if axis == 0 else -2)
    return moved.flatten(0, 1) if axis == 0 else moved.flatten(-2)


def _unfold(part: Tensor, size: int, axis: int) -> tuple[Tensor, int | None]:
    """A result with the mapped axis apart again, and where it is; indices do not depend on values."""
    if axis == -1 and part.dtype == torch.int64:
        return part, None
    apart = part.unflatten(axis, (size, part.shape[axis] // size))
    return apart, 0 if axis == 0 else apart.dim() - 2


def _slices(in_dims: Sequence[int | None], args: Sequence[Any], size: int) -> list[list[Any]]:
    return [
        [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        for i in range(size)
    ]


def _register(name: str, folds: dict[int, int]) -> None:
    operator = getattr(torch.ops.kvb, name)

    def run(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size, mapped = info.batch_size, [(place, dim) for place, dim in enumerate(in_dims) if dim is not None]
        (place, dim), axis = mapped[0], folds.get(mapped[0][0])
        if len(mapped) == 1 and axis is not None:
            out = operator(*args[:place], _fold(args[place], dim, axis), *args[place + 1 :])
            results = [_unfold(part, size, axis) for part in (out if isinstance(out, tuple) else (out,))]
        else:
            outs = [operator(*one) for one in _slices(in_dims, args, size)]
            columns = zip(*outs, strict=True) if isinstance(outs[0], tuple) else (outs,)
            results = [(torch.stack(list(column)), 0) for column in columns]
        parts, dims = zip(*results, strict=True)
        return (parts, dims) if len(parts) > 1 else (parts[0], dims[0])

    torch.library.register_vmap(f"kvb::{name}", run, lib=library)


for _name in NAMES:
    if _name not in IN_PLACE:
        _register(_name, _FOLDS.get(_name, {}))
