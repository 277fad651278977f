"""Values fetched by index, and the gradient of that, against PyTorch's own indexing.

Sums of float16 and bfloat16 are taken in float32, as kvb does: PyTorch's own would round after every number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import verify
from benchmarks.race.draws import Draw
from benchmarks.race.entry import Entry, called
from benchmarks.suites.case import random
from benchmarks.timing import Contestant
from kvb import functional

VERIFIED = 16  # codebooks of a gradient that are summed again in float64


def codes_of(draw: Draw) -> Tensor:
    """[B, S, C]"""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(draw.K, (draw.B, draw.S, draw.C), generator=generator)


def _rows(draw: Draw, codes: Tensor) -> Tensor:
    """Codes as rows of a table [C * K, V]."""
    return codes + torch.arange(draw.C) * draw.K


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gather(draw: Draw) -> Entry:
    """Values [B, S, C, V] that codes name, or their sum or mean over codebooks [B, S, V]."""
    values, codes = random(2, draw.C, draw.K, draw.V).to(draw.torch_dtype), codes_of(draw)
    table, pool = values.view(draw.C * draw.K, draw.V), draw.pool

    def contestant(run: Callable[[], Tensor]) -> Contestant:
        return Contestant(run, lambda out: verify.fetched(values, codes, out, pool, "bscv"))

    def pooled(fetched: Tensor) -> Tensor:
        if pool == "none":
            return fetched
        exact = _exact(fetched)
        return (exact.sum(2) if pool == "sum" else exact.mean(2)).to(values.dtype)

    books = torch.arange(draw.C)

    def by_index_select() -> Tensor:
        flat = _rows(draw, codes).flatten()
        return pooled(table.index_select(0, flat).view(*codes.shape, draw.V))

    def by_index() -> Tensor:
        return pooled(values[books, codes])

    def by_embedding_bag() -> Tensor:
        return F.embedding_bag(_rows(draw, codes).flatten(0, 1), table, mode=pool).view(draw.B, draw.S, draw.V)

    runs = {"torch index_select": by_index_select, "torch index": by_index}
    if pool != "none":
        runs["torch embedding_bag"] = by_embedding_bag
    ours = contestant(called(draw, lambda: functional.gather(values, codes, pool=pool)))
    return Entry(ours, _opponents(draw, runs, contestant))


def _opponents(
    draw: Draw, runs: dict[str, Callable[[], Tensor]], contestant: Callable[[Callable[[], Tensor]], Contestant]
) -> dict[str, Callable[[], Contestant]]:
    found = {name: (lambda run=run: contestant(run)) for name, run in runs.items()}
    if draw.compiled:
        found |= {f"{name}, compiled": (lambda run=run: contestant(called(draw, run))) for name, run in runs.items()}
    return found


def backward(draw: Draw) -> Entry:
    """The gradient of the values, dense [C, K, V], given that of what ``gather`` returns."""
    B, S, C, K, V, pool = draw.B, draw.S, draw.C, draw.K, draw.V, draw.pool
    codes = codes_of(draw)
    grad = random(4, *((B, S, C, V) if pool == "none" else (B, S, V))).to(draw.torch_dtype)
    every = grad if pool == "none" else grad[:, :, None].expand(B, S, C, V)
    share = C if pool == "mean" else 1

    def check(found: Tensor) -> None:
        verify.sums(every.double() / share, codes, found, books=VERIFIED)

    def contestant(run: Callable[[], Tensor]) -> Contestant:
        return Contestant(run, check)

    def rows() -> Tensor:
        exact = _exact(grad) / share if share > 1 else _exact(grad)
        return (exact if pool == "none" else exact[:, :, None].expand(B, S, C, V)).reshape(-1, V)

    def finished(table: Tensor) -> Tensor:
        return table.view(C, K, V).to(grad.dtype)

    def empty() -> Tensor:
        return torch.zeros(C * K, V, dtype=torch.promote_types(grad.dtype, torch.float32))

    def by_index_add() -> Tensor:
        return finished(empty().index_add_(0, _rows(draw, codes).flatten(), rows()))

    def by_scatter_add() -> Tensor:
        return finished(empty().scatter_add_(0, _rows(draw, codes).view(-1, 1).expand(-1, V), rows()))

    def by_embedding() -> Tensor:
        flat = _rows(draw, codes).flatten()
        return finished(torch.ops.aten.embedding_dense_backward(rows(), flat, C * K, -1, False))

    runs = {"torch index_add": by_index_add, "torch scatter_add": by_scatter_add, "torch embedding": by_embedding}
    opponents = _opponents(draw, runs, contestant)
    opponents["torch autograd"] = lambda: contestant(_by_autograd(draw, codes, grad))
    ours = contestant(called(draw, lambda: torch.ops.kvb.gather_backward(grad, codes, K, pool)))
    return Entry(ours, opponents)


def _by_autograd(draw: Draw, codes: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Of advanced indexing, or of ``embedding_bag`` where values are pooled."""
    exact = _exact(grad)
    with torch.enable_grad():
        values = torch.zeros(draw.C, draw.K, draw.V, dtype=exact.dtype, requires_grad=True)
        if draw.pool == "none":
            out = values[torch.arange(draw.C), codes]
        else:
            flat = _rows(draw, codes).flatten(0, 1)
            out = F.embedding_bag(flat, values.view(-1, draw.V), mode=draw.pool).view(draw.B, draw.S, draw.V)

    def run() -> Tensor:
        (found,) = torch.autograd.grad(out, values, _exact(grad), retain_graph=True)
        return found.to(grad.dtype)

    return run
