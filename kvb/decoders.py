"""Decoders turn fetched values [B, C, *shape, V] into predictions.

Source: Träuble et al., ICML 2023 (arXiv:2207.11240), section 4; the decoders of the authors' experiments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from kvb import validation
from kvb._torch import saveable
from kvb.modules.tracing import OneNode


class CodebookVoting(OneNode):
    """Each codebook and position votes with its value; the mean vote is the logits. Has no parameters.

    Equivalent to ``values.flatten(1, -2).mean(1)``; with ``topk`` to ``(values * weights).sum(2)`` over the T fetched
    values before it. Let the values start at zero, ``init_values="zeros"``: random ones outvote what is learned.

    Args:
        num_classes: must equal the value dim V.
        topk: T of the bottleneck.
        weights: one number per rank, for ``topk`` > 1; ones by default.
        dropout: the probability, in training mode, that a codebook at a position has no vote.
        channel_last: values end with V; otherwise, as from a channel-first encoder, V comes before the positions.
        device: of the weights.
    State:
        weights [T], for ``topk`` > 1 only.
    Examples:
        >>> votes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]]])  # of three codebooks for two classes
        >>> kvb.decoders.CodebookVoting(2)(votes)
        tensor([[1.3333, 1.0000]])
    """

    num_classes: int
    topk: int
    dropout: float
    weights: Tensor

    def __init__(
        self,
        num_classes: int,
        topk: int = 1,
        *,
        weights: list[float] | None = None,
        dropout: float = 0.0,
        channel_last: bool = True,
        device: validation.Device = None,
    ) -> None:
        super().__init__()
        self.num_classes = validation.positive_int("num_classes", num_classes)
        self.topk = validation.positive_int("topk", topk)
        self.channel_last = channel_last
        if weights is not None and (topk == 1 or len(weights) != topk):
            raise ValueError(f"weights must hold one number for each of topk > 1 ranks, got {weights} for topk={topk}")
        if topk > 1:
            self.register_buffer("weights", torch.tensor(weights or [1] * topk, dtype=torch.float32, device=device))
        self.dropout = validation.number("dropout", dropout, 0.0, 1.0)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """values -> logits [B, V].

        With ``channel_last`` values are [B, C, *shape, V] (any axes between the first and the last), and for ``topk``
        > 1 [B, C, T, *shape, V]; without, [B, C, V, *shape] and [B, C, T, V, *shape].

        Args:
            mask: bool [B, *shape], True where a position votes; a sample without any gets zeros.
        Raises:
            TypeError: not a floating-point tensor, or a mask that is not bool. ValueError: a shape that does not fit.
        """
        if isinstance(values, Proxy):
            return self._call_of(values, mask)
        validation.floating("CodebookVoting", "values", values)
        ranks = self.topk > 1
        axis = -1 if self.channel_last else 2 + ranks
        if (
            values.dim() < 3 + ranks
            or values.shape[axis] != self.num_classes
            or (ranks and values.shape[2] != self.topk)
        ):
            rank = ("T, ", f"{self.topk}, ") if ranks else ("", "")
            letters, sizes = (
                f"(B, C, {t}*shape, {v})" if self.channel_last else f"(B, C, {t}{v}, *shape)"
                for t, v in zip(rank, ("V", self.num_classes), strict=True)
            )
            raise ValueError(
                f"expected values of shape {letters} = {sizes}, got {tuple(values.shape)}; "
                "codebook voting needs dim_values equal to the number of classes"
            )
        votes = values.movedim(axis, -1)
        if ranks:
            votes = torch.tensordot(votes, self.weights.to(values.dtype), ([2], [0]))
        if mask is not None:
            validation.positions("CodebookVoting", mask, (votes.shape[0], *votes.shape[2:-1]))
            validation.same_device("mask", mask, "values", values)
            votes = torch.where(saveable(mask)[:, None, ..., None], votes, 0)
        flat = votes.flatten(1, -2)
        if self.training and self.dropout:
            flat = nn.functional.dropout1d(flat, self.dropout)
        if mask is None:
            return flat.mean(1)
        return flat.sum(1) / (
            mask.reshape(mask.shape[0], math.prod(mask.shape[1:])).sum(1, keepdim=True) * votes.shape[1]
        ).clamp(min=1)

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes" + (f", topk={self.topk}" if self.topk > 1 else "")


class LinearProbe(OneNode):
    """One linear layer on all values of a sample.

    Equivalent to ``linear(values.flatten(1))``.

    Args:
        num_features: values of one sample, C·V for an embedding.
        num_classes: size of the output.
        bias: learn one.
        device, dtype: of the parameters.
    Examples:
        >>> kvb.decoders.LinearProbe(4 * 16, 10)(torch.randn(5, 4, 16)).shape
        torch.Size([5, 10])
    """

    num_features: int
    linear: nn.Linear

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = validation.positive_int("num_features", num_features)
        validation.positive_int("num_classes", num_classes)
        place: dict[str, Any] = {"device": device, "dtype": validation.float_dtype(dtype)}
        self.linear = nn.Linear(num_features, num_classes, bias=bias, **place)

    def forward(self, values: Tensor) -> Tensor:
        """values [B, ...], ``num_features`` per sample, -> logits [B, num_classes]."""
        if isinstance(values, Proxy):
            return self._call_of(values)
        logits: Tensor = self.linear(_flat(type(self).__name__, values, self.num_features))
        return logits


class MLP(OneNode):
    """A network with one hidden layer (ReLU) on all values of a sample.

    Equivalent to ``output(relu(hidden(values.flatten(1))))``.

    Args:
        num_features: values of one sample, C·V for an embedding.
        num_classes: size of the output.
        hidden: size of the hidden layer; 128 in the authors' experiments.
        device, dtype: of the parameters.
    Examples:
        >>> kvb.decoders.MLP(4 * 16, 10)(torch.randn(5, 4, 16)).shape
        torch.Size([5, 10])
    """

    num_features: int
    hidden: nn.Linear
    output: nn.Linear

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        hidden: int = 128,
        *,
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = validation.positive_int("num_features", num_features)
        place: dict[str, Any] = {"device": device, "dtype": validation.float_dtype(dtype)}
        self.hidden = nn.Linear(num_features, validation.positive_int("hidden", hidden), **place)
        self.output = nn.Linear(hidden, validation.positive_int("num_classes", num_classes), **place)

    def forward(self, values: Tensor) -> Tensor:
        """values [B, ...], ``num_features`` per sample, -> logits [B, num_classes]."""
        if isinstance(values, Proxy):
            return self._call_of(values)
        flat = _flat(type(self).__name__, values, self.num_features)
        logits: Tensor = self.output(self.hidden(flat).relu())
        return logits


def _flat(owner: str, values: Tensor, num_features: int) -> Tensor:
    validation.floating(owner, "values", values)
    if values.dim() < 2 or math.prod(values.shape[1:]) != num_features:
        raise ValueError(
            f"expected values of shape (B, ...) with num_features = {num_features} numbers per sample, "
            f"got {tuple(values.shape)}"
        )
    return values.flatten(1)


def add_distance_to_values(values: Tensor, distances: Tensor, *, axis: int = -1) -> Tensor:
    """Append the distance to the fetched key to its value, as one more channel.

    Equivalent to ``torch.cat([values, distances[..., None]], -1)``. Only so does a loss on the output
    reach the features. Distances are positive; the published ones are negative.

    Args:
        values, distances: [B, C, *shape, V] and [B, C, *shape], as ``BottleneckOutput`` has them.
        axis: where V is in ``values``: 2 for those of a channel-first encoder, [B, C, V, *shape].
    Returns:
        the shape of ``values`` with V + 1 in place of V, and their dtype.
    Raises:
        TypeError: not floating-point tensors. ValueError: shapes disagree, or there is no such axis.
    Source: the option of that name in the authors' experiments.
    Examples:
        >>> kvb.decoders.add_distance_to_values(torch.zeros(1, 1, 2), torch.ones(1, 1))
        tensor([[[0., 0., 1.]]])
    """
    validation.floating("add_distance_to_values", "values", values)
    validation.floating("add_distance_to_values", "distances", distances)
    if not -values.dim() <= axis < values.dim():
        raise ValueError(f"axis must be one of the {values.dim()} axes of values, got {axis}")
    want = (*values.shape[: axis % values.dim()], *values.shape[axis % values.dim() + 1 :])
    if distances.shape != want:
        raise ValueError(
            f"expected distances of the shape of values without axis {axis}, {want}, got {tuple(distances.shape)}; "
            "a channel-first encoder returns values with axis=2 (3 with topk > 1)"
        )
    return torch.cat([values, distances.unsqueeze(axis).to(values.dtype)], axis)
