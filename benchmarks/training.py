"""Training on codes at the paper's size: ``python -m benchmarks.training``, from the repository root.

Every step is a whole one in Python: logits, loss, gradient, clipping, update. Its peer is the same step with a dense
gradient, kvb's gather and PyTorch's own loss, clipping and optimizer, in the same race. As in ``benchmarks.cpu``, the
exit status is 1 when a result is wrong.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvb
from benchmarks import memory, table, verify
from benchmarks.shapes import PAPER
from benchmarks.table import THREADS, Measured, Row, effort
from benchmarks.timing import Contestant, Deadline, Ratio, race
from kvb import functional

WARM_UP = 0.1  # seconds of untimed steps before a turn
BATCHES = 64  # of random codes, in turns: more than the caches remember
Batches = Sequence[tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], Tensor]  # codes, targets -> loss


def _batches() -> Batches:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *sizes: int) -> Tensor:
        return torch.randint(high, sizes, generator=generator)

    return [(draw(PAPER.K, PAPER.B, PAPER.C).short(), draw(PAPER.V, PAPER.B)) for _ in range(BATCHES)]


def _table() -> Tensor:
    return torch.randn(PAPER.C, PAPER.K, PAPER.V, generator=torch.Generator().manual_seed(1))


def _contestant(values: Tensor, step: Step, batches: Batches, check: bool = True) -> Contestant:
    """One step per call; the first one starts from the table as it is here, takes the first batch and is verified.

    Training is not interrupted every few steps by a peer that empties the caches: untimed steps come before each turn.
    """
    start, turns = values.detach().clone() if check else None, itertools.cycle(batches)

    def run() -> Tensor:
        return step(*next(turns))

    def correct(loss: Tensor) -> None:
        nonlocal start
        if start is not None:
            verify.trained(start, *batches[0], values.detach(), loss)
        start = None  # its memory is not part of the race

    def warm_up() -> None:
        deadline = Deadline(WARM_UP)
        while start is None and deadline.left > 0:
            run()

    return Contestant(run, correct, warm_up)


def _fused(batches: Batches) -> Contestant:
    values = _table()
    return _contestant(values, lambda codes, targets: kvb.training.sgd_step(values, codes, targets).loss, batches)


def _autograd(
    batches: Batches,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    clip: Callable[..., Tensor],
    *,
    sparse_grad: bool,
    check: bool,
) -> Contestant:
    values = nn.Parameter(_table())
    learner = optimizer([values])

    def step(codes: Tensor, targets: Tensor) -> Tensor:
        logits = functional.gather(values, codes[:, None], pool="mean", sparse_grad=sparse_grad).squeeze(1)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        learner.zero_grad()
        loss.backward()
        clip([values], 1.0)
        learner.step()
        return loss.detach()

    return _contestant(values, step, batches, check)


DENSE = functools.partial(_autograd, clip=nn.utils.clip_grad_norm_, sparse_grad=False)
SPARSE = functools.partial(_autograd, clip=kvb.optim.clip_grad_norm_, sparse_grad=True)


def _against(ours: Contestant, theirs: Contestant, peer: str, quick: bool) -> Measured:
    result = race({"kvb": ours, "dense": theirs}, effort(quick))
    return table.against(result, "kvb", "dense", peer)


def fused(quick: bool) -> Measured:
    """The fused step against the dense one."""
    batches = _batches()
    dense = DENSE(batches, lambda params: torch.optim.SGD(params, lr=0.3), check=True)
    return _against(_fused(batches), dense, "dense gradient, torch.optim.SGD", quick)


def row_sgd(quick: bool) -> Measured:
    """Autograd with row gradients and RowwiseSGD, for any loss, against the dense step."""
    batches = _batches()
    ours = SPARSE(batches, lambda params: kvb.optim.RowwiseSGD(params, lr=0.3), check=True)
    dense = DENSE(batches, lambda params: torch.optim.SGD(params, lr=0.3), check=True)
    return _against(ours, dense, "dense gradient, torch.optim.SGD", quick)


def autograd_over_fused(quick: bool) -> Measured:
    """Autograd with row gradients, clipping and RowwiseSGD, in fused steps."""
    batches = _batches()
    ours = SPARSE(batches, lambda params: kvb.optim.RowwiseSGD(params, lr=0.3), check=True)
    result = race({"autograd": ours, "fused": _fused(batches)}, effort(quick))
    seconds = [result.seconds(who) for who in ("autograd", "fused")]
    return Measured(*seconds, "s", "fused step", result.ratio("autograd", "fused"))


def row_adam(quick: bool) -> Measured:
    """RowwiseAdam on row gradients against torch.optim.Adam, which moves all rows: the results differ on purpose."""
    batches = _batches()
    ours = SPARSE(batches, lambda params: kvb.optim.RowwiseAdam(params, lr=1e-3), check=False)
    dense = DENSE(batches, lambda params: torch.optim.Adam(params, lr=1e-3), check=False)
    return _against(ours, dense, "dense gradient, torch.optim.Adam", quick)


def training_memory(quick: bool) -> Measured:
    """Memory of an epoch of fused steps beyond values and codes, as a share of the 64 MB allowed."""
    extra, allowed = memory.extra_bytes(THREADS, "training"), 64e6
    return Measured(extra, allowed, "B", "allowed", Ratio(*[extra / allowed] * 3))


ROWS = (
    Row("step:fused", fused, 10),
    Row("step:row-sgd", row_sgd),
    Row("step:autograd", autograd_over_fused, 2.3, at_most=True),
    Row("step:row-adam", row_adam),
    Row("memory:training", training_memory, 1.0, at_most=True),
)


if __name__ == "__main__":
    sys.exit(table.run(ROWS, "benchmarks.training", __doc__, None))
