"""What came of learning keys: the report of ``init_keys``, and what there is to say of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvb import validation

FEW_PAIRS, FEW_ROWS_PER_KEY = 8, 4  # below that, that few pairs are in use means nothing
NEAR_ONE, FEW_HIT = 2.0, 0.2  # a perplexity up to that, or so small a share of pairs hit, is worth a warning


class KeyReport(NamedTuple):
    """What ``init_keys`` did, measured on its last pass over the data.

    rows: queries per codebook in that pass; skipped: (query, codebook) pairs with NaN or Inf;
    inertia: mean squared distance of a finite query to its key; dead_codes: pairs that no query hit, of C*K.

    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> report = bottleneck.init_keys(torch.randn(100, 4, 8), "kmeans", progress=False)
        >>> report.method, report.rows, report.pairs
        ('kmeans', 100, 64)
    """

    method: str
    rows: int
    skipped: int
    inertia: float
    dead_codes: int
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.rows} rows per codebook ({self.skipped} skipped), inertia {self.inertia:.6g}, "
            f"{self.dead_codes} of {self.pairs} codes dead"
        )


def concern(report: KeyReport, cluster_size: Tensor) -> str | None:
    """What is wrong with keys of which hardly any is in use, and what to do; None where nothing can be said.

    Args:
        cluster_size: [C, K] as the report's passes left it; all ones if nothing moved.
    """
    C, K = cluster_size.shape
    finite = report.rows - report.skipped // C
    if K < FEW_PAIRS or finite < FEW_ROWS_PER_KEY * K:
        return None
    hit = (report.pairs - report.dead_codes) / C
    usage = cluster_size.double() / cluster_size.double().sum(-1, keepdim=True).clamp(min=1e-30)
    perplexity = float(torch.special.entr(usage).sum(-1).exp().mean())
    if hit > max(NEAR_ONE, FEW_HIT * K) and perplexity > NEAR_ONE:
        return None
    remedy = (
        "random keys lie around the origin at unit scale, and these features elsewhere, or close together: call "
        'init_keys(..., "kmeans++"), or center and scale the features'
        if report.method == "random"
        else "the queries are nearly all alike: look at the features, and at what the splitter makes of them"
    )
    return (
        f"hardly any key is in use, so that values cannot tell inputs apart: of {K} pairs of a codebook {hit:.3g} were "
        f"hit, perplexity {min(perplexity, hit):.3g}; {remedy}"
    )


def dead_code_threshold(pairs: int, batch_size: int, positions: int = 1, factor: float = 0.1) -> float:
    """A ``threshold_ema_dead_code``: a pair is dead when it gets less than ``factor`` of an equal share of the hits.

    Equivalent to ``factor * batch_size * positions / pairs``: a batch hits a codebook ``batch_size * positions`` times,
    in all processes that learn together, and ``cluster_size`` is the moving average of a pair's part of that.

    Args:
        pairs: K. batch_size: samples of a batch. positions: of a sample, the product of ``*shape``.
        factor: >= 0, usually below 1; 0 replaces none, 1 every pair with fewer hits than the mean.
    Raises:
        TypeError, ValueError: sizes that are no positive integers; a factor below 0.
    Examples:
        >>> kvb.dead_code_threshold(256, batch_size=128)
        0.05
    """
    hits = validation.positive_int("batch_size", batch_size) * validation.positive_int("positions", positions)
    share = validation.number("factor", factor, 0.0, math.inf)
    return share * hits / validation.positive_int("pairs", pairs)
