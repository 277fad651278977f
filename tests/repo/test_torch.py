"""What kvb uses of PyTorch's private names: each does here what kvb expects of it, and says so where it is gone."""

from __future__ import annotations

import functools
import re
import runpy
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from kvb import _torch

SOURCE = Path(_torch.__file__).read_text()
PATHS = sorted(set(re.findall(r'_private\(\s*"([\w.]+)"', SOURCE)))
BUILT_IN = ("torch.Tensor.", "torch.UntypedStorage.", "torch._C._FunctionBase.")  # types that keep their methods


@pytest.mark.parametrize("path", [path for path in PATHS if not path.startswith(BUILT_IN)])
def test_a_version_without_it_is_told_by_name(path, monkeypatch):
    owner, _, name = path.rpartition(".")
    monkeypatch.delattr(functools.reduce(getattr, owner.split(".")[1:], torch), name)
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


def test_assert_async():
    _torch.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        _torch.assert_async(torch.tensor(False), "not fine")


def test_sparse_tensors():
    places, rows = torch.tensor([[0, 2]]), torch.ones(2, 3)
    sparse = torch.sparse_coo_tensor(places, rows, (4, 3), check_invariants=False)
    assert not sparse.is_coalesced()
    assert torch.equal(_torch.coordinates(sparse), places)
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
