"""A step of training on codes where values are split over processes: ``kvb.training.sgd_step`` for a DTensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvb import collectives, ops  # noqa: F401  (importing ops registers the operators)
from kvb.distributed import exchange
from kvb.distributed.layout import CODEBOOKS, Layout
from kvb.reference.arithmetic import widest
from kvb.reference.shared import accumulator, require_codes
from kvb.reference.values import clipped_step_, cross_entropy


def sgd_step_(
    values: Any,
    codes: Tensor,
    targets: Tensor,
    counted: Tensor | None,
    lr: float,
    max_norm: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sgd_step_`` on the union of all data-parallel batches; logits are those of this batch.

    Sent: votes [B, V] and one number over the parts of the table; over data-parallel processes two numbers, codes, and
    gradients [B, V].

    Args:
        values: DTensor [C, K, V], split over codebooks or over pairs. codes: [B, S, C]. targets: [B].
        counted: bool [B, S], the positions that vote; None for all.
    """
    layout, table = Layout.of(values), exchange.part_of(values)
    (C, K, _), (B, S, _) = values.shape, codes.shape
    require_codes(codes, C, K)
    if counted is None:
        counted = torch.ones((B, S), dtype=torch.bool, device=codes.device)
    fetched = (_OfCodebooks if layout.axis == CODEBOOKS else _OfPairs)(table, codes, counted, layout)
    voters = C * counted.sum(1, keepdim=True).clamp(min=1)
    logits = exchange.summed(fetched.votes(), layout.shards) / voters
    loss, grad = cross_entropy(logits, targets, label_smoothing)
    total = loss * B if B else loss.new_zeros(())
    total, samples = collectives.total((total, loss.new_tensor(float(B))), layout.data)
    sent = fetched.codes, counted, grad * B / samples / voters
    fetched.codes, fetched.counted, grad = map(torch.cat, collectives.parts(sent, layout.data))
    rows, grads, count = fetched.merged(grad)
    squares = collectives.total((grads.to(widest(grads.device)).square().sum(),), layout.shards)[0]
    norm = clipped_step_(table, rows, grads, count, lr, max_norm, squares.sqrt())
    return total / samples, norm, logits


class _OfCodebooks:
    """The rows that a batch fetches of the codebooks that are here."""

    def __init__(self, table: Tensor, codes: Tensor, counted: Tensor, layout: Layout) -> None:
        self.table, self.codes, self.counted = table, codes[..., layout.here].contiguous(), counted

    def votes(self) -> Tensor:
        """The sums [B, V] of what every sample fetches."""
        votes: Tensor = torch.ops.kvb.gather(self.table, self.codes, "sum", "bscv")
        return torch.where(self.counted[..., None], votes.to(accumulator(votes.dtype)), 0).sum(1)

    def merged(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, their gradients and their number, given the gradient [B, V] of ``votes``."""
        spread = torch.where(self.counted[..., None], grad[:, None], 0)
        return torch.ops.kvb.gather_backward_rows(spread, self.codes, self.table.shape[1], "sum")


class _OfPairs:
    """The rows that a batch fetches of the pairs that are here."""

    def __init__(self, table: Tensor, codes: Tensor, counted: Tensor, layout: Layout) -> None:
        self.table, self.codes, self.counted, self.here = table, codes, counted, layout.here

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Which sample fetches which row of [C*k, V]."""
        own = (self.codes >= self.here.start) & (self.codes < self.here.stop) & self.counted[..., None]
        sample, _, book = own.nonzero(as_tuple=True)
        return sample, book * self.table.shape[1] + self.codes[own].to(torch.int64) - self.here.start

    def votes(self) -> Tensor:
        sample, row = self._rows()
        flat = self.table.view(1, -1, self.table.shape[2])
        fetched = torch.ops.kvb.gather(flat, row[:, None, None], "none", "bscv")[:, 0, 0]
        fetched = fetched.to(accumulator(fetched.dtype))
        return fetched.new_zeros((len(self.codes), fetched.shape[1])).index_add_(0, sample, fetched)

    def merged(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sample, row = self._rows()
        size = self.table.shape[0] * self.table.shape[1]
        return torch.ops.kvb.gather_backward_rows(grad[sample][:, None, None], row[:, None, None], size, "none")
