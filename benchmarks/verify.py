"""Whether a result is right: judged by ``kvb.reference`` and by float64 arithmetic, never by a fast operator.

Every check raises ``WrongResult`` with numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.timing import WrongResult
from kvb import reference
from kvb.reference.values import cross_entropy

SAMPLE = 64  # positions that are searched again by the reference
UNIT = 2.0**-24  # half a unit in the last place of float32


def _unit(*tensors: Tensor) -> float:
    """Of the arithmetic on these tensors: float64 if one of them is, else float32."""
    return 2.0**-53 if any(one.dtype == torch.float64 for one in tensors) else UNIT


def _stored(exact: Tensor, dtype: torch.dtype) -> Tensor | float:
    """How far rounding to a dtype narrower than the arithmetic moves numbers."""
    kind = torch.finfo(dtype)
    return 0.0 if kind.bits >= 32 else kind.eps / 2 * exact.abs() + kind.smallest_normal * kind.eps


def _require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise WrongResult(message)


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit."""
    same = found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected)
    _require(same, f"{what}: {tuple(found.shape)} {found.dtype} differs from the expected {tuple(expected.shape)}")


def _distances(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries.double() - keys.double()).square().sum(-1)


def same_choice(queries: Tensor, keys: Tensor, found: Tensor, expected: Tensor) -> None:
    """Indices [B, S, C] agree, or differ where two keys are as near as float32 can tell.

    The allowance is that of the search itself: 8 * 2^-24 * (|q - m| + max|k - m|)^2 around the mean key m; 2^-53 in
    float64.
    """
    K = keys.shape[1]
    _require(found.shape == expected.shape, f"indices {tuple(found.shape)}, expected {tuple(expected.shape)}")
    _require(((found >= 0) & (found < K)).all(), f"an index outside of [0, {K})")
    b, s, c = (found != expected).nonzero(as_tuple=True)
    if len(c) == 0:
        return
    q, mean = queries[b, s, c].double(), keys.double().mean(1)
    radius = (keys - mean[:, None]).norm(dim=-1).amax(-1)
    bound = 8 * _unit(queries, keys) * ((q - mean[c]).norm(dim=-1) + radius[c]).square()
    gap = _distances(q, keys[c, found[b, s, c]]) - _distances(q, keys[c, expected[b, s, c]])
    wrong = int((gap.abs() > bound).sum())
    _require(
        wrong == 0,
        f"{wrong} of {found.numel()} chosen keys are not the nearest: off by up to {gap.abs().max():.3g} "
        f"where {bound.max():.3g} is allowed",
    )


def same_ranks(queries: Tensor, keys: Tensor, found: Tensor, expected: Tensor) -> None:
    """The same for several keys of every query, nearest first: indices [B, S, C, T], none of them twice."""
    _require(found.shape == expected.shape, f"indices {tuple(found.shape)}, expected {tuple(expected.shape)}")
    ordered = found.sort(-1).values
    _require((ordered[..., 1:] != ordered[..., :-1]).all(), "a key was found twice for one query")
    for t in range(found.shape[-1]):
        same_choice(queries, keys, found[..., t], expected[..., t])


def share_wrong(queries: Tensor, keys: Tensor, found: Tensor) -> float:
    """The share of indices [B, S, C] whose key is farther than the search's own allowance permits, as above."""
    expected, _ = reference.nearest(queries, keys, reference.pack_keys(keys), None, 1)
    b, s, c = (found != expected[..., 0]).nonzero(as_tuple=True)
    q, mean = queries[b, s, c].double(), keys.double().mean(1)
    radius = (keys.double() - mean[:, None]).norm(dim=-1).amax(-1)
    bound = 8 * UNIT * ((q - mean[c]).norm(dim=-1) + radius[c]).square()
    far, near = (_distances(q, keys[c, which[b, s, c]]) for which in (found.long(), expected[..., 0]))
    return int((far - near > bound).sum()) / max(1, found.numel())


def nearest(queries: Tensor, keys: Tensor, indices: Tensor, distances: Tensor) -> None:
    """The nearest keys [B, S, C] or [B, S, C, T]: all distances, and on some positions the choice of the reference."""
    _require(((indices >= 0) & (indices < keys.shape[1])).all(), f"an index outside of [0, {keys.shape[1]})")
    ranked = indices.view(*queries.shape[:3], -1)
    for index, distance in zip(ranked.unbind(-1), distances.view(ranked.shape).unbind(-1), strict=True):
        exact = _distances(queries, keys[torch.arange(len(keys)), index])
        error = ((distance - exact).abs() - (queries.shape[-1] + 4) * _unit(queries, keys) * exact).max()
        _require(error <= 0, f"a distance is off by {error:.3g} more than rounding explains")
    sampled_choice(queries, keys, indices)


