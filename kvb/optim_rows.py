"""Which rows of a table are worth training: those that new data uses more than earlier data did.

Source: Lin et al., Continual Learning via Sparse Memory Finetuning, 2025 (arXiv:2510.15103), TF-IDF of memory slots;
Goyal et al., Improving Sparse Memory Finetuning, 2026 (arXiv:2604.05248), Kullback-Leibler divergence.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvb import collectives, validation
from kvb.collectives import Group

By = Literal["tfidf", "kl"]
MEASURES: tuple[By, ...] = get_args(By)


class RowCounts:
    """How often each row of a table was fetched, and in how many batches: sums, which merge over batches and processes.

    Equivalent to ``counts += indices.bincount(minlength=K); batches_with += counts_of_this_batch > 0; batches += 1``
    for each call of ``add``. ::

        background = kvb.optim.RowCounts(memory.num_pairs)
        memory.counter = background  # every forward counts from now on
        for x in earlier_data:
            model(x)

    Args:
        shape: of the table without its last axis: K for rows [K, V], C and K for a bottleneck's values [C, K, V].
        device: of the counts.
    Attributes:
        counts: int64 of that shape, fetches. batches_with: the same, batches that fetched the row. batches: how many.
    Raises:
        TypeError, ValueError: no sizes, or sizes that are no positive integers.
    Examples:
        >>> seen = kvb.optim.RowCounts(5).add(torch.tensor([0, 3, 3]))
        >>> seen.counts
        tensor([1, 0, 0, 2, 0])
    """

    def __init__(self, *shape: int, device: torch.device | str | None = None) -> None:
        if len(shape) not in (1, 2):
            raise ValueError(f"shape must be K, or C and K, got {shape}: pass *table.shape[:-1]")
        for size in shape:
            validation.positive_int("shape", size)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self.batches_with = torch.zeros_like(self.counts)
        self.batches = 0

    def add(self, indices: Tensor) -> RowCounts:
        """Count one batch.

        Args:
            indices: integers in [0, K), of any shape; for a table [C, K, V] codes [B, C, *shape], as of ``encode``.
        Returns:
            itself.
        Raises:
            TypeError: no integers. ValueError: no axis of C codebooks. IndexError: an index outside of [0, K).
        """
        validation.integer("add", "indices", indices)
        K = self.counts.shape[-1]
        rows = indices.detach().to(self.counts.device, torch.int64)
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < K:
            raise IndexError(f"indices must be in [0, {K}), got {int(rows.min())} to {int(rows.max())}")
        if self.counts.dim() == 2:
            validation.codes(rows, len(self.counts))
            first = torch.arange(len(self.counts), device=rows.device) * K
            rows = rows + first.view(-1, *[1] * (rows.dim() - 2))
        found = rows.flatten().bincount(minlength=self.counts.numel()).view_as(self.counts)
        self.counts += found
        self.batches_with += found > 0
        self.batches += 1
        return self

    def merge(self, other: RowCounts) -> RowCounts:
        """Add what another counter of the same table has seen; itself."""
        if not isinstance(other, RowCounts):
            raise TypeError(f"other must be a RowCounts, got {type(other).__name__}")
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"expected counts {tuple(self.counts.shape)}, got {tuple(other.counts.shape)}")
        self.counts += other.counts.to(self.counts.device)
        self.batches_with += other.batches_with.to(self.counts.device)
        self.batches += other.batches
        return self

    def total(self, process_group: Group = None) -> RowCounts:
        """A new counter with the sums over all processes, in one ``all_reduce``; the same in each of them."""
        batches = self.counts.new_tensor([self.batches])
        found = RowCounts(*self.counts.shape, device=self.counts.device)
        sums = collectives.total((self.counts, self.batches_with, batches), process_group)
        found.counts, found.batches_with, found.batches = sums[0].clone(), sums[1].clone(), int(sums[2])
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts, "batches_with": self.batches_with, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for counts of another shape."""
        if state["counts"].shape != self.counts.shape:
            raise ValueError(f"expected counts {tuple(self.counts.shape)}, got {tuple(state['counts'].shape)}")
        self.counts.copy_(state["counts"])
        self.batches_with.copy_(state["batches_with"])
        self.batches = int(state["batches"])


