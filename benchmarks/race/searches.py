"""``nearest`` and whole forwards, against matrix products, ``cdist`` and faiss.

Plain PyTorch multiplies float16 and bfloat16 as float32: products in either would find other keys. Without packed keys,
norms of keys and indices of faiss belong to the call, with them they were made before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kvb
from benchmarks import verify
from benchmarks.peers import plain
from benchmarks.peers.faiss import FaissSearch
from benchmarks.race.draws import Draw
from benchmarks.race.entry import Entry, called
from benchmarks.suites.case import random
from benchmarks.timing import Absent, Contestant
from kvb import functional

MOST_DISTANCES = 1 << 28  # that a formula may hold at once: 1 GB
# Takes queries [B, S, C, D] and keys [C, K, D], or None for those of before, to indices [B, S, C, T].
Find = Callable[[Tensor, Tensor | None], Tensor]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_book(queries: Tensor) -> Tensor:
    """[C, N, D]"""
    return _wide(queries).flatten(0, 1).transpose(0, 1)


def _ranked(scores: Tensor, draw: Draw) -> Tensor:
    """The least scores [C, N, K] as indices [B, S, C, T]."""
    found = scores.argmin(-1, keepdim=True) if draw.T == 1 else scores.topk(draw.T, largest=False).indices
    return found.view(draw.C, draw.B, draw.S, draw.T).movedim(0, 2)


def _require_few(draw: Draw, what: str) -> None:
    if draw.N * draw.C * draw.K > MOST_DISTANCES:
        raise Absent(f"{what} would hold {draw.N * draw.C * draw.K:.3g} distances")


def _cdist(draw: Draw, queries: Tensor, keys: Tensor) -> Find:
    _require_few(draw, "cdist")
    before = _wide(keys)

    def find(queries: Tensor, keys: Tensor | None) -> Tensor:
        return _ranked(torch.cdist(_by_book(queries), before if keys is None else _wide(keys)), draw)

    return find


def _whole(draw: Draw, queries: Tensor, keys: Tensor) -> Find:
    """All scores by one ``baddbmm``, or ``addmm`` for one codebook."""
    _require_few(draw, "baddbmm")

    def prepared(keys: Tensor) -> tuple[Tensor, Tensor]:
        wide = _wide(keys)
        return wide.square().sum(-1)[:, None] / 2, wide.transpose(1, 2)

    before = prepared(keys)

    def find(queries: Tensor, keys: Tensor | None) -> Tensor:
        halves, columns = before if keys is None else prepared(keys)
        if draw.C == 1:
            rows = _wide(queries).view(draw.N, draw.D)
            return _ranked(torch.addmm(halves[0], rows, columns[0], alpha=-1)[None], draw)
        return _ranked(torch.baddbmm(halves, _by_book(queries), columns, alpha=-1), draw)

    return find


def _chunks(draw: Draw, queries: Tensor, keys: Tensor) -> Find:
    finder = plain.chunked(_wide(queries), _wide(keys), draw.ranks)

    def find(queries: Tensor, keys: Tensor | None) -> Tensor:
        if keys is not None:
            finder.update(_wide(keys))
        return finder(_wide(queries)).view(draw.B, draw.S, draw.C, draw.T)

    return find


def _faiss(draw: Draw, queries: Tensor, keys: Tensor) -> Find:
    """In the better of its two modes, queries contiguous and in float32 before the call."""
    if draw.dtype == "float64":
        raise Absent("faiss has no float64")
    finder = FaissSearch(_wide(queries), _wide(keys), draw.T)

    def find(queries: Tensor, keys: Tensor | None) -> Tensor:
        if keys is not None:
            finder.update(_wide(keys))
        return finder().view(draw.C, draw.B, draw.S, draw.T).movedim(0, 2)

    return find


FINDERS: dict[str, Callable[[Draw, Tensor, Tensor], Find]] = {
    "torch.cdist": _cdist,
    "torch baddbmm": _whole,
    "torch baddbmm, chunks": _chunks,
    "faiss": _faiss,
}
COMPILED = ("torch baddbmm", "torch.cdist")


def _opponents(
    draw: Draw, prepare: Callable[[Find, Callable[..., Any]], Contestant], queries: Tensor, keys: Tensor
) -> Mapping[str, Callable[[], Contestant]]:
    """Each finder as a contestant; those of plain PyTorch also compiled, where kvb is."""

    def contestant(finder: str, wrap: Callable[..., Any]) -> Contestant:
        return prepare(FINDERS[finder](draw, queries, keys), wrap)

    found = {name: functools.partial(contestant, name, lambda run: run) for name in FINDERS}
    if draw.compiled:
        wrap = functools.partial(called, draw)
        found |= {f"{name}, compiled": functools.partial(contestant, name, wrap) for name in COMPILED}
    return found


def _data(draw: Draw) -> tuple[Tensor, Tensor]:
    """Heads [B, C, S, D] and keys [C, K, D]."""
    heads = random(0, draw.B, draw.C, draw.S, draw.D).to(draw.torch_dtype)
    return heads, random(1, draw.C, draw.K, draw.D).to(draw.torch_dtype)


def search(draw: Draw) -> Entry:
    """The nearest keys: indices; kvb's distances, too."""
    heads, keys = _data(draw)
    queries = heads.transpose(1, 2).contiguous()
    packed = functional.pack_keys(keys) if draw.packed else None
    expected = functional.nearest(queries, keys, topk=draw.T)[0].view(draw.B, draw.S, draw.C, draw.T)
    ours = Contestant(
        called(draw, lambda: functional.nearest(queries, keys, packed=packed, topk=draw.T)),
        lambda found: verify.nearest(queries, keys, *found),
    )
    given = None if draw.packed else keys

    def prepare(find: Find, wrap: Callable[..., Any]) -> Contestant:
        run = wrap(lambda: find(queries, given))
        return Contestant(run, lambda found: verify.same_ranks(queries, keys, found, expected))

    return Entry(ours, _opponents(draw, prepare, queries, keys))


