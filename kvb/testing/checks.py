"""One check per operator: it runs a backend's operator on a problem, and raises ``Wrong`` if the contract is broken."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvb import ops
from kvb.reference.values import LAYOUTS, POOLS
from kvb.testing.cases import Problem
from kvb.testing.expectations import (
    UNIT,
    SumOfRows,
    accumulator,
    exact,
    gradient_sum,
    judge_gather,
    judge_search,
    require,
    require_close,
    require_like,
    table_rows,
)
from kvb.testing.memory_checks import check_gather_dot as check_gather_dot
from kvb.testing.memory_checks import check_gather_weighted as check_gather_weighted
from kvb.testing.memory_checks import check_product_nearest as check_product_nearest
from kvb.testing.memory_checks import check_scatter_weighted_rows as check_scatter_weighted_rows


@dataclasses.dataclass(frozen=True)
class Backend:
    """What is checked: anything with operators of ``kvb.ops.NAMES`` as attributes; a missing one is not checked."""

    name: str
    device: torch.device
    operators: Any


def check_pack_keys(op: Any, problem: Problem) -> None:
    packed, again = op.pack_keys(problem.keys), op.pack_keys(problem.keys)
    require_like("packed keys", packed, (problem.case.C, packed.shape[-1]), torch.uint8)
    require(torch.equal(packed, again), "packing the same keys twice gives different bytes")


def check_packed_matches(op: Any, problem: Problem) -> None:
    keys = problem.keys
    packed = op.pack_keys(keys)
    answer = op.packed_matches(keys, packed)
    require_like("the answer", answer, (), torch.bool)
    require(bool(answer), "packed keys do not match the keys that they were made of")
    if keys.numel():
        other = keys.clone()
        other[-1, -1] = (other[-1, -1] == 0).to(other.dtype)
        require(not bool(op.packed_matches(other, packed)), "packed keys match keys of which one changed")


def check_nearest(op: Any, problem: Problem) -> None:
    T = problem.case.T
    packed = op.pack_keys(problem.keys)
    indices, distances = op.nearest(problem.queries, problem.keys, packed, problem.mask, T)
    judge_search(problem, indices, distances, T)


def check_sample(op: Any, problem: Problem) -> None:
    """So cold that only the nearest is drawn, where distances differ by more than a thousandth."""
    queries, keys, mask, case = problem.queries, problem.keys, problem.mask, problem.case
    seed = torch.tensor(7)
    indices, distances = op.sample(queries, keys, mask, 1e-5, seed)
    again, _ = op.sample(queries, keys, mask, 1e-5, seed)
    require(torch.equal(indices, again), "the same seed gives different indices")
    several = require_like(
        "drawn indices",
        op.sample(queries, keys, mask, 1e-5, seed, case.T)[0],
        (case.B, case.S, case.C, case.T),
        torch.int64,
    )
    require(torch.equal(several[..., :1], indices.cpu()), "the first of several draws differs from one draw")
    ordered = several.sort(-1).values
    require((ordered[..., 1:] != ordered[..., :-1]).all(), "a key was drawn twice")
    shape, want = (case.B, case.S, case.C, 1), exact(problem)
    indices = require_like("indices", indices, shape, torch.int64)
    require(((indices >= 0) & (indices < case.K)).all(), f"an index outside of [0, {case.K})")
    require((indices[~want.finite] == 0).all(), "expected index 0 for a query that is not finite")
    require(distances.cpu()[~want.finite].isnan().all(), "expected distance NaN for a query that is not finite")
    chosen, best = want.distances.gather(-1, indices)[..., 0], want.distances.amin(-1)
    judged = want.finite & (best < torch.inf)
    # Scores are off by the rounding of the filter, draws by a few temperatures.
    slack = 1e-3 + 1e3 * want.bound
    require((chosen[judged] <= (best + slack)[judged]).all(), "a far key was drawn at a temperature of 1e-5")
    rounding = (case.D + 4) * want.unit * chosen[judged] + torch.finfo(distances.dtype).tiny
    require_close("distances", distances.cpu()[..., 0][judged], chosen[judged], rounding)


def check_gather(op: Any, problem: Problem) -> None:
    for pool in POOLS:
        for layout in LAYOUTS:
            out = op.gather(problem.values, problem.indices, pool, layout)
            judge_gather(problem, problem.indices, out, pool, layout)
        if pool != "none":
            judge_gather(problem, problem.indices, op.gather(problem.values, problem.indices, pool, "bv"), pool, "bv")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def check_gather_backward(op: Any, problem: Problem) -> None:
    for pool, grad in problem.grads.items():
        want = gradient_sum(problem, pool)
        want.judge(f"gradients (pool={pool!r})", op.gather_backward(grad, problem.indices, problem.case.K, pool))
        with _deterministic():
            one, two = (op.gather_backward(grad, problem.indices, problem.case.K, pool) for _ in range(2))
        want.judge(f"deterministic gradients (pool={pool!r})", one)
        require(torch.equal(one, two), "two deterministic gradients differ")


def check_gather_backward_rows(op: Any, problem: Problem) -> None:
    case = problem.case
    M = min(case.B * case.S * case.C, case.C * case.K)
    touched = table_rows(problem.indices, case.K).unique()
    for pool, grad in problem.grads.items():
        rows, grads, number = op.gather_backward_rows(grad, problem.indices, case.K, pool)
        rows = require_like("rows", rows, (M,), torch.int64)
        grads = require_like("gradients", grads, (M, case.V), grad.dtype)
        n = int(require_like("the number of rows", number, (1,), torch.int64))
        require(n == len(touched), f"expected {len(touched)} rows, got {n}")
        require(torch.equal(rows[:n], touched), "expected the touched rows, ascending")
        require((rows[n:] == -1).all() and (grads[n:] == 0).all(), "expected rows -1 and gradients 0 in the tail")
        dense = grads.new_zeros(case.C * case.K, case.V).index_copy(0, rows[:n], grads[:n])
        gradient_sum(problem, pool).judge(f"gradients (pool={pool!r})", dense.view(case.C, case.K, case.V))


def check_sgd_step_(op: Any, problem: Problem) -> None:
    """What follows from the logits is judged by those that were returned, so that their rounding counts once."""
    case, values = problem.case, problem.values.clone()
    (B, S, C), V, lr, max_norm, smoothing = problem.indices.shape, case.V, 0.5, 0.02, 0.1
    targets = torch.arange(B, device=values.device) % V
    loss, norm, logits = op.sgd_step_(values, problem.indices, targets, lr, max_norm, smoothing)
    dtype = accumulator(values.dtype)
    loss = require_like("the loss", loss, (), dtype)
    norm = require_like("the norm", norm, (), dtype)
    logits = require_like("logits", logits, (B, V), dtype).double()
    values, before = require_like("values", values, problem.values.shape, problem.values.dtype), problem.values.cpu()
    if B * S == 0:
        require(loss.isnan(), "expected loss NaN for an empty batch")
        require(torch.equal(values, before), "expected that an empty batch moves nothing")
        return

    rows, unit = table_rows(problem.indices, case.K), UNIT[dtype]
    fetched = before.double().view(-1, V)[rows]
    mean, size = fetched.mean((1, 2)), fetched.abs().mean((1, 2))
    require_close("logits", logits, mean, (2 * (C + S) * unit + 2 * UNIT[values.dtype]) * size)

    shares, fit = logits.log_softmax(-1), torch.full_like(logits, smoothing / V)
    fit[torch.arange(B), targets.cpu()] += 1 - smoothing
    slack = (16 + V) * unit
    require_close("losses", loss, -(fit * shares).sum(-1).mean(), slack * (1 + shares.abs().max()))

    def total(each: Tensor) -> Tensor:
        """Of all positions, [C * K, *], where each sample gives the same to all that it fetches."""
        out = torch.zeros(C * case.K, each.shape[1], dtype=torch.float64)
        return out.index_add(0, rows.flatten(), each[:, None, None].expand(B, S, C, -1).reshape(B * S * C, -1))

    grad, fetches = total((shares.exp() - fit) / (B * S * C)), total(torch.ones(B, 1, dtype=torch.float64))
    off = (slack + 2 * unit * fetches) * total((shares.exp() + fit) / (B * S * C))
    require_close("norms", norm, grad.norm(), off.norm() + 4 * unit * grad.norm())
    step = lr * min(1.0, max_norm / (float(grad.norm()) + 1e-6))
    moved = before.double() - step * grad.view_as(before)
    off += (off.norm() / (grad.norm() + 1e-6) + 4 * unit) * grad.abs()
    allowed = step * off.view_as(before) + 2 * UNIT[values.dtype] * (moved.abs() + before.double().abs())
    touched = fetches.view(C, case.K, 1) > 0
    require_close("values", values, torch.where(touched, moved, before.double()), torch.where(touched, allowed, 0))


def _rows(problem: Problem) -> list[Tensor]:
    """Rows in the order of the batch, in ascending order without repetition, one more than once, and none."""
    fetched = table_rows(problem.indices, problem.case.K).flatten()
    ascending = fetched.unique()
    rows = [fetched, ascending, torch.cat([ascending, ascending[-1:]]), ascending.flip(0), fetched[:0]]
    return [each.to(problem.indices.device) for each in rows]


def check_rows_to_places(op: Any, problem: Problem) -> None:
    K = problem.case.K
    for rows in _rows(problem):
        want = torch.stack([rows.cpu() // K, rows.cpu() % K])
        found = require_like("places", op.rows_to_places(rows, K), want.shape, torch.int64)
        require(torch.equal(found, want), f"{int((found != want).sum())} of {found.numel()} numbers are wrong")


def check_places_to_rows(op: Any, problem: Problem) -> None:
    K = problem.case.K
    for rows in _rows(problem):
        places, want = torch.stack([rows // K, rows % K]), rows.cpu()
        found, ascending = op.places_to_rows(places, K)
        found = require_like("rows", found, want.shape, torch.int64)
        require(torch.equal(found, want), f"{int((found != want).sum())} of {found.numel()} rows are wrong")
        ordered = torch.equal(want, want.unique())
        found = require_like("whether the rows ascend", ascending, (), torch.bool)
        require(bool(found) == ordered, f"expected {ordered} where rows ascend, got {bool(found)}")


def check_move_rows_(op: Any, problem: Problem) -> None:
    """To the last bit: each row once, the product rounded, then the difference."""
    for values in (problem.values, problem.values * 3):
        K, flat = problem.case.K, values.flatten(0, 1).contiguous().clone()
        rows = table_rows(problem.indices, K).unique().to(flat.device)
        grads, step = flat.index_select(0, rows).flip(-1), 0.3
        want = flat.index_copy(0, rows, flat.index_select(0, rows) - grads * step).cpu()
        for table, places in ((flat.clone(), rows[None]), (flat.view_as(values), torch.stack([rows // K, rows % K]))):
            op.move_rows_(table, places, grads, step)
            found = require_like("values", table, table.shape, want.dtype).view_as(want)
            same = (found == want) | (found.isnan() & want.isnan())
            require(bool(same.all()), f"{int((~same).sum())} of {found.numel()} values are wrong")


def check_clip_rows_(op: Any, problem: Problem) -> None:
    """Only rows in order are scaled: to a norm below theirs and to one above."""
    K, dtype = problem.case.K, accumulator(problem.values.dtype)
    for rows in _rows(problem):
        places = torch.stack([rows // K, rows % K])
        before = problem.values.flatten(0, 1).index_select(0, rows)
        norm, ordered = before.cpu().double().norm(), torch.equal(rows, rows.unique())
        allowed = (4 + before.numel() ** 0.5) * UNIT[dtype] * norm
        for max_norm in (float(norm) / 3, float(norm) * 3):
            grads = before.clone()
            found, ascending = op.clip_rows_(grads, places, max_norm)
            require_close("norms", require_like("the norm", found, (), dtype), norm, allowed)
            found = require_like("whether places ascend", ascending, (), torch.bool)
            require(bool(found) == ordered, f"expected {ordered} where places ascend, got {bool(found)}")
            share = max_norm / (norm + 1e-6)
            want = before.cpu().double() * (1.0 if share >= 1 or not ordered else share)
            grads, unit = require_like("grads", grads, want.shape, before.dtype), UNIT[before.dtype]
            slack = (2 * unit + allowed / (norm + 1e-6)) * want.abs() if ordered else torch.zeros_like(want)
            require_close("clipped rows", grads, want, slack)


def check_tally_(op: Any, problem: Problem) -> None:
    """Integers exactly, with and without weights, and back to where they were; floats that are whole numbers, too."""
    case, device = problem.case, problem.indices.device
    B, S, C = problem.indices.shape
    targets, weight = (torch.arange(B) * 7) % case.V, (torch.arange(B * S * C) % 5).view(B, S, C)
    places = (table_rows(problem.indices, case.K) * case.V + targets[:, None, None]).flatten()
    before = torch.arange(C * case.K * case.V) % 11
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
        for given in (None, weight.to(device, dtype), (torch.arange(S) + 1).to(device, dtype)[:, None].expand(B, S, C)):
            added = torch.ones(B, S, C) if given is None else given.cpu()
            want = before.clone().index_add_(0, places, added.to(torch.int64).flatten())
            counts = before.to(device, dtype).view(C, case.K, case.V)
            found = op.tally_(counts, problem.indices, targets.to(device), given, False)
            after = require_like("counts", counts, (C, case.K, case.V), dtype).flatten()
            require(
                torch.equal(after, want.to(dtype)), f"{int((after != want).sum())} of {after.numel()} counts are wrong"
            )
            require(require_like("the lowest count", found, (), dtype) == 0, "expected 0 where nothing is removed")
            found = op.tally_(counts, problem.indices, targets.to(device), given, True)
            require(torch.equal(counts.cpu().flatten(), before.to(dtype)), "removing does not undo adding")
            require(found.cpu() == (before[places].amin() if len(places) else 0), "not the lowest count left")


def _judge_hits(problem: Problem, hits: Tensor) -> None:
    case = problem.case
    rows = table_rows(problem.indices, case.K)[problem.queries.cpu().isfinite().all(-1)]
    expected = torch.bincount(rows, minlength=case.C * case.K).view(case.C, case.K)
    hits = require_like("hits", hits, expected.shape, torch.int64)
    require(torch.equal(hits, expected), f"{int((hits != expected).sum())} of {hits.numel()} hits are wrong")


def check_count(op: Any, problem: Problem) -> None:
    _judge_hits(problem, op.count(problem.queries, problem.indices, problem.case.K))


def check_accumulate(op: Any, problem: Problem) -> None:
    queries, indices, K = problem.queries, problem.indices, problem.case.K
    hits, sums = op.accumulate(queries, indices, K)
    _judge_hits(problem, hits)
    rows = torch.where(queries.isfinite().all(-1, keepdim=True), queries, 0)
    SumOfRows(problem, rows, accumulator(queries.dtype)).judge("sums of queries", sums)


def _spare(problem: Problem) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """All queries as rows for dead pairs, the finite ones first, and how many those are."""
    rows = problem.queries.cpu().permute(2, 0, 1, 3).flatten(1, 2).to(problem.keys.dtype)
    if rows.shape[1] == 0:
        return None, None
    finite = rows.isfinite().all(-1)
    order = finite.int().argsort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order[..., None].expand_as(rows)).to(problem.keys.device)
    return rows, finite.sum(-1).to(problem.keys.device)


def check_update_keys_(op: Any, problem: Problem) -> None:
    """Sizes are multiples of a sixteenth, so that every backend finds the same pairs dead."""
    before = problem.keys.cpu()
    C, K, D = before.shape
    decay, eps, threshold, start = 0.75, 1e-5, 0.5, 1.25
    rows, finite = table_rows(problem.indices, K), problem.queries.cpu().isfinite().all(-1, keepdim=True)
    each = torch.where(finite, problem.queries.cpu().double(), 0)
    empty = torch.zeros(C * K, D, dtype=torch.float64)
    dtype = accumulator(before.dtype)
    sums = empty.index_add(0, rows.flatten(), each.reshape(-1, D)).view(C, K, D).to(dtype)
    hits = torch.bincount(rows[finite[..., 0]], minlength=C * K).view(C, K).to(dtype)
    averages = torch.where(before.isfinite(), before, 0) * 1.5
    sizes = (torch.arange(C * K) % 7 / 4).view(C, K).to(before.dtype)
    spare, usable = _spare(problem)
    found = [part.to(problem.keys.device, copy=True) for part in (before, averages, sizes)]
    given = (part.to(problem.keys.device) for part in (hits, sums))
    packed = op.update_keys_(*found, *given, spare, usable, decay, eps, threshold, start, False)
    require(torch.equal(packed, op.pack_keys(found[0])), "the packed keys are not those of the new keys")

    unit, keep = UNIT[dtype], decay if hits.any() else 1.0
    hit, size = hits > 0, keep * sizes.double() + (1 - keep) * hits
    average = keep * averages.double() + (1 - keep) * sums.double()
    off = 4 * unit * (averages.double().abs() + sums.double().abs()) * (keep < 1)
    total = size.sum(-1, keepdim=True)
    smoothed = ((size + eps) / (total + K * eps) * total)[..., None]
    moved = torch.where(hit[..., None], average / smoothed, before.double())
    off_moved, stays = off / smoothed + 16 * unit * moved.abs(), ~hit
    if spare is not None and usable is not None:
        some = usable.cpu()[:, None]
        dead = (size < threshold) & (some > 0)
        place = ((dead.cumsum(-1) - 1) % some.clamp(min=1))[..., None]
        fresh = spare.cpu().double().gather(1, place.expand_as(moved))
        moved = torch.where(dead[..., None], fresh, moved)
        average = torch.where(dead[..., None], fresh * start, average)
        size, stays = torch.where(dead, start, size), stays & ~dead
    new = require_like("keys", found[0], before.shape, before.dtype)
    same = torch.equal(new[stays].nan_to_num(), before[stays].nan_to_num())
    require(same, "a key changed that neither was hit nor is dead")
    for name, part, want, allowed in (
        ("cluster sizes", found[2], size, torch.zeros(())),
        ("averages", found[1], average, off),
        ("keys", torch.where(stays[..., None], 0, new), torch.where(stays[..., None], 0, moved), off_moved),
    ):
        part = require_like(name, part, want.shape, before.dtype)
        require_close(name, part, want, allowed.nan_to_num() + 2 * UNIT[before.dtype] * want.abs())


def check_lookup(op: Any, problem: Problem) -> None:
    packed = op.pack_keys(problem.keys)
    for pool in POOLS:
        out, indices = op.lookup(problem.queries, problem.keys, packed, problem.values, problem.mask, pool)
        indices = require_like("indices", indices, problem.queries.shape[:3], torch.int64)
        distances = exact(problem).distances.gather(-1, indices[..., None])
        distances[~problem.queries.cpu().isfinite().all(-1)] = torch.nan
        dtype = accumulator(torch.promote_types(problem.queries.dtype, problem.keys.dtype))
        judge_search(problem, indices[..., None], distances.to(dtype), 1)
        judge_gather(problem, indices, out, pool, "bscv")
        if problem.case.S == 0:
            continue
        first = op.lookup(problem.queries[:, 0], problem.keys, packed, problem.values, problem.mask, pool)
        for name, one, of_all in zip(("values", "indices"), first, (out, indices), strict=True):
            part = require_like(f"{name} of one position", one, of_all[:, 0].shape, of_all.dtype)
            require_close(f"{name} of one position", part, of_all[:, 0].cpu(), torch.zeros(()))


CHECKS: dict[str, Callable[[Any, Problem], None]] = {name: globals()[f"check_{name}"] for name in ops.NAMES}