def select_rows(counts: RowCounts, background: RowCounts, number: int, *, by: By = "tfidf") -> Tensor:
    """The rows that new data uses most relative to a background: those to train, so that others stay what they are.

    Equivalent to ``(share * log((B + 1) / (batches_with + 1))).topk(number)`` by TF-IDF, where ``share`` is that of the
    new data's fetches, and B, ``batches_with`` count batches of the background; by KL to
    ``(share * log(share / background_share)).topk(number)``, where the background's counts are one higher, so that none
    is zero. Only rows that the new data fetched are chosen; ties go to those it fetched most, then to the lower ones.

    Args:
        counts: of the new data, one batch or all of it. background: of earlier data; a new counter for none.
        number: how many rows, >= 1; fewer come back where the new data fetched fewer.
        by: "tfidf", or "kl".
    Returns:
        rows of the flattened table, ascending: [M] int64, M <= number. ``keep_rows_`` takes them.
    Raises:
        TypeError: no counters. ValueError: counters of different tables, an unknown measure, or ``number`` < 1.
    Source: Lin et al., arXiv:2510.15103, section 3; Goyal et al., arXiv:2604.05248.
    Examples:
        >>> earlier = kvb.optim.RowCounts(5).add(torch.tensor([0, 0, 1]))
        >>> new = kvb.optim.RowCounts(5).add(torch.tensor([0, 3, 3, 4]))
        >>> kvb.optim.select_rows(new, earlier, 2)
        tensor([3, 4])
    """
    for name, one in (("counts", counts), ("background", background)):
        if not isinstance(one, RowCounts):
            raise TypeError(f"{name} must be a kvb.optim.RowCounts, got {type(one).__name__}")
    if counts.counts.shape != background.counts.shape:
        raise ValueError(
            f"expected a background of the same table, counts {tuple(counts.counts.shape)}, got "
            f"{tuple(background.counts.shape)}"
        )
    validation.positive_int("number", number)
    validation.choice("by", by, MEASURES)
    new, old = counts.counts.flatten().cpu().double(), background.counts.flatten().cpu().double()
    share = new / new.sum().clamp(min=1)
    if by == "tfidf":
        scores = share * ((background.batches + 1) / (background.batches_with.flatten().cpu().double() + 1)).log()
    else:
        scores = share * (share / ((old + 1) / (old.sum() + len(old)))).log()
    fetched = (new > 0).nonzero()[:, 0]
    fetched = fetched[new[fetched].argsort(descending=True, stable=True)]
    best = scores[fetched].argsort(descending=True, stable=True)[:number]
    return fetched[best].sort().values.to(counts.counts.device)


@torch.no_grad()
def keep_rows_(param: Tensor, rows: Tensor) -> None:
    """Drop the gradient of every other row of a table, in place: a row-wise optimizer moves the chosen ones alone.

    Equivalent to ``param.grad[others] = 0``; of a sparse gradient the other rows are taken out.

    Args:
        param: a table [..., V] with a gradient, dense or sparse; one without is left as it is.
        rows: [M] int64, of the flattened table, as ``select_rows`` gives them.
    Raises:
        TypeError: rows that are no integers. ValueError: rows of more than one axis. IndexError: one outside of it.
    Examples:
        >>> table = torch.zeros(3, 2, requires_grad=True)
        >>> table.sum().backward()
        >>> kvb.optim.keep_rows_(table, torch.tensor([1]))
        >>> table.grad
        tensor([[0., 0.],
                [1., 1.],
                [0., 0.]])
    """
    validation.integer("keep_rows_", "rows", rows)
    validation.shape("rows", rows, "M", (None,))
    count = param.shape[:-1].numel()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise IndexError(f"rows must be in [0, {count}), got {int(rows.min())} to {int(rows.max())}")
    if param.grad is None:
        return
    kept = torch.zeros(count, dtype=torch.bool, device=param.device)
    kept[rows.to(param.device)] = True
    grad = param.grad
    if not grad.is_sparse:
        grad.view(-1, grad.shape[-1])[~kept] = 0
        return
    grad = grad.coalesce()
    here = kept.view(param.shape[:-1])[tuple(grad.indices())]
    param.grad = torch.sparse_coo_tensor(
        grad.indices()[:, here], grad.values()[here], grad.shape, check_invariants=False, is_coalesced=True
    )
