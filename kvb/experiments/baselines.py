"""Baselines: heads that learn classes from fixed features in one pass, and one table of all by name.

All but the networks keep statistics that later classes only add to, so they forget nothing; what they keep differs:
means, covariances of the features, or the features themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kvb.experiments.heads import Budget, Head, NetworkHead

RIDGE = 1e-4  # SLDA: share of the identity in the covariance, as published
PENALTIES = tuple(10.0**power for power in range(-4, 7))  # ridge and RanPAC choose from these
FOLDS = 5  # one example of so many decides on the penalty
SHRINK, TUKEY = 1.0, 0.5  # FeCAM: of each covariance, towards its mean variance and covariance; of the features
NEIGHBOURS = 20


class OnePassHead(Head):
    """A head that sees every example once; ``add`` takes a batch, and a question after it solves for weights."""

    passes: int = 1

    def add(self, features: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def step(self, prepared: Tensor, labels: Tensor, *, rate: float, budget: Budget) -> Tensor:
        self.add(prepared.double(), labels)
        return prepared.new_zeros(())


class _MomentsHead(OnePassHead):
    """Counts, sums of every class, and something of size channels x channels: all sums, so that no order matters."""

    sums: Tensor
    counts: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.sums = torch.zeros(num_classes, channels, dtype=torch.float64)
        self.counts = torch.zeros(num_classes, dtype=torch.int64)
        self._solution: tuple[Tensor, Tensor] | None = None

    @property
    def means(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1)[:, None]

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, features)
        self.counts += labels.bincount(minlength=len(self.counts))
        self._solution = None

    def forward(self, prepared: Tensor) -> Tensor:
        if self._solution is None:
            self._solution = self.solve()
        weight, bias = self._solution
        return (prepared.double() @ weight.T + bias).masked_fill(self.counts == 0, -torch.inf)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights [V, channels] and biases [V] of the logits."""
        raise NotImplementedError


class NearestMeanHead(_MomentsHead):
    """The class with the nearest mean of the features: one pass, no rate, nothing to forget; a strong, simple baseline.

    Never predicts a class without an example so far.

    Source: Mensink et al., Distance-based image classification, TPAMI 2013; in class-incremental learning, Rebuffi et
    al., iCaRL, CVPR 2017 (arXiv:1611.07725).
    """

    def solve(self) -> tuple[Tensor, Tensor]:
        return 2 * self.means, -self.means.square().sum(-1)


class SLDAHead(_MomentsHead):
    """Linear discriminants with one covariance for all classes, computed from sums.

    Source: Hayes and Kanan, Lifelong machine learning with deep streaming linear discriminant analysis, CVPR workshops
    2020 (arXiv:1909.01520); the covariance is the pooled one, not their running estimate, so that no order matters.
    """

    products: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        self.products += features.T @ features

    def solve(self) -> tuple[Tensor, Tensor]:
        means = self.means
        within = (self.products - means.T @ (self.counts[:, None] * means)) / self.counts.sum().clamp(min=1)
        eye = torch.eye(len(within), dtype=within.dtype)
        weight = torch.linalg.solve((1 - RIDGE) * within + RIDGE * eye, means.T).T
        return weight, -0.5 * (weight * means).sum(-1)


class RidgeHead(SLDAHead):
    """Ridge regression of one-hot labels; the penalty is chosen on every fifth example of a class, then all count.

    Args:
        projection: [channels, M]: first project the features at random, and rectify them (RanPAC).
    Source: McDonnell et al., RanPAC: Random projections and pre-trained models for continual learning, NeurIPS 2023
    (arXiv:2307.02251), without its first-session adaptation.
    """

    def __init__(self, channels: int, num_classes: int, projection: Tensor | None = None) -> None:
        super().__init__(channels if projection is None else projection.shape[1], num_classes)
        self.projection = projection
        self.held: list[tuple[Tensor, Tensor]] = []

    def prepare(self, features: Tensor) -> Tensor:
        return features if self.projection is None else (features @ self.projection).relu()

    def add(self, features: Tensor, labels: Tensor) -> None:
        earlier = self.counts[labels] + (labels[:, None] == labels).tril(-1).sum(1)
        held = earlier % FOLDS == FOLDS - 1
        self.held.append((features[held], labels[held]))
        super().add(features, labels)

    def solve(self) -> tuple[Tensor, Tensor]:
        products, sums = self.products, self.sums
        penalty = 1.0
        if any(len(labels) for _, labels in self.held):
            features, labels = (torch.cat(parts) for parts in zip(*self.held, strict=True))
            rest = sums.index_add(0, labels, features, alpha=-1)
            values, vectors = torch.linalg.eigh(products - features.T @ features)
            losses = {each: self._loss(values, vectors, rest, each, features, labels) for each in PENALTIES}
            penalty = min(losses, key=lambda each: losses[each])
        eye = torch.eye(len(products), dtype=products.dtype)
        return torch.linalg.solve(products + penalty * eye, sums.T).T, torch.zeros(len(sums), dtype=sums.dtype)

    def _loss(
        self, values: Tensor, vectors: Tensor, sums: Tensor, penalty: float, features: Tensor, labels: Tensor
    ) -> float:
        """The mean squared error on examples held out, as published."""
        weight = (sums @ vectors / (values.clamp(min=0) + penalty)) @ vectors.T
        wanted = nn.functional.one_hot(labels, len(sums))
        return (features @ weight.T - wanted).square().mean().item()


