"""Heads that learn classes from fixed features, each in its own way; all of them get the same batches.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 5, for the bottleneck and
the linear and the MLP head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvb import functional, training
from kvb.classifier import KeyValueClassifier
from kvb.counting import ClassCounts
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.projection import NearestCodes

ROWS = 1024  # features that are split into queries at a time: all of them would be C*D/channels times as large


@dataclass(frozen=True)
class Budget:
    """What every head may spend on a task."""

    epochs: int
    batch_size: int
    label_smoothing: float
    clip_norm: float


class Head(nn.Module):
    """Features to logits in two steps: ``prepare`` is what no training changes and runs once, ``forward`` the rest.

    passes: over the examples of a task where the budget's epochs are of no use; None takes these.
    """

    passes: int | None = None

    def kept(self) -> int:
        """Bytes of all tensors that have to stay for the head to go on learning; what private names hold is a cache."""
        fields = [field for module in self.modules() for field in vars(module).items()]
        parts = [part for name, part in fields if isinstance(part, Tensor) and not name.startswith("_")]
        storages = {part.data_ptr(): part.nbytes for part in (*self.parameters(), *self.buffers(), *parts)}
        return sum(storages.values())

    def prepare(self, features: Tensor) -> Tensor:
        return features

    def step(self, prepared: Tensor, labels: Tensor, *, rate: float, budget: Budget) -> Tensor:
        """Learn from one batch; its loss before, []."""
        raise NotImplementedError


class NetworkHead(Head):
    """An ordinary network on the features, trained by SGD without momentum."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, prepared: Tensor) -> Tensor:
        logits: Tensor = self.network(prepared)
        return logits

    def step(self, prepared: Tensor, labels: Tensor, *, rate: float, budget: Budget) -> Tensor:
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self(prepared), labels, label_smoothing=budget.label_smoothing)
        self.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), budget.clip_norm)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=rate)
        return loss.detach()


class _VotingHead(Head):
    """Codebook voting on codes [N, C] or [N, C, T] of frozen keys: only values [C, K, V] learn, from zero."""

    values: Tensor

    def forward(self, prepared: Tensor) -> Tensor:
        codes = prepared[:, None] if prepared.dim() == 2 else prepared.transpose(1, 2)
        return functional.gather(self.values, codes, pool="mean", pool_positions=True)

    def step(self, prepared: Tensor, labels: Tensor, *, rate: float, budget: Budget) -> Tensor:
        return training.sgd_step(
            self.values, prepared, labels, lr=rate, max_norm=budget.clip_norm, label_smoothing=budget.label_smoothing
        ).loss


class CodesHead(_VotingHead):
    """On codes as they are; heads with values of their own on the same codes share their keys."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.init.zeros_(values)


class BottleneckHead(_VotingHead):
    """On features, whose codes are searched once.

    Equivalent to ``CodebookVoting(V)(bottleneck(splitter(features)))``, trained as a ``NetworkHead`` is.

    Args:
        splitter: features [N, channels] -> [N, C, D].
        bottleneck: its value dim is the number of classes.
    """

    bottleneck: KeyValueBottleneck

    def __init__(self, splitter: nn.Module, bottleneck: KeyValueBottleneck) -> None:
        super().__init__()
        self.splitter = splitter
        self.bottleneck = bottleneck.freeze_keys()
        nn.init.zeros_(bottleneck.values)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Those of the bottleneck, which owns them."""
        return self.bottleneck.values

    def prepare(self, features: Tensor) -> Tensor:
        parts = (self.splitter(part) for part in features.split(ROWS))
        return self.bottleneck.encode_dataset(parts, progress=False).codes


class CountingHead(Head):
    """Class counts in the pairs that features fetch, with keys, sizes and smoothing of ``KeyValueClassifier``.

    Args:
        model: whose ``fit_keys`` has seen the key data.
        num_classes: V.
    """

    coder: NearestCodes
    counts: ClassCounts

    passes: int = 1

    def __init__(self, model: KeyValueClassifier, num_classes: int) -> None:
        super().__init__()
        self.coder = model.coder_
        self.counts = model.new_counts(num_classes)

    def prepare(self, features: Tensor) -> Tensor:
        codes: Tensor = self.coder(features).to(torch.int16)
        return codes

    def forward(self, prepared: Tensor) -> Tensor:
        scores: Tensor = self.counts(prepared)
        return scores

    def step(self, prepared: Tensor, labels: Tensor, *, rate: float, budget: Budget) -> Tensor:
        self.counts.add(prepared, labels)
        return torch.zeros(())


class NearestPairsHead(_VotingHead):
    """Codebook voting of several nearest pairs, on the same codes as ``CountingHead``, by SGD."""

    coder: NearestCodes
    values: Tensor

    def __init__(self, model: KeyValueClassifier, num_classes: int) -> None:
        super().__init__()
        self.coder = model.coder_
        C, K, _ = self.coder.keys.shape
        self.values = torch.zeros(C, K, num_classes)

    def prepare(self, features: Tensor) -> Tensor:
        codes: Tensor = self.coder(features).to(torch.int16)
        return codes
