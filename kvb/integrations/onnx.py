"""kvb's operators in ONNX: ``torch.onnx.export`` of modules whose keys are frozen, with the same codes.

The search is that of ``kvb/reference/search.py`` in ONNX's operators: a filter by a matrix product, here in float64,
and a rescore of every key within its proven bound, by direct difference in float64, in the order of sums of
``kvb/reference/arithmetic.py``. So indices are equal wherever a runtime rounds Sub, Mul and Add of doubles as IEEE 754
says, and float64 tells the distances apart. One codebook is searched at a time: nothing of size batch x codebooks x
keys is ever in memory.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from onnxscript import ir
from onnxscript import opset18 as op
from torch import Tensor, nn

OPSET = 18
_UNIT = sys.float_info.epsilon / 2  # the unit roundoff of float64
_TINY = sys.float_info.min
_FOLLOWED = 1e300  # a bound above it may have overflown on its way
_DOUBLE, _INTEGER, _BOOL = int(ir.DataType.DOUBLE), int(ir.DataType.INT64), int(ir.DataType.BOOL)
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_batch: bool = True,
    **options: Any,
) -> Any:
    """A module in ONNX, with kvb's operators in it, for any number of samples.

    Equivalent to ``torch.onnx.export(module, args, path, dynamo=True, custom_translation_table=translations(),
    dynamic_shapes=..., external_data=False)``.

    Args:
        module: in eval mode.
        args: an example of its arguments, tensors with the batch first.
        path: the file to write, if any. With ``external_data=True`` it may exceed 2 GB, in two files.
        dynamic_batch: any number of samples; else as many as in the example.
        options: of ``torch.onnx.export``: ``input_names=``, ``dynamic_shapes=``, ``external_data=`` and so on.
    Returns:
        the ``torch.onnx.ONNXProgram``.
    Raises:
        RuntimeError: a module in training mode. ValueError: an example of fewer than two samples, which PyTorch takes
        for the only number there is. torch.onnx's errors: something else in the module has no translation; draws at a
        temperature have none.
    Examples:
        >>> from kvb.integrations import onnx
        >>> module = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=3).freeze_keys().eval()
        >>> program = onnx.export(module, (torch.randn(2, 4, 8),), "memory.onnx")
        >>> program.model.graph.inputs[0].shape
        Shape([SymbolicDim('batch'), 4, 8])
    """
    if module.training:
        raise RuntimeError("export() expects a module in eval mode, in which keys do not learn: call module.eval()")
    if dynamic_batch and "dynamic_shapes" not in options:
        given = inspect.signature(module.forward).bind(*args, **(options.get("kwargs") or {})).arguments
        options["dynamic_shapes"] = _any_batch(given, torch.export.Dim("batch"))
    table = {**translations(), **options.pop("custom_translation_table", {})}
    defaults = {"opset_version": OPSET, "external_data": False, "verbose": False}
    return torch.onnx.export(module, args, path, dynamo=True, custom_translation_table=table, **{**defaults, **options})


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)`` for kvb's operators.

    Examples:
        >>> from kvb.integrations import onnx
        >>> sorted(operator.name() for operator in onnx.translations())
        ['kvb::gather', 'kvb::lookup', 'kvb::nearest', 'kvb::pack_keys']
    """
    kvb = torch.ops.kvb
    return {
        kvb.nearest.default: _nearest,
        kvb.lookup.default: _lookup,
        kvb.gather.default: _gather,
        kvb.pack_keys.default: _pack_keys,
    }


def _any_batch(given: Any, batch: Any) -> Any:
    """``dynamic_shapes`` of arguments, or of a part of them: the first axis of each tensor is the batch."""
    if isinstance(given, Tensor):
        if given.dim() and given.shape[0] < 2:
            raise ValueError(
                f"export() expects an example of at least two samples, got {given.shape[0]}: PyTorch takes 0 and 1 for "
                "fixed sizes; or pass dynamic_batch=False"
            )
        return {0: batch} if given.dim() else None
    if isinstance(given, Mapping):
        return {name: _any_batch(part, batch) for name, part in given.items()}
    return [_any_batch(part, batch) for part in given] if isinstance(given, (tuple, list)) else None


# --- the operators ----------------------------------------------------------------------------------------------------


class _Keys(NamedTuple):
    """What a search knows of all its keys, C first; a runtime computes it once, as it loads the model."""

    exact: Any  # [C, K, D] zero where a key cannot be fetched
    centred: Any  # [C, D, K] less the mean of those that can
    halves: Any  # [C, K] half of the squared norms of those, +inf where a key cannot be fetched
    usable: Any  # [C, K] bool
    centre: Any  # [C, D]
    radius: Any  # [C] the largest norm of a centred key


