"""The operators as functions: check the arguments, then call ``torch.ops.kvb``.

Letters: B batch, S positions, C codebooks, K key-value pairs per codebook, D key dim, V value dim.
Source of all: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvb import ops, validation
from kvb._torch import assert_async
from kvb.reference.values import LAYOUTS as LAYOUTS
from kvb.reference.values import POOLS as POOLS
from kvb.reference.values import TOGETHER
from kvb.reference.values import Layout as Layout
from kvb.reference.values import Pool as Pool


def _check_search(owner: str, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    validation.floating(owner, "queries", queries)
    validation.floating(owner, "keys", keys)
    validation.shape("keys", keys, "C K D", (None, None, None))
    C, K, D = keys.shape
    for name, size in (("codebooks", C), ("pairs", K), ("key dims", D)):
        if size == 0:
            raise ValueError(
                f"expected keys with at least one of each of (C, K, D), got no {name}: {tuple(keys.shape)}"
            )
    validation.shape("queries", queries, "B S C D", (None, None, C, D))
    validation.same_device("queries", queries, "keys", keys)
    if mask is not None:
        validation.mask(owner, mask, C, K)
        validation.same_device("mask", mask, "keys", keys)
    return queries if queries.stride(-1) == 1 else queries.contiguous()


def _packed(keys: Tensor, given: Tensor | None) -> Tensor:
    """The packed keys that the caller passes, if they belong to these keys; what stands for none of them for None."""
    if given is None:
        return ops.kept.unpacked(keys)
    validation.tensor("nearest", "packed", given)
    validation.same_device("packed", given, "keys", keys)
    matches = torch.ops.kvb.packed_matches(keys, given)
    message = (
        "packed keys do not match keys, which are others or have changed since; pack them again with pack_keys(keys)"
    )
    if keys.device.type == "cpu" and not torch.compiler.is_compiling():
        if not matches:
            raise RuntimeError(message)
    else:  # the host must not wait here: the device asserts it
        assert_async(matches, message)
    return given


def pack_keys(keys: Tensor) -> Tensor:
    """Prepare keys for several searches: pass the result as ``packed`` to ``nearest`` and ``lookup``.

    The bytes belong to the backend and device that made them; after any change of ``keys``, pack again.

    Args:
        keys: [C, K, D] float16, bfloat16, float32 or float64.
    Returns:
        packed: uint8 [C, bytes].
    Raises:
        TypeError: not a floating-point tensor. ValueError: not three axes.
    Examples:
        >>> keys = torch.randn(4, 16, 8)
        >>> packed = kvb.functional.pack_keys(keys)
        >>> indices, distances = kvb.functional.nearest(torch.randn(5, 1, 4, 8), keys, packed=packed)
    """
    validation.floating("pack_keys", "keys", keys)
    validation.shape("keys", keys, "C K D", (None, None, None))
    return torch.ops.kvb.pack_keys(keys)


def nearest(
    queries: Tensor,
    keys: Tensor,
    *,
    packed: Tensor | None = None,
    mask: Tensor | None = None,
    topk: int = 1,
) -> tuple[Tensor, Tensor]:
    """The nearest keys of every query in every codebook, by squared L2 distance.

    Equivalent to ``d = ((q[..., None, :] - k)**2).sum(-1); d.topk(topk, largest=False)``, without the [B, S, C, K]
    distances, and exact: the chosen key is the nearest one of the numbers given, not of a rounded expansion.

    Args:
        queries: [B, S, C, D] float16, bfloat16, float32 or float64, any strides.
        keys: [C, K, D], same device. float64 on either side makes the whole search float64.
        packed: ``pack_keys(keys)``, to share between calls; every call reads the keys once to check that they match.
            Pack where the same keys serve several calls, not for one: up to 16 queries (B * S) read the keys as they
            lie, on the CPU several times as fast as packing them, and for more the call packs them itself.
        mask: [C, K] bool, True where a key may be found.
        topk: how many keys, nearest first.
    Returns:
        indices: [B, S, C] int64, with a last axis T when ``topk`` > 1. Ties go to the lowest index. A query with NaN
            or Inf gets index 0 (0..T-1); a key with NaN or Inf is never found before a finite one.
        distances: the same shape, float32 (float64), squared and never negative; NaN for a query that is not finite,
            +inf where fewer than ``topk`` keys are usable. Differentiable with respect to ``queries``, given the
            indices.
    Raises:
        TypeError: not floating-point tensors, or a mask that is not bool. ValueError: ranks or sizes disagree, or
        ``topk`` > K. RuntimeError: devices differ, or ``packed`` was made from other keys.
    Examples:
        >>> keys = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])  # one codebook of two keys
        >>> kvb.functional.nearest(torch.tensor([[[[3.0, 3.0]]]]), keys)
        (tensor([[[1]]]), tensor([[[1.]]]))
    """
    queries = _check_search("nearest", queries, keys, mask)
    validation.topk(topk, keys.shape[1])
    packed = _packed(keys, packed)
    indices, distances = torch.ops.kvb.nearest(queries, keys, packed, mask, topk)
    return (indices, distances) if topk > 1 else (indices[..., 0], distances[..., 0])


def sample(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    mask: Tensor | None = None,
    topk: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw keys for every query with probability softmax(-distance / temperature) over its codebook.

    Equivalent to ``(-d / temperature + gumbel).topk(topk).indices`` with fresh Gumbel noise, in tiles: ``topk`` draws
    without replacement.

    Args:
        queries, keys, mask: as for ``nearest``.
        temperature: > 0; the closer to 0, the nearer the keys.
        topk: how many different keys to draw per query.
        generator: a CPU generator for the seed; PyTorch's default otherwise.
    Returns:
        indices [B, S, C] int64 and their squared distances, as ``nearest`` returns them; [B, S, C, T] for topk > 1.
    Raises:
        as ``nearest``; ValueError: temperature <= 0.
    Examples:
        >>> keys = torch.tensor([[[0.0], [1.0], [9.0]]])
        >>> indices, distances = kvb.functional.sample(torch.zeros(100, 1, 1, 1), keys, temperature=1.0)
        >>> sorted(set(indices.flatten().tolist()))  # the nearest often, the next at times, the far one never
        [0, 1]
    """
    queries = _check_search("sample", queries, keys, mask)
    validation.number("temperature", temperature, 0.0, float("inf"), open_low=True)
    validation.topk(topk, keys.shape[1])
    seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu", generator=generator)
    indices, distances = torch.ops.kvb.sample(queries, keys, mask, temperature, seed, topk)
    return (indices, distances) if topk > 1 else (indices[..., 0], distances[..., 0])


