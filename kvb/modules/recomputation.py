"""Gradient checkpointing while keys learn: a forward that runs again searches the keys that it searched before.

``torch.utils.checkpoint`` runs a forward a second time within the backward pass. By then the keys have moved, and the
gradient would be that of other pairs. So a forward under a checkpoint leaves the keys that it found, under a
fingerprint of its queries, to the one that repeats it.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb import _torch

FORWARDS = 16  # how many may wait for their backward pass
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x1E3779B97F4A7C15


class _Forward(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    fingerprint: Tensor
    keys: Tensor
    packed: Tensor
    graph: weakref.ref[Any] | None  # lives as long as something may run this forward again; None if nobody knows


def in_backward() -> bool:
    """Whether this call comes from a backward pass, as a recomputation does."""
    return not torch.compiler.is_compiling() and _torch.in_backward()


def under_checkpoint() -> bool:
    """Whether a checkpoint may run this call again: it disables gradients, or hooks into what they save."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _torch.saving_hooks() is None):
        return False
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if "checkpoint" in frame.f_code.co_filename:
            return True
    return False


def _fingerprint(queries: Tensor) -> Tensor:
    """A weighted sum of the bits, modulo 2^64."""
    bits = queries.detach().contiguous().view(_BITS[queries.element_size()]).flatten().to(torch.int64)
    return (bits * (torch.arange(len(bits), device=bits.device) * 2 + 1) * _ODD).sum()


class Forwards:
    """The latest forwards under a checkpoint, and the keys that each of them searched."""

    def __init__(self) -> None:
        self._latest: list[_Forward] = []

    def remember(self, queries: Tensor, keys: Tensor, packed: Tensor) -> None:
        hooks = _torch.saving_hooks()
        graph = None if hooks is None else weakref.ref(hooks[1])
        new = _Forward(queries.shape, queries.dtype, _fingerprint(queries), keys.clone(), packed, graph)
        self._latest = [*self._alive()[1 - FORWARDS :], new]

    def _alive(self) -> list[_Forward]:
        return [known for known in self._latest if known.graph is None or known.graph() is not None]

    def recall(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The keys, and their packed form, that the same queries were searched with.

        Raises:
            RuntimeError: no such forward is known, or several that searched different keys.
        """
        mine, alive = _fingerprint(queries), self._alive()
        shaped = [known for known in alive if known.shape == queries.shape and known.dtype == queries.dtype]
        same = [known for known in shaped if torch.equal(known.fingerprint, mine)]
        if not same:
            raise RuntimeError(
                "a forward in training mode ran within a backward pass while keys learn, with queries that none of "
                f"the last {FORWARDS} checkpointed forwards had, so that it cannot search the keys of then: call "
                "freeze_keys() first, or leave the bottleneck out of the checkpoint"
            )
        # Within one checkpoint forwards run again in their order.
        first, graphs = same[0], {None if known.graph is None else known.graph() for known in same}
        unclear = len(graphs) > 1 or (None in graphs and len(same) > 1)
        if unclear and not all(torch.equal(known.keys, first.keys) for known in same):
            raise RuntimeError(
                f"{len(same)} checkpointed forwards with the same queries searched different keys, and nothing tells "
                "which of them runs again: run the backward pass of each before the next, with use_reentrant=False"
            )
        others = [known for known in alive if known is not first]
        self._latest = [*others, first] if _torch.graph_is_kept() else others
        return first.keys, first.packed
