"""Every private part of PyTorch that kvb uses, each named once: what it does, and the error when it is gone."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _private(path: str) -> Any:
    """What ``path`` names within PyTorch; an ImportError that says which version lacks it."""
    found: Any = torch
    names = path.split(".")
    for depth, name in enumerate(names[1:], 2):
        found = getattr(found, name, sys.modules.get(".".join(names[:depth])))  # some packages hide their modules
        if found is None:
            raise ImportError(
                f"kvb needs {path}, which torch {torch.__version__} does not have: install a version of torch that "
                "kvb was released for, or a newer kvb"
            )
    return found


# Skips autograd in the calls within: the outputs carry no history, neither gradients nor tangents.
below_autograd: Callable[[], contextlib.AbstractContextManager[None]] = _private("torch._C._AutoDispatchBelowAutograd")
# Skips the bookkeeping of writes as well, which comes after autograd.
below_bookkeeping: Callable[[], contextlib.AbstractContextManager[None]] = _private(
    "torch._C._AutoDispatchBelowADInplaceOrView"
)
# The dispatch keys that come after that bookkeeping.
after_bookkeeping: Any = _private("torch._C._after_ADInplaceOrView_keyset")
# Whether a torch.func transform is under way.
transforms_active: Callable[[], bool] = _private("torch._C._are_functorch_transforms_active")
# Lets a torch.autograd.Function record at the level of the current torch.func transform alone.
single_level_autograd: Callable[[], contextlib.AbstractContextManager[None]] = _private(
    "torch._functorch.autograd_function.enable_single_level_autograd_function"
)
# Raises on the device where a condition does not hold; the host does not wait.
assert_async: Callable[[Tensor, str], None] = _private("torch._assert_async")

# Turns forward-mode differentiation on or off within.
_forward_mode: Callable[[bool], contextlib.AbstractContextManager[None]] = _private(
    "torch.autograd.forward_ad._set_fwd_grad_enabled"
)
# Whether an operator, "kvb::nearest" say, has a kernel of its own at a dispatch key, "CPU" say.
has_kernel: Callable[[str, str], bool] = _private("torch._C._dispatch_has_kernel_for_dispatch_key")

# Lets a named tuple pass through torch.export.
register_namedtuple: Callable[..., None] = _private("torch.utils._pytree._register_namedtuple")

# How often a tensor was written, as far as PyTorch knows.
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
# How many tensors of Python and C++ are this one, and how many share the storage at an address.
users_of: Callable[[Tensor], int] = _private("torch.Tensor._use_count")
users_of_storage: Callable[[int], int] = _private("torch._C._storage_Use_Count")
# Whether torch.func wraps a tensor.
is_wrapped: Callable[[Tensor], bool] = _private("torch._C._functorch.is_functorch_wrapped_tensor")
_is_batched: Callable[[Tensor], bool] = _private("torch._C._functorch.is_batchedtensor")
_keys_of: Callable[[Tensor], Any] = _private("torch._C._dispatch_keys")
_OLD_VMAP: Any = _private("torch._C._parse_dispatch_key")("Batched")  # that of is_grads_batched in torch.autograd.grad
_unwrapped: Callable[[Tensor], Tensor] = _private("torch._C._functorch.get_unwrapped")
# How many dispatch modes see the operators of this thread, and what torch.jit.trace keeps of them, or None.
dispatch_modes: Callable[[], int] = _private("torch._C._len_torch_dispatch_stack")
trace: Callable[[], Any] = _private("torch._C._get_tracing_state")

# Whether a profiler looks on, and the hooks before and after a step of any optimizer.
_profiler_on: Callable[[], bool] = _private("torch._C._autograd._profiler_enabled")
_optimizer_hooks: tuple[Any, Any] = (
    _private("torch.optim.optimizer._global_optimizer_pre_hooks"),
    _private("torch.optim.optimizer._global_optimizer_post_hooks"),
)
_private("torch.optim.Optimizer.profile_hook_step")

# The backward pass that this thread runs, or -1; and whether its graph is kept for another one.
_backward_pass: Callable[[], int] = _private("torch._C._current_graph_task_id")
graph_is_kept: Callable[[], bool] = _private("torch._C._autograd._get_current_graph_task_keep_graph")
# What packs and unpacks the tensors that autograd saves, or None.
_saving: Callable[[bool], Any] = _private("torch._C._autograd._top_saved_tensors_default_hooks")

# The DistributedDataParallel whose forward runs, or None.
active_ddp: Callable[[], Any] = _private("torch.nn.parallel.DistributedDataParallel._get_active_ddp_module")
# Leaves parameters and buffers of a module out of the DistributedDataParallel that will be around it.
ignore_in_ddp: Callable[[Any, set[str]], None] = _private(
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
)

_private("torch.Tensor._version")
_private("torch.UntypedStorage._cdata")
_private("torch._C._FunctionBase.apply")
_private("torch.Tensor._coalesced_")
_private("torch.Tensor._indices")
_private("torch.Tensor._values")
_private("torch.autograd.forward_ad._current_level")


def tangents_possible() -> bool:
    """Whether forward-mode differentiation may be under way: only then does a tensor carry a tangent.

    While torch.compile traces, PyTorch does not keep the level: any transform may be a torch.func.jvp.
    """
    return forward_ad._current_level >= 0 or transforms_active()


@contextlib.contextmanager
def derivatives_on() -> Iterator[None]:
    """Both modes of differentiation, for the outer of nested torch.func transforms.

    PyTorch turns them off around ``forward`` and ``jvp`` of a ``torch.autograd.Function``, for all levels at once.
    """
    with torch.enable_grad(), _forward_mode(True):
        yield


def transforms_of(tensor: Tensor) -> int:
    """How many nested torch.func transforms wrap it."""
    count = 0
    while is_wrapped(tensor):
        tensor, count = _unwrapped(tensor), count + 1
    return count


def is_mapped(tensor: Tensor) -> bool:
    """Whether torch.vmap maps over it, at any level of nested torch.func transforms, or a batched backward pass."""
    if _keys_of(tensor).has(_OLD_VMAP):
        return True
    while is_wrapped(tensor):
        if _is_batched(tensor):
            return True
        tensor = _unwrapped(tensor)
    return False


def record_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its look at the signature of ``forward``, which takes most of a small call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def entry_of(operator: Any) -> Callable[..., Any]:
    """What a call of ``torch.ops.kvb.<name>.default`` comes to, without the Python before it; else itself."""
    entry: Callable[..., Any] = getattr(operator, "_op", operator)
    return entry


def coordinates(sparse: Tensor) -> Tensor:
    """Where the rows of a sparse tensor lie, [axes, M], whether or not it is coalesced."""
    return sparse._indices()


def rows_of(sparse: Tensor) -> Tensor:
    """The rows of a sparse tensor, [M, ...], whether or not it is coalesced."""
    return sparse._values()


def call_coalesced(sparse: Tensor) -> Tensor:
    """The same tensor, declared coalesced: its rows are known to be in order and without repetition."""
    return sparse._coalesced_(True)


def tell_calls_apart(operator: Any, first: int) -> None:
    """Let DTensor remember the rule of an operator together with its arguments from the first that is no tensor.

    By itself it takes only int for such, no SymInt and no str, and would apply the rule of another call.
    """
    propagator = _private("torch.distributed.tensor.DTensor._op_dispatcher").sharding_propagator
    propagator.op_to_schema_info[operator].static_argnum = first


def sparse_whole_of(like: Any, part: Tensor) -> Any:
    """The DTensor, placed as another one, of which this process has a sparse part; no public function makes it."""
    return type(like)(part, like._spec, requires_grad=False)


def address_of(storage: torch.UntypedStorage) -> int:
    """What ``users_of_storage`` takes; good as long as somebody holds the storage."""
    return storage._cdata


def constant_when_compiled(function: _Function) -> _Function:
    """Mark a function as ``torch.compiler.assume_constant_result`` does, which would import the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def hooked_where_watched(step: _Function) -> _Function:
    """A step of an optimizer, with what PyTorch does around every step, for hooks and profilers, only where there are
    some: that takes longer than a small step.
    """
    watched = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def run(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or any(_optimizer_hooks)
        plain = not (hooks or torch.compiler.is_compiling() or _profiler_on())
        return step(optimizer, closure) if plain else watched(optimizer, closure)

    run.hooked = True  # type: ignore[attr-defined]  # else PyTorch does it
    return run  # type: ignore[return-value]


def in_backward() -> bool:
    """Whether a backward pass runs this call."""
    return _backward_pass() != -1


def saving_hooks() -> tuple[Any, Any] | None:
    """What packs and unpacks the tensors that autograd saves, where ``saved_tensors_hooks`` are active."""
    hooks: tuple[Any, Any] | None = _saving(False)
    return hooks


def joined_forward(model: Any, forward: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Within, a process that has joined a ``DistributedDataParallel`` runs ``forward`` where the others run theirs."""
    name = "_check_global_requires_backward_grad_sync"  # the last that is sent before a forward
    _private(f"torch.nn.parallel.DistributedDataParallel.{name}")
    own = getattr(model, name)

    def and_forward(is_joined_rank: bool) -> Any:
        found = own(is_joined_rank)
        if is_joined_rank:
            with model._inside_ddp_forward():
                forward()
        return found

    @contextlib.contextmanager
    def replaced() -> Iterator[None]:
        vars(model)[name] = and_forward
        try:
            yield
        finally:
            del vars(model)[name]

    return replaced()


def has_lone_joins(model: Any) -> bool:
    """Whether a ``DistributedDataParallel`` is within ``join``, and its joined processes run no forward."""
    return model._join_config.enable and "_check_global_requires_backward_grad_sync" not in vars(model)


def ignored_in_ddp(module: Any) -> set[str]:
    """The names that ``ignore_in_ddp`` was told of a module."""
    return set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def saveable(tensor: Tensor) -> Tensor:
    """For autograd, which refuses what was made in inference_mode: the indices and masks of a frozen encoder, say."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()
