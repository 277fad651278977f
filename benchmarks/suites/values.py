"""Values fetched, and their gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import verify
from benchmarks.shapes import Module
from benchmarks.suites.case import Case, random, random_codes, random_values
from benchmarks.timing import Contestant
from kvb import functional

VERIFIED = 16  # codebooks of a gradient that are summed again in float64


class Gather:
    """Values [C, K, V] and codes [B, S, C]; a run returns [B, C, S, V]."""

    def __init__(self, values: Tensor, codes: Tensor) -> None:
        self.values, self.codes = values, codes

    def contestant(self, run: Callable[[], Tensor]) -> Contestant:
        return Contestant(run, lambda out: verify.fetched(self.values, self.codes, out, "none", "bcsv"))


def gather(shape: Module) -> Case:
    """The values that codes name, as [B, C, S, V]."""
    values, codes = random_values(shape), random_codes(shape)
    given = Gather(values, codes)
    nbytes = codes.nbytes + 2 * 4 * codes.numel() * shape.V
    ours = given.contestant(lambda: functional.gather(values, codes, layout="bcsv"))
    return Case(ours, given, nbytes, "bytes")


class Backward:
    """A gradient [B, C, S, V] and codes [B, S, C]; a run returns that of the values, [C, K, V]."""

    def __init__(self, grad: Tensor, codes: Tensor, K: int) -> None:
        self.grad, self.codes = grad, codes
        self.C, self.K, self.V = codes.shape[2], K, grad.shape[3]

    def contestant(self, run: Callable[[], Tensor]) -> Contestant:
        rows = self.grad.transpose(1, 2)
        return Contestant(run, lambda found: verify.sums(rows, self.codes, found, books=VERIFIED))


def backward(shape: Module) -> Case:
    """The gradient of the values, dense, given that of the values fetched, [B, C, S, V]."""
    C, K, V = shape.C, shape.K, shape.V
    codes, grad = random_codes(shape), random(4, shape.B, C, shape.S, V)
    given = Backward(grad, codes, K)
    rows = grad.transpose(1, 2)
    ours = given.contestant(lambda: torch.ops.kvb.gather_backward(rows, codes, K, "none"))
    return Case(ours, given, grad.nbytes + codes.nbytes + 4 * C * K * V, "bytes")
