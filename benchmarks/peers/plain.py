"""The nearest keys in plain PyTorch: ``cdist``, ``baddbmm`` in chunks, and the latter compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import finders, need
from benchmarks.peers.finders import Finder
from benchmarks.peers.peer import Peer
from benchmarks.shapes import FEW, GPU
from benchmarks.timing import Contestant, clock_of, quickest

CHUNKS = {"cpu": (1 << 20, 1 << 22, 1 << 24), "cuda": (1 << 24, 1 << 26, 1 << 28)}  # scores at a time
Least = Callable[[Tensor, Tensor, Tensor], Tensor]


def cdist(queries: Tensor, keys: Tensor) -> Finder:
    """``torch.cdist`` and ``argmin``: every distance at once."""
    B, S, C, _ = queries.shape
    need.cpu(queries.device, "torch.cdist, which holds every distance,")
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
    chunk, and then makes scratch of its own. With ``topk`` the indices have a last axis.
    """

    def __init__(self, keys: Tensor, N: int, chunk: int, least: Least | None = None, topk: int | None = None) -> None:
        self.C, self.K, _ = keys.shape
        self.topk = topk
        self.books = min(self.C, max(1, chunk // (N * self.K)))
        self.rows = min(N, max(1, chunk // self.K))
        self.scratch = keys.new_empty(0 if least else self.books * self.rows * self.K)
        self.least = least
        self.update(keys)

    def update(self, keys: Tensor) -> None:
        """Other keys of the same shape."""
        self.halves, self.columns = keys.square().sum(-1)[:, None] / 2, keys.transpose(1, 2)

    def __call__(self, queries: Tensor) -> Tensor:
        B, S, C, D = queries.shape
        N = B * S
        ranks = () if self.topk is None else (self.topk,)
        indices = torch.empty(C, N, *ranks, dtype=torch.int64, device=queries.device)
        for c in range(0, C, self.books):
            book = slice(c, c + self.books)
            # [books, N, D], in one copy where batch and positions cannot be one axis
            rows = queries[:, :, book].permute(2, 0, 1, 3).reshape(-1, N, D)
            for n in range(0, N, self.rows):
                part = rows[:, n : n + self.rows]
                self._find(book, part, indices[book, n : n + self.rows])
        return indices.view(C, B, S, *ranks).movedim(0, 2)

    def _find(self, book: slice, part: Tensor, out: Tensor) -> None:
        if self.least is not None:
            out.copy_(self.least(self.halves[book], part, self.columns[book]))
            return
        scores = self.scratch[: part.shape[0] * part.shape[1] * self.K].view(*part.shape[:2], self.K)
        torch.baddbmm(self.halves[book], part, self.columns[book], alpha=-1, out=scores)
        if self.topk is None:
            torch.argmin(scores, -1, out=out)
        else:
            out.copy_(scores.topk(self.topk, largest=False).indices)


def _best_chunk(queries: Tensor, keys: Tensor, least: Least | None = None, topk: int | None = None) -> Chunked:
    """The chunk size that is quickest on as many queries and codebooks as show it in little time."""
    B, S, C, _ = queries.shape
    K, chunks = keys.shape[1], CHUNKS[keys.device.type]
    books = min(C, max(1, chunks[-1] // (B * S * K)))
    few = slice(0, max(1, chunks[-1] // (S * K * books)))
    trial, some = queries[few, :, :books], keys[:books]
    rows = trial.shape[0] * S
    runs = {str(chunk): functools.partial(Chunked(some, rows, chunk, least, topk), trial) for chunk in chunks}
    return Chunked(keys, B * S, int(quickest(runs, clock_of(keys.device))), least, topk)


def chunked(queries: Tensor, keys: Tensor, topk: int | None = None) -> Chunked:
    """``baddbmm`` and ``argmin``, or ``topk``, in chunks of the size that is quickest here."""
    return _best_chunk(queries, keys, topk=topk)


def compiled(queries: Tensor, keys: Tensor) -> Finder:
    """The same, each chunk by ``torch.compile``."""
    need.compiler("torch.compile")
    torch.compiler.reset()
    found = _best_chunk(queries, keys, torch.compile(_least, dynamic=False))
    found(queries)  # compiles
    return found


def key_update(given: Any) -> Contestant:
    """Search, count and sum, move the averages, divide."""
    (C, K, D), decay, eps = given.keys.shape, given.decay, given.eps
    find, queries = chunked(given.queries, given.keys), given.queries
    keys, keys_avg, cluster_size = given.keys.clone(), given.keys.clone(), torch.ones(C, K)
    first = torch.arange(C) * K

    def run() -> None:
        find.update(keys)
        flat = (find(queries) + first).flatten()
        number = torch.bincount(flat, minlength=C * K).view(C, K)
        added = torch.zeros(C * K, D).index_add_(0, flat, queries.reshape(-1, D)).view(C, K, D)
        cluster_size.mul_(decay).add_(number, alpha=1 - decay)
        keys_avg.mul_(decay).add_(added, alpha=1 - decay)
        total = cluster_size.sum(-1, keepdim=True)
        smooth = (cluster_size + eps) / (total + K * eps) * total
        keys.copy_(torch.where((number > 0)[..., None], keys_avg / smooth[..., None], keys))

    return given.contestant(run, keys, keys_avg, cluster_size)


PEERS = (
    Peer(
        "torch.cdist",
        "torch.cdist + argmin, every distance at once",
        finders.offers(cdist, "search", "forward", "memories"),
        quick=False,
    ),
    Peer(
        "torch baddbmm",
        "baddbmm + argmin in chunks",
        {**finders.offers(chunked, *finders.SUITES), "key_update": key_update},
        shapes=(*FEW, *(name for name in GPU if name != "paper-1m")),
    ),
    Peer(
        "torch.compile",
        "baddbmm + argmin in chunks, compiled",
        finders.offers(compiled, "search"),
        shapes=(*FEW, "paper-256", "seed"),
        quick=False,
        compiles=True,
    ),
)
