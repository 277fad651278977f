"""Decoders turn fetched values [B, C, *shape, V] into predictions.

Source: Träuble et al., ICML 2023 (arXiv:2207.11240), section 4; the authors' codebook voting.
"""

from __future__ import annotations

from torch import Tensor, nn

from kvb import checks


class CodebookVoting(nn.Module):
    """Every codebook and position votes with its value; the mean vote is the logits. Nothing here learns.

    Equivalent to ``values.flatten(1, -2).mean(1)``.

    Args:
        num_classes: must equal the value dim V.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = checks.positive_int("num_classes", num_classes)

    def forward(self, values: Tensor) -> Tensor:
        """values [B, C, *shape, V] (any axes between the first and the last) -> logits [B, V]."""
        checks.floating("CodebookVoting", "values", values)
        if values.dim() < 3 or values.shape[-1] != self.num_classes:
            raise ValueError(
                f"expected values of shape (B, C, *shape, V) = (B, C, *shape, {self.num_classes}), got "
                f"{tuple(values.shape)}; codebook voting needs dim_values equal to the number of classes"
            )
        return values.flatten(1, -2).mean(1)

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes"
