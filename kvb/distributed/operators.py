"""Operators on DTensor: which of their axes may be split over processes, and what comes of it.

Registered when ``kvb.distributed`` is imported. Where an operator's arguments are split over another axis, DTensor
joins them first. Operators that are not here raise on DTensor: ``sample``, whose draws depend on who has what, and what
writes in place or returns rows by their number; ``kvb.training.sgd_step`` takes a DTensor itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from kvb import ops  # noqa: F401  (importing ops registers the operators)
from kvb._torch import tell_calls_apart

Choice = tuple[list[Placement], list[Placement | None]]
# The axes of tensors by their letters; "*" is one that belongs to C alone, and is never split.
QUERIES, KEYS, PACKED, MASK, VALUES, CODES, FOUND = "BSCD", "CKD", "C*", "CK", "CKV", "BSC", "BSCT"


def _choices(axes: str, inputs: tuple[str | None, ...], outputs: tuple[str, ...], added: str = "") -> list[Choice]:
    """Every tensor whole, or all split over one of the axes that they have.

    Args:
        axes: those that may be split. inputs: None for what is no tensor. added: axes over which outputs are sums.
    """
    choices: list[Choice] = []
    for axis in ("", *axes):

        def place(tensor: str | None, axis: str = axis, total: bool = False) -> Any:
            if tensor is None:
                return None
            if axis and axis in tensor:
                return Shard(tensor.index(axis))
            return Partial() if total and axis and axis in added else Replicate()

        choices.append(([place(one, total=True) for one in outputs], [place(one) for one in inputs]))
    return choices


def _pooled(pool: str, layout: str = "bscv") -> tuple[str, str, str]:
    """The axes of fetched values, those that may be split, and that which then has to be added up.

    A mean over codebooks divides by their number: it does not follow from means of parts.
    """
    if pool == "none":
        return layout.upper(), "BSC", ""
    if layout == "bv":
        return "BV", "BSC" if pool == "sum" else "B", "SC"
    return "BSV", "BSC" if pool == "sum" else "BS", "C"


def pack_keys(keys: Any) -> list[Choice]:
    return _choices("C", (KEYS,), (PACKED,))


def nearest(queries: Any, keys: Any, packed: Any, mask: Any, topk: int) -> list[Choice]:
    return _choices("BSC", (QUERIES, KEYS, PACKED, mask and MASK, None), (FOUND, FOUND))


def gather(values: Any, indices: Any, pool: str, layout: str) -> list[Choice]:
    fetched, axes, added = _pooled(pool, layout)
    return _choices(axes + "V", (VALUES, CODES, None, None), (fetched,), added)


def gather_backward(grad: Any, indices: Any, K: int, pool: str) -> list[Choice]:
    fetched, axes, _ = _pooled(pool)
    return _choices(axes + "V", (fetched, CODES, None, None), (VALUES,), added="BS")


def lookup(queries: Any, keys: Any, packed: Any, values: Any, mask: Any, pool: str) -> list[Choice]:
    fetched, axes, added = _pooled(pool)
    inputs: tuple[str | None, ...] = (QUERIES, KEYS, PACKED, VALUES, mask and MASK, None)
    outputs: tuple[str, ...] = (fetched, CODES)
    if queries.ndim < len(QUERIES):  # of one position: nothing has an axis S
        inputs = tuple(one and one.replace("S", "") for one in inputs)
        outputs, axes = tuple(one.replace("S", "") for one in outputs), axes.replace("S", "")
    return _choices(axes, inputs, outputs, added)


def accumulate(queries: Any, indices: Any, K: int) -> list[Choice]:
    return _choices("BSC", (QUERIES, CODES, None), ("CK", KEYS), added="BS")


def count(queries: Any, indices: Any, K: int) -> list[Choice]:
    return _choices("BSC", (QUERIES, CODES, None), ("CK",), added="BS")


# Every rule, and where the arguments of its operator begin that are no tensors: what a rule says depends on those.
RULES: dict[Any, int] = {pack_keys: 1, nearest: 4, gather: 2, gather_backward: 2, lookup: 5, accumulate: 2, count: 2}

for _rule, _first in RULES.items():
    _operator = getattr(torch.ops.kvb, _rule.__name__).default
    register_sharding(_operator)(_rule)
    tell_calls_apart(_operator, _first)
