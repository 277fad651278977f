"""The nearest keys in plain PyTorch: ``cdist``, ``baddbmm`` in chunks, and the latter compiled.

A finder is prepared for its keys and takes queries [B, S, C, D] to indices [B, S, C].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import need
from benchmarks.timing import quickest

CHUNKS = (1 << 20, 1 << 22, 1 << 24)  # scores at a time
Finder = Callable[[Tensor], Tensor]
Least = Callable[[Tensor, Tensor, Tensor], Tensor]


def cdist(queries: Tensor, keys: Tensor) -> Finder:
    """``torch.cdist`` and ``argmin``: every distance at once."""
    B, S, C, _ = queries.shape
    need.memory(4.0 * B * S * C * keys.shape[1], "torch.cdist, which holds every distance,")

    def find(queries: Tensor) -> Tensor:
        rows = queries.flatten(0, 1).transpose(0, 1)
        return torch.cdist(rows, keys).argmin(-1).T.view(B, S, C)

    return find


def _least(halves: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
    return torch.baddbmm(halves, queries, columns, alpha=-1).argmin(-1)


class Chunked:
    """``baddbmm`` and ``argmin``, never more than about ``chunk`` scores at a time.

    Key norms, transposed keys and the scratch for scores are prepared beforehand; ``least`` replaces what is done to a
    chunk, and then makes scratch of its own.
    """

    def __init__(self, keys: Tensor, N: int, chunk: int, least: Least | None = None) -> None:
        self.C, self.K, _ = keys.shape
        self.books = min(self.C, max(1, chunk // (N * self.K)))
        self.rows = min(N, max(1, chunk // self.K))
        self.scratch = torch.empty(0 if least else self.books * self.rows * self.K)
        self.least = least
        self.update(keys)

    def update(self, keys: Tensor) -> None:
        """Other keys of the same shape."""
        self.halves, self.columns = keys.square().sum(-1)[:, None] / 2, keys.transpose(1, 2)

    def __call__(self, queries: Tensor) -> Tensor:
        B, S, C, D = queries.shape
        N = B * S
        indices = torch.empty(C, N, dtype=torch.int64)
        for c in range(0, C, self.books):
            book = slice(c, c + self.books)
            # [books, N, D], in one copy where batch and positions cannot be one axis
            rows = queries[:, :, book].permute(2, 0, 1, 3).reshape(-1, N, D)
            for n in range(0, N, self.rows):
                part = rows[:, n : n + self.rows]
                self._find(book, part, indices[book, n : n + self.rows])
        return indices.view(C, B, S).permute(1, 2, 0)

    def _find(self, book: slice, part: Tensor, out: Tensor) -> None:
        if self.least is not None:
            out.copy_(self.least(self.halves[book], part, self.columns[book]))
            return
        scores = self.scratch[: part.shape[0] * part.shape[1] * self.K].view(*part.shape[:2], self.K)
        torch.baddbmm(self.halves[book], part, self.columns[book], alpha=-1, out=scores)
        torch.argmin(scores, -1, out=out)


def _best_chunk(queries: Tensor, keys: Tensor, least: Least | None = None) -> Chunked:
    """The chunk size that is quickest on as many queries and codebooks as show it in little time."""
    B, S, C, _ = queries.shape
    K = keys.shape[1]
    books = min(C, max(1, CHUNKS[-1] // (B * S * K)))
    few = slice(0, max(1, CHUNKS[-1] // (S * K * books)))
    trial, some = queries[few, :, :books], keys[:books]
    rows = trial.shape[0] * S
    runs = {str(chunk): functools.partial(Chunked(some, rows, chunk, least), trial) for chunk in CHUNKS}
    return Chunked(keys, B * S, int(quickest(runs)), least)


def chunked(queries: Tensor, keys: Tensor) -> Chunked:
    """``baddbmm`` and ``argmin`` in chunks, of the size that is quickest here."""
    return _best_chunk(queries, keys)


def compiled(queries: Tensor, keys: Tensor) -> Finder:
    """The same, each chunk by ``torch.compile``."""
    need.compiler("torch.compile")
    torch.compiler.reset()
    found = _best_chunk(queries, keys, torch.compile(_least, dynamic=False))
    found(queries)  # compiles
    return found


FINDERS = {"torch.cdist": cdist, "torch baddbmm": chunked, "torch.compile": compiled}


def fetch(values: Tensor, indices: Tensor) -> Tensor:
    """values [C, K, V] at indices [B, S, C], as [B, C, S, V]: one ``index_select``."""
    C, K, V = values.shape
    B, S, _ = indices.shape
    flat = (indices + torch.arange(C) * K).transpose(1, 2).flatten()
    return values.view(C * K, V).index_select(0, flat).view(B, C, S, V)
