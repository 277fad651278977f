"""Memory layers: a table of K = n * n rows behind product keys, in place of a transformer's feed-forward block. ::

    memory = kvb.memory.ProductKeyMemory(512, num_keys=1000, topk=32)  # a million rows
    y = x + memory(x)  # [..., 512]; each position reads 32 rows per head

Source: Lample et al., Large memory layers with product keys, NeurIPS 2019 (arXiv:1907.05242); Berges et al., Memory
layers at scale, 2024 (arXiv:2412.09764).
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvb import ops, validation

__all__ = ["ProductKeyMemory"]

Norm = Literal["none", "batch", "layer"]
NORMS: tuple[Norm, ...] = get_args(Norm)


class Counter(Protocol):
    """What counts the rows that are fetched, as ``kvb.optim.RowCounts``."""

    def add(self, indices: Tensor) -> object: ...


class ProductKeyMemory(nn.Module):
    """A large table of values, of which each input reads the ``topk`` rows whose product keys score best, per head.

    A pair (i, j) of half keys stands for row ``i * n + j`` of n * n rows and scores ``q1 @ keys1[i] + q2 @ keys2[j]``.
    Its best rows are found exactly in two searches among n half keys: nothing of size n * n is ever in memory but the
    table itself. Equivalent, for one head and a query ``q``, to ::

        scores = (q1 @ keys1.T)[:, :, None] + (q2 @ keys2.T)[:, None, :]  # [N, n, n]
        best, rows = scores.flatten(1).topk(topk)
        out = (best.softmax(-1)[..., None] * values[rows]).sum(1)

    summed over heads. Equal sums go to the row with the lower index.

    Args:
        dim: channels of the input.
        num_keys: n, half keys of each head and half: the table has n * n rows; 65536 at most.
        topk: rows that each head reads, at most n * n.
        heads: searches with queries and keys of their own in the one table.
        dim_key: of a query, an even number; ``dim`` by default, or ``dim`` + 1 where that is odd.
        dim_values: of a row, and of the output unless ``gated``; ``dim`` by default.
        dim_out: of the output with ``gated``; ``dim`` by default.
        query_norm: "none", "batch" (Lample et al.) or "layer", over the queries.
        gated: the output is ``project(silu(gate(x)) * out)``, two more matrices (Memory+ of Berges et al.).
        values: a table [n * n, dim_values] to share, ``other.values``, in place of one of its own.
        sparse_grad: give ``values`` a sparse gradient: the rows read, merged, never a dense table. For the row-wise
            optimizers of ``kvb.optim``, and for ``torch.optim.SGD`` and ``SparseAdam``.
        device, dtype: of the parameters.
    Attributes:
        keys: [heads, 2, n, dim_key / 2]. values: [n * n, dim_values]. num_pairs: n * n.
        counter: None, or anything with ``add(indices)``, such as ``kvb.optim.RowCounts``, which every forward calls.
    Raises:
        TypeError, ValueError: an argument out of its range, or shared values of another shape.
    Source: Lample et al., arXiv:1907.05242; Berges et al., arXiv:2412.09764, section 3.
    Examples:
        >>> memory = kvb.memory.ProductKeyMemory(64, num_keys=32, topk=8)  # 1,024 rows
        >>> memory(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        num_keys: int = 1000,
        *,
        topk: int = 32,
        heads: int = 4,
        dim_key: int | None = None,
        dim_values: int | None = None,
        dim_out: int | None = None,
        query_norm: Norm = "none",
        gated: bool = False,
        values: nn.Parameter | None = None,
        sparse_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = validation.positive_int("dim", dim)
        self.num_keys = validation.positive_int("num_keys", num_keys)
        if num_keys > 1 << 16:
            raise ValueError(f"num_keys must be at most {1 << 16}, got {num_keys}")
        self.num_pairs = num_keys**2
        self.topk = validation.topk(topk, self.num_pairs)
        self.heads = validation.positive_int("heads", heads)
        self.dim_key = dim + dim % 2 if dim_key is None else validation.positive_int("dim_key", dim_key)
        if self.dim_key % 2:
            raise ValueError(f"dim_key must be even, as each half has keys of its own, got {dim_key}")
        self.dim_values = dim if dim_values is None else validation.positive_int("dim_values", dim_values)
        if dim_out is not None and not gated:
            raise ValueError(f"dim_out needs gated=True, got {dim_out}; without it set dim_values")
        out = dim if dim_out is None else validation.positive_int("dim_out", dim_out)
        self.dim_out = out if gated else self.dim_values
        self.sparse_grad, self.gated, self.counter = sparse_grad, gated, None
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * self.dim_key, **options)
        self.query_norm = self._norm(validation.choice("query_norm", query_norm, NORMS), options)
        self.keys = nn.Parameter(torch.empty(heads, 2, num_keys, self.dim_key // 2, **options))
        self.values = self._table(values, options)
        self.gate = nn.Linear(dim, self.dim_values, bias=False, **options) if gated else None
        self.project = nn.Linear(self.dim_values, out, bias=False, **options) if gated else None
        self._start(values is None)

    counter: Counter | None

    def _norm(self, kind: Norm, options: dict[str, Any]) -> nn.Module:
        if kind == "none":
            return nn.Identity()
        if kind == "batch":
            return nn.BatchNorm1d(self.heads * self.dim_key, **options)
        return nn.LayerNorm(self.dim_key, **options)

    def _table(self, values: nn.Parameter | None, options: dict[str, Any]) -> nn.Parameter:
        shape = (self.num_pairs, self.dim_values)
        if values is None:
            return nn.Parameter(torch.empty(shape, **options))
        if not isinstance(values, nn.Parameter):
            raise TypeError(f"values must be the nn.Parameter of another memory, got {type(values).__name__}")
        validation.shape("values", values, "K V", shape, "K = n * n rows")
        return values

    @torch.no_grad()
    def _start(self, of_values: bool) -> None:
        """As Lample et al. have it: keys uniform, values normal, both small."""
        bound = 1 / math.sqrt(self.dim_key // 2)
        self.keys.uniform_(-bound, bound)
        if of_values:
            self.values.normal_(std=self.dim_values**-0.5)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_keys={self.num_keys}, topk={self.topk}, heads={self.heads}, dim_key={self.dim_key}, "
            f"dim_values={self.dim_values}, sparse_grad={self.sparse_grad}"
        )

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that inputs [N, dim] read: indices int64 and scores, both [N, heads, topk], best first."""
        queries = self.query(x)
        if isinstance(self.query_norm, nn.BatchNorm1d):
            queries = self.query_norm(queries)
        queries = queries.unflatten(-1, (self.heads, self.dim_key))
        if isinstance(self.query_norm, nn.LayerNorm):
            queries = self.query_norm(queries)
        indices, scores = torch.ops.kvb.product_nearest(queries, self.keys.to(queries.dtype), self.topk)
        return indices, scores

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What inputs read.

        Args:
            x: [..., dim], of the parameters' dtype; under autocast of any.
            mask: bool [...], True where a position counts; elsewhere the output is 0, and nothing is read, counted or
                learned.
        Returns:
            [..., dim_values], or [..., dim_out] if gated; dtype of the parameters, or autocast's if gated.
        Raises:
            TypeError: x is not floating point, or the mask not bool. ValueError: other shapes.
        """
        validation.floating("forward", "x", x)
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"expected x of shape (..., dim) = (..., {self.dim}), got {tuple(x.shape)}")
        if mask is None:
            return self._read(x.reshape(-1, self.dim)).view(*x.shape[:-1], self.dim_out)
        validation.positions("forward", mask, x.shape[:-1], "...")
        read = self._read(x[mask])
        return read.new_zeros(*x.shape[:-1], self.dim_out).index_put((mask,), read)

    def _read(self, x: Tensor) -> Tensor:
        """[N, dim] to [N, dim_out]."""
        indices, scores = self.search(x)
        if self.counter is not None:
            self.counter.add(indices)
        weights = scores.softmax(-1).to(self.values.dtype).flatten(1)
        fetch = ops.gather_weighted_row_grad if self.sparse_grad else torch.ops.kvb.gather_weighted
        out: Tensor = fetch(self.values, indices.flatten(1), weights)
        if self.gate is None or self.project is None:
            return out
        gated: Tensor = self.project(F.silu(self.gate(x)) * out)
        return gated
