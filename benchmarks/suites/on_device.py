"""The operators one by one on a device: large shapes, verified on a sample of positions.

Positions are the batch here: queries are [N, 1, C, D]. A peer may err: the share of its wrong choices is
reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import machine, verify
from benchmarks.shapes import Lookup
from benchmarks.timing import Contestant
from kvb import functional

SAMPLE = 256  # positions that are verified
FITS = 0.6  # of the free memory may be taken by one row


class Problem(NamedTuple):
    """The inputs of one row."""

    shape: Lookup
    queries: Tensor
    keys: Tensor
    values: Tensor
    indices: Tensor


def _bytes_per_position(shape: Lookup, with_values: bool) -> int:
    """Memory of everything that grows with N: inputs, outputs, and a gradient or two."""
    return shape.C * (4 * shape.D + 40 + 12 * shape.V * with_values)


def reduced(shape: Lookup, free: int, with_values: bool) -> Lookup:
    """The shape with as few halvings of N as make it fit into ``free`` bytes."""
    while shape.N > 1 and shape.N * _bytes_per_position(shape, with_values) > FITS * free:
        shape = shape._replace(N=shape.N // 2)
    return shape


def problem(shape: Lookup, device: torch.device, with_values: bool) -> Problem:
    shape = reduced(shape, machine.available_bytes(device), with_values)
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    N, C, K, D, V = shape
    indices = torch.randint(K, (N if with_values else 0, 1, C), generator=generator, device=device)
    return Problem(shape, random(N, 1, C, D), random(C, K, D), random(C, K, V), indices)


def _sample(N: int) -> Tensor:
    return torch.linspace(0, N - 1, min(SAMPLE, N)).long()


def _some(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)].cpu()


class Work(NamedTuple):
    """kvb's contestant, the inputs for its peers, and what the algorithm moves and computes at least."""

    kvb: Contestant
    nbytes: float
    flops: float = 0.0
    given: Any = None  # has a ``contestant`` method, as in the other suites
    suite: str = ""  # what peers call it


class Search:
    """Queries [N, 1, C, D] and keys [C, K, D]; a run returns what ``codes`` turns into indices [N, 1, C]."""

    def __init__(self, given: Problem) -> None:
        self.shape, self.queries, self.keys = given.shape, given.queries, given.keys

    def contestant(self, run: Callable[[], Any], codes: Callable[[Any], Tensor] = lambda found: found) -> Contestant:
        return Contestant(run, lambda found: self.share_wrong(codes(found)))

    def share_wrong(self, found: Tensor) -> float:
        rows = _sample(self.shape.N)
        return verify.share_wrong(_some(self.queries, rows), self.keys.cpu(), _some(found, rows))


class Memories(Search):
    """The same with values; a run returns mean values [N, 1, V] and codes [N, 1, C].

    A peer that projects embeddings gets some whose projection only picks the features of its codebook.
    """

    def __init__(self, given: Problem) -> None:
        super().__init__(given)
        self.values = given.values

    @property
    def x(self) -> Tensor:
        return self.queries.flatten(2)

    @property
    def projection(self) -> Tensor:
        C, D = self.queries.shape[2:]
        return torch.eye(C * D, device=self.keys.device).view(C * D, C, D).transpose(0, 1)

    def project(self) -> Tensor:
        return self.queries

    def contestant(self, run: Callable[[], tuple[Tensor, Tensor]]) -> Contestant:
        def check(result: tuple[Tensor, Tensor]) -> float:
            out, codes = result
            rows = _sample(self.shape.N)
            verify.fetched(self.values.cpu(), _some(codes, rows), _some(out, rows), "mean", "bscv")
            return self.share_wrong(codes)

        return Contestant(run, check)


def _search_work(shape: Lookup) -> tuple[float, float]:
    nbytes = shape.query_bytes + shape.key_bytes + 12 * shape.N * shape.C
    return nbytes, 2.0 * shape.N * shape.C * shape.K * shape.D


def search(given: Problem) -> Work:
    """``nearest`` with packed keys, as a module calls it: indices and distances."""
    packed, rows = functional.pack_keys(given.keys), _sample(given.shape.N)

    def check(found: tuple[Tensor, Tensor]) -> None:
        indices, distances = (_some(part, rows)[..., 0] for part in found)
        verify.nearest(_some(given.queries, rows), given.keys.cpu(), indices, distances)

    ours = Contestant(lambda: torch.ops.kvb.nearest(given.queries, given.keys, packed, None, 1), check)
    return Work(ours, *_search_work(given.shape), Search(given), "search")


def lookup(given: Problem) -> Work:
    """Search and mean over codebooks in one call, as a module makes it."""
    packed, rows = functional.pack_keys(given.keys), _sample(given.shape.N)

    def check(found: tuple[Tensor, Tensor]) -> None:
        out, indices = (_some(part, rows) for part in found)
        verify.sampled_choice(_some(given.queries, rows), given.keys.cpu(), indices)
        verify.fetched(given.values.cpu(), indices, out, "mean", "bscv")

    nbytes, flops = _search_work(given.shape)
    run = functools.partial(torch.ops.kvb.lookup, given.queries, given.keys, packed, given.values, None, "mean")
    return Work(Contestant(run, check), nbytes + 4 * given.shape.N * given.shape.V, flops, Memories(given), "memories")


def pack(given: Problem) -> Work:
    keys = given.keys

    def check(packed: Tensor) -> None:
        verify.equal(functional.pack_keys(keys), packed, "packing twice")

    ours = Contestant(lambda: functional.pack_keys(keys), check)
    return Work(ours, keys.nbytes + functional.pack_keys(keys).nbytes)


def gather(given: Problem, pool: str = "none") -> Work:
    shape, rows = given.shape, _sample(given.shape.N)

    def check(out: Tensor) -> None:
        verify.fetched(given.values.cpu(), _some(given.indices, rows), _some(out, rows), pool, "bscv")

    written = 4 * shape.N * shape.V * (shape.C if pool == "none" else 1)
    nbytes = given.indices.nbytes + written + min(given.values.nbytes, 4 * shape.N * shape.C * shape.V)
    return Work(Contestant(lambda: functional.gather(given.values, given.indices, pool=pool), check), nbytes)


def backward(given: Problem, pool: str = "none") -> Work:
    shape = given.shape
    size = (shape.N, 1, shape.C, shape.V) if pool == "none" else (shape.N, 1, shape.V)
    grad = torch.randn(size, device=given.keys.device)

    def check(found: Tensor) -> None:
        rows = grad[:, :, :1] if pool == "none" else grad[:, :, None] / shape.C
        verify.sums(rows.cpu(), given.indices[:, :, :1].cpu(), found[:1].cpu())

    ours = Contestant(lambda: torch.ops.kvb.gather_backward(grad, given.indices, shape.K, pool), check)
    return Work(ours, grad.nbytes + given.indices.nbytes + given.values.nbytes)


def accumulate(given: Problem) -> Work:
    shape = given.shape

    def check(found: tuple[Tensor, Tensor]) -> None:
        hits, sums = found
        first = (part[:, :, :1].cpu() for part in (given.queries, given.indices))
        verify.sums(*first, sums[:1].cpu(), hits[:1].cpu())

    ours = Contestant(lambda: torch.ops.kvb.accumulate(given.queries, given.indices, shape.K), check)
    return Work(ours, shape.query_bytes + given.indices.nbytes + shape.key_bytes)