class FeCAMHead(_MomentsHead):
    """Mahalanobis distance to the mean of each class, by its own covariance, shrunk and normalised to correlations.

    A class of one example is as far as that example.

    Source: Goswami et al., FeCAM: Exploiting the heterogeneity of class distributions in exemplar-free continual
    learning, NeurIPS 2023 (arXiv:2309.14062).
    """

    products: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.products = torch.zeros(num_classes, channels, channels, dtype=torch.float64)

    def prepare(self, features: Tensor) -> Tensor:
        """Tukey's transformation, with the sign kept: features here are centred."""
        return features.sign() * features.abs() ** TUKEY

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        for label in labels.unique():
            rows = features[labels == label]
            self.products[label] += rows.T @ rows

    def forward(self, prepared: Tensor) -> Tensor:
        if self._solution is None:
            self._solution = self.means, torch.stack([self._precision(label) for label in range(len(self.counts))])
        gaps = prepared.double()[:, None] - self._solution[0]
        distances = torch.einsum("nvc,vcd,nvd->nv", gaps, self._solution[1], gaps)
        return (-distances).masked_fill(self.counts == 0, -torch.inf)

    def _precision(self, label: int) -> Tensor:
        mean, count = self.means[label], self.counts[label].clamp(min=1)
        covariance = self.products[label] / count - mean.outer(mean)
        variance = covariance.diagonal().mean()
        if count == 1:
            return torch.eye(len(mean), dtype=mean.dtype)
        apart = (covariance.sum() - covariance.diagonal().sum()) / (len(mean) * (len(mean) - 1))
        eye = torch.eye(len(mean), dtype=mean.dtype)
        shrunk = covariance + SHRINK * (variance * eye + apart * (1 - eye))
        scale = shrunk.diagonal().clamp(min=torch.finfo(mean.dtype).tiny).sqrt()
        return torch.linalg.pinv(shrunk / scale.outer(scale), hermitian=True)


class NeighboursHead(OnePassHead):
    """The vote of the nearest stored examples by cosine: keeps all features."""

    features: Tensor
    labels: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features = torch.zeros(0, channels, dtype=torch.float64)
        self.labels = torch.zeros(0, dtype=torch.int64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.features = torch.cat([self.features, nn.functional.normalize(features)])
        self.labels = torch.cat([self.labels, labels])

    def forward(self, prepared: Tensor) -> Tensor:
        likeness = nn.functional.normalize(prepared.double()) @ self.features.T
        near = likeness.topk(min(NEIGHBOURS, len(self.labels)))
        votes = torch.zeros(len(prepared), self.num_classes, dtype=torch.float64)
        return votes.scatter_add_(1, self.labels[near.indices], near.values.clamp(min=1e-9))


# --- baselines by name ------------------------------------------------------------------------------------------------
# Each: (channels, sizes, *, hidden, projected, from_zero) -> one head for every size, a number of classes. hidden: of
# the MLP. projected: M of RanPAC. ``from_zero`` starts output layers at zero, as the bottleneck's values do: from
# PyTorch's own start, heads forget more.


def _output(channels: int, num_classes: int, from_zero: bool) -> nn.Linear:
    layer = nn.Linear(channels, num_classes)
    if from_zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def linear_heads(channels: int, sizes: Sequence[int], *, hidden: int, projected: int, from_zero: bool) -> list[Head]:
    return [NetworkHead(_output(channels, size, from_zero)) for size in sizes]


def mlp_heads(channels: int, sizes: Sequence[int], *, hidden: int, projected: int, from_zero: bool) -> list[Head]:
    """One hidden layer, which all of them share."""
    shared = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU())
    return [NetworkHead(nn.Sequential(*shared, _output(hidden, size, from_zero))) for size in sizes]


def one_pass(build: Callable[[int, int], Head]) -> Callable[..., list[Head]]:
    """The same for a head that has no layers to start."""

    def heads(channels: int, sizes: Sequence[int], *, hidden: int, projected: int, from_zero: bool) -> list[Head]:
        return [build(channels, size) for size in sizes]

    return heads


def ranpac_heads(channels: int, sizes: Sequence[int], *, hidden: int, projected: int, from_zero: bool) -> list[Head]:
    """One projection, which all of them share."""
    projection = torch.randn(channels, projected)
    return [RidgeHead(channels, size, projection) for size in sizes]


BASELINES: dict[str, Callable[..., list[Head]]] = {
    "linear": linear_heads,
    "MLP": mlp_heads,
    "nearest mean": one_pass(NearestMeanHead),
    "SLDA": one_pass(SLDAHead),
    "ridge": one_pass(RidgeHead),
    "RanPAC": ranpac_heads,
    "FeCAM": one_pass(FeCAMHead),
    "20 neighbours": one_pass(NeighboursHead),
}