def gather(
    values: Tensor,
    indices: Tensor,
    *,
    pool: Pool = "none",
    pool_positions: bool = False,
    layout: Layout = "bscv",
    sparse_grad: bool = False,
) -> Tensor:
    """Fetch the values at ``indices``, optionally pooled over codebooks, and over positions too.

    Equivalent to ``values[arange(C), indices]`` followed by nothing, ``.mean(2)`` or ``.sum(2)``; and by ``.mean(1)``
    or ``.sum(1)`` with ``pool_positions``.

    Args:
        values: [C, K, V] floating point.
        indices: [B, S, C] of any integer dtype, same device.
        pool: "none", "mean" or "sum" over codebooks.
        pool_positions: pool over positions as well, the vote of all that a sample fetches. Needs a ``pool``.
        layout: "bscv", or "bcsv" with the codebooks before the positions; both are written directly.
        sparse_grad: make the gradient a coalesced sparse tensor of the rows fetched, never a dense [C, K, V].
    Returns:
        [B, S, C, V] or [B, C, S, V], pooled [B, S, V], over positions too [B, V]; dtype of ``values``, differentiable
        with respect to them.
    Raises:
        TypeError: indices that are not integers. ValueError: ranks or sizes disagree, unknown pool or layout, or
        ``pool_positions`` without a pool. IndexError: an index outside [0, K).
    Examples:
        >>> values = torch.arange(6.0).view(2, 3, 1)  # two codebooks of three values
        >>> kvb.functional.gather(values, torch.tensor([[[0, 2]]])).flatten()
        tensor([0., 5.])
        >>> kvb.functional.gather(values, torch.tensor([[[0, 2]]]), pool="mean")
        tensor([[[2.5000]]])
    """
    validation.floating("gather", "values", values)
    validation.shape("values", values, "C K V", (None, None, None))
    validation.integer("gather", "indices", indices)
    validation.shape("indices", indices, "B S C", (None, None, values.shape[0]))
    validation.same_device("indices", indices, "values", values)
    validation.choice("pool", pool, POOLS)
    validation.choice("layout", layout, LAYOUTS)
    if pool_positions and pool == "none":
        raise ValueError('pool_positions needs a pool over codebooks: expected pool="mean" or "sum", got "none"')
    fetch = ops.gather_row_grad if sparse_grad else ops.gather
    return fetch(values, indices, pool, TOGETHER if pool_positions else layout)


def lookup(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    packed: Tensor | None = None,
    mask: Tensor | None = None,
    pool: Pool = "none",
) -> tuple[Tensor, Tensor]:
    """For every query and codebook, fetch the value of the nearest key.

    Equivalent to ``i = ((q[..., None, :] - k)**2).sum(-1).argmin(-1); values[arange(C), i]``, without the
    [B, S, C, K] distances.

    Args:
        queries: [B, S, C, D] float16, bfloat16, float32 or float64; one head per codebook.
        keys: [C, K, D], same device as ``queries``.
        values: [C, K, V].
        packed: ``pack_keys(keys)``, to share between calls; when it pays, says ``nearest``.
        mask: [C, K] bool, True where a pair may be fetched.
        pool: "none", "mean" or "sum" over codebooks.
    Returns:
        out: [B, S, C, V], pooled [B, S, V]; dtype of ``values``, differentiable with respect to ``values`` only.
        indices: [B, S, C] int64; ties go to the lowest index.
    Raises:
        as ``nearest`` and ``gather``.
    Examples:
        >>> keys, values = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[10.0], [20.0]]])
        >>> kvb.functional.lookup(torch.tensor([[[[0.9]]]]), keys, values)
        (tensor([[[[20.]]]]), tensor([[[1]]]))
    """
    queries = _check_search("lookup", queries, keys, mask)
    validation.floating("lookup", "values", values)
    validation.shape("values", values, "C K V", (*keys.shape[:2], None))
    validation.same_device("values", values, "keys", keys)
    validation.choice("pool", pool, POOLS)
    packed = _packed(keys, packed)
    return ops.lookup(queries, keys, packed, values, mask, pool)
