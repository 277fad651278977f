"""What the operators share: checks of their arguments, tiles of their work, rows of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvb._torch import assert_async

TILE = 1 << 22  # elements of the largest temporary: 16 MB of float32 scores

Tile = tuple[slice, slice, slice]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def require_tensors(**tensors: Tensor | None) -> None:
    """Tensors on one device, each with memory for all of it: a storage may be resized below what its tensors span."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *_ = given
    for name, tensor in given.items():
        require(
            tensor.device == given[first].device,
            f"expected {name} and {first} on one device, got {tensor.device} and {given[first].device}",
        )
        needed, held = _span(tensor)[1] * tensor.element_size(), tensor.untyped_storage().nbytes()
        require(
            held >= needed,
            f"expected {name} with memory for {needed} bytes, got a storage of {held} bytes: it was resized",
        )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of its storage that a tensor uses, and the one after its last; nothing for an empty one."""
    if tensor.numel() == 0:
        return 0, 0
    first = int(tensor.storage_offset())
    return first, first + 1 + sum(int(n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def require_apart(written: dict[str, Tensor], **read: Tensor | None) -> None:
    """What an operator writes in place shares no memory with anything else that it reads or writes."""
    everything = {**written, **{name: tensor for name, tensor in read.items() if tensor is not None}}
    extents = {}
    for name, tensor in everything.items():
        if base := tensor.untyped_storage().data_ptr():  # 0 where there is no memory, as on the meta device
            extents[name] = [base + place * tensor.element_size() for place in _span(tensor)]
    for name, (begin, end) in extents.items():
        for other in written:
            if other == name or other not in extents:
                continue
            first, last = extents[other]
            require(
                not (begin < last and first < end),
                f"expected {name} that share no memory with the {other} written in place; clone() them first",
            )


def require_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(
            tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
            f"expected {name} float16, bfloat16, float32 or float64, got {tensor.dtype}",
        )


def require_shape(name: str, tensor: Tensor, *sizes: int | str) -> None:
    """A letter in place of a size allows any."""
    fits = tensor.dim() == len(sizes) and all(
        isinstance(want, str) or want == got for want, got in zip(sizes, tensor.shape, strict=True)
    )
    want = ", ".join(str(size) for size in sizes)
    require(fits, f"expected {name} [{want}], got {tuple(tensor.shape)}")


def _require_in_range(indices: Tensor, K: int) -> None:
    """Raise IndexError on the CPU; elsewhere assert on the device, without making the host wait."""
    require(
        indices.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        f"expected integer indices, got {indices.dtype}",
    )
    if indices.numel() == 0:
        return
    low, high = (bound.to(torch.int64) for bound in indices.aminmax())  # K may not fit a narrow dtype
    if indices.device.type != "cpu":
        assert_async((low >= 0) & (high < K), f"an index is out of bounds for codebook with {K} pairs")
    elif low < 0 or high >= K:
        bad = int(low) if low < 0 else int(high)
        raise IndexError(f"index {bad} is out of bounds for codebook with {K} pairs")


def require_codes(indices: Tensor, C: int, K: int) -> None:
    """Indices [B, S, C] with every one in [0, K)."""
    require(
        indices.dim() == 3 and indices.shape[2] == C,
        f"expected indices [B, S, {C}], got {tuple(indices.shape)}",
    )
    require(K >= 0, f"expected K of at least 0, got {K}")
    require(C * K < 1 << 48, f"expected fewer than 2^48 pairs, got {C} codebooks of {K}")
    _require_in_range(indices, K)


def require_in_table(indices: Tensor, limit: int) -> None:
    """Rows of a table, in any order: raise IndexError on the CPU; elsewhere assert on the device."""
    if indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if indices.device.type != "cpu":
        assert_async((low >= 0) & (high < limit), f"an index is out of bounds for a table of {limit} rows")
    elif low < 0 or high >= limit:
        raise IndexError(f"index {int(low) if low < 0 else int(high)} is out of bounds for a table of {limit} rows")


def require_classes(targets: Tensor, V: int) -> None:
    """Raise IndexError on the CPU; elsewhere assert on the device, without making the host wait."""
    if targets.numel() == 0:
        return
    low, high = targets.aminmax()
    if targets.device.type != "cpu":
        assert_async((low >= 0) & (high < V), f"a target is out of bounds for {V} classes")
    elif low < 0 or high >= V:
        raise IndexError(f"target {int(low) if low < 0 else int(high)} is out of bounds for {V} classes")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are returned in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(B: int, S: int, C: int, width: int) -> Iterator[Tile]:
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


def flat_rows(indices: Tensor, K: int, first: int = 0) -> Tensor:
    """Rows of a flattened [C*K, ...] table for indices [B, S, c] of codebooks ``first``, ``first + 1``, ..."""
    books = torch.arange(first, first + indices.shape[-1], device=indices.device)
    return indices.to(torch.int64) + books * K


def finite_rows(rows: Tensor) -> Tensor:
    return rows.isfinite().all(-1)


def require_in_order(places: Tensor, sizes: Sequence[int], ascending: Tensor) -> None:
    """Places [A, M] within a table of these sizes, each once: raises on the CPU; elsewhere asserts on the device."""
    if places.shape[1] == 0:
        return
    outside = torch.stack([(place < 0) | (place >= size) for place, size in zip(places, sizes, strict=True)]).any(0)
    message = "expected places in ascending order, without repetition"
    if places.device.type != "cpu":
        assert_async(ascending & ~outside.any(), f"{message}, of a table of {tuple(sizes)}")
        return
    require(bool(ascending), message)
    if outside.any():
        bad = tuple(places[:, outside][:, 0].tolist())
        raise IndexError(f"place {bad} is out of bounds for a table of {tuple(sizes)}")


def require_keys(keys: Tensor) -> None:
    require_tensors(keys=keys)
    require_floating(keys=keys)
    require_shape("keys", keys, "C", "K", "D")
    require(keys.numel() > 0, f"expected keys [C, K, D], none of them 0, got {tuple(keys.shape)}")


def require_statistics(
    keys: Tensor,
    keys_avg: Tensor,
    cluster_size: Tensor,
    hits: Tensor,
    sums: Tensor,
    spare: Tensor | None,
    usable: Tensor | None,
) -> torch.dtype:
    """Shapes and dtypes of ``update_keys_``; returns the dtype that it computes in."""
    require_tensors(
        keys=keys, keys_avg=keys_avg, cluster_size=cluster_size, hits=hits, sums=sums, spare=spare, usable=usable
    )
    require_keys(keys)
    C, K, D = keys.shape
    exact = accumulator(keys.dtype)
    wanted = {
        "keys": (keys, keys.dtype, (C, K, D)),
        "keys_avg": (keys_avg, keys.dtype, (C, K, D)),
        "cluster_size": (cluster_size, keys.dtype, (C, K)),
        "hits": (hits, exact, (C, K)),
        "sums": (sums, exact, (C, K, D)),
    }
    require((spare is None) == (usable is None), "expected spare rows and how many are usable, or neither")
    if spare is not None and usable is not None:
        require_shape("spare", spare, C, "R", D)
        require_shape("usable", usable, C)
        require(spare.shape[1] > 0, "expected at least one spare row for each codebook")
        # Elsewhere the host would have to wait; ``update_keys_`` clamps.
        within = spare.device.type != "cpu" or bool(((usable >= 0) & (usable <= spare.shape[1])).all())
        require(within, f"expected usable between 0 and the {spare.shape[1]} spare rows")
        wanted["spare"] = spare, keys.dtype, (C, max(1, spare.shape[1]), D)
        wanted["usable"] = usable, torch.int64, (C,)
    for name, (tensor, dtype, shape) in wanted.items():
        require(
            tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device == keys.device,
            f"expected contiguous {name} {dtype} {shape} on {keys.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}",
        )
    state = {"keys": keys, "keys_avg": keys_avg, "cluster_size": cluster_size}
    require_apart(state, hits=hits, sums=sums, spare=spare, usable=usable)
    return exact
