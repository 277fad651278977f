"""Metrics for torchmetrics: how codebooks are used, and what a model that learns one task after the other forgets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kvb import validation


class _Hits(Metric):
    """Counts how often each pair is fetched.

    Args:
        num_codebooks: C.
        key_value_pairs_per_codebook: K.
        options: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False
    hits: Tensor

    def __init__(self, num_codebooks: int, key_value_pairs_per_codebook: int, **options: Any) -> None:
        super().__init__(**options)
        C = validation.positive_int("num_codebooks", num_codebooks)
        K = validation.positive_int("key_value_pairs_per_codebook", key_value_pairs_per_codebook)
        self.add_state("hits", torch.zeros(C, K, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Count a batch of codes.

        Args:
            indices: [B, C, *shape] of any integer dtype, as ``encode`` returns them or ``BottleneckOutput.indices``.
            mask: bool [B, *shape], True where a position counts.
        Raises:
            TypeError: not integers. ValueError: another number of codebooks. IndexError: an index outside [0, K).
        """
        C, K = self.hits.shape
        validation.integer("update", "indices", indices)
        validation.codes(indices, C)
        rows = indices.movedim(1, -1)
        flat = rows.reshape(-1, C) if mask is None else rows[mask].reshape(-1, C)
        if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < K):
            raise IndexError(f"expected indices in [0, {K}), got {int(flat.min())} to {int(flat.max())}")
        places = flat.long() + torch.arange(C, device=flat.device) * K
        self.hits += torch.bincount(places.flatten(), minlength=C * K).view(C, K)


class CodebookUsage(_Hits):
    """The share of pairs that were fetched at least once, [].

    Equivalent to ``1 - module.fraction_of_unused_keys()`` after counting the same batches.

    Examples:
        >>> from kvb.integrations.torchmetrics import CodebookUsage
        >>> metric = CodebookUsage(num_codebooks=1, key_value_pairs_per_codebook=4)
        >>> metric.update(torch.tensor([[0], [3]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        return (self.hits > 0).float().mean()


class Perplexity(_Hits):
    """exp(entropy) of a codebook's hits, its pairs in effective use from 1 to K; the mean over codebooks, [].

    Equivalent to ``module.perplexity().mean()`` after counting the same batches. Zero before the first.

    Examples:
        >>> from kvb.integrations.torchmetrics import Perplexity
        >>> metric = Perplexity(num_codebooks=1, key_value_pairs_per_codebook=4)
        >>> metric.update(torch.tensor([[0], [3]]))
        >>> round(metric.compute().item(), 4)
        2.0
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        shares = self.hits / self.hits.sum(-1, keepdim=True).clamp(min=1)
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        return torch.where(self.hits.sum(-1) > 0, entropy.exp(), 0).mean()


class _ByTask(Metric):
    """Keeps the accuracy on every task after learning every task, [T, T].

    Args:
        num_tasks: T.
        options: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, **options: Any) -> None:
        super().__init__(**options)
        T = validation.positive_int("num_tasks", num_tasks)
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(T, T, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, *, task: int, learnt: int) -> None:
        """Add predictions for samples of one task.

        Args:
            preds: classes [N], or scores [N, classes].
            target: classes [N].
            task: whose samples these are, from 0.
            learnt: the last task that the model has learned, from 0.
        Raises:
            ValueError: a task outside [0, T), or shapes that do not fit.
        """
        T = len(self.total)
        for name, number in (("task", task), ("learnt", learnt)):
            if not 0 <= number < T:
                raise ValueError(f"{name} must be in [0, {T}), got {number}")
        classes = preds.argmax(-1) if preds.dim() == 2 else preds
        if classes.shape != target.shape or target.dim() != 1:
            raise ValueError(
                f"expected preds of shape (N,) or (N, classes) and target of shape (N,), got {tuple(preds.shape)} and "
                f"{tuple(target.shape)}"
            )
        self.right[learnt, task] += (classes == target).sum()
        self.total[learnt, task] += len(target)

    def accuracies(self) -> Tensor:
        """[T, T]: row i after learning task i, column j of task j; NaN where nothing was added."""
        return self.right / self.total


class AverageIncrementalAccuracy(_ByTask):
    """The mean over i of the accuracy on the tasks 0 to i after learning task i, [] (Rebuffi et al., CVPR 2017).

    The tasks count alike, whatever their sizes. Rows of which a task is missing are left out.

    Examples:
        >>> from kvb.integrations.torchmetrics import AverageIncrementalAccuracy
        >>> metric = AverageIncrementalAccuracy(num_tasks=2)
        >>> preds, target = torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> metric.update(preds, target, task=0, learnt=0)
        >>> metric.update(1 - preds, target, task=0, learnt=1)  # the first task is lost
        >>> metric.update(preds, target, task=1, learnt=1)
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        matrix = self.accuracies()
        return torch.stack([matrix[i, : i + 1].mean() for i in range(len(matrix))]).nanmean()


class Forgetting(_ByTask):
    """By how much the accuracy on a task fell from its best to the last row with data: the mean over earlier tasks, [].

    Source: Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018. Negative where tasks got better; zero
    after a single task.

    Examples:
        >>> from kvb.integrations.torchmetrics import Forgetting
        >>> metric = Forgetting(num_tasks=2)
        >>> preds, target = torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> metric.update(preds, target, task=0, learnt=0)
        >>> metric.update(1 - preds, target, task=0, learnt=1)  # the first task is lost
        >>> metric.update(preds, target, task=1, learnt=1)
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        matrix = self.accuracies()
        rows = matrix.isfinite().any(1).nonzero().flatten()
        if len(rows) < 2:
            return matrix.new_zeros(())
        last = int(rows[-1])
        best = matrix[:last, :last].nan_to_num(-torch.inf).amax(0)
        lost = best - matrix[last, :last]
        return lost[lost.isfinite()].mean()
