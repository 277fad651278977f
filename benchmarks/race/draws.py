"""What is drawn: an operator, its sizes, log-uniform, its dtype, and how it is called; the same ones for a seed.

Letters as in ``kvb/ops``, and T for topk; a size that means nothing to an operator is 1. What is larger than the
bounds below is left out and drawn again.
"""

from __future__ import annotations

import collections
import math
import random
from typing import NamedTuple

import torch

RANGES = {"N": (1, 100_000), "C": (1, 512), "K": (2, 65_536), "D": (1, 768), "V": (1, 512), "T": (1, 32)}
OPERATORS = {
    "search": "NCKDT",
    "forward": "NCKDVT",
    "gather": "NCKV",
    "backward": "NCKV",
    "training_step": "NCKV",
    "autograd_step": "NCKV",
}
SEARCHES = ("search", "forward")
STEPS = ("training_step", "autograd_step")
DTYPES = {"float32": 8, "float16": 3, "bfloat16": 3, "float64": 2}  # and how often, of sixteen
COMPILED = 1 / 8  # of the shapes: a compiler takes seconds for each
MOST_NUMBERS = 1 << 24  # of one tensor: 64 MB in float32
MOST_WORK = 1 << 33  # multiply-adds of a search, or numbers that are moved
MOST_DRAWS = 10_000


class Draw(NamedTuple):
    """One shape of the race; N = B * S."""

    index: int
    operator: str
    B: int
    S: int
    C: int
    K: int
    D: int
    V: int
    T: int
    dtype: str
    packed: bool  # keys of a search, beforehand
    compiled: bool
    pool: str

    @property
    def N(self) -> int:
        return self.B * self.S

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def ranks(self) -> int | None:
        """As ``topk`` of plain searches: None for one key without an axis for it."""
        return self.T if self.T > 1 else None

    @property
    def work(self) -> int:
        """Multiply-adds of a search; else numbers read or written."""
        if self.operator in SEARCHES:
            return self.N * self.C * self.K * self.D
        return self.N * self.C * self.V

    @property
    def numbers(self) -> dict[str, int]:
        """How large the tensors are."""
        N, C = self.N, self.C
        found = {"queries": N * C * self.D, "keys": C * self.K * self.D, "indices": N * C * self.T}
        return found | {"values": C * self.K * self.V, "fetched": N * C * self.T * self.V}

    def excess(self) -> str:
        """What is too large to be raced here; empty if nothing is."""
        if self.work > MOST_WORK:
            return "work"
        return next((name for name, size in self.numbers.items() if size > MOST_NUMBERS), "")

    def __str__(self) -> str:
        letters = "".join(letter for letter in OPERATORS[self.operator] if letter != "N")
        sizes = " ".join(f"{letter}={getattr(self, letter)}" for letter in "BS" + letters)
        how = [self.dtype]
        if self.operator in SEARCHES:
            how.append("packed" if self.packed else "not packed")
        if self.pool != "none":
            how.append(self.pool)
        return f"{self.operator} {sizes} {', '.join(how)}{', compiled' if self.compiled else ''}"


def _size(chance: random.Random, low: int, high: int) -> int:
    return min(high, round(math.exp(chance.uniform(math.log(low), math.log(high)))))


def _try(chance: random.Random, index: int, operator: str) -> Draw:
    letters = OPERATORS[operator]
    sizes = {letter: _size(chance, *bounds) if letter in letters else 1 for letter, bounds in RANGES.items()}
    S = _size(chance, 1, sizes["N"]) if chance.random() < 0.5 else 1
    dtype = "float32" if operator in STEPS else chance.choices([*DTYPES], [*DTYPES.values()])[0]
    packed = operator not in SEARCHES or chance.random() < 0.5
    return Draw(
        index=index,
        operator=operator,
        B=max(1, sizes["N"] // S),
        S=S,
        C=sizes["C"],
        K=sizes["K"],
        D=sizes["D"],
        V=sizes["V"],
        # A lookup without a module fetches one key.
        T=min(sizes["T"], sizes["K"]) if packed or operator == "search" else 1,
        dtype=dtype,
        packed=packed,
        compiled=operator not in STEPS and chance.random() < COMPILED,
        pool=chance.choice(("none", "mean", "sum")) if operator in ("gather", "backward") else "none",
    )


def draw(seed: int, index: int) -> tuple[Draw, collections.Counter[str]]:
    """The shape of that number, and what was too large about those that were drawn before it and left out."""
    chance = random.Random(f"{seed}:{index}")
    operator = [*OPERATORS][index % len(OPERATORS)]
    left_out: collections.Counter[str] = collections.Counter()
    for _ in range(MOST_DRAWS):
        one = _try(chance, index, operator)
        if not one.excess():
            return one, left_out
        left_out[one.excess()] += 1
    raise AssertionError(f"no {operator} within the bounds in {MOST_DRAWS} draws")
