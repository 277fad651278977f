"""A step of training on codes where values are split over processes: ``kvb.training.sgd_step`` for a DTensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kvb import collectives, ops  # noqa: F401  (importing ops registers the operators)
from kvb.distributed import exchange
from kvb.distributed.layout import CODEBOOKS, Layout
from kvb.reference.arithmetic import widest
from kvb.reference.shared import accumulator, require_codes
from kvb.reference.values import descend_, smoothed_cross_entropy


def sgd_step_(
    values: DTensor, codes: Tensor, targets: Tensor, lr: float, max_norm: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sgd_step_`` on the union of all data-parallel batches; logits are those of this batch.

    Sent: votes [B, V] and one number over the parts of the table; over data-parallel processes two numbers, codes, and
    gradients [B, V].

    Args:
        values: [C, K, V], split over codebooks or over pairs. codes: [B, S, C]. targets: [B].
    """
    layout, table = Layout.of(values), exchange.part_of(values)
    (C, K, V), (B, S, _) = values.shape, codes.shape
    require_codes(codes, C, K)
    fetched = _fetched(table, codes, layout)
    logits = exchange.summed(fetched.votes(), layout.shards) / (C * S)
    losses, grad = smoothed_cross_entropy(logits, targets, label_smoothing)
    loss, samples = collectives.total((losses.sum(), losses.new_tensor(float(B))), layout.data)
    fetched.codes = collectives.joined(fetched.codes, layout.data)
    rows, grads, count = fetched.merged(collectives.joined(grad, layout.data) / samples / S / C)
    squares = collectives.total((grads.to(widest(grads.device)).square().sum(),), layout.shards)[0]
    norm = squares.sqrt()
    descend_(table.view(-1, V), rows, grads, count, norm, lr, max_norm)
    return loss / samples, norm.to(accumulator(values.dtype)), logits


class _OfCodebooks:
    """The rows that a batch fetches of the codebooks that are here."""

    def __init__(self, table: Tensor, codes: Tensor, layout: Layout) -> None:
        self.table, self.codes = table, codes[..., layout.here]

    def votes(self) -> Tensor:
        """The sums [B, V] of what every sample fetches."""
        votes: Tensor = torch.ops.kvb.gather(self.table, self.codes, "sum", "bscv")
        return votes.to(accumulator(votes.dtype)).sum(1)

    def merged(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, their gradients and their number, given the gradient [B, V] of ``votes``."""
        grad = grad[:, None].expand(-1, self.codes.shape[1], -1)
        return torch.ops.kvb.gather_backward_rows(grad, self.codes, self.table.shape[1], "sum")


class _OfPairs:
    """The rows that a batch fetches of the pairs that are here."""

    def __init__(self, table: Tensor, codes: Tensor, layout: Layout) -> None:
        self.table, self.codes, self.here = table, codes, layout.here

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Which sample fetches which row of [C*k, V]."""
        sample, _, book = (own := (self.codes >= self.here.start) & (self.codes < self.here.stop)).nonzero(
            as_tuple=True
        )
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


def _fetched(table: Tensor, codes: Tensor, layout: Layout) -> _OfCodebooks | _OfPairs:
    return (_OfCodebooks if layout.axis == CODEBOOKS else _OfPairs)(table, codes, layout)
