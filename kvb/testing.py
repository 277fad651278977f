"""Every operator of every backend of this machine, held to the contract: ``python -m kvb check``.

Expected results are spelled out here in float64; the reference is judged by them like every other backend. What a fast
backend may get wrong is decided by shapes, strides and data, so each case of ``CASES`` names the one thing it stresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvb import ops, reference

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
POOLS = ("none", "mean", "sum")


# --- data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; ``name`` says what it stresses. Letters as in ``kvb/ops.py``, T nearest keys."""

    name: str
    B: int = 5
    S: int = 3
    C: int = 2
    K: int = 40
    D: int = 8
    V: int = 5
    T: int = 1
    dtype: torch.dtype = torch.float32
    keys: torch.dtype | None = None  # where it differs from that of queries and values
    codes: torch.dtype = torch.int64
    data: str = "normal"
    strides: str = "contiguous"
    masked: float = 0.0  # share of the pairs that may not be fetched; from 1 on, no pair of the first codebook may


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _normal(case: Case) -> tuple[Tensor, Tensor]:
    return _random(case.B, case.S, case.C, case.D), _random(case.C, case.K, case.D)


def _offset(case: Case) -> tuple[Tensor, Tensor]:
    queries, keys = _normal(case)
    return queries + 100, keys + 100


def _lattice(case: Case) -> tuple[Tensor, Tensor]:
    """Small integers: distances are exact, and most of them tied."""
    return _normal(case)[0].round().clamp(-2, 2), _normal(case)[1].round().clamp(-2, 2)


