"""Nobody can write to the keys and have the old ones searched: every way to write a tensor's memory that is known.

A way is a generator: what it does before its ``yield`` happens before the keys are packed, the rest afterwards. Nothing
here looks at the keys of the module in between, as a look would be noticed.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from kvb import KeyValueBottleneck, functional
from kvb.compat.key_value_bottleneck.core import KeyValueBottleneck as Replica
from kvb.modules import packed_keys

pytestmark = pytest.mark.fallback

C, K, D = 2, 24, 3
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


# --- at once ----------------------------------------------------------------------------------------------------------


def at_once(name, write):
    def run(module, new):
        yield
        write(module, new)

    WAYS[name] = run


def _data(module, new):
    module.keys.data = new.clone()


def _attribute(module, new):
    module.keys = new.clone()


def _data_item(module, new):
    module.keys.data[...] = new


def _item(module, new):
    module.keys[...] = new


def _ctypes(module, new):
    keys = module.keys
    ctypes.memmove(keys.data_ptr(), new.data_ptr(), new.nbytes)


def _memoryview(module, new):
    memoryview(module.keys.numpy()).cast("B")[:] = new.numpy().tobytes()


def _numpy_of_buffers(module, new):
    for name, buffer in module.named_buffers():
        if name == "keys":
            np.copyto(buffer.numpy(), new.numpy())


def _data_of_all(module, new):
    for buffer in nn.Sequential(module).buffers():
        if buffer.shape == new.shape:
            buffer.data.copy_(new)


def _state_dict(module, new):
    module.state_dict()["keys"].data.copy_(new)


def _load(module, new):
    module.load_state_dict({**module.state_dict(), "keys": new})


def _assign(module, new):
    module.load_state_dict({**module.state_dict(), "keys": new.clone()}, assign=True)


def _as_a_state_dict_is_loaded_in_place(module, new):
    with torch.autograd._unsafe_preserve_version_counter((module.keys,)):
        module.keys.copy_(new)


def _inference(module, new):
    with torch.inference_mode():
        module.keys.copy_(new)


def _swapped(module, new):
    torch.utils.swap_tensors(module.keys, new.clone())


def _sgd(module, new):
    keys = module.keys
    keys.grad = keys - new
    torch.optim.SGD([keys], lr=1.0, foreach=True).step()
    keys.grad = None
    keys.copy_(new)


def _averaged(module, new):
    source = copy.deepcopy(module)
    source.keys.copy_(new)
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    average.module, average.n_averaged = module, torch.zeros(())
    average.update_parameters(source)


def _unflattened(module, new):
    torch.nn.utils.vector_to_parameters(new.flatten(), [module.keys])


def _applied(module, new):
    module._apply(lambda tensor: new.clone() if tensor.shape == new.shape else tensor)


def _resized(module, new):
    module.keys.resize_(0).resize_(new.shape).copy_(new)


def _other_strides(module, new):
    module.keys.data = new.transpose(0, 2).contiguous().transpose(0, 2)


def _exchanged_at_one_address(module, new):
    keys = module.keys
    keys.set_(keys.untyped_storage(), 0, (C, K, D), (D, C * D, 1))  # the same memory in another order
    keys.data.copy_(new)


for _name, _write in {
    "copy_": lambda module, new: module.keys.copy_(new),
    "item": _item,
    "data.copy_": lambda module, new: module.keys.data.copy_(new),
    "data[...]": _data_item,
    "data =": _data,
    "attribute": _attribute,
    "numpy": lambda module, new: np.copyto(module.keys.numpy(), new.numpy()),
    "asarray": lambda module, new: np.copyto(np.asarray(module.keys), new.numpy()),
    "dlpack": lambda module, new: torch.from_dlpack(module.keys).copy_(new),
    "dlpack capsule": lambda module, new: torch.from_dlpack(torch.utils.dlpack.to_dlpack(module.keys)).copy_(new),
    "detach": lambda module, new: module.keys.detach().copy_(new),
    "view": lambda module, new: module.keys.data.view(-1).copy_(new.flatten()),
    "set_": lambda module, new: module.keys.set_(new.clone()),
    "storage": lambda module, new: module.keys.untyped_storage().copy_(new.untyped_storage()),
    "ctypes": _ctypes,
    "memoryview": _memoryview,
    "foreach": lambda module, new: torch._foreach_copy_([module.keys.data], [new]),
    "out=": lambda module, new: torch.add(new, 0, out=module.keys.data),
    "index_put_": lambda module, new: module.keys.data.index_put_((torch.arange(C),), new),
    "index_copy_": lambda module, new: module.keys.data.index_copy_(0, torch.arange(C), new),
    "scatter_": lambda module, new: module.keys.data.scatter_(0, torch.arange(C)[:, None, None].expand_as(new), new),
    "swap_tensors": _swapped,
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _assign,
    "state_dict": _state_dict,
    "no new version": _as_a_state_dict_is_loaded_in_place,
    "inference mode": _inference,
    "optimizer": _sgd,
    "AveragedModel": _averaged,
    "vector_to_parameters": _unflattened,
    "buffers": _data_of_all,
    "named_buffers": _numpy_of_buffers,
    "get_buffer": lambda module, new: module.get_buffer("keys").data.copy_(new),
    "_buffers": lambda module, new: module._buffers["keys"].data.copy_(new),
    "vars": lambda module, new: vars(module)["_buffers"]["keys"].data.copy_(new),
    "dict of buffers": lambda module, new: dict(module._buffers)["keys"].data.copy_(new),
    "buffers unpacked": lambda module, new: {**vars(module)["_buffers"]}["keys"].data.copy_(new),
    "buffers joined": lambda module, new: (vars(module)["_buffers"] | {})["keys"].data.copy_(new),
    "buffers got": lambda module, new: vars(module)["_buffers"].get("keys").data.copy_(new),
    "buffers copied": lambda module, new: copy.copy(module)._buffers["keys"].data.copy_(new),
    "_apply": _applied,
    "resize_": _resized,
    "other strides": _other_strides,
    "other order": _exchanged_at_one_address,
}.items():
    at_once(_name, _write)


# --- with something that was kept -------------------------------------------------------------------------------------


def kept(name, take, write=lambda held, new: held.copy_(new)):
    def run(module, new):
        held = take(module)
        yield
        write(held, new)

    WAYS[f"kept: {name}"] = run


def _rows(held, new):
    for row, fresh in zip(held, new, strict=True):
        row.copy_(fresh)


def _keys_among(held, new):
    for buffer in held:
        if buffer.shape == new.shape:
            buffer.data.copy_(new)


def _bytes(held, new):
    held[:] = new.numpy().tobytes()


def _step(held, new):
    held.param_groups[0]["params"][0].data.copy_(new)


def _writer(module):
    keys = module.keys
    return lambda new: keys.data.copy_(new)


for _name, _take, *_write in (
    ("data", lambda module: module.keys.data),
    ("keys", lambda module: module.keys, lambda held, new: held.data.copy_(new)),
    ("detached", lambda module: module.keys.detach(), lambda held, new: held.data.copy_(new)),
    ("view", lambda module: module.keys.data[:, :], lambda held, new: held.copy_(new)),
    ("rows", lambda module: list(module.keys.data), _rows),
    ("numpy", lambda module: module.keys.numpy(), lambda held, new: np.copyto(held, new.numpy())),
    ("memoryview", lambda module: memoryview(module.keys.numpy()).cast("B"), _bytes),
    ("dlpack", lambda module: torch.from_dlpack(module.keys)),
    ("storage", lambda module: module.keys.untyped_storage(), lambda held, new: held.copy_(new.untyped_storage())),
    ("state_dict", lambda module: module.state_dict(), lambda held, new: held["keys"].data.copy_(new)),
    ("buffers", lambda module: list(module.buffers()), _keys_among),
    ("iterator", lambda module: module.buffers(), _keys_among),
    ("dict", lambda module: vars(module), lambda held, new: held["_buffers"]["keys"].data.copy_(new)),
    ("_buffers", lambda module: module._buffers, lambda held, new: held["keys"].data.copy_(new)),
    ("items", lambda module: module._buffers.items(), lambda held, new: dict(held)["keys"].data.copy_(new)),
    ("values", lambda module: module._buffers.values(), _keys_among),
    ("weak reference", lambda module: weakref.ref(module.keys), lambda held, new: held().data.copy_(new)),
    ("twin", copy.copy, lambda held, new: held.keys.data.copy_(new)),
    ("optimizer", lambda module: torch.optim.SGD([module.keys], lr=1.0), _step),
    ("closure", _writer, lambda held, new: held(new)),
):
    kept(_name, _take, *_write)


@way
def another_module(module, new):
    other = nn.Module()
    other.register_buffer("mine", module.keys)
    yield
    other.mine.data.copy_(new)


@way
def shared_memory(module, new):
    module.share_memory()
    yield
    torch.from_dlpack(module.keys).copy_(new)


@way
def given_by_numpy(module, new):
    array = np.zeros((C, K, D), np.float32)
    module.keys = torch.from_numpy(array)
    yield
    array[...] = new.numpy()


@way
def given_by_a_buffer(module, new):
    memory = bytearray(new.nbytes)
    module.keys = torch.frombuffer(memory, dtype=torch.float32).view(C, K, D)
    yield
    memory[:] = new.numpy().tobytes()


@way
def a_slice_of_a_larger_tensor(module, new):
    whole = torch.zeros(2 * C, K, D)
    module.keys = whole[1 : 1 + C]
    yield
    whole.data[1 : 1 + C] = new


@way
def a_function_of_the_module(module, new):
    yield
    torch.func.functional_call(module, {}, (torch.randn(4, C, 1, D),))
    gc.collect()
    module.keys.data.copy_(new)


@way
def a_thread(module, new):
    start, keys = threading.Event(), module.keys

    def work():
        start.wait()
        keys.data.copy_(new)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    start.set()
    thread.join()


def write_in_a_child(module, new):
    """The keys lie in shared memory; a forked process writes them."""
    child = os.fork()
    if child == 0:
        np.copyto(module.keys.numpy(), new.numpy())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@way
def another_process(module, new):
    module.share_memory()
    yield
    write_in_a_child(module, new)


# --- every way, every module ------------------------------------------------------------------------------------------


def own(**options):
    return KeyValueBottleneck(C, K, D, 4, return_values_only=False, **options)


def replica(**options):
    return Replica(C, K, D, 4, return_values_only=False, **options)


def codes(module, x):
    """Indices [B, C] of a forward."""
    found = module(x)
    return (
        found.indices[..., 0]
        if isinstance(module, KeyValueBottleneck) and not isinstance(module, Replica)
        else found[2][:, :, 0, 0, 0]
    )


def nearest(x, keys):
    return (x[:, :, 0, None].double() - keys.double()).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("learning", [False, True], ids=["frozen", "learning"])
@pytest.mark.parametrize("build", [own, replica])
@pytest.mark.parametrize("name", WAYS)
def test_what_was_written_is_searched(name, build, learning):
    module, x = build(), torch.randn(60, C, 1, D)
    for _ in range(2):  # keys that an update packed, or that have been compared
        module(x)
    if not learning:
        module.freeze_keys().eval()
    wrong = 0
    for _ in range(3):
        new = torch.randn(C, K, D)
        want = nearest(x, new)
        steps = WAYS[name](module, new)
        next(steps)
        module.eval()
        for _ in range(3):
            codes(module, x)
        next(steps, None)
        del steps
        wrong += int((codes(module.train(learning), x) != want).sum())
    assert wrong == 0


def test_there_are_many_ways():
    assert len(WAYS) >= 60


# --- two threads, two processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [own, replica])
@pytest.mark.parametrize(
    "take", [lambda module: module.keys.data, lambda module: module.keys.numpy()], ids=["data", "numpy"]
)
def test_a_thread_that_writes_between_the_searches_of_another(build, take):
    module, x = build().freeze_keys().eval(), torch.randn(60, C, 1, D)
    news = torch.randn(50, C, K, D)
    turns, wrong = [threading.Semaphore(1), threading.Semaphore(0)], []

    def write():
        for new in news:
            turns[0].acquire()
            held = take(module)
            held[...] = new if isinstance(held, torch.Tensor) else new.numpy()
            del held
            turns[1].release()

    writer = threading.Thread(target=write)
    writer.start()
    for new in news:
        turns[1].acquire()
        wrong.append(int((codes(module, x) != nearest(x, new)).sum()))
        codes(module, x)
        turns[0].release()
    writer.join()
    assert sum(wrong) == 0


def test_threads_that_search_do_not_disturb_one_another():
    module, x = own().freeze_keys().eval(), torch.randn(60, C, 1, D)
    want, wrong = nearest(x, module.keys), []

    def search():
        wrong.extend(int((codes(module, x) != want).sum()) for _ in range(200))

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 800
    assert sum(wrong) == 0
    for _ in range(3):
        codes(module, x)
    assert module._packed._kept.alone


COLLECTIVES = """
    import os, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from kvb import KeyValueBottleneck
    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    torch.manual_seed(rank)
    C, K, D = 2, 40, 3
    torch.manual_seed(7); x = torch.randn(1000, C, D); torch.manual_seed(rank)

    def wrong(module):
        keys = [torch.empty(C, K, D) for _ in range(2)]
        found = module.encode(x)
        again = (x[..., None, :].double() - module.keys.double()).square().sum(-1).argmin(-1)
        dist.all_gather(keys, module.keys.clone())
        assert torch.equal(*keys)
        return int((found != again).sum())

    def prepared():
        module = KeyValueBottleneck(C, K, D, 2).freeze_keys().eval()
        for _ in range(3):
            module.encode(x)
        return module

    module = prepared()
    dist.broadcast(module.keys, 0)
    print("broadcast", wrong(module))
    module = prepared()
    held = module.keys
    module.encode(x)
    dist.all_reduce(held)
    del held
    print("all_reduce", wrong(module))
    module = prepared()
    held = module.keys
    for _ in range(3):
        module.encode(x)
        dist.broadcast(held.data, 1)
    print("kept", wrong(module))
    # Keys of rank 0 alone, then every forward synchronises the buffers.
    module = KeyValueBottleneck(C, K, D, 2, init_mode="kmeans")
    if rank == 0:
        torch.distributed.get_world_size = lambda *a: 1  # its own statistics
        module.init_keys(x, progress=False)
        torch.distributed.get_world_size = lambda *a: 2
        module.freeze_keys()
    parallel = DistributedDataParallel(module)
    for _ in range(3):
        parallel(x).sum().backward()
    print("ddp", wrong(module), module.keys_frozen, module.keys_initialised)
    module = KeyValueBottleneck(C, K, D, 2)
    parallel = DistributedDataParallel(module)
    for step in range(3):
        with torch.no_grad():
            module.keys.data.copy_(torch.randn(C, K, D))  # another on each rank, until the next forward
        parallel(x[:50] * (rank + 1)).sum().backward()
        assert len({*torch.stack([module.keys.sum()]).tolist()}) == 1
    module.freeze_keys()
    parallel(x[:50]).sum().backward()
    print("ddp learning", wrong(module))
    dist.destroy_process_group()
