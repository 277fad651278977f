"""Compiled and exported modules keep packed keys between calls as plain ones do, and never search old keys."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
import torch._inductor
from key_writers import WAYS, C, D, K
from torch._dynamo.testing import CompileCounterWithBackend

from kvb import KeyValueBottleneck
from kvb.ops import kept

pytestmark = pytest.mark.fallback

BATCH = ({0: torch.export.Dim("batch")},)


def make(**options):
    return KeyValueBottleneck(C, K, D, 4, **options).freeze_keys().eval()


def nearest(x, keys):
    return (x[:, :, None].double() - keys.double()).square().sum(-1).argmin(-1)


def operators_of(call, *args):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*args)
    return [e.name for e in profile.events() if e.name in ("kvb::pack_keys", "kvb::packed_matches")]


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_codes():
    """One graph for all modules of a kind."""
    torch._dynamo.reset()
    return torch.compile(lambda module, x: module.encode(x), backend="aot_eager")


@pytest.mark.parametrize("name", WAYS)
def test_what_was_written_is_searched(name, compiled_codes):
    module, x = make(), torch.randn(60, C, D)
    wrong = 0
    for _ in range(3):
        new = torch.randn(C, K, D)
        want = nearest(x, new)
        steps = WAYS[name](module, new)
        next(steps)
        for _ in range(3):
            compiled_codes(module, x)
        next(steps, None)
        del steps
        wrong += int((compiled_codes(module, x) != want).sum())
    assert wrong == 0


@pytest.mark.parametrize(
    ("options", "dynamic", "backend"),
    [
        ({}, None, "eager"),
        ({}, True, "aot_eager"),
        ({"topk": 2}, None, "aot_eager"),
        ({"return_values_only": False}, False, "aot_eager"),
        pytest.param({}, None, "inductor", marks=pytest.mark.slow),
        pytest.param({"return_values_only": False}, True, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_keys_are_packed_once_and_compared_where_somebody_may_have_written(options, dynamic, backend):
    torch._dynamo.reset()
    module, x = make(**options), torch.randn(5, C, D)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    for with_gradient in (False, True):
        with torch.set_grad_enabled(with_gradient):
            for _ in range(3):
                compiled(x)
            assert operators_of(compiled, x) == []
    module(x)
    assert operators_of(module, x) == []
    held = module.keys
    for _ in range(2):
        assert operators_of(compiled, x) == ["kvb::packed_matches"]
    held.data.mul_(-1)
    assert operators_of(compiled, x) == ["kvb::packed_matches", "kvb::pack_keys"]
    del held
    compiled(x)
    assert operators_of(compiled, x) == []


def test_keys_that_the_graph_itself_writes():
    torch._dynamo.reset()
    module, x = make(), torch.randn(60, C, D)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def moved(x, by):
        before = module.encode(x)
        module.keys.add_(by)
        return before, module.encode(x)

    for _ in range(4):
        by = torch.randn(C, K, D)
        want = nearest(x, module.keys), nearest(x, module.keys + by)
        assert all(torch.equal(*pair) for pair in zip(moved(x, by), want, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_keys_that_learn_in_one_graph_with_a_search(backend):
    torch._dynamo.reset()
    module, twin = (KeyValueBottleneck(C, K, D, 4) for _ in range(2))
    twin.load_state_dict(module.state_dict())

    def step(module, x):
        before = module.encode(x)
        return before, module(x).sum(), module.encode(x)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for each in range(6):
        x = torch.randn(60, C, D)
        for got, want in zip(compiled(module, x), step(twin, x), strict=True):
            torch.testing.assert_close(got, want)
        assert torch.equal(module.encode(x), nearest(x, module.keys))
        if each == 2:
            compilations = counter.frame_count
    assert counter.frame_count == compilations  # no recompilation from step to step


def test_modules_share_a_graph_and_not_their_keys():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda module, x: module.encode(x), fullgraph=True, backend=counter)
    first, x = make(), torch.randn(60, C, D)
    second = copy.deepcopy(first)
    second.keys.mul_(-1)
    for _ in range(3):
        for module in (first, second):
            assert torch.equal(compiled(module, x), nearest(x, module.keys))
    assert counter.frame_count == 1


def test_an_inference_module_compiles():
    torch._dynamo.reset()
    x = torch.randn(60, C, D)
    with torch.inference_mode():
        module = make().double()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            module.keys.mul_(-1)
            assert torch.equal(compiled(x), module(x))


# --- exported ---------------------------------------------------------------------------------------------------------


def exported(module, strict=False):
    return torch.export.export(module, (torch.randn(4, C, D),), dynamic_shapes=BATCH, strict=strict)


@pytest.mark.parametrize(("options", "strict"), [({}, False), ({"topk": 2}, True)], ids=str)
def test_a_program_packs_once(options, strict):
    module, x = make(**options), torch.randn(7, C, D)
    want = module(x)
    file = io.BytesIO()
    torch.export.save(exported(module, strict), file)
    file.seek(0)
    program = torch.export.load(file).module()
    assert operators_of(program, x).count("kvb::pack_keys") == 1
    assert operators_of(program, x) == []
    assert torch.equal(program(x), want)


def test_a_program_that_gets_other_keys_packs_them():
    module, x = make(return_values_only=False), torch.randn(60, C, D)
    program = exported(module).module()
    for write in (
        lambda new: program.load_state_dict({**program.state_dict(), "keys": new}),
        lambda new: program.load_state_dict({**program.state_dict(), "keys": new}, assign=True),
        lambda new: program.keys.copy_(new),
    ):
        for _ in range(2):
            program(x)
            new = torch.randn(C, K, D)
            write(new)
            assert torch.equal(program(x).indices, nearest(x, new))
    assert operators_of(program, x) == []


def test_a_program_of_an_inference_module():
    """Outside of inference_mode PyTorch exports no module that was made in it, not even a Linear."""
    x = torch.randn(60, C, D)
    with torch.inference_mode():
        module = make(return_values_only=False).double().float()
        program = exported(module).module()
    for _ in range(2):
        assert torch.equal(program(x).indices, nearest(x, program.keys))
        with torch.inference_mode():
            program.keys.mul_(-1)  # of which PyTorch keeps no count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_package_of_compiled_code(tmp_path):
    module, x = make(return_values_only=False), torch.randn(60, C, D)
    path = torch._inductor.aoti_compile_and_package(exported(module), package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for batch in (x, x[:1], x[:7]):
        assert all(torch.equal(*pair) for pair in zip(package(batch), module(batch), strict=True))
    assert operators_of(package, x) == []
    new = torch.randn(C, K, D)
    package.load_constants({"keys": new, "values": module.values.detach()}, check_full_update=False)
    assert torch.equal(package(x).indices, nearest(x, new))


def test_numbers_of_modules_that_are_gone():
    keys = torch.randn(C, K, D)
    module = make()
    number = kept.number_of(module._packed)
    del module
    assert torch.equal(torch.ops.kvb.kept_packed(keys, number), torch.ops.kvb.pack_keys(keys))