def _duplicates(case: Case) -> tuple[Tensor, Tensor]:
    """Three keys of ten stand twice, and every other query is a key."""
    queries, keys = _normal(case)
    twins = max(1, case.K * 3 // 10)
    keys[:, case.K - twins :] = keys[:, :twins]
    books = torch.arange(case.C)
    queries[::2] = keys[books, torch.randint(case.K, queries[::2].shape[:3])]
    return queries, keys


def _outliers(case: Case) -> tuple[Tensor, Tensor]:
    """Neighbouring queries from 1e-8 to 1e8 times as large as the keys."""
    queries, keys = _normal(case)
    return queries * 10.0 ** torch.randint(-8, 9, (*queries.shape[:3], 1)), keys


def _bad_queries(case: Case) -> tuple[Tensor, Tensor]:
    queries, keys = _normal(case)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    place = torch.rand(queries.shape) < 0.1
    return torch.where(place, bad[torch.randint(3, queries.shape)], queries), keys


def _bad_keys(case: Case) -> tuple[Tensor, Tensor]:
    queries, keys = _normal(case)
    keys[:, ::3, 0], keys[:, 1::5, -1] = torch.nan, torch.inf
    return queries, keys


DATA: dict[str, Callable[[Case], tuple[Tensor, Tensor]]] = {
    "normal": _normal,
    "offset": _offset,
    "lattice": _lattice,
    "duplicates": _duplicates,
    "outliers": _outliers,
    "bad queries": _bad_queries,
    "bad keys": _bad_keys,
}

CASES = (
    Case("plain"),
    Case("B=0", B=0),
    Case("B=1", B=1, S=1),
    Case("S=0", S=0),
    Case("many queries", B=40, S=20),
    Case("C=1", C=1),
    Case("many codebooks", B=3, S=1, C=70),
    Case("K=1", K=1),
    Case("K=7, below any block", K=7),
    Case("K=200, small", B=40, K=200, D=32, V=64),
    Case("K=513, one above a block", K=513),
    Case("K=4096, large", B=70, S=1, K=4096, D=10, V=10),
    Case("K=4096, one query", B=1, S=1, K=4096, D=10, V=10),
    Case("D=1", D=1),
    Case("D=12", D=12, K=300),
    Case("D=14", D=14, K=300),
    Case("D=20, no power of two", D=20),
    Case("D=64", D=64, K=300),
    Case("D=200, above 128", D=200),
    Case("V=1", V=1),
    Case("V=64", V=64),
    Case("float16", dtype=torch.float16),
    Case("float16, large K", dtype=torch.float16, B=20, K=1200, D=14),
    Case("bfloat16", dtype=torch.bfloat16, T=2),
    Case("bfloat16, K=200", dtype=torch.bfloat16, B=20, K=200, D=32),
    Case("float64", dtype=torch.float64),
    Case("float64, large K", dtype=torch.float64, K=1200, D=14),
    Case("float16 queries, float32 keys", dtype=torch.float16, keys=torch.float32),
    Case("float32 queries, float64 keys", keys=torch.float64),
    Case("int32 indices", codes=torch.int32),
    Case("int16 indices", codes=torch.int16),
    Case("uint8 indices", codes=torch.uint8),
    Case("codebooks outermost in memory", strides="transposed"),
    Case("batch innermost but for D", strides="batch last"),
    Case("an unaligned slice", strides="slice", D=7, V=3),
    Case("an expanded batch", strides="expanded"),
    Case("3 nearest", T=3),
    Case("3 nearest, large K", T=3, K=1200, D=14),
    Case("all K nearest", T=7, K=7),
    Case("masked", masked=0.3),
    Case("masked, large K", masked=0.3, K=1200, D=14, T=2),
    Case("fewer usable pairs than asked for", K=6, T=4, masked=0.6),
    Case("a codebook without a usable pair", masked=1.0, T=2),
    Case("exact ties", data="lattice", D=3),
    Case("exact ties, large K", data="lattice", D=3, K=1200),
    Case("exact ties, 3 nearest", data="lattice", D=3, T=3),
    Case("30 % duplicated keys", data="duplicates"),
    Case("30 % duplicated keys, large K", data="duplicates", K=1200, D=14),
    Case("30 % duplicated keys, masked", data="duplicates", masked=0.5),
    Case("30 % duplicated keys, 2 nearest", data="duplicates", T=2),
    Case("an offset of 100", data="offset"),
    Case("an offset of 100, large K", data="offset", K=1200, D=14),
    Case("queries of 1e-8 to 1e8 side by side", data="outliers", B=30),
    Case("queries of 1e-8 to 1e8, large K", data="outliers", B=30, K=1200, D=14),
    Case("queries with NaN and Inf", data="bad queries", T=2),
    Case("queries with NaN and Inf, large K", data="bad queries", K=1200, D=14),
    Case("keys with NaN and Inf", data="bad keys"),
    Case("keys with NaN and Inf, large K", data="bad keys", K=1200, D=14, T=2),
)


def _in_memory(tensor: Tensor, strides: str) -> Tensor:
    """The same numbers [B, S, C, ...], laid out otherwise; "expanded" repeats the first batch entry."""
    if strides == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "batch last":
        return tensor.movedim(0, 2).contiguous().movedim(2, 0)
    if strides == "expanded":
        return tensor[:1].expand_as(tensor)
    if strides == "slice":
        padded = tensor.new_zeros(tensor.shape[0] + 1, *tensor.shape[1:-1], tensor.shape[-1] + 3)
        padded[1:, ..., 1:-2] = tensor
        return padded[1:, ..., 1:-2]
    return tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inputs of all operators for one case, on one device."""

    case: Case
    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    indices: Tensor  # any, for the operators that take them
    grads: dict[str, Tensor]  # of gather's result, by pool

    @functools.cached_property
    def exact(self) -> _Exact:
        return _expected(self)


@functools.cache
def _problem(case: Case, device: torch.device) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        queries, keys = DATA[case.data](case)
        values = _random(case.C, case.K, case.V)
        mask = torch.rand(case.C, case.K) >= case.masked if case.masked else None
        # Half of the indices meet in one pair: sums of many rows beside sums of few.
        indices = torch.randint(case.K, (case.B, case.S, case.C)) * (torch.rand(case.B, case.S, case.C) < 0.5)
        grads = {pool: _random(case.B, case.S, *([case.C] if pool == "none" else []), case.V) for pool in POOLS}
    if mask is not None and case.masked < 1:
        mask[:, 0] = True
    return Problem(
        case,
        _in_memory(queries.to(device, case.dtype), case.strides),
        keys.to(device, case.keys or case.dtype),
        values.to(device, case.dtype),
        None if mask is None else mask.to(device),
        _in_memory(indices.to(device, case.codes), case.strides if case.strides != "slice" else ""),
        {pool: _in_memory(grad.to(device, case.dtype), case.strides) for pool, grad in grads.items()},
    )


# --- judgement --------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A result that breaks the contract; the message says how."""


def _require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise Wrong(message)


def _require_like(name: str, found: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU, once its shape and dtype are right."""
    _require(
        tuple(found.shape) == tuple(shape) and found.dtype == dtype,
        f"expected {name} {dtype} {tuple(shape)}, got {found.dtype} {tuple(found.shape)}",
    )
    return found.cpu()


def _require_close(name: str, found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    # Negated, so that NaN fails.
    wrong = ~((found.double() - exact).abs() <= allowed) & ~(found.double() == exact)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise Wrong(
            f"{int(wrong.sum())} of {wrong.numel()} {name} are off by more than rounding; at {place} expected "
            f"{exact[place]:.9g}, got {found.double()[place]:.9g}"
        )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class _Exact:
    """What a search has to find, on the CPU."""

    distances: Tensor  # [B, S, C, K] float64; +inf for pairs that may not be fetched
    bound: Tensor  # [B, S, C] by how much a chosen key may be farther than the best
    finite: Tensor  # [B, S, C] whether the query is
    twins: Tensor  # [C, K] the first usable key that equals this one
    unit: float  # rounding of a returned distance


def _expected(problem: Problem) -> _Exact:
    queries, keys = problem.queries.cpu().double(), problem.keys.cpu().double()
    usable = keys.isfinite().all(-1)
    mean = torch.where(usable[..., None], keys, 0).sum(1) / usable.sum(1).clamp(min=1)[:, None]
    radius = torch.where(usable, (keys - mean[:, None]).norm(dim=-1), 0).amax(1)
    usable = usable if problem.mask is None else usable & problem.mask.cpu()
    distances = torch.stack([(queries[:, :, c, None] - keys[c]).square().sum(-1) for c in range(problem.case.C)], dim=2)
    distances = torch.where(usable, distances, torch.inf)
    unit = UNIT[_accumulator(torch.promote_types(problem.queries.dtype, problem.keys.dtype))]
    bound = 8 * unit * ((queries - mean).norm(dim=-1) + radius).square()
    twins = torch.stack([_first_equal(book, ok) for book, ok in zip(keys, usable, strict=True)])
    return _Exact(distances, bound, queries.isfinite().all(-1), twins, unit)


def _first_equal(keys: Tensor, usable: Tensor) -> Tensor:
    """For every one of the keys [K, D], the lowest index of a usable key that equals it."""
    _, kind = keys.unique(dim=0, return_inverse=True)
    index = torch.where(usable, torch.arange(len(keys)), len(keys))
    return index.scatter_reduce(0, kind, index, "amin", include_self=False)[kind]


def _judge_search(problem: Problem, indices: Tensor, distances: Tensor, T: int) -> None:
    """Indices and distances [B, S, C, T]."""
    case, exact = problem.case, problem.exact
    shape = (case.B, case.S, case.C, T)
    dtype = _accumulator(torch.promote_types(problem.queries.dtype, problem.keys.dtype))
    indices = _require_like("indices", indices, shape, torch.int64)
    distances = _require_like("distances", distances, shape, dtype).double()
    _require(((indices >= 0) & (indices < case.K)).all(), f"an index outside of [0, {case.K})")
    ordered = indices.sort(-1).values
    _require((ordered[..., 1:] != ordered[..., :-1]).all(), "an index stands twice among the nearest of one query")

    first = torch.arange(T).expand(shape)
    bad = ~exact.finite
    _require(torch.equal(indices[bad], first[bad]), "expected indices 0, 1, ... for a query that is not finite")
    _require(distances[bad].isnan().all(), "expected distance NaN for a query that is not finite")

    good, wanted = exact.finite, exact.distances.sort(dim=-1, stable=True)
    chosen = exact.distances.gather(-1, indices)[good]
    best, returned = wanted.values[..., :T][good], distances[good]
    missing = best == torch.inf
    _require((chosen[missing] == torch.inf).all(), "expected an unusable pair where no usable one is left")
    fill = _fill(wanted.indices[..., :T][good], missing)
    _require(torch.equal(indices[good][missing], fill[missing]), "expected the lowest unused indices as a filling")
    _require((returned[missing] == torch.inf).all(), "expected distance +inf where no usable pair is left")
    _require((chosen[~missing] < torch.inf).all(), "a pair was chosen that is masked or not finite")

    bound = (exact.bound[good][:, None] + (case.D + 4) * UNIT[torch.float64] * best).expand_as(best)
    worse = (chosen - best)[~missing] - bound[~missing]
    _require(
        (worse <= 0).all(),
        f"{int((~(worse <= 0)).sum())} of {worse.numel()} chosen keys are farther than the nearest by more than the "
        f"bound, 8 units in the last place of (|q - m| + max|k - m|)^2",
    )
    rounding = (case.D + 4) * exact.unit * chosen + torch.finfo(dtype).tiny
    _require_close("distances", returned[~missing], chosen[~missing], rounding[~missing])
    if T == 1:
        twins = torch.stack([exact.twins[c, indices[:, :, c, 0]] for c in range(case.C)], dim=2)[..., None][good]
        same = torch.equal(indices[good][~missing], twins[~missing])
        _require(same, "a key was chosen although an equal one stands at a lower index")
    if case.data == "lattice":
        _require(torch.equal(indices, wanted.indices[..., :T]), "expected the lowest indices among exact ties")


def _fill(wanted: Tensor, missing: Tensor) -> Tensor:
    """Where ``missing`` [rows, T], the lowest index that stands nowhere before in its row."""
    filled = wanted.clone()
    for t in range(wanted.shape[1]):
        options = torch.arange(t + 1)
        unused = (options[:, None] != filled[:, None, :t]).all(-1).to(torch.uint8).argmax(-1)
        filled[:, t] = torch.where(missing[:, t], unused, filled[:, t])
    return filled


def _rows(indices: Tensor, K: int) -> Tensor:
    """Rows of a [C*K, ...] table, on the CPU."""
    return indices.cpu().long() + torch.arange(indices.shape[2]) * K


def _judge_gather(problem: Problem, indices: Tensor, out: Tensor, pool: str, layout: str) -> None:
    case, values = problem.case, problem.values.cpu()
    fetched = values.reshape(-1, case.V)[_rows(indices, case.K)]
    if pool == "none":
        fetched = fetched if layout == "bscv" else fetched.transpose(1, 2)
        out = _require_like("values", out, fetched.shape, values.dtype)
        _require(torch.equal(out, fetched), f"{int((out != fetched).sum())} of {out.numel()} fetched values differ")
        return
    exact = fetched.double().sum(2) / (case.C if pool == "mean" else 1)
    size = fetched.double().abs().sum(2) / (case.C if pool == "mean" else 1)
    allowed = 2 * case.C * UNIT[_accumulator(values.dtype)] * size + 2 * UNIT[values.dtype] * exact.abs()
    allowed += torch.finfo(values.dtype).tiny
    _require_close("pooled values", _require_like("values", out, exact.shape, values.dtype), exact, allowed)


class _Sum:
    """Rows added up by index: in float64, and by how much another order of additions may be off."""

    def __init__(self, problem: Problem, rows: Tensor, reference_sum: Callable[[], Tensor], dtype: torch.dtype) -> None:
        case, width, rows = problem.case, rows.shape[-1], rows.cpu().double()
        flat = _rows(problem.indices, case.K).flatten()
        empty = torch.zeros(case.C * case.K, width, dtype=torch.float64)
        self.exact = empty.index_add(0, flat, rows.reshape(-1, width)).view(case.C, case.K, width)
        size = empty.index_add(0, flat, rows.abs().reshape(-1, width)).view_as(self.exact)
        error = (reference_sum().cpu().double() - self.exact).abs().amax() if self.exact.numel() else 0.0
        self.allowed = 2 * error + 2 * UNIT[_accumulator(dtype)] * size + UNIT[dtype] * self.exact.abs()
        self.dtype = dtype

    def judge(self, name: str, found: Tensor) -> None:
        _require_close(name, _require_like(name, found, self.exact.shape, self.dtype), self.exact, self.allowed)


def _grad_sum(problem: Problem, pool: str) -> _Sum:
    case, grad = problem.case, problem.grads[pool]
    rows = grad if pool == "none" else grad[:, :, None].expand(-1, -1, case.C, -1)
    rows = rows.double() / (case.C if pool == "mean" else 1)
    return _Sum(problem, rows, lambda: reference.gather_backward(grad, problem.indices, case.K, pool), grad.dtype)


# --- one check an operator --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Backend:
    """Who answers: anything with the operators of ``kvb.ops.NAMES`` as attributes (a missing one is not checked)."""

    name: str
    device: torch.device
    operators: Any


def check_pack_keys(op: Any, problem: Problem) -> None:
    packed, again = op.pack_keys(problem.keys), op.pack_keys(problem.keys)
    _require_like("packed keys", packed, (problem.case.C, packed.shape[-1]), torch.uint8)
    _require(torch.equal(packed, again), "packing the same keys twice gives different bytes")


def check_packed_matches(op: Any, problem: Problem) -> None:
    keys, packed = problem.keys, op.pack_keys(problem.keys)
    _require(
        _require_like("the answer", op.packed_matches(keys, packed), (), torch.bool), "keys do not match their own"
    )
    usable = keys.isfinite().all(-1).nonzero()
    for c, k in (usable[0], usable[-1]):
        other = keys.clone()
        other[c, k, 0] = torch.where(other[c, k, 0] == 1, 2, 1)
        _require(not op.packed_matches(other, packed), "keys with another coordinate match")
    _require(not op.packed_matches(keys, packed[:, :-1]), "packed keys of another size match")


def check_nearest(op: Any, problem: Problem) -> None:
    T = problem.case.T
    packed = op.pack_keys(problem.keys)
    indices, distances = op.nearest(problem.queries, problem.keys, packed, problem.mask, T)
    _judge_search(problem, indices, distances, T)


def check_sample(op: Any, problem: Problem) -> None:
    """So cold that only the nearest is drawn, where distances differ by more than a thousandth."""
    queries, keys, mask, case = problem.queries, problem.keys, problem.mask, problem.case
    seed = torch.tensor(7)
    indices, distances = op.sample(queries, keys, mask, 1e-5, seed)
    again, _ = op.sample(queries, keys, mask, 1e-5, seed)
    _require(torch.equal(indices, again), "the same seed gives different indices")
    shape, exact = (case.B, case.S, case.C, 1), problem.exact
    indices = _require_like("indices", indices, shape, torch.int64)
    _require(((indices >= 0) & (indices < case.K)).all(), f"an index outside of [0, {case.K})")
    _require((indices[~exact.finite] == 0).all(), "expected index 0 for a query that is not finite")
    _require(distances.cpu()[~exact.finite].isnan().all(), "expected distance NaN for a query that is not finite")
    chosen, best = exact.distances.gather(-1, indices)[..., 0], exact.distances.amin(-1)
    judged = exact.finite & (best < torch.inf)
    # Scores are off by the rounding of the filter, draws by a few temperatures.
    slack = 1e-3 + 1e3 * exact.bound
    _require((chosen[judged] <= (best + slack)[judged]).all(), "a far key was drawn at a temperature of 1e-5")
    rounding = (case.D + 4) * exact.unit * chosen[judged] + torch.finfo(distances.dtype).tiny
    _require_close("distances", distances.cpu()[..., 0][judged], chosen[judged], rounding)


def check_gather(op: Any, problem: Problem) -> None:
    for pool in POOLS:
        for layout in ("bscv", "bcsv"):
            out = op.gather(problem.values, problem.indices, pool, layout)
            _judge_gather(problem, problem.indices, out, pool, layout)


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
        want = _grad_sum(problem, pool)
        want.judge(f"gradients (pool={pool!r})", op.gather_backward(grad, problem.indices, problem.case.K, pool))
        with _deterministic():
            one, two = (op.gather_backward(grad, problem.indices, problem.case.K, pool) for _ in range(2))
        want.judge(f"deterministic gradients (pool={pool!r})", one)
        _require(torch.equal(one, two), "two deterministic gradients differ")


def check_gather_backward_rows(op: Any, problem: Problem) -> None:
    case = problem.case
    M = min(case.B * case.S * case.C, case.C * case.K)
    touched = _rows(problem.indices, case.K).unique()
    for pool, grad in problem.grads.items():
        rows, grads, number = op.gather_backward_rows(grad, problem.indices, case.K, pool)
        rows = _require_like("rows", rows, (M,), torch.int64)
        grads = _require_like("gradients", grads, (M, case.V), grad.dtype)
        n = int(_require_like("the number of rows", number, (1,), torch.int64))
        _require(n == len(touched), f"expected {len(touched)} rows, got {n}")
        _require(torch.equal(rows[:n], touched), "expected the touched rows, ascending")
        _require((rows[n:] == -1).all() and (grads[n:] == 0).all(), "expected rows -1 and gradients 0 in the tail")
        dense = grads.new_zeros(case.C * case.K, case.V).index_copy(0, rows[:n], grads[:n])
        _grad_sum(problem, pool).judge(f"gradients (pool={pool!r})", dense.view(case.C, case.K, case.V))


def check_sgd_step_(op: Any, problem: Problem) -> None:
    """What follows from the logits is judged by those that were returned, so that their rounding counts once."""
    case, values = problem.case, problem.values.clone()
    (B, S, C), V, lr, max_norm, smoothing = problem.indices.shape, case.V, 0.5, 0.02, 0.1
    targets = torch.arange(B, device=values.device) % V
    loss, norm, logits = op.sgd_step_(values, problem.indices, targets, lr, max_norm, smoothing)
    dtype = _accumulator(values.dtype)
    loss = _require_like("the loss", loss, (), dtype)
    norm = _require_like("the norm", norm, (), dtype)
    logits = _require_like("logits", logits, (B, V), dtype).double()
    values, before = _require_like("values", values, problem.values.shape, problem.values.dtype), problem.values.cpu()
    if B * S == 0:
        _require(loss.isnan(), "expected loss NaN for an empty batch")
        _require(torch.equal(values, before), "expected that an empty batch moves nothing")
        return

    rows, unit = _rows(problem.indices, case.K), UNIT[dtype]
    fetched = before.double().view(-1, V)[rows]
    exact, size = fetched.mean((1, 2)), fetched.abs().mean((1, 2))
    _require_close("logits", logits, exact, (2 * (C + S) * unit + 2 * UNIT[values.dtype]) * size)

    shares, fit = logits.log_softmax(-1), torch.full_like(logits, smoothing / V)
    fit[torch.arange(B), targets.cpu()] += 1 - smoothing
    slack = (16 + V) * unit
    _require_close("losses", loss, -(fit * shares).sum(-1).mean(), slack * (1 + shares.abs().max()))

    def total(each: Tensor) -> Tensor:
        """Of all positions, [C * K, *], where each sample gives the same to all that it fetches."""
        out = torch.zeros(C * case.K, each.shape[1], dtype=torch.float64)
        return out.index_add(0, rows.flatten(), each[:, None, None].expand(B, S, C, -1).reshape(B * S * C, -1))

    grad, fetches = total((shares.exp() - fit) / (B * S * C)), total(torch.ones(B, 1, dtype=torch.float64))
    off = (slack + 2 * unit * fetches) * total((shares.exp() + fit) / (B * S * C))
    _require_close("norms", norm, grad.norm(), off.norm() + 4 * unit * grad.norm())
    step = lr * min(1.0, max_norm / (float(grad.norm()) + 1e-6))
    moved = before.double() - step * grad.view_as(before)
    off += (off.norm() / (grad.norm() + 1e-6) + 4 * unit) * grad.abs()
    allowed = step * off.view_as(before) + 2 * UNIT[values.dtype] * (moved.abs() + before.double().abs())
    touched = fetches.view(C, case.K, 1) > 0
    _require_close("values", values, torch.where(touched, moved, before.double()), torch.where(touched, allowed, 0))


def _judge_hits(problem: Problem, hits: Tensor) -> None:
    case = problem.case
    rows = _rows(problem.indices, case.K)[problem.queries.cpu().isfinite().all(-1)]
    expected = torch.bincount(rows, minlength=case.C * case.K).view(case.C, case.K)
    hits = _require_like("hits", hits, expected.shape, torch.int64)
    _require(torch.equal(hits, expected), f"{int((hits != expected).sum())} of {hits.numel()} hits are wrong")


def check_count(op: Any, problem: Problem) -> None:
    _judge_hits(problem, op.count(problem.queries, problem.indices, problem.case.K))


def check_accumulate(op: Any, problem: Problem) -> None:
    queries, indices, K = problem.queries, problem.indices, problem.case.K
    hits, sums = op.accumulate(queries, indices, K)
    _judge_hits(problem, hits)
    rows = torch.where(queries.isfinite().all(-1, keepdim=True), queries, 0)
    dtype = _accumulator(queries.dtype)
    _Sum(problem, rows, lambda: reference.accumulate(queries, indices, K)[1], dtype).judge("sums of queries", sums)


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
    rows, finite = _rows(problem.indices, K), problem.queries.cpu().isfinite().all(-1, keepdim=True)
    each = torch.where(finite, problem.queries.cpu().double(), 0)
    empty = torch.zeros(C * K, D, dtype=torch.float64)
    dtype = _accumulator(before.dtype)
    sums = empty.index_add(0, rows.flatten(), each.reshape(-1, D)).view(C, K, D).to(dtype)
    hits = torch.bincount(rows[finite[..., 0]], minlength=C * K).view(C, K).to(dtype)
    averages = torch.where(before.isfinite(), before, 0) * 1.5
    sizes = (torch.arange(C * K) % 7 / 4).view(C, K).to(before.dtype)
    spare, usable = _spare(problem)
    found = [part.to(problem.keys.device, copy=True) for part in (before, averages, sizes)]
    given = (part.to(problem.keys.device) for part in (hits, sums))
    packed = op.update_keys_(*found, *given, spare, usable, decay, eps, threshold, start, False)
    _require(torch.equal(packed, op.pack_keys(found[0])), "the packed keys are not those of the new keys")

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
    new = _require_like("keys", found[0], before.shape, before.dtype)
    same = torch.equal(new[stays].nan_to_num(), before[stays].nan_to_num())
    _require(same, "a key changed that neither was hit nor is dead")
    for name, part, exact, allowed in (
        ("cluster sizes", found[2], size, torch.zeros(())),
        ("averages", found[1], average, off),
        ("keys", torch.where(stays[..., None], 0, new), torch.where(stays[..., None], 0, moved), off_moved),
    ):
        part = _require_like(name, part, exact.shape, before.dtype)
        _require_close(name, part, exact, allowed.nan_to_num() + 2 * UNIT[before.dtype] * exact.abs())


def check_lookup(op: Any, problem: Problem) -> None:
    packed = op.pack_keys(problem.keys)
    for pool in POOLS:
        out, indices = op.lookup(problem.queries, problem.keys, packed, problem.values, problem.mask, pool)
        indices = _require_like("indices", indices, problem.queries.shape[:3], torch.int64)
        distances = problem.exact.distances.gather(-1, indices[..., None])
        distances[~problem.queries.cpu().isfinite().all(-1)] = torch.nan
        dtype = _accumulator(torch.promote_types(problem.queries.dtype, problem.keys.dtype))
        _judge_search(problem, indices[..., None], distances.to(dtype), 1)
        _judge_gather(problem, indices, out, pool, "bscv")


CHECKS: dict[str, Callable[[Any, Problem], None]] = {name: globals()[f"check_{name}"] for name in ops.NAMES}


# --- the table --------------------------------------------------------------------------------------------------------


class _Attempt(contextlib.AbstractContextManager["_Attempt"]):
    """Keeps what went wrong inside: a backend may fail in ways that only its own compiler knows."""

    failure = ""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Wrong):
            self.failure = str(error)
        elif isinstance(error, Exception):
            self.failure = f"{type(error).__name__}: {error}"
        return isinstance(error, Exception)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one operator of one backend did."""

    operator: str
    backend: str
    cases: int
    failures: list[tuple[str, str]]  # the case, and what was wrong

    def __str__(self) -> str:
        return f"FAIL {len(self.failures)} of {self.cases}" if self.failures else f"pass {self.cases}"


def verdict(operator: str, backend: Backend, cases: Sequence[Case] = CASES) -> Verdict:
    """Run all cases of one operator."""
    failures = []
    for case in cases:
        with _Attempt() as attempt:
            CHECKS[operator](backend.operators, _problem(case, backend.device))
        if attempt.failure:
            failures.append((case.name, attempt.failure))
    return Verdict(operator, f"{backend.name} on {backend.device}", len(cases), failures)


def _registered(device: torch.device) -> tuple[Backend, Backend]:
    """The operators that the device's own backend answers, and the reference for all of them."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    fast = [name for name in ops.NAMES if torch._C._dispatch_has_kernel_for_dispatch_key(f"kvb::{name}", key)]
    operators = types.SimpleNamespace(**{name: getattr(torch.ops.kvb, name) for name in fast})
    return Backend(ops.backend(device.type), device, operators), Backend("torch", device, reference)


def devices() -> list[torch.device]:
    """The CPU, and the GPU where there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def run(chosen: Sequence[torch.device], cases: Sequence[Case] = CASES) -> bool:
    """Check every backend of the devices, print the table, and say whether all passed."""
    backends = [backend for device in chosen for backend in _registered(device) if vars(backend.operators)]
    first: Verdict | None = None
    print(f"{'operator':<22}{'backend':<20}verdict")
    for backend in backends:
        for operator in ops.NAMES:
            if not hasattr(backend.operators, operator):
                continue
            found = verdict(operator, backend, cases)
            print(f"{operator:<22}{found.backend:<20}{found}", flush=True)
            first = first or (found if found.failures else None)
    if first:
        case, message = first.failures[0]
        print(f"first failure: {first.operator}, {first.backend}, case {case!r}: {message}")
    return first is None
