"""The operator contract: schemas, shapes, gradients, batching, and which backend answers.

Letters, the same in Python, Triton and C++:
    B batch   S positions   C codebooks   K key-value pairs per codebook   D key dim   V value dim   T nearest keys

Each operator is one schema. The reference answers on every device (``CompositeExplicitAutograd``); a faster backend
registers the same schemas under its own dispatch key, and PyTorch's dispatcher picks. Nothing here computes.

Shapes:
    queries [B, S, C, D], any strides with a contiguous last axis    keys [C, K, D]    packed uint8 [C, nbytes]
    mask bool [C, K], True where a pair may be fetched               values [C, K, V]  indices [B, S, C], any integer
    ``nearest`` and ``sample`` return indices int64 and squared distances, both [B, S, C, T].
    A query with NaN or Inf gets the indices 0..T-1 at distance NaN; where fewer than T keys are usable, the lowest
    unused indices follow at distance +inf.
    ``packed_matches`` returns a bool []: whether ``packed`` was made of these keys, as they are now.
    ``sgd_step_`` writes values, takes targets int64 [B], and returns a loss [], a norm [] and logits [B, V].
    ``update_keys_`` writes keys, keys_avg [C, K, D] and cluster_size [C, K], all of one dtype; it takes hits [C, K] and
    sums [C, K, D] in float32 (float64 for float64 keys), spare rows [C, R, D] like the keys, and int64 usable [C].
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function

from kvb import reference

SCHEMAS = (
    "pack_keys(Tensor keys) -> Tensor",
    "packed_matches(Tensor keys, Tensor packed) -> Tensor",
    "nearest(Tensor queries, Tensor keys, Tensor packed, Tensor? mask, int topk) -> (Tensor, Tensor)",
    "sample(Tensor queries, Tensor keys, Tensor? mask, float temperature, Tensor seed, int topk=1) -> (Tensor, Tensor)",
    "gather(Tensor values, Tensor indices, str pool, str layout) -> Tensor",
    "gather_backward(Tensor grad, Tensor indices, SymInt K, str pool) -> Tensor",
    "gather_backward_rows(Tensor grad, Tensor indices, SymInt K, str pool) -> (Tensor, Tensor, Tensor)",
    "sgd_step_(Tensor(a!) values, Tensor indices, Tensor targets, float lr, float max_norm, float label_smoothing)"
    " -> (Tensor, Tensor, Tensor)",
    "update_keys_(Tensor(a!) keys, Tensor(b!) keys_avg, Tensor(c!) cluster_size, Tensor hits, Tensor sums,"
    " Tensor? spare, Tensor? usable, float decay, float eps, float threshold, float start, bool rescale_all) -> Tensor",
    "accumulate(Tensor queries, Tensor indices, SymInt K) -> (Tensor, Tensor)",
    "count(Tensor queries, Tensor indices, SymInt K) -> Tensor",
    "lookup(Tensor queries, Tensor keys, Tensor packed, Tensor values, Tensor? mask, str pool) -> (Tensor, Tensor)",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
IN_PLACE = tuple(name for name in NAMES if name.endswith("_"))  # they write their first arguments

if hasattr(torch.ops.kvb, NAMES[0]):
    raise ImportError("kvb.ops cannot be loaded twice: PyTorch keeps operators as long as a process lives; restart it")
_library = torch.library.Library("kvb", "DEF")


# --- the reference backend --------------------------------------------------------------------------------------------


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round the reference's inner products to half precision."""

    @functools.wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return operator(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *rest)

    return run


for _schema, _name in zip(SCHEMAS, NAMES, strict=True):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _without_autocast(getattr(reference, _name)), "CompositeExplicitAutograd")


# --- the fast backends ------------------------------------------------------------------------------------------------

CPU_CAPABILITIES = ("torch", "triton", "portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")