def _nearest(queries: Any, keys: Any, packed: Any, mask: Any, topk: int = 1) -> tuple[Any, Any]:
    """``kvb::nearest``: queries [B, S, C, D], keys [C, K, D] -> indices and distances [B, S, C, T]."""
    C, K, D = _sizes(keys)
    exact = ir.DataType.DOUBLE in (queries.dtype, keys.dtype)
    sizes = op.Slice(op.Shape(queries), _numbers([0]), _numbers([2]))  # B, S
    by_book = op.Transpose(op.Cast(queries, to=_DOUBLE), perm=[2, 0, 1, 3])
    rows = op.Reshape(by_book, op.Concat(_numbers([C]), op.ReduceProd(sizes), _numbers([D]), axis=0), allowzero=1)
    finite = _finite(rows)  # [C, N]
    rows = op.Where(op.Unsqueeze(finite, _numbers([-1])), rows, _real(0))
    found = op.Scan(rows, *_prepared(keys, mask), body=_one_codebook(K, D, topk), num_scan_inputs=7)  # [C, N, 2T]
    least, best = (op.Slice(found, _numbers([i * topk]), _numbers([(i + 1) * topk]), _numbers([-1])) for i in (0, 1))
    finite = op.Unsqueeze(finite, _numbers([-1]))
    least = op.Where(finite, least, _real(float("nan")))
    best = op.Where(finite, op.Cast(best, to=_INTEGER), _numbers(range(topk)))
    shape = op.Concat(_numbers([C]), sizes, _numbers([topk]), axis=0)
    best, least = (op.Transpose(op.Reshape(one, shape, allowzero=1), perm=[1, 2, 0, 3]) for one in (best, least))
    return best, least if exact else op.Cast(least, to=int(ir.DataType.FLOAT))


def _lookup(queries: Any, keys: Any, packed: Any, values: Any, mask: Any, pool: str = "none") -> tuple[Any, Any]:
    one_position = len(queries.shape) == 3
    rows = op.Unsqueeze(queries, _numbers([1])) if one_position else queries
    indices = op.Squeeze(_nearest(rows, keys, packed, mask, 1)[0], _numbers([-1]))
    out = _gather(values, indices, pool, "bscv")
    if one_position:
        out, indices = (op.Squeeze(found, _numbers([1])) for found in (out, indices))
    return out, indices


def _gather(values: Any, indices: Any, pool: str = "none", layout: str = "bscv") -> Any:
    """``kvb::gather``: values [C, K, V] at indices [B, S, C]."""
    C, K, V = _sizes(values)
    places = op.Add(op.Cast(indices, to=_INTEGER), _numbers([c * K for c in range(C)]))
    fetched = op.Gather(op.Reshape(values, _numbers([C * K, V])), places, axis=0)
    if pool == "none":
        return fetched if layout == "bscv" else op.Transpose(fetched, perm=[0, 2, 1, 3])
    half = values.dtype in _HALVES
    wide = op.Cast(fetched, to=int(ir.DataType.FLOAT)) if half else fetched
    pooled = (op.ReduceMean if pool == "mean" else op.ReduceSum)(wide, _numbers([2]), keepdims=0)
    return op.Cast(pooled, to=int(values.dtype)) if half else pooled


def _pack_keys(keys: Any) -> Any:
    """Nothing reads it: here keys are prepared where they are searched."""
    return op.Constant(value=ir.tensor(np.zeros((0,), np.uint8)))


# --- the search -------------------------------------------------------------------------------------------------------


def _prepared(keys: Any, mask: Any) -> _Keys:
    exact = op.Cast(keys, to=_DOUBLE)
    usable = _finite(exact) if mask is None else op.And(_finite(exact), mask)
    row = op.Unsqueeze(usable, _numbers([-1]))
    exact = op.Where(row, exact, _real(0))
    count = op.ReduceSum(op.Cast(row, to=_DOUBLE), _numbers([1]), keepdims=1)
    centre = op.Div(op.ReduceSum(exact, _numbers([1]), keepdims=1), op.Max(count, _real(1)))
    centred = op.Where(row, op.Sub(exact, centre), _real(0))
    squares = op.ReduceSumSquare(centred, _numbers([-1]), keepdims=0)
    halves = op.Where(usable, op.Mul(squares, _real(0.5)), _real(float("inf")))
    radius = op.Sqrt(op.ReduceMax(squares, _numbers([-1]), keepdims=0))
    by_channel = op.Transpose(centred, perm=[0, 2, 1])
    return _Keys(exact, by_channel, halves, usable, op.Squeeze(centre, _numbers([1])), radius)


