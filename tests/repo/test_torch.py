"""What kvb uses of PyTorch's private names: each does here what kvb expects of it, and says so where it is gone."""

from __future__ import annotations

import functools
import re
import runpy
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import register_sharding

from kvb import _torch

SOURCE = Path(_torch.__file__).read_text()
PATHS = sorted(set(re.findall(r'_private\(\s*"([\w.]+)"', SOURCE)))
BUILT_IN = ("torch.Tensor.", "torch.UntypedStorage.", "torch._C._FunctionBase.")  # types that keep their methods
LATE = ("torch.distributed.tensor.",)  # asked for where it is used, as its import takes long


@pytest.mark.parametrize("path", [path for path in PATHS if not path.startswith(BUILT_IN + LATE)])
def test_a_version_without_it_is_told_by_name(path, monkeypatch):
    owner, _, name = path.rpartition(".")
    found = sys.modules.get(owner)  # some packages hide their modules
    monkeypatch.delattr(found or functools.reduce(getattr, owner.split(".")[1:], torch), name)
    with pytest.raises(ImportError, match=rf"kvb needs {re.escape(path)}, which torch .* does not have: install"):
        runpy.run_path(_torch.__file__)


def test_a_version_without_a_method_is_told_by_name():
    with pytest.raises(ImportError, match=r"kvb needs torch.Tensor._no_such, which torch"):
        _torch._private("torch.Tensor._no_such")


def test_every_one_has_a_test():
    tested = Path(__file__).read_text()
    for name in re.findall(r"^(?:def )?([a-z]\w+)(?:\(|: )", SOURCE, re.MULTILINE):
        assert f"_torch.{name}" in tested, name