def _no_kernels() -> str:
    """Why there are no kernels here; empty where there are."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if importlib.util.find_spec("kvb.kernels") is None:
        return (
            "kvb/kernels is no folder, because this checkout was made without symbolic links: run `git config "
            "core.symlinks true`, delete kvb/kernels and run `git checkout kvb/kernels`; or copy kernels/ there"
        )
    return ""


@functools.cache
def _kernels() -> Any:
    """The Triton kernels, imported at the first call: Triton is large, and looks for a GPU."""
    return importlib.import_module("kvb.kernels.launch")


def _launcher(name: str) -> Callable[..., Any]:
    """The kernels' operator, or that of the reference where there is no kernel for it."""
    fallback = _without_autocast(getattr(reference, name))
    return lambda *args: getattr(_kernels(), name, fallback)(*args)


def _register_kernels(dispatch_key: str) -> None:
    for name in NAMES:
        if name != "packed_matches":
            _library.impl(name, _launcher(name), dispatch_key)

    def packed_matches(keys: Tensor, packed: Tensor) -> Tensor:
        return reference.packed_matches(keys, packed, _kernels().pack_keys)

    _library.impl("packed_matches", packed_matches, dispatch_key)


def _load_on_cpu() -> tuple[str, str]:
    """The backend of the CPU, and where that is plain PyTorch, why."""
    wish = os.environ.get("KVB_CPU_CAPABILITY")
    wish = "torch" if wish == "reference" else wish  # its name before 0.2
    if wish is not None and wish not in CPU_CAPABILITIES:
        raise ValueError(f"KVB_CPU_CAPABILITY={wish!r}: allowed values are {', '.join(CPU_CAPABILITIES)}")
    if wish == "torch":
        return "torch", "KVB_CPU_CAPABILITY=torch"
    if wish == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("KVB_CPU_CAPABILITY=triton runs the GPU's kernels interpreted: set TRITON_INTERPRET=1 too")
        if why := _no_kernels():
            raise ValueError(f"KVB_CPU_CAPABILITY=triton: {why}")
        _register_kernels("CPU")
        return "triton", ""
    try:
        importlib.import_module("kvb._C")  # which registers itself
    except ModuleNotFoundError:
        return "torch", (
            "the C++ extension was not built: pip install --no-build-isolation . with g++ and torch at hand"
        )
    except ImportError as error:
        warnings.warn(f"the C++ extension of kvb cannot be loaded, plain PyTorch runs instead: {error}", stacklevel=2)
        return "torch", f"the C++ extension cannot be loaded: {error}"
    return "cpp", ""


