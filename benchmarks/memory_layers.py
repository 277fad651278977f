"""Product keys at a million rows, in processor time: ``python -m benchmarks.memory_layers``, from the repository root.

4,096 queries, 1,000 x 1,000 pairs of half keys, rows of 128 numbers, 32 of them for each query. The peer is plain
PyTorch: two products, two ``topk``, all sums of the two, ``topk``, softmax, ``embedding_bag``. Queries and keys have
few bits, so that every score is exact and the best of all pairs are known. As in ``benchmarks.bars``, the exit status
is 1 where a row falls short. ``quick`` takes fewer rounds.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvb
from benchmarks import table
from benchmarks.table import THREADS, Measured, Row
from benchmarks.timing import Ratio, WrongResult, processor_seconds

QUERIES, KEYS, DIM, TOPK = 4096, 1000, 128, 32
BITS = 32.0  # queries and keys are whole numbers of its inverse
JUDGED = 8  # queries whose pairs are sorted, all of them
ROUNDS, QUICK_ROUNDS = 9, 3
PLAIN = "plain PyTorch"


class Problem(NamedTuple):
    """queries [N, 1, D], half keys [1, 2, n, D / 2], values [n * n, D]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


@functools.cache
def problem(queries: int = QUERIES, keys: int = KEYS) -> Problem:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(queries, 1, DIM, generator=generator), torch.randn(1, 2, keys, DIM // 2, generator=generator)
    return Problem(
        *(each.mul(BITS).round().div(BITS) for each in drawn), torch.randn(keys**2, DIM, generator=generator)
    )


def kvb_read(queries: Tensor, keys: Tensor, values: Tensor, sparse_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, scores and what is read, by kvb."""
    rows, scores = torch.ops.kvb.product_nearest(queries, keys, TOPK)
    fetch = kvb.ops.gather_weighted_row_grad if sparse_grad else torch.ops.kvb.gather_weighted
    return rows[:, 0], scores[:, 0], fetch(values, rows[:, 0], scores[:, 0].softmax(-1))


def plain_read(
    queries: Tensor, keys: Tensor, values: Tensor, sparse_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch, written as the papers have it."""
    (first, i), (second, j) = (
        (queries[:, 0, part] @ keys[0, half].T).topk(TOPK) for half, part in enumerate(_halves())
    )
    scores, best = (first[:, :, None] + second[:, None, :]).flatten(1).topk(TOPK)
    rows = i.gather(1, best // TOPK) * keys.shape[2] + j.gather(1, best % TOPK)
    weights = scores.softmax(-1)
    out = F.embedding_bag(rows, values, per_sample_weights=weights, mode="sum", sparse=sparse_grad)
    return rows, scores, out


def _halves() -> tuple[slice, slice]:
    return slice(DIM // 2), slice(DIM // 2, DIM)


def verify(found: tuple[Tensor, Tensor, Tensor], given: Problem) -> None:
    """Raises WrongResult where pairs are not the best of all, or scores and reads not those of plain PyTorch."""
    rows, scores, out = found
    if not torch.equal(scores, plain_read(*given)[1]):
        raise WrongResult("scores differ from those of plain PyTorch")
    # Of equal scores at the last rank plain PyTorch takes any: what is read is that of these rows.
    read = F.embedding_bag(rows, given.values, per_sample_weights=scores.softmax(-1), mode="sum")
    if not torch.allclose(out, read, rtol=1e-5, atol=1e-5):
        raise WrongResult("what is read differs from plain PyTorch")
    halves = [given.queries[:JUDGED, 0, part] @ given.keys[0, half].T for half, part in enumerate(_halves())]
    every = (halves[0][:, :, None] + halves[1][:, None, :]).flatten(1)
    if not torch.equal(rows[:JUDGED], every.sort(dim=-1, descending=True, stable=True).indices[:, :TOPK]):
        raise WrongResult("pairs differ from the first ones of all pairs, sorted")


def _in_turns(ours: Callable[[], object], theirs: Callable[[], object], quick: bool, peer: str) -> Measured:
    pairs = [[processor_seconds(run, 1, 1) for run in (ours, theirs)] for _ in range(QUICK_ROUNDS if quick else ROUNDS)]
    ratios = sorted(there / here for here, there in pairs)
    low, value, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
    seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Measured(*seconds, "s", peer, Ratio(value, low, high))


def forward(threads: int, quick: bool) -> Measured:
    """What 4,096 queries read, on so many threads."""
    given = problem()
    torch.set_num_threads(threads)
    try:
        verify(kvb_read(*given), given)
        return _in_turns(lambda: kvb_read(*given), lambda: plain_read(*given), quick, PLAIN)
    finally:
        torch.set_num_threads(THREADS)


def step(sparse: bool, quick: bool) -> Measured:
    """Forward, backward and a step of SGD for keys and values, by kvb's rows and by PyTorch's gradients."""
    queries, keys, values = problem()

    def stepper(
        read: Callable[..., tuple[Tensor, ...]], optimizer: type[torch.optim.Optimizer], sparse_grad: bool
    ) -> Callable[[], None]:
        given = [nn.Parameter(one.clone()) for one in (keys, values)]
        learner = optimizer(given, lr=1e-3)  # type: ignore[call-arg]

        def run() -> None:
            learner.zero_grad()
            read(queries, *given, sparse_grad)[2].square().mean().backward()
            learner.step()

        return run

    ours = stepper(kvb_read, kvb.optim.RowwiseSGD, True)
    theirs = stepper(plain_read, torch.optim.SGD, sparse)
    return _in_turns(ours, theirs, quick, f"{PLAIN}, {'sparse' if sparse else 'dense'} gradient")


ROWS = (
    Row("product-keys:1-thread", functools.partial(forward, 1), 3.0),
    Row("product-keys:2-threads", functools.partial(forward, 2), 3.0),
    Row("product-keys:step", functools.partial(step, False)),
    Row("product-keys:sparse", functools.partial(step, True)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return table.run(ROWS, "benchmarks.memory_layers", __doc__ or "", arguments, held=True)


if __name__ == "__main__":
    sys.exit(main())