def several_nearest(queries: Tensor, keys: Tensor, indices: Tensor, distances: Tensor) -> None:
    """The T nearest keys [B, S, C, T]: every distance, and on a sample of positions every rank of the reference."""
    chosen = keys[torch.arange(len(keys))[:, None], indices]
    exact = _distances(queries[..., None, :], chosen)
    error = ((distances - exact).abs() - (queries.shape[-1] + 4) * UNIT * exact).max()
    _require(error <= 0, f"a distance is off by {error:.3g} more than rounding explains")
    sample = torch.linspace(0, len(queries) - 1, min(SAMPLE, len(queries))).long()
    some = queries[sample]
    expected, _ = reference.nearest(some, keys, reference.pack_keys(keys), None, indices.shape[-1])
    for rank in range(indices.shape[-1]):
        same_choice(some, keys, indices[sample][..., rank], expected[..., rank])


def sampled_choice(queries: Tensor, keys: Tensor, indices: Tensor) -> None:
    """On a sample of positions, indices [B, S, C] or [B, S, C, T] are the choice of the reference."""
    B, S = queries.shape[:2]
    indices = indices.view(*queries.shape[:3], -1)
    sample = torch.linspace(0, B * S - 1, min(SAMPLE, B * S)).long()
    b, s = sample // S, sample % S
    few = queries[b, s][:, None]
    expected, _ = reference.nearest(few, keys, reference.pack_keys(keys), None, indices.shape[-1])
    same_ranks(few, keys, indices[b, s][:, None], expected)


def fetched(values: Tensor, indices: Tensor, out: Tensor, pool: str, layout: str) -> None:
    """``gather``: fetched values bit for bit, pooled ones within the rounding of their sums."""
    expected = reference.gather(values, indices, pool, layout)
    if pool == "none":
        equal(out, expected, "fetched values")
        return
    C = indices.shape[2]
    exact = reference.gather(values.double(), indices, pool, layout)
    largest = reference.gather(values.double().abs(), indices, pool, layout)
    _require(out.shape == exact.shape, f"pooled values {tuple(out.shape)}, expected {tuple(exact.shape)}")
    allowed = 2 * C * _unit(values) * largest + _stored(exact, values.dtype)
    _require(((out - exact).abs() <= allowed).all(), "pooled values are off by more than rounding")


def voted(values: Tensor, indices: Tensor, out: Tensor) -> None:
    """out [B, V] is the mean value that indices [B, S, C] fetch, within the rounding of the sum."""
    exact, largest = (
        reference.gather(v, indices, "mean", "bscv").mean(1) for v in (values.double(), values.double().abs())
    )
    _require(out.shape == exact.shape, f"votes {tuple(out.shape)}, expected {tuple(exact.shape)}")
    allowed = 2 * indices.shape[1] * indices.shape[2] * UNIT * largest
    _require(((out - exact).abs() <= allowed).all(), "votes are off by more than rounding")


def sums(rows: Tensor, indices: Tensor, found: Tensor, hits: Tensor | None = None, books: int | None = None) -> None:
    """found [C, K, V] adds up the rows [B, S, C, V] that indices [B, S, C] send to every pair.

    Any order of float32 additions passes: n numbers may be off by n * 2^-24 times the sum of their sizes, and the sum
    is then rounded to its dtype. ``books`` limits the check to the first codebooks.
    """
    C, K, V = found.shape
    for c in range(C if books is None else min(books, C)):
        row, index = rows[:, :, c].reshape(-1, V).double(), indices[:, :, c].flatten()
        number = torch.bincount(index, minlength=K)
        if hits is not None:
            equal(hits[c], number, f"hits of codebook {c}")
        exact = torch.zeros(K, V, dtype=torch.float64).index_add_(0, index, row)
        size = torch.zeros(K, V, dtype=torch.float64).index_add_(0, index, row.abs_())
        off = (found[c] - exact).abs() > number[:, None] * _unit(found) * size + _stored(exact, found.dtype)
        _require(not off.any(), f"{int(off.sum())} of {K * V} sums of codebook {c} are off by more than rounding")


def trained(start: Tensor, codes: Tensor, targets: Tensor, values: Tensor, loss: Tensor) -> None:
    """values [C, K, V] are what a step of the paper's recipe on codes [B, (S), C] makes of ``start``, with its loss.

    The step is that of ``kvb.training.sgd_step`` with its defaults, in float64 here. A row may be off by the rounding
    of its number and of the gradients that meet in it, one by one, and may cancel; one that no code names not at all.
    """
    exact, codes = start.double(), codes.view(len(codes), -1, len(start))
    want, _, logits = reference.sgd_step_(exact, codes, targets, 0.3, 1.0, 0.1)
    _require(abs(float(loss) - float(want)) <= 64 * UNIT * float(want), f"loss {float(loss):.7g}, expected {want:.7g}")
    _, grad = cross_entropy(logits, targets, 0.1)
    each = (grad.abs() / codes.shape[1])[:, None].expand(-1, codes.shape[1], -1)
    addends = reference.gather_backward(each, codes, start.shape[1], "mean")
    fetches = reference.gather_backward(torch.ones_like(each[..., :1]), codes, start.shape[1], "sum")
    moved, size = (exact - start).abs(), start.double().abs()
    off = (values - exact).abs() > 2 * UNIT * (size + moved) + UNIT * (64 * moved + (64 + fetches) * 0.3 * addends)
    _require(not off.any(), f"{int(off.sum())} of {off.numel()} values are off by more than rounding")
