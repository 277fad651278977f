"""The rows of queries that one launch searches, as the kernels read them, and cutting a batch into them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

CHUNK = 1 << 24  # rows times codebooks of one launch: what is kept about them in between stays below a few hundred MB
CHUNK_BYTES = 1 << 28  # of that, in any case
WHOLE = 256  # rows of the largest tile


class Rows:
    """Some batches of queries [B, S, C, D], and where their results go: indices and distances [B, S, C, T].

    Attributes:
        count: B * S. cells: B * S * C.
        arguments: what every kernel takes that reads queries. Strides are those of batches, positions and codebooks;
            FLAT where the second leads from row to row. An axis of one element has stride 0, so that it spoils no
            alignment: ALIGN divides all strides.
        wide: whether a thread loads two coordinates of a row at once or more, so that it holds a sum of their squares.
    """

    __slots__ = ("arguments", "cells", "count", "distances", "indices", "wide")

    def __init__(self, queries: Tensor, indices: Tensor, distances: Tensor) -> None:
        B, S, C, D = queries.shape
        batch, position, book, _ = queries.stride()
        flat = B == 1 or S == 1 or batch == S * position
        if S == 1:
            batch, position = 0, batch
        elif flat:
            batch = 0
        if C == 1:
            book = 0
        align = math.gcd(16, batch, position, book)
        self.indices, self.distances = indices, distances
        self.count, self.cells = B * S, B * S * C
        self.wide = align > 1 and queries.data_ptr() % 16 == 0
        self.arguments: dict[str, Any] = {
            "queries": queries,
            "S": S,
            "stride_b": batch,
            "stride_s": position,
            "stride_c": book,
            "C": C,
            "FLAT": flat,
            "ALIGN": align,
            "D": D,
        }


def chunks(queries: Tensor, indices: Tensor, distances: Tensor, bytes_per_cell: int) -> list[Rows]:
    """All rows, in as few pieces as the limits allow; B*S of any size becomes rows below 2^31."""
    B, S, C, _ = queries.shape
    most = max(1, min(CHUNK, CHUNK_BYTES // bytes_per_cell) // C)
    most = most // WHOLE * WHOLE or most  # no tile of rows but the last is padded
    if most >= B * S:
        return [Rows(queries, indices, distances)]
    batches = max(1, most // S)
    pieces = list(zip(*(part.split(batches) for part in (queries, indices, distances)), strict=True))
    if batches == 1 and most < S:
        pieces = [cut for piece in pieces for cut in zip(*(part.split(most, 1) for part in piece), strict=True)]
    return [Rows(*piece) for piece in pieces]
