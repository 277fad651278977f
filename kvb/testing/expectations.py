"""What results have to be, in float64 on the CPU, and by how much they may be off."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvb.testing.cases import Problem

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


class Wrong(Exception):
    """A result that breaks the contract; the message says how."""


def require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise Wrong(message)


def require_like(name: str, found: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU, once its shape and dtype are right."""
    require(
        tuple(found.shape) == tuple(shape) and found.dtype == dtype,
        f"expected {name} {dtype} {tuple(shape)}, got {found.dtype} {tuple(found.shape)}",
    )
    return found.cpu()


def require_close(name: str, found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    # Negated, so that NaN fails.
    wrong = ~((found.double() - exact).abs() <= allowed) & ~(found.double() == exact)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise Wrong(
            f"{int(wrong.sum())} of {wrong.numel()} {name} are off by more than rounding; at {place} expected "
            f"{exact[place]:.9g}, got {found.double()[place]:.9g}"
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Exact:
    """What a search has to find, on the CPU."""

    distances: Tensor  # [B, S, C, K] float64; +inf for pairs that may not be fetched
    bound: Tensor  # [B, S, C] by how much a chosen key may be farther than the best
    finite: Tensor  # [B, S, C] whether the query is
    twins: Tensor  # [C, K] the first usable key that equals this one
    unit: float  # rounding of a returned distance


@functools.cache
def exact(problem: Problem) -> Exact:
    queries, keys = problem.queries.cpu().double(), problem.keys.cpu().double()
    usable = keys.isfinite().all(-1)
    mean = torch.where(usable[..., None], keys, 0).sum(1) / usable.sum(1).clamp(min=1)[:, None]
    radius = torch.where(usable, (keys - mean[:, None]).norm(dim=-1), 0).amax(1)
    usable = usable if problem.mask is None else usable & problem.mask.cpu()
    distances = torch.stack([(queries[:, :, c, None] - keys[c]).square().sum(-1) for c in range(problem.case.C)], dim=2)
    distances = torch.where(usable, distances, torch.inf)
    unit = UNIT[accumulator(torch.promote_types(problem.queries.dtype, problem.keys.dtype))]
    bound = 8 * unit * ((queries - mean).norm(dim=-1) + radius).square()
    twins = torch.stack([_first_equal(book, ok) for book, ok in zip(keys, usable, strict=True)])
    return Exact(distances, bound, queries.isfinite().all(-1), twins, unit)


def _first_equal(keys: Tensor, usable: Tensor) -> Tensor:
    """For every one of the keys [K, D], the lowest index of a usable key that equals it."""
    _, kind = keys.unique(dim=0, return_inverse=True)
    index = torch.where(usable, torch.arange(len(keys)), len(keys))
    return index.scatter_reduce(0, kind, index, "amin", include_self=False)[kind]


def judge_search(problem: Problem, indices: Tensor, distances: Tensor, T: int) -> None:
    """Indices and distances [B, S, C, T]."""
    case, want = problem.case, exact(problem)
    shape = (case.B, case.S, case.C, T)
    dtype = accumulator(torch.promote_types(problem.queries.dtype, problem.keys.dtype))
    indices = require_like("indices", indices, shape, torch.int64)
    distances = require_like("distances", distances, shape, dtype).double()
    require(((indices >= 0) & (indices < case.K)).all(), f"an index outside of [0, {case.K})")
    ordered = indices.sort(-1).values
    require((ordered[..., 1:] != ordered[..., :-1]).all(), "an index stands twice among the nearest of one query")

    first = torch.arange(T).expand(shape)
    bad = ~want.finite
    require(torch.equal(indices[bad], first[bad]), "expected indices 0, 1, ... for a query that is not finite")
    require(distances[bad].isnan().all(), "expected distance NaN for a query that is not finite")

    good, wanted = want.finite, want.distances.sort(dim=-1, stable=True)
    chosen = want.distances.gather(-1, indices)[good]
    best, returned = wanted.values[..., :T][good], distances[good]
    missing = best == torch.inf
    require((chosen[missing] == torch.inf).all(), "expected an unusable pair where no usable one is left")
    fill = _fill(wanted.indices[..., :T][good], missing)
    require(torch.equal(indices[good][missing], fill[missing]), "expected the lowest unused indices as a filling")
    require((returned[missing] == torch.inf).all(), "expected distance +inf where no usable pair is left")
    require((chosen[~missing] < torch.inf).all(), "a pair was chosen that is masked or not finite")

    bound = (want.bound[good][:, None] + (case.D + 4) * UNIT[torch.float64] * best).expand_as(best)
    worse = (chosen - best)[~missing] - bound[~missing]
    require(
        (worse <= 0).all(),
        f"{int((~(worse <= 0)).sum())} of {worse.numel()} chosen keys are farther than the nearest by more than the "
        f"bound, 8 units in the last place of (|q - m| + max|k - m|)^2",
    )
    rounding = (case.D + 4) * want.unit * chosen + torch.finfo(dtype).tiny
    require_close("distances", returned[~missing], chosen[~missing], rounding[~missing])
    if T == 1:
        twins = torch.stack([want.twins[c, indices[:, :, c, 0]] for c in range(case.C)], dim=2)[..., None][good]
        same = torch.equal(indices[good][~missing], twins[~missing])
        require(same, "a key was chosen although an equal one stands at a lower index")
    if case.data == "lattice":
        require(torch.equal(indices, wanted.indices[..., :T]), "expected the lowest indices among exact ties")


def _fill(wanted: Tensor, missing: Tensor) -> Tensor:
    """Where ``missing`` [rows, T], the lowest index that stands nowhere before in its row."""
    filled = wanted.clone()
    for t in range(wanted.shape[1]):
        options = torch.arange(t + 1)
        unused = (options[:, None] != filled[:, None, :t]).all(-1).to(torch.uint8).argmax(-1)
        filled[:, t] = torch.where(missing[:, t], unused, filled[:, t])
    return filled


def table_rows(indices: Tensor, K: int) -> Tensor:
    """Rows of a [C*K, ...] table, on the CPU."""
    return indices.cpu().long() + torch.arange(indices.shape[2]) * K


def judge_gather(problem: Problem, indices: Tensor, out: Tensor, pool: str, layout: str) -> None:
    case, values = problem.case, problem.values.cpu()
    fetched = values.reshape(-1, case.V)[table_rows(indices, case.K)]
    if pool == "none":
        fetched = fetched if layout == "bscv" else fetched.transpose(1, 2)
        out = require_like("values", out, fetched.shape, values.dtype)
        require(torch.equal(out, fetched), f"{int((out != fetched).sum())} of {out.numel()} fetched values differ")
        return
    axes = (1, 2) if layout == "bv" else (2,)
    count = math.prod(fetched.shape[axis] for axis in axes)
    if count == 0 and pool == "mean":
        require(out.shape == (case.B, case.V) and bool(out.isnan().all()), "expected means over no position of NaN")
        return
    divisor = count if pool == "mean" else 1
    exact, size = fetched.double().sum(axes) / divisor, fetched.double().abs().sum(axes) / divisor
    allowed = 2 * count * UNIT[accumulator(values.dtype)] * size + 2 * UNIT[values.dtype] * exact.abs()
    allowed += torch.finfo(values.dtype).tiny
    require_close("pooled values", require_like("values", out, exact.shape, values.dtype), exact, allowed)


class SumOfRows:
    """Rows added up by index, in float64, and by how much any order of additions may be off.

    Let u be the rounding of the type that sums are computed in (``UNIT``). However n numbers are added, n - 1 additions
    round partial sums, none of them larger than s = sum|x|, by at most u of themselves: (n - 1) * u * s (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.2). Twice that, because the float64 sum here is no better
    than a float64 result, and because matrix units truncate to 2u where others round. ``mean`` may multiply by 1/C:
    2 * u * s more, so 2 * n * u * s in all. Rounding to the type of the result comes last.
    """

    def __init__(self, problem: Problem, rows: Tensor, dtype: torch.dtype) -> None:
        case, width, rows = problem.case, rows.shape[-1], rows.cpu().double()
        flat = table_rows(problem.indices, case.K).flatten()
        empty = torch.zeros(case.C * case.K, width, dtype=torch.float64)
        self.exact: Tensor = empty.index_add(0, flat, rows.reshape(-1, width)).view(case.C, case.K, width)
        size = empty.index_add(0, flat, rows.abs().reshape(-1, width)).view_as(self.exact)
        hits = torch.bincount(flat, minlength=case.C * case.K).view(case.C, case.K, 1)
        self.allowed: Tensor = 2 * hits * UNIT[accumulator(dtype)] * size
        self.allowed += UNIT[dtype] * self.exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        self.dtype = dtype

    def judge(self, name: str, found: Tensor) -> None:
        require_close(name, require_like(name, found, self.exact.shape, self.dtype), self.exact, self.allowed)


def gradient_sum(problem: Problem, pool: str) -> SumOfRows:
    case, grad = problem.case, problem.grads[pool]
    rows = grad if pool == "none" else grad[:, :, None].expand(-1, -1, case.C, -1)
    rows = rows.double() / (case.C if pool == "mean" else 1)
    return SumOfRows(problem, rows, grad.dtype)
