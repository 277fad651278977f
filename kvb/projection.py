"""Features to queries and codes of C codebooks, by a metric learned without labels, the same in any batch.

Source: the metric is relevant component analysis (Bar-Hillel et al., Learning a Mahalanobis metric from equivalence
constraints, JMLR 2005) with nearest neighbours in place of known pairs; random projections as in Träuble et al., ICML
2023 (arXiv:2207.11240), section 3. Ours: products that no order of summation changes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvb import functional, validation

NEIGHBOURS = 10
RIDGE = 1.0  # of the mean variance; this and NEIGHBOURS were chosen on validation examples, see docs/experiments.md
ROWS = 4096  # that neighbours are searched among
WIDEST = 2048  # channels up to which a metric is learned: its matrix has the square of them
BATCH = 1024  # rows projected and searched at a time
_MATRIX_BITS = 20


@torch.no_grad()
def local_whitening(features: Tensor, *, neighbours: int = NEIGHBOURS, ridge: float = RIDGE) -> Tensor:
    """The symmetric matrix that makes differences between near neighbours alike in all directions.

    Equivalent to ``(W + ridge * W.trace() / F * eye(F)) ** -0.5`` for the mean W of ``outer(x - y, x - y)`` over
    features x and their nearest neighbours y. Where classes are clusters this needs no labels to find what varies
    inside of them.

    Args:
        features: [N, F] finite floating-point numbers.
    Returns:
        [F, F] float64; the identity for fewer than three rows, or where all are alike.
    Raises:
        TypeError, ValueError: no such tensor, no positive number of neighbours.
    """
    validation.floating("local_whitening", "features", features)
    validation.shape("features", features, "N F", (None, None))
    near = min(validation.positive_int("neighbours", neighbours), len(features) - 1)
    x = features.double()
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if near < 2:
        return eye
    within = torch.zeros_like(eye)
    for rows in torch.arange(len(x), device=x.device).split(1024):
        distances = torch.cdist(x[rows], x)
        distances[torch.arange(len(rows)), rows] = torch.inf
        found = distances.topk(near, largest=False).indices
        gaps = (x[rows, None] - x[found]).flatten(0, 1)
        within += gaps.T @ gaps
    variance, directions = torch.linalg.eigh(within)
    scale = variance.clamp(min=0).mean()
    if not scale > 0:
        return eye
    return (directions * (variance.clamp(min=0) / scale + ridge).rsqrt()) @ directions.T


class WhitenedProjection(nn.Module):
    """Project features [B, F] once per codebook, with the same bits in any batch, order, and number of threads.

    Equivalent to ``((x - mean) @ matrix).unflatten(-1, (C, D))`` with features rounded to fixed-point numbers: their
    products with the matrix, fixed-point too, are summed in float64 without any rounding.

    Args:
        num_channels: F.
        num_codebooks, dim_keys: C and D.
    State:
        mean [F]; matrix [F, C*D] float64 of whole numbers, and scale [C*D], what one of them is worth.
    """

    num_codebooks: int
    dim_keys: int
    mean: Tensor
    matrix: Tensor
    scale: Tensor

    def __init__(self, num_channels: int, num_codebooks: int, dim_keys: int) -> None:
        super().__init__()
        self.num_codebooks = validation.positive_int("num_codebooks", num_codebooks)
        self.dim_keys = validation.positive_int("dim_keys", dim_keys)
        F, heads = validation.positive_int("num_channels", num_channels), num_codebooks * dim_keys
        self.register_buffer("mean", torch.zeros(F))
        self.register_buffer("matrix", torch.zeros(F, heads, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(heads, dtype=torch.float64))
        # Whole numbers below 2**53 are exact: what the matrix and the sum leave goes to the features.
        self._bits = 53 - _MATRIX_BITS - max(1, math.ceil(math.log2(F)))

    @torch.no_grad()
    def fit(self, features: Tensor, generator: torch.Generator) -> WhitenedProjection:
        """Centre on the mean of features [N, F], learn the metric from them, draw the projections; returns self."""
        F, heads = self.matrix.shape
        self.mean = features.double().mean(0).float()
        place = features.device
        some = torch.randperm(len(features), generator=generator)[:ROWS].to(place)
        centred = features[some] - self.mean
        metric = local_whitening(centred) if 2 < F <= WIDEST else torch.eye(F, dtype=torch.float64, device=place)
        if heads == self.num_codebooks * F:  # as many as channels: each codebook sees all, turned at random
            drawn = torch.randn(self.num_codebooks, F, F, dtype=torch.float64, generator=generator)
            drawn = torch.linalg.qr(drawn).Q.transpose(0, 1).reshape(F, heads)
        else:
            drawn = torch.randn(F, heads, dtype=torch.float64, generator=generator)
        matrix = metric @ drawn.to(place)
        self.scale = matrix.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny) / 2 ** (_MATRIX_BITS - 1)
        self.matrix = (matrix / self.scale).round()
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [B, F] -> queries [B, C, D] float32."""
        centred = (x.float() - self.mean).double()
        # A power of two for each row, so that nothing but the rounding to whole numbers is lost.
        _, exponent = torch.frexp(centred.abs().amax(-1, keepdim=True))
        unit = torch.ldexp(torch.ones_like(centred[:, :1]), exponent - self._bits)
        products = (centred / unit).round() @ self.matrix
        return (products * (self.scale * unit)).float().unflatten(-1, (self.num_codebooks, self.dim_keys))