def _one_codebook(K: int, D: int, topk: int) -> Any:
    """The body of a Scan: rows [N, D] and the parts of ``_Keys`` -> distances and, as doubles, indices [N, 2T].

    A score |k|^2/2 - q.k of a centred row and a centred key is off by at most (2D + 8) u (|q| r + r^2/2), and a little
    for products that underflow: see ``_filter`` of the reference. Half a rescored distance is off by (D + 3) u times
    itself at most. (2D + 8) u (|q| + r)^2 is more than both, so that whatever the rescore may put first is a candidate.
    Comparisons are negated so that NaN, from an overflow, stays one. Candidates are in the order of the keys, so that
    the first of equals is the lowest. Where fewer than T keys can be fetched, all keys are candidates.
    """
    body = _Body()
    rows = body.input("rows", None, D)
    keys = _Keys(
        exact=body.input("exact", K, D),
        centred=body.input("centred", D, K),
        halves=body.input("halves", K),
        usable=body.input("usable", K, dtype=ir.DataType.BOOL),
        centre=body.input("centre", D),
        radius=body.input("radius"),
    )
    centred = body("Sub", rows, keys.centre)
    scores = body("Sub", keys.halves, body("MatMul", centred, keys.centred))
    norm = body("Sqrt", body("ReduceSumSquare", centred, body.numbers([-1]), keepdims=1))
    reach = body("Add", norm, keys.radius)
    bound = body("Mul", reach, reach)  # [N, 1]
    error = body("Mul", body("Add", body("Mul", bound, body.real(_UNIT)), body.real(_TINY)), body.real(4 * D + 16))
    if topk == 1:
        worst = body("ReduceMin", scores, body.numbers([-1]), keepdims=1)
    else:
        lowest, _ = body.outputs("TopK", scores, body.numbers([topk]), largest=0)
        worst = body("Slice", lowest, body.numbers([topk - 1]), body.numbers([topk]), body.numbers([-1]))
    followed = body("LessOrEqual", bound, body.real(_FOLLOWED))
    limit = body("Where", followed, body("Add", worst, error), body.real(float("inf")))
    near = body("Not", body("Greater", scores, limit))  # [N, K]
    # Ones and zeros, counted exactly; of equals, TopK takes the first.
    ones = body("Cast", near, to=int(ir.DataType.FLOAT if K <= 1 << 24 else ir.DataType.DOUBLE))
    counts = body("Cast", body("ReduceSum", ones, body.numbers([-1]), keepdims=0), to=_INTEGER)
    most = body("ReduceMax", body("Concat", counts, body.numbers([topk]), axis=0), keepdims=1)  # [1]
    chosen, key = body.outputs("TopK", ones, most)  # [N, most]
    apart = body("Sub", body("Unsqueeze", rows, body.numbers([1])), body("Gather", keys.exact, key))
    distances = _fold(body, body("Mul", apart, apart), D)
    found = body("And", body("Cast", chosen, to=_BOOL), body("Gather", keys.usable, key))
    distances = body("Where", found, distances, body.real(float("inf")))
    least, place = body.outputs("TopK", distances, body.numbers([topk]), largest=0)
    best = body("Cast", body("GatherElements", key, place, axis=1), to=_DOUBLE)
    return body.graph(body("Concat", least, best, axis=1))


def _fold(body: _Body, terms: Any, size: int) -> Any:
    """Sums over the last axis, of a size, in the order of ``kvb.reference.arithmetic``."""
    axis = body.numbers([-1])
    while size > 1:
        half = size // 2
        ends = [body.numbers([at]) for at in (0, half, 2 * half, size)[: 3 + size % 2]]
        lower, upper, *rest = [body("Slice", terms, *pair, axis) for pair in pairwise(ends)]
        terms = body("Concat", body("Add", lower, upper), *rest, axis=-1)
        size -= half
    return body("Squeeze", terms, axis)


class _Body:
    """The graph of one iteration, with names that a graph around it does not have."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()
        self._inputs: list[Any] = []

    def input(self, name: str, *shape: int | None, dtype: Any = ir.DataType.DOUBLE) -> Any:
        value = ir.Value(name=f"kvb_{name}", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def __call__(self, name: str, *inputs: Any, **attributes: Any) -> Any:
        return self._tape.op(name, inputs, attributes)

    def outputs(self, name: str, *inputs: Any, **attributes: Any) -> tuple[Any, Any]:
        first, second = self._tape.op_multi_out(name, inputs, attributes, num_outputs=2)
        return first, second

    def numbers(self, of: int | Iterable[int]) -> Any:
        return self("Constant", value=_integers(of))

    def real(self, of: float) -> Any:
        return self("Constant", value=ir.tensor(np.array(of, np.float64)))

    def graph(self, output: Any) -> Any:
        nodes = self._tape.nodes
        for number, value in enumerate(value for node in nodes for value in node.outputs):
            value.name = f"kvb_{number}"
        output.type = ir.TensorType(ir.DataType.DOUBLE)
        return ir.Graph(self._inputs, [output], nodes=nodes, name="kvb_search_codebook")


# --- small things -----------------------------------------------------------------------------------------------------


def _finite(rows: Any) -> Any:
    """bool: whether all of the last axis of doubles is finite."""
    each = op.Cast(op.LessOrEqual(op.Abs(rows), _real(sys.float_info.max)), to=_INTEGER)
    return op.Cast(op.ReduceMin(each, _numbers([-1]), keepdims=0), to=_BOOL)


def _integers(of: int | Iterable[int]) -> Any:
    return ir.tensor(np.array(of if isinstance(of, int) else list(of), np.int64))


def _numbers(of: int | Iterable[int]) -> Any:
    return op.Constant(value=_integers(of))


def _real(of: float) -> Any:
    return op.Constant(value=ir.tensor(np.array(of, np.float64)))


def _sizes(table: Any) -> tuple[int, int, int]:
    """C, K and D or V, which a model knows when it is exported."""
    C, K, D = (int(size) for size in table.shape)
    return C, K, D