def _load_on_cuda() -> tuple[str, str]:
    """The same for CUDA and ROCm, which PyTorch calls CUDA too; nothing here touches a device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch", "this PyTorch was built without CUDA or ROCm"
    if why := _no_kernels():
        return "torch", why
    _register_kernels("CUDA")
    return "triton", ""


_backends = {"cpu": _load_on_cpu(), "cuda": _load_on_cuda()}
# Why a device type has no fast backend; empty where it has one.
absent = {device: why for device, (_, why) in _backends.items()}


def backend(device: str) -> str:
    """Which backend runs on a device type: "cpp", "triton" or "torch"."""
    return _backends.get(device, ("torch", ""))[0]


def operators(device: str) -> tuple[str, ...]:
    """The operators that the fast backend of a device type has; all others run in plain PyTorch."""
    if backend(device) == "torch":
        return ()
    if backend(device) == "triton":
        return tuple(name for name in NAMES if hasattr(_kernels(), name))
    key = device.upper()
    return tuple(name for name in NAMES if torch._C._dispatch_has_kernel_for_dispatch_key(f"kvb::{name}", key))


def _packed_nbytes(keys: Tensor) -> int:
    """Bytes of one packed codebook in the layout of the backend that runs on the device of ``keys``."""
    (_, K, D), name = keys.shape, backend(keys.device.type)
    if name == "cpp":
        return int(torch.ops.kvb.cpu_packed_nbytes(K, D, keys.dtype == torch.float64))
    layout = _kernels() if name == "triton" else reference
    return int(layout.packed_nbytes(K, D, keys.dtype))


# --- shapes without data ----------------------------------------------------------------------------------------------


def _distance_dtype(queries: Tensor, keys: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake_pack_keys(keys: Tensor) -> Tensor:
    return keys.new_empty((keys.shape[0], _packed_nbytes(keys)), dtype=torch.uint8)


def _fake_packed_matches(keys: Tensor, packed: Tensor) -> Tensor:
    return keys.new_empty((), dtype=torch.bool)


def _fake_search(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:3], topk)
    distances = queries.new_empty(shape, dtype=_distance_dtype(queries, keys))
    return queries.new_empty(shape, dtype=torch.int64), distances


def _fake_nearest(
    queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int
) -> tuple[Tensor, Tensor]:
    return _fake_search(queries, keys, topk)


def _fake_sample(
    queries: Tensor, keys: Tensor, mask: Tensor | None, temperature: float, seed: Tensor, topk: int = 1
) -> tuple[Tensor, Tensor]:
    return _fake_search(queries, keys, topk)


def _fake_gather(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    (B, S, C), V = indices.shape, values.shape[-1]
    if pool != "none":
        return values.new_empty((B, S, V))
    return values.new_empty((B, S, C, V) if layout == "bscv" else (B, C, S, V))


def _fake_gather_backward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
    return grad.new_empty((indices.shape[2], K, grad.shape[-1]))


def _fake_gather_backward_rows(grad: Tensor, indices: Tensor, K: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.sym_min(indices.numel(), indices.shape[2] * K)
    rows = grad.new_empty((size,), dtype=torch.int64)
    return rows, grad.new_empty((size, grad.shape[-1])), grad.new_empty((1,), dtype=torch.int64)


def _fake_sgd_step_(
    values: Tensor, indices: Tensor, targets: Tensor, lr: float, max_norm: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = _sum_dtype(values), (indices.shape[0], values.shape[2])
    loss, norm = (values.new_empty((), dtype=dtype) for _ in range(2))
    return loss, norm, values.new_empty(shape, dtype=dtype)


def _fake_update_keys_(keys: Tensor, *rest: Any) -> Tensor:
    return _fake_pack_keys(keys)


def _fake_accumulate(queries: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    C, D = queries.shape[2:]
    return _fake_count(queries, indices, K), queries.new_empty((C, K, D), dtype=_sum_dtype(queries))


def _fake_count(queries: Tensor, indices: Tensor, K: int) -> Tensor:
    return queries.new_empty((queries.shape[2], K), dtype=torch.int64)


def _fake_lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    indices = queries.new_empty(queries.shape[:3], dtype=torch.int64)
    return _fake_gather(values, indices, pool, "bscv"), indices


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A meta tensor among others leads here: the answer would be memory that nobody wrote."""

    @functools.wraps(fake)
    def run(*args: Any) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.dim() > 0}
        if len(devices) > 1:
            raise RuntimeError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
        return fake(*args)

    return run


for _name in NAMES:
    torch.library.register_fake(f"kvb::{_name}", _on_one_device(globals()[f"_fake_{_name}"]), lib=_library)


# --- gradients --------------------------------------------------------------------------------------------------------
# Values learn; queries learn through the distance to the key that was chosen; keys never learn by gradient.