def test_below_autograd_records_nothing():
    x = torch.ones(3, requires_grad=True)
    with _torch.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_a_kernel_of_the_bookkeeping_can_pass_on():
    library = torch.library.Library("kvb_test_torch", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    operator, seen = torch.ops.kvb_test_torch.twice.default, []

    def run(keyset, x):
        seen.append(x)
        with _torch.below_bookkeeping():
            return operator.redispatch(keyset & _torch.after_bookkeeping, x)

    library.impl("twice", run, "ADInplaceOrView", with_keyset=True)
    assert operator(torch.ones(2)).tolist() == [2, 2]
    assert len(seen) == 1
    assert _torch.has_kernel("kvb_test_torch::twice", "ADInplaceOrView")
    assert not _torch.has_kernel("kvb_test_torch::twice", "CUDA")


def test_transforms_and_tangents_are_seen():
    seen = []

    def look(x):
        seen.append((_torch.transforms_active(), _torch.tangents_possible()))
        return x.sum()

    look(torch.ones(2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    torch.func.grad(look)(torch.ones(2))
    with forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [(False, False), (True, True), (True, True), (False, True)]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x):
        on = torch.is_grad_enabled()
        with _torch.derivatives_on():
            assert (on, torch.is_grad_enabled()) == (False, True)
            return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 2


def test_a_function_records_and_gradients_can_be_on_inside():
    x = torch.ones(2, requires_grad=True)
    _torch.record_of(Double)(x).sum().backward()
    assert x.grad.tolist() == [2, 2]
    with _torch.single_level_autograd():
        assert _torch.record_of(Double)(x).requires_grad
    assert not torch.is_grad_enabled() or x.requires_grad


def test_the_entry_of_an_operator_is_what_it_calls():
    x = torch.ones(2)
    assert torch.equal(_torch.entry_of(torch.ops.aten.mul.Tensor)(x, x + 1), x + 1)
    assert _torch.entry_of(len) is len


def test_assert_async():
    _torch.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        _torch.assert_async(torch.tensor(False), "not fine")


def test_sparse_tensors():
    places, rows = torch.tensor([[0, 2]]), torch.ones(2, 3)
    sparse = torch.sparse_coo_tensor(places, rows, (4, 3), check_invariants=False)
    assert not sparse.is_coalesced()
    assert torch.equal(_torch.coordinates(sparse), places)
    assert torch.equal(_torch.rows_of(sparse), rows)
    assert _torch.call_coalesced(sparse).is_coalesced()


def test_a_named_tuple_passes_through_trees():
    kind = namedtuple("kind", ["a", "b"])
    _torch.register_namedtuple(kind, serialized_type_name="kvb_test_torch.kind")
    leaves, spec = torch.utils._pytree.tree_flatten(kind(1, [2]))
    assert torch.utils._pytree.tree_unflatten(leaves, spec) == kind(1, [2])


def test_writes_and_holders_are_counted():
    x = torch.ones(3)
    before = _torch.version_of(x)
    x.add_(1)
    assert _torch.version_of(x) == before + 1
    x.data.add_(1)
    assert _torch.version_of(x) == before + 1
    storage = x.untyped_storage()
    address = _torch.address_of(storage)
    tensors, storages = _torch.users_of(x), _torch.users_of_storage(address)
    assert torch.ones(2).untyped_storage()._cdata != address
    for hold in (lambda: x.detach(), lambda: x.numpy(), lambda: memoryview(x.numpy()), lambda: torch.from_dlpack(x)):
        held = hold()
        assert (_torch.users_of(x), _torch.users_of_storage(address)) > (tensors, storages), held
        del held
        assert (_torch.users_of(x), _torch.users_of_storage(address)) == (tensors, storages)


def test_who_watches_a_call_is_seen():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Pass(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x, seen = torch.ones(2), []

    def look(x):
        seen.append((_torch.is_wrapped(x), _torch.dispatch_modes(), _torch.trace() is not None))
        return x * 2

    look(x)
    torch.vmap(look)(x)
    with Pass():
        look(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen == [(False, 0, False), (True, 0, False), (False, 1, False), (False, 0, True)]


def test_backward_passes_and_checkpoints_are_seen():
    x, seen = torch.ones(2, requires_grad=True), []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append((_torch.in_backward(), _torch.saving_hooks() is not None))
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append((_torch.in_backward(), _torch.graph_is_kept()))
            return grad

    Look.apply(x).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        out = Look.apply(x).sum()
    out.backward(retain_graph=True)
    assert seen == [(False, False), (True, False), (False, True), (True, True)]


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


@pytest.fixture
def lone_process(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.around = None

    def forward(self, x):
        self.around = _torch.active_ddp()
        return self.second(x)


def test_the_ddp_whose_forward_runs_is_known(lone_process):
    layers = Layers()
    model = torch.nn.parallel.DistributedDataParallel(layers, find_unused_parameters=True)
    assert _torch.active_ddp() is None
    model(torch.ones(1, 2))
    assert layers.around is model
    assert _torch.active_ddp() is None


def test_ddp_leaves_out_what_it_is_told(lone_process):
    layers = Layers()
    assert _torch.ignored_in_ddp(layers) == set()
    _torch.ignore_in_ddp(layers, {"first.weight", "first.bias"})
    assert _torch.ignored_in_ddp(layers) == {"first.weight", "first.bias"}
    model = torch.nn.parallel.DistributedDataParallel(layers)
    model(torch.ones(1, 2)).sum().backward()  # without find_unused_parameters the first layer would be missed
    model(torch.ones(1, 2)).sum().backward()


def test_a_joined_process_runs_the_forward(lone_process):
    model, runs = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)), []
    assert not _torch.has_lone_joins(model)
    with model.join():
        assert _torch.has_lone_joins(model)
        with _torch.joined_forward(model, lambda: runs.append(_torch.active_ddp())):
            assert not _torch.has_lone_joins(model)
            model.join_hook(divide_by_initial_world_size=True).main_hook()
    assert runs == [model]


def test_how_transforms_wrap():
    seen = []

    def note(x):
        seen.append((_torch.transforms_of(x), _torch.is_mapped(x)))
        return x.sum()

    x = torch.ones(2, 3)
    note(x)
    torch.func.grad(note)(x)
    torch.vmap(note)(x)
    torch.func.grad(lambda x: torch.vmap(note)(x).sum())(x)
    torch.func.hessian(note)(x)
    assert seen == [(0, False), (1, False), (1, True), (2, True), (2, False)]


def test_a_batched_backward_pass_maps():
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch.is_mapped(grad))
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Noted.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Noted.apply(x), x, torch.ones(2))
    assert seen == [True, False]


def test_a_constant_when_compiled():
    asked = []

    @_torch.constant_when_compiled
    def known(numbers):
        asked.append(len(numbers))
        return sorted(numbers, key=id)[0] > 0  # what the compiler cannot trace

    compiled = torch.compile(lambda x: x + known([1, 2]), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
    assert asked == [2]


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_split_tensor_of_a_sparse_part(mesh):
    like = DTensor.from_local(torch.zeros(4, 3), mesh, [Shard(0)])
    sparse = torch.sparse_coo_tensor(torch.tensor([[2]]), torch.ones(1, 3), (4, 3))
    whole = _torch.sparse_whole_of(like, sparse)
    assert whole.placements == like.placements
    assert whole.shape == like.shape
    assert whole._local_tensor is sparse  # to_local() makes a view, which a sparse tensor has not


def test_calls_of_a_split_operator_are_told_apart(mesh):
    """By an argument that is a str: with one rule for both, the second call would repeat the placement of the first."""
    library = torch.library.Library("kvb_test_split", "DEF")
    library.define("turned(Tensor x, str how) -> Tensor")
    library.impl("turned", lambda x, how: x.clone(), "CompositeExplicitAutograd")
    operator, asked = torch.ops.kvb_test_split.turned.default, []

    def rule(x, how):
        asked.append(how)
        return [([Shard(0)], [Shard(0), None])]

    register_sharding(operator)(rule)
    _torch.tell_calls_apart(operator, 1)
    split = DTensor.from_local(torch.zeros(4, 3), mesh, [Shard(0)])
    for how in ("left", "right", "left"):
        operator(split, how)
    assert {"left", "right"} <= set(asked)


def test_a_version_without_dispatch_of_split_tensors_is_told_by_name(monkeypatch):
    monkeypatch.delattr(DTensor, "_op_dispatcher")
    with pytest.raises(ImportError, match=r"kvb needs torch.distributed.tensor.DTensor._op_dispatcher, which torch"):
        _torch.tell_calls_apart(torch.ops.kvb.count.default, 2)


def test_what_inference_mode_made_can_be_saved():
    with torch.inference_mode():
        made = torch.tensor([2.0])
    kept = _torch.saveable(made)
    assert not kept.is_inference()
    assert _torch.saveable(kept) is kept
    weight = torch.ones(1, requires_grad=True)
    (weight * kept).sum().backward()
    assert weight.grad.tolist() == [2]


def test_a_step_is_hooked_where_somebody_looks_on():
    class Optimizer(torch.optim.Optimizer):
        @_torch.hooked_where_watched
        def step(self, closure=None):
            return closure()

    optimizer, calls = Optimizer([torch.ones(1)], {}), []
    assert Optimizer.step.hooked
    assert optimizer.step(lambda: "done") == "done"
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    assert optimizer.step(lambda: "done") == "done"
    assert calls == ["after"]
