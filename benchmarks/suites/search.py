"""The search alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import verify
from benchmarks.shapes import Module
from benchmarks.suites.case import Case, random, random_keys
from benchmarks.timing import Contestant
from kvb import functional


class Search:
    """Queries [B, S, C, D] and keys [C, K, D]; a run returns what ``codes`` turns into indices [B, S, C]."""

    def __init__(self, queries: Tensor, keys: Tensor, expected: Tensor) -> None:
        self.queries, self.keys, self.expected = queries, keys, expected

    def contestant(self, run: Callable[[], Any], codes: Callable[[Any], Tensor] = lambda found: found) -> Contestant:
        def check(found: Any) -> None:
            verify.same_choice(self.queries, self.keys, codes(found), self.expected)

        return Contestant(run, check)

    def by_codebook(self, found: Any) -> Tensor:
        """C rows of B*S codes as indices."""
        B, S, C, _ = self.queries.shape
        return torch.stack([torch.as_tensor(row) for row in found]).view(C, B, S).permute(1, 2, 0)


def search(shape: Module) -> Case:
    """The nearest key of every query in every codebook, keys prepared: indices, and kvb's distances, too."""
    queries, keys = random(0, shape.B, shape.S, shape.C, shape.D), random_keys(shape)
    packed = functional.pack_keys(keys)
    expected, _ = functional.nearest(queries, keys, packed=packed)
    ours = Contestant(
        lambda: functional.nearest(queries, keys, packed=packed), lambda found: verify.nearest(queries, keys, *found)
    )
    return Case(ours, Search(queries, keys, expected), shape.search.flops, "flops")