def _below_autograd(operator: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _learns(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _saveable(indices: Tensor) -> Tensor:
    """Indices made under inference_mode, by a frozen encoder say, may be trained on later."""
    return indices.clone() if indices.is_inference() else indices


def _save_chosen(ctx: Any, queries: Tensor, keys: Tensor, indices: Tensor, distances: Tensor) -> None:
    """Keep the chosen keys, not all keys: those may move in place before the backward pass."""
    ctx.mark_non_differentiable(indices)
    ranks = [torch.ops.kvb.gather(keys, one, "none", "bscv") for one in indices.unbind(-1)]
    ctx.save_for_backward(queries, torch.stack(ranks, -2), distances)


def _distance_grad(ctx: Any, grad: Tensor) -> Tensor:
    """Gradient of sum((q - k)^2) for q, [B, S, C, D]; a rank without a key (distance inf or NaN) gives none."""
    queries, chosen, distances = ctx.saved_tensors
    grad = torch.where(distances.isfinite(), grad, 0)[..., None]
    apart = queries.to(grad.dtype)[..., None, :] - chosen.to(grad.dtype)
    return torch.where(grad != 0, 2 * apart * grad, 0).sum(-2).to(queries.dtype)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(queries: Tensor, keys: Tensor, packed: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
        return _below_autograd(torch.ops.kvb.nearest.default, queries, keys, packed, mask, topk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save_chosen(ctx, inputs[0], inputs[1], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _distance_grad(ctx, grads[1]), None, None, None, None


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, mask: Tensor | None, temperature: float, seed: Tensor, topk: int = 1
    ) -> tuple[Tensor, Tensor]:
        return _below_autograd(torch.ops.kvb.sample.default, queries, keys, mask, temperature, seed, topk)

    setup_context = _Nearest.setup_context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _distance_grad(ctx, grads[1]), *[None] * (len(ctx.needs_input_grad) - 1)  # a default is not passed on


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
        return _below_autograd(torch.ops.kvb.gather.default, values, indices, pool, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, indices, ctx.pool, ctx.layout = inputs
        ctx.K = values.shape[1]
        ctx.save_for_backward(_saveable(indices))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        transposed = ctx.pool == "none" and ctx.layout == "bcsv"
        grad = grads[0].transpose(1, 2) if transposed else grads[0]
        return torch.ops.kvb.gather_backward(grad, indices, ctx.K, ctx.pool), None, None, None


class _GatherRows(torch.autograd.Function):
    """``gather`` with a row-sparse gradient: merged rows from the kernel, never a dense [C, K, V]."""

    forward = _Gather.forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Gather.setup_context(ctx, inputs, output)
        ctx.shape = inputs[0].shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        transposed = ctx.pool == "none" and ctx.layout == "bcsv"
        grad = grads[0].transpose(1, 2) if transposed else grads[0]
        rows, merged, count = torch.ops.kvb.gather_backward_rows(grad, indices, ctx.K, ctx.pool)
        n = int(count)  # on another device the host waits here: a sparse tensor knows its size
        rows = rows[:n]
        places = torch.stack([rows // ctx.K, rows % ctx.K])
        sparse = torch.sparse_coo_tensor(places, merged[:n], ctx.shape, check_invariants=False, is_coalesced=True)
        return sparse, None, None, None


def gather_row_grad(values: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
    """``torch.ops.kvb.gather`` whose gradient for ``values`` is a coalesced sparse tensor, C and K its sparse axes.

    Sparse tensors cannot be traced: under ``torch.compile`` this breaks the graph once.
    """
    if not _learns(values):
        return torch.ops.kvb.gather(values, indices, pool, layout)
    apply = torch.compiler.disable(_GatherRows.apply) if torch.compiler.is_compiling() else _GatherRows.apply
    return apply(values, indices, pool, layout)


class _GatherBackward(torch.autograd.Function):
    """Linear in its input, so its own gradient is a gather: second derivatives come for free."""

    @staticmethod
    def forward(grad: Tensor, indices: Tensor, K: int, pool: str) -> Tensor:
        return _below_autograd(torch.ops.kvb.gather_backward.default, grad, indices, K, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pool = inputs[3]
        ctx.save_for_backward(_saveable(inputs[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return torch.ops.kvb.gather(grads[0], indices, ctx.pool, "bscv"), None, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
    ) -> tuple[Tensor, Tensor]:
        return _below_autograd(torch.ops.kvb.lookup.default, queries, keys, packed, values, mask, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.K, ctx.pool = inputs[3].shape[1], inputs[5]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return None, None, None, torch.ops.kvb.gather_backward(grads[0], indices, ctx.K, ctx.pool), None, None


def _register_autograd(name: str, function: type[torch.autograd.Function], learns: int) -> None:
    """Let ``function`` answer where argument ``learns`` requires a gradient, and pass by it everywhere else."""
    operator = getattr(torch.ops.kvb, name).default
    # What ``function.apply`` comes to, without a look at the signature of ``forward``, which would take most of a call.
    record = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(*args: Any) -> Any:
        if not _learns(args[learns]):
            return _below_autograd(operator, *args)
        if not torch._C._are_functorch_transforms_active():
            return record(*args)
        # Below the dispatcher a torch.func transform has already unwrapped its level: record at that level alone.
        with enable_single_level_autograd_function():
            return record(*args)

    _library.impl(name, run, "Autograd")


_register_autograd("nearest", _Nearest, learns=0)
_register_autograd("sample", _Sample, learns=0)
_register_autograd("gather", _Gather, learns=0)
_register_autograd("gather_backward", _GatherBackward, learns=0)
_register_autograd("lookup", _Lookup, learns=3)


def lookup(
    queries: Tensor, keys: Tensor, packed: Tensor, values: Tensor, mask: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kvb.lookup``, past the Python at its Autograd key where no value learns: a sixth of a small call."""
    arguments = queries, keys, packed, values, mask, pool
    if torch.compiler.is_compiling() or _learns(values):
        return torch.ops.kvb.lookup.default(*arguments)
    return _below_autograd(torch.ops.kvb.lookup.default, *arguments)


# --- operators that write ---------------------------------------------------------------------------------------------


def _register_write(name: str) -> None:
    """Tell autograd that the first arguments changed: what was saved of them for a backward pass is stale."""
    operator = getattr(torch.ops.kvb, name).default
    written = sum(argument.is_write for argument in operator._schema.arguments)

    def run(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version(args[:written])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(name, run, "ADInplaceOrView", with_keyset=True)


for _name in IN_PLACE:
    _register_write(_name)


# --- torch.vmap -------------------------------------------------------------------------------------------------------


def _slices(in_dims: Sequence[int | None], args: Sequence[Any], size: int) -> list[list[Any]]:
    return [
        [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        for i in range(size)
    ]


def _register_vmap(name: str, batch: int | None) -> None:
    """Fold a mapped axis of argument ``batch`` into its B; map anything else one slice at a time."""
    operator = getattr(torch.ops.kvb, name)

    def run(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        mapped = [i for i, dim in enumerate(in_dims) if dim is not None]
        if batch is not None and mapped == [batch]:
            moved = args[batch].movedim(in_dims[batch], 0)
            v, B = moved.shape[:2]
            out = operator(*args[:batch], moved.flatten(0, 1), *args[batch + 1 :])
            parts = [part.unflatten(0, (v, B)) for part in (out if isinstance(out, tuple) else (out,))]
        else:
            outs = [operator(*one) for one in _slices(in_dims, args, info.batch_size)]
            columns = zip(*outs, strict=True) if isinstance(outs[0], tuple) else (outs,)
            parts = [torch.stack(list(column)) for column in columns]
        return (tuple(parts), (0,) * len(parts)) if len(parts) > 1 else (parts[0], 0)

    torch.library.register_vmap(f"kvb::{name}", run, lib=_library)


for _name, _batch in (("nearest", 0), ("lookup", 0), ("gather", 1)):
    _register_vmap(_name, _batch)
for _name in set(NAMES) - {"nearest", "lookup", "gather", *IN_PLACE}:
    _register_vmap(_name, None)
