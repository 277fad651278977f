"""Derivatives of the operators, in reverse and forward mode; what autograd learns about those that write.

Values learn; queries learn through the distance to the key that was chosen; keys never learn by gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from kvb._torch import (
    after_bookkeeping,
    below_autograd,
    below_bookkeeping,
    derivatives_on,
    entry_of,
    record_of,
    saveable,
    single_level_autograd,
    tangents_possible,
    transforms_active,
)
from kvb.ops.schemas import IN_PLACE, NAMES, SCHEMAS, library


def _forward(operator: Any, *args: Any) -> Any:
    """Run an operator in ``forward``: inside nested torch.func transforms the outer ones go on differentiating."""
    if not transforms_active():
        with below_autograd():
            return entry_of(operator)(*args)
    with derivatives_on(), below_autograd():
        return operator(*args)


def _learns(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _save(ctx: Any, *tensors: Tensor) -> None:
    """For ``backward``, and while forward-mode tangents exist for ``jvp`` as well."""
    ctx.save_for_backward(*tensors)
    if tangents_possible():
        ctx.save_for_forward(*tensors)


def _require_no_tangents(operator: str, *tensors: Tensor) -> None:
    if tangents_possible() and any(forward_ad.unpack_dual(one, level=0).tangent is not None for one in tensors):
        raise NotImplementedError(
            f"torch.ops.kvb.{operator} has no forward-mode derivative; call detach() on its arguments first"
        )


# --- distances --------------------------------------------------------------------------------------------------------


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
        return _forward(torch.ops.kvb.nearest.default, queries, keys, packed, mask, topk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the chosen keys, not all keys: those may move in place before the backward pass."""
        queries, keys, (indices, distances) = *inputs[:2], output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)  # to tell no tangent from one of zeros
        ranks = [torch.ops.kvb.gather(keys, one, "none", "bscv") for one in indices.unbind(-1)]
        _save(ctx, queries, torch.stack(ranks, -2), distances)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of sum((q - k)^2) for q, [B, S, C, D]."""
        none = [None] * len(ctx.needs_input_grad)  # as many as were passed on: a default is not
        if grads[1] is None:
            return tuple(none)
        queries, chosen, distances = ctx.saved_tensors
        grad = torch.where(distances.isfinite(), grads[1], 0)
        moved = 2 * _apart(queries, chosen, distances) * grad[..., None]
        return moved.sum(-2).to(queries.dtype), *none[1:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, Tensor | None]:
        """The same for a tangent of q: [B, S, C, T]."""
        if tangents[1] is not None:
            raise NotImplementedError(
                "expected keys without a tangent: keys never learn by gradient, and kvb has no derivative for them; "
                "call keys.detach() first"
            )
        if tangents[0] is None:
            return None, None
        # Their own tangents belong to the level of this derivative, not to those of the outer ones.
        queries, chosen, distances = (forward_ad.unpack_dual(saved, level=0).primal for saved in ctx.saved_tensors)
        with derivatives_on():
            tangent = tangents[0].to(distances.dtype)[..., None, :]
            return None, (2 * _apart(queries, chosen, distances) * tangent).sum(-1)


def _apart(queries: Tensor, chosen: Tensor, distances: Tensor) -> Tensor:
    """q - k, [B, S, C, T, D]; zero for a rank without a key, whose distance is inf or NaN and has no derivative."""
    apart = queries.to(distances.dtype)[..., None, :] - chosen.to(distances.dtype)
    return torch.where(distances.isfinite()[..., None], apart, 0)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, mask: Tensor | None, temperature: float, seed: Tensor, topk: int = 1
    ) -> tuple[Tensor, Tensor]:
        return _forward(torch.ops.kvb.sample.default, queries, keys, mask, temperature, seed, topk)

    setup_context = _Nearest.setup_context
    backward = _Nearest.backward
    jvp = _Nearest.jvp


# --- values -----------------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
        return _forward(torch.ops.kvb.gather.default, values, indices, pool, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, indices, ctx.pool, ctx.layout = inputs
        ctx.shape = values.shape
        _save(ctx, saveable(indices))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        grad, pool = _in_order(ctx, grads[0], indices)
        return gather_backward(grad, indices, ctx.shape[1], pool), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        """Linear in the values: their tangent is fetched like they are."""
        if tangents[0] is None:
            return None
        with derivatives_on():
            return torch.ops.kvb.gather(tangents[0], *ctx.saved_tensors, ctx.pool, ctx.layout)


def _in_order(ctx: Any, grad: Tensor, indices: Tensor) -> tuple[Tensor, str]:
    """The gradient of fetched values in the layout "bscv", and how those were pooled."""
    if ctx.layout == "bv":
        _, S, C = indices.shape
        grad = (grad / (S * C) if ctx.pool == "mean" else grad).unsqueeze(1)
        return (grad.expand(-1, S, -1) if S != 1 else grad), "sum"
    return grad.transpose(1, 2) if ctx.pool == "none" and ctx.layout == "bcsv" else grad, ctx.pool


class _GatherBackward(torch.autograd.Function):
    """Linear in its input, so its own gradient is a gather: second derivatives come for free."""

    @staticmethod
    def forward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
        return _forward(torch.ops.kvb.gather_backward.default, grad, indices, K, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.K, ctx.pool = inputs[2:]
        _save(ctx, saveable(inputs[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.kvb.gather(grads[0], *ctx.saved_tensors, ctx.pool, "bscv"), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        if tangents[0] is None:
            return None
        with derivatives_on():
            return torch.ops.kvb.gather_backward(tangents[0], *ctx.saved_tensors, ctx.K, ctx.pool)


class MergedRows(torch.autograd.Function):
    """Nothing differentiates merged rows, and nobody shall believe so."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[0], output[2])


