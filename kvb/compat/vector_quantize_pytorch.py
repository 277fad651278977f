"""The names of ``vector_quantize_pytorch`` that a pickled ``DiscreteKeyValueBottleneck`` refers to.

For reading such files where that package is not installed; what else it has is not here.
"""

from __future__ import annotations

from typing import Any

from kvb.compat.codebook import Codebook
from kvb.compat.quantize import VectorQuantize


def _unused(*arguments: Any, **options: Any) -> None:
    """In place of functions that a pickle names and the replicas do not call."""
    raise NotImplementedError(
        "kvb.compat reads the pickles of vector-quantize-pytorch; install it to call its functions"
    )


class CosineSimCodebook(Codebook):
    """What the owner of such a codebook knows by its name."""


EuclideanCodebook = Codebook
batched_sample_vectors = gumbel_sample = identity = l2norm = noop = sample_vectors_distributed = _unused

__all__ = ["Codebook", "CosineSimCodebook", "EuclideanCodebook", "VectorQuantize"]
