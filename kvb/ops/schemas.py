"""Every operator once: its schema, and the shapes of its results. What it computes: ``kvb/reference.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvb import reference
from kvb.ops import backends

if hasattr(torch.ops.kvb, "pack_keys"):
    raise ImportError("kvb.ops cannot be loaded twice: PyTorch keeps operators as long as a process lives; restart it")
library: torch.library.Library = torch.library.Library("kvb", "DEF")
_schemas: list[str] = []


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round the reference's inner products to half precision."""

    @functools.wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        backends.warn_where_slow(first.device.type)
        if not torch.is_autocast_enabled(first.device.type):
            return operator(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *rest)

    return run


def _with_packed_keys(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A search that takes what stands for packed keys as well: see ``kvb/ops/kept.py``."""

    @functools.wraps(operator)
    def run(queries: Tensor, keys: Tensor, packed: Tensor, *rest: Any) -> Any:
        if packed.dtype == torch.int64:
            packed = torch.ops.kvb.kept_packed(keys, packed)
        elif packed.shape == (keys.shape[0], 0):
            packed = torch.ops.kvb.pack_keys(keys)
        return operator(queries, keys, packed, *rest)

    return run


def _front(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel in Python gets its arguments from."""
    return _with_packed_keys(operator) if name in ("nearest", "lookup") else operator


def _reference(name: str) -> Callable[..., Any]:
    return _front(name, _without_autocast(getattr(reference, name)))


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A meta tensor among others leads here: the result would be uninitialised memory."""

    @functools.wraps(fake)
    def run(*args: Any) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.dim() > 0}
        if len(devices) > 1:
            raise RuntimeError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
        return fake(*args)

    return run


def _operator(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define the operator of the decorated function's name, and let the reference of that name run it everywhere.

    The function gets tensors without data, and returns such tensors in the shapes, dtypes and strides of the results.
    """

    def define(fake: Callable[..., Any]) -> Callable[..., Any]:
        name = fake.__name__
        _schemas.append(name + signature)
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _reference(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvb::{name}", _on_one_device(fake), lib=library)
        return fake

    return define


def _distance_dtype(queries: Tensor, keys: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _search(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:3], topk)
    distances = queries.new_empty(shape, dtype=_distance_dtype(queries, keys))
    return queries.new_empty(shape, dtype=torch.int64), distances


@_operator("(Tensor keys) -> Tensor")
def pack_keys(keys: Tensor) -> Tensor:
    return keys.new_empty((keys.shape[0], backends.packed_nbytes(keys)), dtype=torch.uint8)


@_operator("(Tensor keys, Tensor packed) -> Tensor")
def packed_matches(keys: Tensor, packed: Tensor) -> Tensor:
    return keys.new_empty((), dtype=torch.bool)


@_operator("(Tensor queries, Tensor keys, Tensor packed, Tensor? mask, int topk) -> (Tensor, Tensor)")
def nearest(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    return _search(queries, keys, topk)


@_operator(
    "(Tensor queries, Tensor keys, Tensor? mask, float temperature, Tensor seed, int topk=1) -> (Tensor, Tensor)"
)
def sample(
    queries: Tensor, keys: Tensor, mask: Tensor | None, temperature: float, seed: Tensor, topk: int = 1
) -> tuple[Tensor, Tensor]:
    return _search(queries, keys, topk)


@_operator("(Tensor values, Tensor indices, str pool, str layout) -> Tensor")
def gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    (B, S, C), V = indices.shape, values.shape[-1]
    if pool != "none":
        return values.new_empty((B, V) if layout == "bv" else (B, S, V))
    return values.new_empty((B, S, C, V) if layout == "bscv" else (B, C, S, V))


@_operator("(Tensor grad, Tensor indices, SymInt K, str pool) -> Tensor")
def gather_backward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
    return grad.new_empty((indices.shape[2], K, grad.shape[-1]))


@_operator("(Tensor grad, Tensor indices, SymInt K, str pool) -> (Tensor, Tensor, Tensor)")
def gather_backward_rows(grad: Tensor, indices: Tensor, K: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.sym_min(indices.numel(), indices.shape[2] * K)
    rows = grad.new_empty((size,), dtype=torch.int64)
    return rows, grad.new_empty((size, grad.shape[-1])), grad.new_empty((1,), dtype=torch.int64)


@_operator(
    "(Tensor(a!) values, Tensor indices, Tensor targets, float lr, float max_norm, float label_smoothing)"
    " -> (Tensor, Tensor, Tensor)"
)
def sgd_step_(
    values: Tensor, indices: Tensor, targets: Tensor, lr: float, max_norm: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = _sum_dtype(values), (indices.shape[0], values.shape[2])
    loss, norm = (values.new_empty((), dtype=dtype) for _ in range(2))
    return loss, norm, values.new_empty(shape, dtype=dtype)


@_operator("(Tensor rows, SymInt K) -> Tensor")
def rows_to_places(rows: Tensor, K: int) -> Tensor:
    return rows.new_empty((2, rows.shape[0]))


@_operator("(Tensor places, SymInt K) -> (Tensor, Tensor)")
def places_to_rows(places: Tensor, K: int) -> tuple[Tensor, Tensor]:
    return places.new_empty((places.shape[1],)), places.new_empty((), dtype=torch.bool)


@_operator("(Tensor(a!) grads, Tensor places, float max_norm) -> (Tensor, Tensor)")
def clip_rows_(grads: Tensor, places: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    return grads.new_empty((), dtype=_sum_dtype(grads)), places.new_empty((), dtype=torch.bool)


@_operator("(Tensor(a!) values, Tensor places, Tensor grads, float step) -> ()")
def move_rows_(values: Tensor, places: Tensor, grads: Tensor, step: float) -> None:
    return None


@_operator("(Tensor(a!) counts, Tensor indices, Tensor targets, Tensor? weights, bool remove) -> Tensor")
def tally_(counts: Tensor, indices: Tensor, targets: Tensor, weights: Tensor | None, remove: bool) -> Tensor:
    return counts.new_empty(())


@_operator(
    "(Tensor(a!) keys, Tensor(b!) keys_avg, Tensor(c!) cluster_size, Tensor hits, Tensor sums,"
    " Tensor? spare, Tensor? usable, float decay, float eps, float threshold, float start, bool rescale_all) -> Tensor"
)
def update_keys_(keys: Tensor, *rest: Any) -> Tensor:
    return pack_keys(keys)


@_operator("(Tensor queries, Tensor keys, int topk) -> (Tensor, Tensor)")
def product_nearest(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], topk)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=_sum_dtype(queries))


@_operator("(Tensor values, Tensor indices, Tensor weights) -> Tensor")
def gather_weighted(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return values.new_empty((indices.shape[0], values.shape[1]))


@_operator("(Tensor values, Tensor indices, Tensor vectors) -> Tensor")
def gather_dot(values: Tensor, indices: Tensor, vectors: Tensor) -> Tensor:
    return values.new_empty(indices.shape)


@_operator("(Tensor vectors, Tensor indices, Tensor weights, SymInt K) -> (Tensor, Tensor, Tensor)")
def scatter_weighted_rows(vectors: Tensor, indices: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.sym_min(indices.numel(), K)
    rows = vectors.new_empty((size,), dtype=torch.int64)
    return rows, vectors.new_empty((size, vectors.shape[1])), vectors.new_empty((1,), dtype=torch.int64)


@_operator("(Tensor queries, Tensor indices, SymInt K) -> (Tensor, Tensor)")
def accumulate(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    C, D = queries.shape[2:]
    return count(queries, indices, K), queries.new_empty((C, K, D), dtype=_sum_dtype(queries))


@_operator("(Tensor queries, Tensor indices, SymInt K) -> Tensor")
def count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    return queries.new_empty((queries.shape[2], K), dtype=torch.int64)


@_operator("(Tensor queries, Tensor keys, Tensor packed, Tensor values, Tensor? mask, str pool) -> (Tensor, Tensor)")
def lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    indices = queries.new_empty(queries.shape[:-1], dtype=torch.int64)
    books = indices.shape if pool == "none" else indices.shape[:-1]
    return values.new_empty((*books, values.shape[-1])), indices


SCHEMAS = tuple(_schemas)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
IN_PLACE = tuple(name for name in NAMES if name.endswith("_"))  # they write their first arguments

backends.register_kernels(library, {name: _reference(name) for name in NAMES}, _front)


def operators(device: str) -> tuple[str, ...]:
    """The operators that the fast backend of a device type has; all others run in plain PyTorch."""
    return backends.among(NAMES, device)