"""


def test_collectives_and_ddp_in_two_processes(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no distributed package")
    code, path = textwrap.dedent(COLLECTIVES), str(tmp_path / "store")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=240)
        assert out.splitlines() == ["broadcast 0", "all_reduce 0", "kept 0", "ddp 0 True True", "ddp learning 0"], err


# --- what it costs ----------------------------------------------------------------------------------------------------


def operators_of(module, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    return [
        e.name for e in profile.events() if e.name in ("kvb::pack_keys", "kvb::packed_matches", "kvb::update_keys_")
    ]


def test_keys_are_compared_only_where_somebody_may_have_written():
    module, x = own().freeze_keys().eval(), torch.randn(5, C, 1, D)
    module(x)
    assert operators_of(module, x) == []
    held = module.keys
    assert operators_of(module, x) == ["kvb::packed_matches"]
    assert operators_of(module, x) == ["kvb::packed_matches"]
    del held
    assert operators_of(module, x) == ["kvb::packed_matches"]
    assert operators_of(module, x) == []
    list(module.buffers())
    assert operators_of(module, x) == ["kvb::packed_matches"]
    assert operators_of(module, x) == []
    module.keys.add_(0)
    assert operators_of(module, x) == ["kvb::packed_matches"]
    module.keys.data.mul_(-1)
    assert operators_of(module, x) == ["kvb::packed_matches", "kvb::pack_keys"]
    assert operators_of(module, x) == []
    module.unfreeze_keys().train()
    module(x)
    assert operators_of(module, x) == ["kvb::update_keys_"]


def test_other_devices_pack_again_and_never_ask(monkeypatch):
    """As the host would have to wait for the answer."""
    module, x = own().freeze_keys().eval(), torch.randn(5, C, 1, D)
    module(x)
    monkeypatch.setattr(packed_keys, "_matches", lambda keys, packed: False)
    assert operators_of(module, x) == []
    held = module.keys
    assert operators_of(module, x) == ["kvb::pack_keys"]
    del held
    assert operators_of(module, x) == ["kvb::pack_keys"]
    assert operators_of(module, x) == []


def test_packed_keys_of_other_keys_are_refused():
    keys = torch.randn(C, K, D)
    packed = functional.pack_keys(keys)
    keys.data.mul_(-1)
    with pytest.raises(RuntimeError, match="packed keys do not match keys"):
        functional.nearest(torch.randn(3, 1, C, D), keys, packed=packed)