def _fetch(values: Tensor, indices: Tensor) -> Tensor:
    """Values [C, K, V] at indices [B, M, C] in their order: one ``index_select``."""
    C, K, V = values.shape
    flat = (indices + torch.arange(C) * K).flatten()
    return values.view(C * K, V).index_select(0, flat).view(*indices.shape, V)


def forward(draw: Draw) -> Entry:
    """Packed: a frozen module, heads to values [B, C, (T), S, V]; else ``lookup``, queries to values [B, S, C, V]."""
    return _module(draw) if draw.packed else _lookup(draw)


def _lookup(draw: Draw) -> Entry:
    heads, keys = _data(draw)
    values = random(2, draw.C, draw.K, draw.V).to(draw.torch_dtype)
    queries = heads.transpose(1, 2).contiguous()

    def check(result: tuple[Tensor, Tensor]) -> None:
        out, found = result
        verify.fetched(values, found, out, "none", "bscv")

    def check_ours(result: tuple[Tensor, Tensor]) -> None:
        check(result)
        verify.sampled_choice(queries, keys, result[1])

    def prepare(find: Find, wrap: Callable[..., Any]) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            found = find(queries, keys)[..., 0]
            return _fetch(values, found), found

        def check_theirs(result: tuple[Tensor, Tensor]) -> None:
            check(result)
            verify.same_choice(queries, keys, result[1], expected)

        return Contestant(wrap(run), check_theirs)

    run = called(draw, lambda: functional.lookup(queries, keys, values))
    expected = functional.nearest(queries, keys)[0]
    return Entry(Contestant(run, check_ours), _opponents(draw, prepare, queries, keys))


def _module(draw: Draw) -> Entry:
    B, S, C, T = draw.B, draw.S, draw.C, draw.T
    heads, keys = _data(draw)
    module = kvb.KeyValueBottleneck(C, draw.K, draw.D, draw.V, topk=T).to(draw.torch_dtype)
    module = module.eval().freeze_keys().requires_grad_(False)
    module.keys.copy_(keys)
    module.values.data.copy_(random(2, C, draw.K, draw.V))
    values, queries = module.values.data, heads.transpose(1, 2)
    x = heads if S > 1 else heads[:, :, 0]
    expected = module.encode(x).view(B, C, T, S).permute(0, 3, 1, 2)

    def fetched(out: Tensor, found: Tensor) -> None:
        """out [B, C, (T), S, V] is what indices [B, S, C, T] name."""
        flat = found.permute(0, 3, 1, 2).reshape(B, T * S, C)
        verify.fetched(values, flat, out.view(B, C, T * S, draw.V), "none", "bcsv")

    def check_ours(out: Tensor) -> None:
        verify.sampled_choice(queries, keys, expected.contiguous())
        fetched(out, expected)

    def prepare(find: Find, wrap: Callable[..., Any]) -> Contestant:
        first = (torch.arange(C) * draw.K)[:, None, None]

        def run() -> tuple[Tensor, Tensor]:
            found = find(queries, None)
            flat = (found.permute(0, 2, 3, 1) + first).flatten()
            return values.view(C * draw.K, draw.V).index_select(0, flat).view(B, C, T, S, draw.V), found

        def check(result: tuple[Tensor, Tensor]) -> None:
            verify.same_ranks(queries, keys, result[1], expected)
            fetched(*result)

        return Contestant(wrap(run), check)

    run = called(draw, module)
    return Entry(Contestant(lambda: run(x), check_ours), _opponents(draw, prepare, queries, keys))
