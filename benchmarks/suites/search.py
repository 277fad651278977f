"""The search alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kvb
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


def frozen_searcher(queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """A call that finds indices [B, S, C]: ``encode`` of a frozen module, which alone has its keys."""
    module = kvb.KeyValueBottleneck(*keys.shape, dim_values=1).eval().freeze_keys()
    module.keys.copy_(keys)
    heads = queries.transpose(1, 2)
    return lambda: module.encode(heads).transpose(1, 2)


def search(shape: Module) -> Case:
    """The nearest key of every query in every codebook, keys prepared: indices."""
    queries, keys = random(0, shape.B, shape.S, shape.C, shape.D), random_keys(shape)
    expected, distances = functional.nearest(queries, keys)
    verify.nearest(queries, keys, expected, distances)
    given = Search(queries, keys, expected)
    return Case(given.contestant(frozen_searcher(queries, keys)), given, shape.search.flops, "flops")
