"""Nobody can write to the keys and have the old ones searched, by any way that is known.

Nothing here looks at the keys of the module between a write and the search, as a look would be noticed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from key_writers import WAYS, C, D, K

from kvb import KeyValueBottleneck, functional
from kvb.compat.key_value_bottleneck.core import KeyValueBottleneck as Replica
from kvb.ops import kept

pytestmark = pytest.mark.fallback

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
    monkeypatch.setattr(kept, "matches", lambda keys, packed: False)
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


def test_what_a_transform_packed_is_not_kept_beyond_it():
    module, x = KeyValueBottleneck(2, 5, 3, 4).freeze_keys().eval(), torch.randn(6, 2, 3)
    want = module(x)

    def run(values):
        return torch.func.functional_call(module, {"values": values}, (x,))

    for _ in range(2):
        module.refresh_keys()
        torch.func.hessian(lambda values: run(values).square().sum())(module.values.detach())
        assert torch.equal(module(x), want)
        assert torch.func.jacrev(run)(module.values.detach()).shape == (6, 2, 4, 2, 5, 4)
