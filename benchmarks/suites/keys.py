"""Keys that learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kvb
from benchmarks.shapes import Module
from benchmarks.suites.case import Case, random, random_keys
from benchmarks.timing import Contestant, WrongResult
from kvb import functional

BETWEEN = 1e-3  # share of a peer's keys that may move elsewhere: a query between two keys may go either way


class KeyUpdate:
    """Queries [B, S, C, D] and keys [C, K, D]; a run makes one step of a state of keys, averages and sizes."""

    decay, eps = 0.95, 1e-5

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = queries, keys
        C, K, D = keys.shape
        codes, _ = functional.nearest(queries, keys)
        hits = torch.stack([torch.bincount(codes[:, :, c].flatten(), minlength=K) for c in range(C)])
        sums = torch.zeros(C, K, D, dtype=torch.float64)
        for c in range(C):
            sums[c].index_add_(0, codes[:, :, c].flatten(), queries[:, :, c].reshape(-1, D).double())
        size = self.decay + (1 - self.decay) * hits.double()
        smoothed = (size + self.eps) / (size.sum(-1, keepdim=True) + K * self.eps) * size.sum(-1, keepdim=True)
        self.want = (self.decay * keys.double() + (1 - self.decay) * sums) / smoothed[..., None]
        self.hit = hits > 0

    def contestant(
        self, run: Callable[[], Any], keys: Tensor, keys_avg: Tensor, cluster_size: Tensor, between: float = BETWEEN
    ) -> Contestant:
        """``run`` moves the state in place; it is reset before every turn."""

        def check(_: Any) -> None:
            off = ((keys - self.want).abs() > 1e-4 * (1 + self.want.abs())).any(-1) & self.hit
            if off.sum() > between * self.hit.sum():
                raise WrongResult(f"{int(off.sum())} of {int(self.hit.sum())} keys that were hit moved elsewhere")

        def reset() -> None:
            keys.copy_(self.keys)
            keys_avg.copy_(self.keys)
            cluster_size.fill_(1.0)

        return Contestant(run, check, reset)


def key_update(shape: Module) -> Case:
    """One step of learning keys in training mode: search, statistics, moving averages."""
    heads = random(0, shape.B, shape.C, shape.S, shape.D)
    given = KeyUpdate(heads.transpose(1, 2), random_keys(shape))
    module = kvb.KeyValueBottleneck(shape.C, shape.K, shape.D, 1, decay=given.decay, eps=given.eps)
    module.requires_grad_(False)
    ours = given.contestant(lambda: module(heads), module.keys, module.keys_avg, module.cluster_size, between=0.0)
    return Case(ours, given, shape.search.flops, "flops")