class NearestCodes(nn.Module):
    """Features [B, F] -> the T nearest of K keys in each codebook [B, C, T]: keys are rows of unlabelled data.

    Equivalent to ``nearest(WhitenedProjection(...)(x)[:, None], keys, topk=T)[0][:, 0]``; a sample's codes are the same
    in any batch.

    Args:
        num_channels, num_codebooks, pairs, dim_keys: F, C, K and D.
        topk: T at most; where keys are few, one of 16 is near.
    State:
        projection.*; keys [C, K, D] float32.
    """

    projection: WhitenedProjection
    topk: int
    keys: Tensor

    def __init__(self, num_channels: int, num_codebooks: int, pairs: int, dim_keys: int, topk: int) -> None:
        super().__init__()
        self.projection = WhitenedProjection(num_channels, num_codebooks, dim_keys)
        self.topk = max(1, min(validation.positive_int("topk", topk), pairs // 16))
        self.register_buffer("keys", torch.zeros(num_codebooks, pairs, dim_keys))
        self._packed: Tensor | None = None
        self._between: Tensor | None = None  # squared distances [C, K] from each key to the nearest other one

    @torch.no_grad()
    def fit(self, features: Tensor, generator: torch.Generator) -> NearestCodes:
        """Learn the projection from features [N, F], and draw K of them as the keys of each codebook; returns self."""
        self.projection.fit(features, generator)
        C, K, _ = self.keys.shape
        drawn = torch.stack([torch.randperm(len(features), generator=generator)[:K] for _ in range(C)])
        drawn = drawn.to(features.device)
        for begin in range(0, len(features), BATCH):
            heads = self.projection(features[begin : begin + BATCH])
            book, place = ((drawn >= begin) & (drawn < begin + len(heads))).nonzero(as_tuple=True)
            self.keys[book, place] = heads[drawn[book, place] - begin, book]
        self._packed = self._between = None
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [B, F] -> codes [B, C, T] int64, nearest first."""
        codes = torch.cat([self._nearest(self.projection(rows), self.topk)[0] for rows in x.split(BATCH)])
        return codes if self.topk > 1 else codes[..., None]

    @torch.no_grad()
    def none_near(self, x: Tensor, share: float) -> Tensor:
        """Where x [B, F] is farther from its nearest key than ``share`` of the keys are from another: bool [B, C].

        Keys are samples of the unlabelled data: so far is a sample of such data in 1 - share of the codebooks.
        """
        C, K, _ = self.keys.shape
        if self._between is None or self._between.device != self.keys.device:
            ranks = min(2, K)  # the first is the key itself
            found = [self._nearest(rows, ranks)[1] for rows in self.keys.transpose(0, 1).split(BATCH)]
            self._between = torch.cat(found).view(K, C, ranks)[..., -1].T.sort().values
        limit = self._between[:, max(0, math.ceil(share * K) - 1)]
        near = [self._nearest(self.projection(rows), 1)[1] <= limit for rows in x.split(BATCH)]
        return ~torch.cat(near)

    def _nearest(self, queries: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """Codes and squared distances of queries [B, C, D]: [B, C], or [B, C, ranks] for several."""
        if self._packed is None or self._packed.device != self.keys.device:
            self._packed = functional.pack_keys(self.keys)
        codes, distances = functional.nearest(queries[:, None], self.keys, packed=self._packed, topk=ranks)
        return codes[:, 0], distances[:, 0]
