"""Steps of training on codes, with the paper's head, loss and clipping, against PyTorch's own autograd.

float32 only: PyTorch's optimizers take no exact step in narrower dtypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvb
from benchmarks import verify
from benchmarks.race.draws import Draw
from benchmarks.race.entry import Entry
from benchmarks.race.tables import codes_of
from benchmarks.suites.case import random
from benchmarks.timing import Contestant
from kvb import functional

LR, SMOOTHING = 0.3, 0.1
SMALL_TABLE = 10_000  # numbers


def _targets(draw: Draw) -> Tensor:
    return torch.randint(draw.V, (draw.B,), generator=torch.Generator().manual_seed(5))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)


class _Step:
    """Codes [B, C, S], targets [B] and the values to start from."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.codes = codes_of(draw).transpose(1, 2).contiguous()
        self.targets = _targets(draw)
        self.start = random(2, draw.C, draw.K, draw.V)

    def contestant(self, values: Tensor, run: Callable[[], Tensor]) -> Contestant:
        """``run`` moves the values, which are reset before every turn, and returns the loss."""

        def check(loss: Tensor) -> None:
            verify.trained(self.start, self.codes.transpose(1, 2), self.targets, values.data, loss)

        return Contestant(run, check, lambda: values.data.copy_(self.start))

    def opponents(self) -> dict[str, Callable[[], Contestant]]:
        return {
            "torch embedding_bag": lambda: self._dense(self._bag),
            "torch index_select": lambda: self._dense(self._selected),
            "torch sparse embedding_bag": self._sparse,
        }

    def _flat(self) -> Tensor:
        """The rows [B, C * S] that each sample fetches."""
        return (self.codes + (torch.arange(self.draw.C) * self.draw.K)[:, None]).flatten(1)

    def _bag(self, table: Tensor) -> Tensor:
        return F.embedding_bag(self._flat(), table, mode="mean")

    def _selected(self, table: Tensor) -> Tensor:
        flat = self._flat()
        return table.index_select(0, flat.flatten()).view(*flat.shape, -1).mean(1)

    def _dense(self, logits: Callable[[Tensor], Tensor]) -> Contestant:
        """A step of PyTorch's own loss, clipping and optimizer."""
        values = nn.Parameter(self.start.clone())
        optimizer = torch.optim.SGD([values], lr=LR)

        def run() -> Tensor:
            with torch.enable_grad():
                loss = _loss(logits(values.view(-1, self.draw.V)), self.targets)
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_([values], 1.0)
            optimizer.step()
            return loss.detach()

        return self.contestant(values, run)

    def _sparse(self) -> Contestant:
        """The same with a sparse gradient, clipped and applied by hand: PyTorch's clipping knows dense ones only."""
        values = nn.Parameter(self.start.clone())
        table = values.data.view(-1, self.draw.V).requires_grad_()

        def run() -> Tensor:
            with torch.enable_grad():
                loss = _loss(F.embedding_bag(self._flat(), table, mode="mean", sparse=True), self.targets)
                (sparse,) = torch.autograd.grad(loss, table)
            grad = sparse.coalesce()
            step = LR * (1.0 / (grad.values().norm() + 1e-6)).clamp(max=1.0)
            table.data.index_add_(0, grad.indices()[0], grad.values() * -step)
            return loss.detach()

        return self.contestant(values, run)


def training_step(draw: Draw) -> Entry:
    """The fused step."""
    given = _Step(draw)
    values = given.start.clone()
    ours = given.contestant(values, lambda: kvb.training.sgd_step(values, given.codes, given.targets, lr=LR).loss)
    return Entry(ours, given.opponents())


def _rows_pay(draw: Draw) -> bool:
    """Whether gradients should be lists of rows, by the rule of the guide: few of the pairs, or a small table."""
    return 4 * draw.B * draw.S <= draw.K or draw.C * draw.K * draw.V <= SMALL_TABLE


def autograd_step(draw: Draw) -> Entry:
    """Autograd for any loss, with row gradients where they pay."""
    given, rows = _Step(draw), _rows_pay(draw)
    values = nn.Parameter(given.start.clone())
    optimizer = (kvb.optim.RowwiseSGD if rows else torch.optim.SGD)([values], lr=LR)
    clip = kvb.optim.clip_grad_norm_ if rows else nn.utils.clip_grad_norm_
    codes = given.codes.transpose(1, 2)

    def run() -> Tensor:
        with torch.enable_grad():
            logits = functional.gather(values, codes, pool="mean", pool_positions=True, sparse_grad=rows)
            loss = _loss(logits, given.targets)
            optimizer.zero_grad()
            loss.backward()
        clip([values], 1.0)
        optimizer.step()
        return loss.detach()

    return Entry(given.contestant(values, run), given.opponents())
