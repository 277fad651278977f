"""The definition of every kvb operator in plain PyTorch, and the fallback on every device.

Letters (defined in ``kvb/ops.py``): B batch, S positions, C codebooks, K pairs per codebook, D key dim, V value dim,
T nearest keys asked for. Nothing of size B*S*C*K is ever allocated: all work goes through tiles of ``TILE`` elements.

The search has two steps. A *filter* scores every key with a matrix product on data centred on the codebook's mean key;
every key whose score lies within a proven bound of the best is then *rescored* by direct difference in float64.
The filter never decides: ranking and returned distances come from the rescore alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1 << 22  # elements of the largest temporary: 16 MB of float32 scores
LANES = 16  # keys a group: the filter looks at group minima first, which is 16 times less to scan

_HEADER = 64  # bytes of the layout id, and the alignment of a packed codebook
_Tile = tuple[slice, slice, slice]


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _require_in_range(indices: Tensor, K: int) -> None:
    """Raise IndexError on the CPU; elsewhere assert on the device, without making the host wait."""
    _require(
        not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool),
        f"expected integer indices, got {indices.dtype}",
    )
    if indices.numel() == 0:
        return
    low, high = (bound.to(torch.int64) for bound in indices.aminmax())  # K may not fit a narrow dtype
    if indices.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < K), f"an index is out of bounds for codebook with {K} pairs")
    elif low < 0 or high >= K:
        bad = int(low) if low < 0 else int(high)
        raise IndexError(f"index {bad} is out of bounds for codebook with {K} pairs")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(B: int, S: int, C: int, width: int) -> Iterator[_Tile]:
    """Slices of the batch, position and codebook axes whose product times ``width`` stays within TILE."""
    if B * S == 0:
        return
    rows = max(1, TILE // max(1, width))
    books = max(1, rows // (B * S))
    positions = min(S, rows)
    batch = max(1, rows // S)
    for c in range(0, C, books):
        for b in range(0, B, batch):
            for s in range(0, S, positions):
                yield slice(b, b + batch), slice(s, s + positions), slice(c, c + books)


def _flat_rows(indices: Tensor, K: int, first: int = 0) -> Tensor:
    """Rows of a flattened [C*K, ...] table for indices [B, S, c] of codebooks ``first``, ``first + 1``, ..."""
    books = torch.arange(first, first + indices.shape[-1], device=indices.device)
    return indices.to(torch.int64) + books * K


def _finite(queries: Tensor) -> Tensor:
    return queries.isfinite().all(-1)


# --- packed keys ------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Where things lie in one packed codebook, in bytes: id | rows [Kp, D + 1] | centre [D] | radius."""

    K: int
    D: int
    dtype: torch.dtype

    @property
    def padded(self) -> int:
        return -(-self.K // LANES) * LANES

    @property
    def ends(self) -> tuple[int, int, int]:
        size = self.dtype.itemsize
        rows = _HEADER + self.padded * (self.D + 1) * size
        centre = rows + self.D * size
        return rows, centre, centre + size

    @property
    def nbytes(self) -> int:
        return -(-self.ends[-1] // _HEADER) * _HEADER

    @property
    def name(self) -> str:
        return f"kvb reference 1: K={self.K} D={self.D} {self.dtype}"[:_HEADER]


class _Packed(NamedTuple):
    rows: Tensor  # [C, Kp, D + 1] centred key (zero if not finite, or padding), then half its squared norm:
    #               +inf there bars the key, NaN forces its rescore
    centre: Tensor  # [C, D] mean of the finite keys
    radius: Tensor  # [C, 1] largest norm of a centred key


def _layout(K: int, D: int, dtype: torch.dtype) -> _Layout:
    return _Layout(K, D, _accumulator(dtype))


def packed_nbytes(K: int, D: int, dtype: torch.dtype) -> int:
    """Bytes of one packed codebook; the operator's fake uses it too."""
    return _layout(K, D, dtype).nbytes


@functools.lru_cache(maxsize=64)
def _layout_id(layout: _Layout, device: torch.device) -> Tensor:
    return torch.tensor(list(layout.name.encode().ljust(_HEADER)), dtype=torch.uint8, device=device)


def _unpack(packed: Tensor, layout: _Layout) -> _Packed:
    C, (a, b, c) = packed.shape[0], layout.ends
    return _Packed(
        packed[:, _HEADER:a].view(layout.dtype).view(C, layout.padded, layout.D + 1),
        packed[:, a:b].view(layout.dtype),
        packed[:, b:c].view(layout.dtype),
    )


def pack_keys(keys: Tensor) -> Tensor:
    """Keys [C, K, D] in the layout that ``nearest`` searches: uint8 [C, nbytes]."""
    C, K, D = keys.shape
    layout = _layout(K, D, keys.dtype)
    packed = keys.new_zeros((C, layout.nbytes), dtype=torch.uint8)
    packed[:, :_HEADER] = _layout_id(layout, keys.device)
    view = _unpack(packed, layout)
    books = max(1, TILE // max(1, 4 * K * D))
    for c in range(0, C, books):
        tile = slice(c, c + books)
        finite = _finite(keys[tile])
        exact = torch.where(finite[..., None], keys[tile], 0).double()
        centre = (exact.sum(1) / finite.sum(1, keepdim=True).clamp(min=1)).to(layout.dtype)
        centre = torch.where(centre.isfinite(), centre, 0)
        centred = torch.where(finite[..., None], exact - centre[:, None].double(), 0).to(layout.dtype)
        halves = (centred.double().square().sum(-1) / 2).to(layout.dtype)
        # A norm that overflows must not look like a barred key: NaN sends the key to the rescore.
        halves = torch.where(halves.isfinite(), halves, torch.nan)
        view.rows[tile, :K, :D] = centred
        view.rows[tile, :K, D] = torch.where(finite, halves, torch.inf)
        view.rows[tile, K:, D] = torch.inf
        view.centre[tile] = centre
        view.radius[tile] = (2 * torch.where(finite, halves, 0).amax(1, keepdim=True)).sqrt()
    return packed


# --- search -----------------------------------------------------------------------------------------------------------


class _Search(NamedTuple):
    """What every tile of one search shares."""

    keys: Tensor  # [C, K, D]
    packed: _Packed
    usable: Tensor  # [C, Kp] bool: finite, no padding, and not masked
    masked: bool
    scratch: Tensor  # the scores of one tile: fresh memory for each would cost more than the matrix product
    exact: torch.dtype  # of the distances returned


def _matmul_is_exact(device: torch.device) -> bool:
    """Whether float32 matrix products keep float32 precision: the user may allow TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def _begin(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None) -> _Search:
    C, K, D = keys.shape
    _require(
        queries.dim() == 4 and queries.shape[2:] == (C, D),
        f"expected queries [B, S, {C}, {D}] for keys {tuple(keys.shape)}, got {tuple(queries.shape)}",
    )
    _require(
        queries.device == keys.device == packed.device,
        f"expected queries, keys and packed on one device, got {queries.device}, {keys.device} and {packed.device}",
    )
    layout = _layout(K, D, keys.dtype)
    same_size = packed.dtype == torch.uint8 and packed.shape == (C, layout.nbytes)
    # Reading the id on another device would make the host wait; there the size alone is checked.
    same_id = packed.device.type != "cpu" or (
        same_size and torch.equal(packed[0, :_HEADER], _layout_id(layout, packed.device))
    )
    _require(
        same_size and same_id,
        f"packed keys do not match: expected the layout '{layout.name}', {layout.nbytes} bytes for each of "
        f"{C} codebooks, got {packed.dtype} {tuple(packed.shape)}; pack the keys again with pack_keys(keys)",
    )
    view = _unpack(packed, layout)
    usable = view.rows[..., D] != torch.inf
    if mask is not None:
        _require(
            mask.dtype == torch.bool and mask.shape == (C, K) and mask.device == keys.device,
            f"expected mask torch.bool {(C, K)} on {keys.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}",
        )
        usable[:, :K] &= mask
    width = usable.shape[1]
    scratch = view.rows.new_empty(
        min(queries.shape[:3].numel() * width, max(TILE, width)),
        dtype=layout.dtype if _matmul_is_exact(keys.device) else torch.float64,
    )
    exact = _accumulator(torch.promote_types(queries.dtype, keys.dtype))
    return _Search(keys, view, usable, mask is not None, scratch, exact)


def _tile_queries(queries: Tensor, tile: _Tile) -> Tensor:
    """[c, n, D]: the queries of one tile, codebook first."""
    rows = queries[tile].permute(2, 0, 1, 3)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _to_tile(flat: Tensor, out: Tensor) -> Tensor:
    """Turn [c, n, T] back into the [b, s, c, T] of ``out``."""
    b, s, c, T = out.shape
    return flat.view(c, b, s, T).permute(1, 2, 0, 3)


def _filter(search: _Search, tile: _Tile, q: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [c, n, Kp], half the squared distance up to a constant per query, and their error [c, n].

    With u the unit roundoff, q and k centred and rounded once (relative error u each), |k| <= r, and a sum of D + 1
    terms in any order, a score |k|^2/2 - q.k is off by at most (D + 8) u (|q| r + r^2/2); products that underflow
    add at most the smallest normal number each.
    """
    rows, centre, radius = (part[tile[2]] for part in search.packed)
    wide = torch.promote_types(q.dtype, rows.dtype)
    centred = torch.where(finite[..., None], centre[:, None].to(wide) - q.to(wide), 0).to(rows.dtype)
    info, D = torch.finfo(rows.dtype), q.shape[-1]
    norm = torch.linalg.vector_norm(centred, dim=-1)
    error = (D + 8) * (info.eps / 2 * radius * (norm + radius / 2) + info.tiny)
    ones = torch.nn.functional.pad(centred, (0, 1), value=1.0)
    shape = (*q.shape[:2], rows.shape[1])
    scores = search.scratch[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.bmm(ones.to(scores.dtype), rows.mT.to(scores.dtype), out=scores)
    if search.masked:
        scores.masked_fill_(~search.usable[tile[2], None], torch.inf)
    return scores, error


def _candidates(scores: Tensor, error: Tensor, usable: Tensor, finite: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Pairs (row of c*n, key) that may be among the ``topk`` nearest.

    The ``topk``-th smallest group minimum bounds the ``topk``-th smallest score from above; group g holds the keys g,
    g + G, g + 2G, ... Every comparison is negated so that NaN, from an overflow, always stays a candidate.
    """
    c, n, padded = scores.shape
    G = padded // LANES
    finite, error = finite.view(-1), error.view(-1)
    minima = scores.view(c * n, LANES, G).amin(1)
    if topk == 1:
        worst = minima.amin(1)
    elif topk <= G:
        worst = minima.topk(topk, largest=False).values[:, -1]
    else:
        worst = torch.full_like(error, torch.inf)
    highest = torch.finfo(scores.dtype).max
    limit = torch.where(error.isfinite(), (worst + 2 * error).clamp(max=highest), torch.nan)
    near_group = (~(minima > limit[:, None])).view(-1).nonzero()[:, 0]
    row = near_group // G
    key = (near_group % G)[:, None] + torch.arange(0, padded, G, device=scores.device)
    near = ~(scores.take(row[:, None] * padded + key) > limit[row, None])
    near &= usable.take((row // n * padded)[:, None] + key) & finite[row, None]
    pair = near.view(-1).nonzero()[:, 0]
    return row[pair // LANES], key.view(-1)[pair]


def _squared_distances(q: Tensor, k: Tensor) -> Tensor:
    """sum((q - k)^2) over the last axis in float64, by halving: one summation order for all keys, everywhere."""
    terms = (q.double() - k.double()).square_()
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        terms = torch.cat([folded, terms[..., 2 * half :]], -1) if terms.shape[-1] % 2 else folded
    return terms[..., 0]


def _rescore(search: _Search, tile: _Tile, q: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Exact squared distances of the candidate pairs."""
    n, D = q.shape[1:]
    K = search.keys.shape[1]
    rows, table = q.reshape(-1, D), search.keys[tile[2]].reshape(-1, D)
    piece = max(1, TILE // (4 * D))
    pieces = zip(row.split(piece), (row // n * K + key).split(piece), strict=True)
    return torch.cat([_squared_distances(rows.index_select(0, r), table.index_select(0, k)) for r, k in pieces])


def _lowest_unused(chosen: Tensor) -> Tensor:
    """The lowest index that does not yet stand in each row of ``chosen`` [rows, t]."""
    options = torch.arange(chosen.shape[1] + 1, device=chosen.device)
    return (options[:, None] != chosen[:, None]).all(-1).to(torch.uint8).argmax(-1)


def _rank(rows: int, row: Tensor, key: Tensor, distance: Tensor, topk: int, K: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` smallest (distance, key) of every row; missing ones are the lowest unused keys at +inf."""
    indices = torch.empty((rows, topk), dtype=torch.int64, device=row.device)
    distances = torch.empty((rows, topk), dtype=distance.dtype, device=row.device)
    left = torch.ones_like(row, dtype=torch.bool)
    for t in range(topk):
        best = distance.new_full((rows,), torch.inf).scatter_reduce_(0, row, distance, "amin")
        tied = left & (distance == best[row])
        first = torch.full_like(best, K, dtype=torch.int64)
        first.scatter_reduce_(0, row, torch.where(tied, key, K), "amin")
        missing = (first == K).nonzero()[:, 0]
        first[missing] = _lowest_unused(indices[missing, :t])
        best[missing] = torch.inf
        indices[:, t], distances[:, t] = first, best
        taken = key == first[row]
        left &= ~taken
        distance = distance.masked_fill(taken, torch.inf)
    return indices, distances


def nearest(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    """The ``topk`` nearest keys of every query and codebook: indices and squared distances, both [B, S, C, T]."""
    search = _begin(queries, keys, packed, mask)
    (B, S, C, _), K = queries.shape, keys.shape[1]
    _require(1 <= topk <= K, f"expected topk between 1 and {K}, got {topk}")
    indices = torch.empty((B, S, C, topk), dtype=torch.int64, device=queries.device)
    distances = torch.empty((B, S, C, topk), dtype=search.exact, device=queries.device)
    for tile in _tiles(B, S, C, search.usable.shape[1]):
        q = _tile_queries(queries, tile)
        finite = _finite(q)
        scores, error = _filter(search, tile, q, finite)
        row, key = _candidates(scores, error, search.usable[tile[2]], finite, topk)
        distance = _rescore(search, tile, q, row, key)
        best, least = _rank(finite.numel(), row, key, distance, topk, K)
        best = torch.where(finite.view(-1, 1), best, torch.arange(topk, device=q.device))
        least = torch.where(finite.view(-1, 1), least, torch.nan)
        indices[tile] = _to_tile(best, indices[tile])
        distances[tile] = _to_tile(least.to(search.exact), distances[tile])
    return indices, distances


def sample(
    queries: Tensor, keys: Tensor, mask: Tensor | None, temperature: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """One key a query, drawn from softmax(-distance / temperature) by the Gumbel trick; both outputs [B, S, C, 1]."""
    search = _begin(queries, keys, pack_keys(keys), mask)
    B, S, C, _ = queries.shape
    generator = torch.Generator(queries.device).manual_seed(int(seed))
    indices = torch.empty((B, S, C, 1), dtype=torch.int64, device=queries.device)
    distances = torch.empty((B, S, C, 1), dtype=search.exact, device=queries.device)
    for tile in _tiles(B, S, C, search.usable.shape[1]):
        q = _tile_queries(queries, tile)
        finite = _finite(q)
        scores, _ = _filter(search, tile, q, finite)
        gumbel = -torch.empty_like(scores).exponential_(generator=generator).log_()
        logits = (gumbel - (2 / temperature) * scores).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        logits.masked_fill_(~search.usable[tile[2], None], -torch.inf)
        key = torch.where(finite, logits.argmax(-1), 0)
        row = torch.arange(key.numel(), device=key.device)
        distance = _rescore(search, tile, q, row, key.view(-1)).view_as(key)
        distance = torch.where(search.usable[tile[2]].gather(1, key), distance, torch.inf)
        distance = torch.where(finite, distance, torch.nan)
        indices[tile] = _to_tile(key[..., None], indices[tile])
        distances[tile] = _to_tile(distance[..., None].to(search.exact), distances[tile])
    return indices, distances


# --- values -----------------------------------------------------------------------------------------------------------


def _require_codes(indices: Tensor, C: int, K: int) -> None:
    _require(
        indices.dim() == 3 and indices.shape[2] == C,
        f"expected indices [B, S, {C}], got {tuple(indices.shape)}",
    )
    _require_in_range(indices, K)


def gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    """values [C, K, V] at indices [B, S, C]: [B, S, C, V] ("bscv") or [B, C, S, V] ("bcsv"), or pooled [B, S, V]."""
    C, K, V = values.shape
    _require_codes(indices, C, K)
    B, S, _ = indices.shape
    table = values.reshape(C * K, V)
    if pool == "none":
        rows = _flat_rows(indices, K)
        rows = rows if layout == "bscv" else rows.transpose(1, 2)
        return table.index_select(0, rows.flatten()).view(*rows.shape, V)
    out = values.new_zeros((B, S, V), dtype=_accumulator(values.dtype))
    for b, s, c in _tiles(B, S, C, V):
        rows = _flat_rows(indices[b, s, c], K, c.start)
        out[b, s] += table.index_select(0, rows.flatten()).view(*rows.shape, V).sum(2, dtype=out.dtype)
    return (out / C if pool == "mean" else out).to(values.dtype)


def _tile_grad(grad: Tensor, tile: _Tile, C: int, pool: str) -> Tensor:
    """[rows, V] in the accumulator's dtype: the gradient of every fetched value of one tile."""
    b, s, c = tile
    if pool == "none":
        part = grad[tile]
    else:
        books = len(range(C)[c])
        part = grad[b, s, None].expand(-1, -1, books, -1)
    part = part.to(_accumulator(grad.dtype)).reshape(-1, grad.shape[-1])
    return part / C if pool == "mean" else part


def gather_backward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
    """The gradient of ``gather`` for its table, dense [C, K, V]; grad is [B, S, C, V], pooled [B, S, V]."""
    (B, S, C), V = indices.shape, grad.shape[-1]
    _require_codes(indices, C, K)
    table = grad.new_zeros((C * K, V), dtype=_accumulator(grad.dtype))
    for tile in _tiles(B, S, C, V):
        rows = _flat_rows(indices[tile], K, tile[2].start)
        table.index_add_(0, rows.flatten(), _tile_grad(grad, tile, C, pool))
    return table.view(C, K, V).to(grad.dtype)


def gather_backward_rows(grad: Tensor, indices: Tensor, K: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradient as merged rows: ascending rows of [C*K] (tail -1), their gradients, and how many there are."""
    (B, S, C), V = indices.shape, grad.shape[-1]
    _require_codes(indices, C, K)
    size = min(B * S * C, C * K)
    flat = _flat_rows(indices, K)
    ordered, _ = flat.flatten().sort()
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    place = starts.cumsum(0) - 1
    rows = torch.full((size,), -1, dtype=torch.int64, device=grad.device).scatter_(0, place, ordered)
    # Where each table row went: the inverse of ``rows``, so that the sums run in batch order like the dense gradient's.
    slot = torch.zeros(C * K, dtype=torch.int64, device=grad.device).scatter_(0, ordered, place)
    grads = grad.new_zeros((size, V), dtype=_accumulator(grad.dtype))
    for tile in _tiles(B, S, C, V):
        grads.index_add_(0, slot[flat[tile].flatten()], _tile_grad(grad, tile, C, pool))
    return rows, grads.to(grad.dtype), starts.sum().view(1)


# --- training ---------------------------------------------------------------------------------------------------------


def sgd_step_(
    values: Tensor, indices: Tensor, targets: Tensor, lr: float, max_norm: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of clipped SGD on values [C, K, V], in place; loss [], gradient norm [] and logits [B, V] before it.

    The logits are the mean value over the S positions and C codebooks of indices [B, S, C]; the loss is the mean
    cross entropy with the classes targets [B]. Rows that no index names are neither read nor written.
    """
    (C, K, V), (B, S, _) = values.shape, indices.shape
    _require(values.is_contiguous(), f"expected contiguous values, got strides {values.stride()}")
    _require_codes(indices, C, K)
    _require(
        targets.shape == (B,) and targets.dtype == torch.int64,
        f"expected targets torch.int64 {(B,)}, got {targets.dtype} {tuple(targets.shape)}",
    )
    _require_classes(targets, V)
    exact = _accumulator(values.dtype)
    logits = gather(values, indices, "mean", "bscv").to(exact).mean(1)
    shares = logits.log_softmax(-1)
    fit = torch.full_like(shares, label_smoothing / V)
    fit.scatter_add_(1, targets[:, None], fit.new_full((B, 1), 1 - label_smoothing))
    loss = -(fit * shares).sum(-1).mean()
    grad = (shares.exp() - fit) / B / S
    rows, grads, count = gather_backward_rows(grad[:, None].expand(B, S, V), indices, K, "mean")
    norm = grads.double().square().sum().sqrt()
    step = lr * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # The tail names no row: let it repeat the last one, which then is written several times with the same numbers.
    last = torch.arange(len(rows), device=rows.device).clamp(max=(count - 1).clamp(min=0))
    rows, grads = rows[last], grads[last]
    table = values.view(C * K, V)
    moved = table.index_select(0, rows).to(exact) - step.to(exact) * grads
    table.index_copy_(0, rows, moved.to(values.dtype))
    return loss, norm.to(exact), logits


def _require_classes(targets: Tensor, V: int) -> None:
    """Raise IndexError on the CPU; elsewhere assert on the device, without making the host wait."""
    if targets.numel() == 0:
        return
    low, high = targets.aminmax()
    if targets.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < V), f"a target is out of bounds for {V} classes")
    elif low < 0 or high >= V:
        raise IndexError(f"target {int(low) if low < 0 else int(high)} is out of bounds for {V} classes")


# --- key statistics ---------------------------------------------------------------------------------------------------


def accumulate(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Hits int64 [C, K] and sums [C, K, D] of the finite queries assigned to every pair by indices [B, S, C]."""
    B, S, C, D = queries.shape
    _require_codes(indices, C, K)
    sums = queries.new_zeros((C * K, D), dtype=_accumulator(queries.dtype))
    for tile in _tiles(B, S, C, D):
        part = queries[tile].to(sums.dtype)
        part = torch.where(_finite(part)[..., None], part, 0).reshape(-1, D)
        sums.index_add_(0, _flat_rows(indices[tile], K, tile[2].start).flatten(), part)
    return count(queries, indices, K), sums.view(C, K, D)


def count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    """Hits int64 [C, K] of the finite queries assigned to every pair by indices [B, S, C]."""
    B, S, C, D = queries.shape
    _require_codes(indices, C, K)
    hits = torch.zeros(C * K, dtype=torch.int64, device=queries.device)
    for tile in _tiles(B, S, C, D):
        rows = _flat_rows(indices[tile], K, tile[2].start).flatten()
        hits.scatter_add_(0, rows, _finite(queries[tile]).flatten().to(torch.int64))
    return hits.view(C, K)


def update_keys_(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
    decay: float,
    eps: float,
    threshold: float,
    start: float,
    rescale_all: bool,
) -> Tensor:
    """One step of the moving averages of keys [C, K, D], in place, with dead pairs replaced; the new keys, packed.

    With g the decay: ``cluster_size = g*cluster_size + (1-g)*hits``, ``keys_avg = g*keys_avg + (1-g)*sums``, and
    ``keys = where(hits > 0, keys_avg / smoothed(cluster_size), keys)``, the Laplace smoothing ``smoothed(n) =
    (n + eps) / (n.sum(-1) + K*eps) * n.sum(-1)``; with ``rescale_all``, pairs without a hit are divided, too. Without
    any hit in any codebook nothing of that happens.

    Given spare rows [C, R, D], of which the first ``usable`` [C] may be taken, pairs whose cluster size is now below
    ``threshold`` take one each, in turn: ``keys = row, cluster_size = start, keys_avg = row * start``.
    """
    exact = _require_statistics(keys, keys_avg, cluster_size, hits, sums, spare, usable)
    keep = hits.new_full((), decay).masked_fill_(~hits.any(), 1.0)
    size = torch.lerp(hits, cluster_size.to(exact), keep)
    average = torch.lerp(sums, keys_avg.to(exact), keep)
    total = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (total + size.shape[-1] * eps) * total
    moving = hits.any() if rescale_all else (hits > 0)[..., None]
    moved = torch.where(moving, average / smoothed[..., None], keys.to(exact))
    if spare is not None and usable is not None:
        dead = (size < threshold) & (usable > 0)[:, None]
        place = (dead.cumsum(-1) - 1) % usable.clamp(1, spare.shape[1])[:, None]
        fresh = spare.gather(1, place[..., None].expand_as(keys)).to(exact)
        moved = torch.where(dead[..., None], fresh, moved)
        average = torch.where(dead[..., None], fresh.mul_(start), average)
        size = torch.where(dead, start, size)
    moved = moved.to(keys.dtype)
    packed = pack_keys(moved)
    keys.copy_(moved)
    keys_avg.copy_(average)
    cluster_size.copy_(size)
    return packed


def _require_statistics(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
) -> torch.dtype:
    """Shapes and dtypes of ``update_keys_``; returns the dtype that it computes in."""
    _require(keys.dim() == 3, f"expected keys [C, K, D], got {tuple(keys.shape)}")
    C, K, D = keys.shape
    exact = _accumulator(keys.dtype)
    wanted = {
        "keys": (keys, keys.dtype, (C, K, D)),
        "keys_avg": (keys_avg, keys.dtype, (C, K, D)),
        "cluster_size": (cluster_size, keys.dtype, (C, K)),
        "hits": (hits, exact, (C, K)),
        "sums": (sums, exact, (C, K, D)),
    }
    _require((spare is None) == (usable is None), "expected spare rows and how many are usable, or neither")
    if spare is not None and usable is not None:
        wanted["spare"] = spare, keys.dtype, (C, max(1, spare.shape[1]), D)
        wanted["usable"] = usable, torch.int64, (C,)
    for name, (tensor, dtype, shape) in wanted.items():
        _require(
            tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device == keys.device,
            f"expected contiguous {name} {dtype} {shape} on {keys.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}",
        )
    return exact


def lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """Search and gather in one pass: values [B, S, C, V] (pooled [B, S, V]) and indices [B, S, C]."""
    indices = nearest(queries, keys, packed, mask, 1)[0][..., 0]
    return gather(values, indices, pool, "bscv"), indices
