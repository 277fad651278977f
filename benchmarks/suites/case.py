"""What a suite makes of a shape, and the random inputs that all suites share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Module
from benchmarks.timing import Contestant

KVB, CEILING = "kvb", "ceiling"


class Case(NamedTuple):
    """One suite at one shape: kvb, the inputs for its peers, and the least work that the algorithm needs.

    ``given`` has the inputs as attributes, and a ``contestant`` method that turns a peer's run into a contestant whose
    result is verified.
    """

    kvb: Contestant
    given: Any
    amount: float  # operations, or bytes read and written
    ceiling: str  # "flops" or "bytes"


def random(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def random_codes(shape: Module) -> Tensor:
    return torch.randint(shape.K, (shape.B, shape.S, shape.C), generator=torch.Generator().manual_seed(3))


def random_keys(shape: Module) -> Tensor:
    return random(1, shape.C, shape.K, shape.D)


def random_values(shape: Module) -> Tensor:
    return random(2, shape.C, shape.K, shape.V)