def refusing(operator: str) -> Any:
    """The ``backward`` and the ``jvp`` of an operator that merges rows."""

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            f"torch.ops.kvb.{operator}, which makes the gradients of sparse_grad=True, has no derivative of its own: "
            "use sparse_grad=False for second derivatives"
        )

    return staticmethod(refuse)


class _GatherBackwardRows(MergedRows):
    backward = jvp = refusing("gather_backward_rows")

    @staticmethod
    def forward(grad: Tensor, indices: Tensor, K: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(torch.ops.kvb.gather_backward_rows.default, grad, indices, K, pool)


class _Accumulate(torch.autograd.Function):
    """Hits are constant; the sums are linear in the finite queries."""

    @staticmethod
    def forward(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
        return _forward(torch.ops.kvb.accumulate.default, queries, indices, K)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        queries, indices, ctx.K = inputs
        ctx.dtype = queries.dtype
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)
        _save(ctx, saveable(indices), queries.isfinite().all(-1, keepdim=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[1] is None:
            return None, None, None
        indices, finite = ctx.saved_tensors
        rows = torch.ops.kvb.gather(grads[1], indices, "none", "bscv")
        return torch.where(finite, rows, 0).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, Tensor | None]:
        if tangents[0] is None:
            return None, None
        indices, finite = ctx.saved_tensors
        with derivatives_on():
            return None, torch.ops.kvb.accumulate(torch.where(finite, tangents[0], torch.nan), indices, ctx.K)[1]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
    ) -> tuple[Tensor, Tensor]:
        return _forward(torch.ops.kvb.lookup.default, queries, keys, packed, values, mask, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.K, ctx.pool = inputs[3].shape[1], inputs[5]
        ctx.mark_non_differentiable(output[1])
        _save(ctx, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,), grad = ctx.saved_tensors, grads[0]
        if indices.dim() == 2:  # of one position
            indices, grad = indices.unsqueeze(1), grad.unsqueeze(1)
        return None, None, None, gather_backward(grad, indices, ctx.K, ctx.pool), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        """Which values are fetched does not change with the queries and keys, almost everywhere."""
        if tangents[3] is None:
            return None, None
        (indices,) = ctx.saved_tensors
        with derivatives_on():
            if indices.dim() == 2:  # of one position
                return torch.ops.kvb.gather(tangents[3], indices.unsqueeze(1), ctx.pool, "bscv").squeeze(1), None
            return torch.ops.kvb.gather(tangents[3], indices, ctx.pool, "bscv"), None


# --- registration -----------------------------------------------------------------------------------------------------


def differentiate(name: str, function: type[torch.autograd.Function], learns: tuple[int, ...]) -> None:
    """Let ``function`` run where one of the arguments requires a gradient, or while forward-mode tangents exist."""
    operator = getattr(torch.ops.kvb, name).default
    record, entry = record_of(function), entry_of(operator)

    def run(*args: Any) -> Any:
        # Every operator in a compiled graph comes this way, without gradients: no call more than needed.
        learning = torch.is_grad_enabled() and any(args[place].requires_grad for place in learns)
        if not (learning or tangents_possible()):
            with below_autograd():
                return entry(*args)
        if not transforms_active():
            return record(*args)
        # Below the dispatcher a torch.func transform has already unwrapped its level: record at that level alone.
        with single_level_autograd():
            return record(*args)

    library.impl(name, run, "Autograd")


differentiate("nearest", _Nearest, learns=(0,))
differentiate("sample", _Sample, learns=(0,))
differentiate("gather", _Gather, learns=(0,))
differentiate("gather_backward", _GatherBackward, learns=(0,))
differentiate("gather_backward_rows", _GatherBackwardRows, learns=(0,))
differentiate("accumulate", _Accumulate, learns=(0,))
differentiate("lookup", _Lookup, learns=(3,))


def _constant(name: str) -> Callable[..., Any]:
    """``torch.ops.kvb.<name>``, which has no derivative, without the Python before it."""
    operator = getattr(torch.ops.kvb, name).default
    entry = entry_of(operator)

    def call(*args: Any) -> Any:
        return operator(*args) if is_compiling() else entry(*args)

    return call


rows_to_places: Callable[..., Any] = _constant("rows_to_places")
places_to_rows: Callable[..., Any] = _constant("places_to_rows")


def _directly(name: str, function: type[torch.autograd.Function], learns: int) -> Callable[..., Any]:
    """``torch.ops.kvb.<name>``, past the way to the Python at its Autograd key: a third of a small call."""
    operator = getattr(torch.ops.kvb, name).default
    record, entry = record_of(function), entry_of(operator)

    def call(*args: Any) -> Any:
        if is_compiling() or tangents_possible():
            return operator(*args)
        if torch.is_grad_enabled() and args[learns].requires_grad:
            return record(*args)
        with below_autograd():
            return entry(*args)

    return call


gather: Callable[..., Any] = _directly("gather", _Gather, learns=0)
gather_backward: Callable[..., Any] = _directly("gather_backward", _GatherBackward, learns=0)
gather_backward_rows: Callable[..., Any] = _directly("gather_backward_rows", _GatherBackwardRows, learns=0)
lookup: Callable[..., Any] = _directly("lookup", _Lookup, learns=3)


def _keep_books(name: str, written: int) -> None:
    """Tell autograd that the first arguments change: what was saved of them for a backward pass is stale."""
    operator = getattr(torch.ops.kvb, name).default

    def run(keyset: Any, *args: Any) -> Any:
        _require_no_tangents(name, *args[:written])
        torch.autograd.graph.increment_version(args[:written])
        with below_bookkeeping():
            return operator.redispatch(keyset & after_bookkeeping, *args)

    library.impl(name, run, "ADInplaceOrView", with_keyset=True)


for _name in IN_PLACE:
    _keep_books(_name, written=SCHEMAS[NAMES.index(_name)].count("!)"))


def _writing(name: str) -> Callable[..., Any]:
    """``torch.ops.kvb.<name>``, which writes its first argument, past the way to the Python that keeps its books."""
    operator = getattr(torch.ops.kvb, name).default
    entry = entry_of(operator)

    def call(written: Tensor, *args: Any) -> Any:
        if is_compiling() or tangents_possible():
            return operator(written, *args)
        torch.autograd.graph.increment_version(written)
        with below_bookkeeping():
            return entry(written, *args)

    return call


clip_rows_: Callable[..., Any] = _writing("clip_rows_")
move_rows_: Callable[..., Any] = _writing("move_rows_")
