"""The bottleneck under torch.compile, torch.export and torch.func."""

from __future__ import annotations

import io

import pytest
import torch
from small_models import make
from torch._dynamo.testing import CompileCounterWithBackend

from kvb import BottleneckOutput

pytestmark = pytest.mark.fallback


@pytest.mark.parametrize("only_values", [True, False])
def test_compile_fullgraph_in_eval(only_values):
    torch._dynamo.reset()
    module = make(return_values_only=only_values).freeze_keys().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    compilations = set()
    for batch in (4, 7, 9):
        x = torch.randn(batch, 3, 2, 5)
        got, want = compiled(x), module(x)
        pairs = [(got, want)] if only_values else zip(got, want, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # no recompilation over batch sizes


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_compile_fullgraph_in_training(threshold):
    """Moving averages, dead-code replacement and the backward pass in one graph."""
    torch._dynamo.reset()
    module, twin = (make(threshold_ema_dead_code=threshold) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (20, 30):
        x = torch.randn(batch, 3, 5)
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    torch.testing.assert_close(module.values.grad, twin.values.grad)
    if threshold == 0:
        torch.testing.assert_close(module.keys, twin.keys)
    assert torch.equal(module.cluster_size.isfinite(), twin.cluster_size.isfinite())


def test_compile_fullgraph_while_counting():
    torch._dynamo.reset()
    module = make().freeze_keys()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(20, 3, 5)).sum().backward()
    assert module.cluster_size_counter.sum() == 60


def test_export_with_dynamic_batch_and_save():
    module = make(return_values_only=False).freeze_keys().eval()
    x = torch.randn(4, 3, 2, 5)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 4, 9):
        x = torch.randn(batch, 3, 2, 5)
        got, want = loaded(x), module(x)
        assert isinstance(got, BottleneckOutput)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_function_transforms_on_the_module():
    module = make().freeze_keys().eval()
    x = torch.randn(6, 3, 5)
    state = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    module(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(state, x)["values"], module.values.grad)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x[:, None])["values"]
    torch.testing.assert_close(each.sum(0), module.values.grad)
    assert torch.equal(torch.vmap(lambda one: module(one[None])[0])(x), module(x))


def test_meta_device_runs_without_data():
    module = make(return_values_only=False).to("meta")
    out = module(torch.empty(6, 3, 2, 5, device="meta"))
    assert out.values.shape == (6, 3, 2, 4)
    assert {part.device.type for part in out} == {"meta"}


def test_no_host_synchronisation_per_batch():
    """Nothing outside the operators reads a tensor's data on the host, in any training mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    reads = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal", "unique_dim", "_unique2"}

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    module = make(threshold_ema_dead_code=0.5, return_values_only=False)
    x = torch.randn(8, 3, 5)
    module(x)
    with Spy():
        module(x)
    module.mask_pairs(torch.arange(33).view(3, 11) > 0)  # reads the mask, once
    with Spy():
        module(x)
    module.freeze_keys()
    module(x)
    with Spy():
        module(x).values.sum().backward()
    assert "accumulate" in seen
    assert "count" in seen
    assert not reads & set(seen)
