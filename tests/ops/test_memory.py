"""Direct calls of operators: what cannot be computed is an error, never a signal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvb import ops, reference

op = torch.ops.kvb
CPP = ops.backend("cpu") == "cpp"
BACKENDS = pytest.mark.parametrize("op", [torch.ops.kvb, reference], ids=["cpu", "torch"])
pytestmark = [pytest.mark.fallback, pytest.mark.memory]

if ops.backend("cpu") == "triton":
    pytest.skip("the checks of C++ and plain PyTorch", allow_module_level=True)


def calls(C=2, K=4, D=3, V=5, B=6):
    """One call of every operator, by the names of its tensors."""
    keys, values = torch.randn(C, K, D), torch.randn(C, K, V)
    queries, indices = torch.randn(B, 1, C, D), torch.randint(K, (B, 1, C))
    search = {"queries": queries, "keys": keys, "packed": None}
    return {
        "pack_keys": ({"keys": keys}, ()),
        "nearest": (search, (None, 1)),
        "lookup": ({**search, "values": values}, (None, "mean")),
        "gather": ({"values": values, "indices": indices}, ("none", "bscv")),
        "gather_backward": ({"grad": torch.randn(B, 1, C, V), "indices": indices}, (K, "none")),
        "gather_backward_rows": ({"grad": torch.randn(B, 1, V), "indices": indices}, (K, "mean")),
        "accumulate": ({"queries": queries, "indices": indices}, (K,)),
        "count": ({"queries": queries, "indices": indices}, (K,)),
        "sgd_step_": (
            {"values": values, "indices": indices, "targets": torch.randint(V, (B,))},
            (0.1, 1.0, 0.0),
        ),
        "rows_to_places": ({"rows": torch.randint(C * K, (B,))}, (K,)),
        "places_to_rows": ({"places": torch.randint(K, (2, B))}, (K,)),
        "clip_rows_": ({"grads": torch.randn(K, V), "places": torch.arange(K)[None]}, (0.1,)),
        "move_rows_": (
            {"values": values.view(C * K, V), "places": torch.arange(K)[None], "grads": torch.randn(K, V)},
            (0.1,),
        ),
        "tally_": (
            {
                "counts": torch.zeros(C, K, V),
                "indices": indices,
                "targets": torch.randint(V, (B,)),
                "weights": torch.ones(B, 1, C),
            },
            (False,),
        ),
        "update_keys_": (
            {
                "keys": keys,
                "keys_avg": keys.clone(),
                "cluster_size": torch.ones(C, K),
                "hits": torch.ones(C, K),
                "sums": torch.randn(C, K, D),
                "spare": torch.randn(C, 3, D),
                "usable": torch.full((C,), 3),
            },
            (0.9, 1e-5, 0.5, 1.0, False),
        ),
    }


def answer(op, name, tensors, options):
    tensors = dict(tensors)
    if "packed" in tensors and tensors["packed"] is None:
        tensors["packed"] = op.pack_keys(tensors["keys"])
    return getattr(op, name)(*tensors.values(), *options)


EVERY = [(name, tensor) for name, (tensors, _) in calls().items() for tensor in tensors]


@BACKENDS
@pytest.mark.parametrize(("name", "tensor"), EVERY)
@pytest.mark.parametrize("left", [0, 4])
def test_an_emptied_storage_is_an_error(op, name, tensor, left):
    tensors, options = calls()[name]
    if "packed" in tensors:
        tensors["packed"] = op.pack_keys(tensors["keys"])
    tensors[tensor].untyped_storage().resize_(left)
    with pytest.raises(
        RuntimeError, match=rf"expected {tensor} with memory for \d+ bytes, got a storage of {left} bytes"
    ):
        answer(op, name, tensors, options)


@BACKENDS
def test_what_is_written_shares_no_memory_with_what_is_read(op):
    values = torch.randn(2, 4, 5)
    codes = values.view(torch.int32)[:1, :1, :2].zero_()
    with pytest.raises(RuntimeError, match="expected indices that share no memory with the values written in place"):
        op.sgd_step_(values, codes, torch.zeros(1, dtype=torch.int64), 0.1, 1.0, 0.0)
    tensors, options = calls()["update_keys_"]
    shared = torch.randn(2, 12, 3)
    pairs = {"keys_avg": tensors["keys"], "sums": tensors["keys"], "hits": tensors["cluster_size"]}
    for name, other in pairs.items():
        with pytest.raises(RuntimeError, match="share no memory"):
            answer(op, "update_keys_", {**tensors, name: other}, options)
    overlapping = {"keys": shared.view(-1)[:24].view(2, 4, 3), "spare": shared.view(-1)[:18].view(2, 3, 3)}
    with pytest.raises(RuntimeError, match="share no memory"):
        answer(op, "update_keys_", {**tensors, **overlapping}, options)
    # Neighbours in one storage do not overlap.
    whole = torch.randn(48)
    answer(op, "update_keys_", {**tensors, "keys": whole[:24].view(2, 4, 3), "sums": whole[24:].view(2, 4, 3)}, options)


@BACKENDS
@pytest.mark.parametrize("empty", ["C", "K", "D"])
def test_a_search_needs_codebooks_keys_and_coordinates(op, empty):
    sizes = {"C": 2, "K": 4, "D": 3, empty: 0}
    keys, queries = torch.zeros(*sizes.values()), torch.zeros(1, 1, sizes["C"], sizes["D"])
    for call in (
        lambda: op.pack_keys(keys),
        lambda: op.nearest(queries, keys, torch.zeros(sizes["C"], 64, dtype=torch.uint8), None, 1),
        lambda: op.packed_matches(keys, torch.zeros(sizes["C"], 64, dtype=torch.uint8)),
    ):
        with pytest.raises(RuntimeError, match=r"expected keys \[C, K, D\], none of them 0"):
            call()


@pytest.mark.parametrize(("name", "tensor"), EVERY)
def test_a_tensor_without_data_among_others_is_an_error(name, tensor):
    tensors, options = calls()[name]
    if len(tensors) == 1:
        pytest.skip("there are no others")
    if "packed" in tensors:
        tensors["packed"] = op.pack_keys(tensors["keys"])
    with pytest.raises(RuntimeError, match="expected all tensors on one device, got cpu, meta"):
        answer(op, name, {**tensors, tensor: tensors[tensor].to("meta")}, options)


# --- out of memory ----------------------------------------------------------------------------------------------------


def limits_the_address_space() -> None:
    """Skips where that is impossible: a sanitizer needs it, and an emulator of processors gives what is asked for."""
    if sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("limits the address space")
    import resource

    before, probe = resource.getrlimit(resource.RLIMIT_AS), 1 << 46
    resource.setrlimit(resource.RLIMIT_AS, (probe, before[1]))
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] == probe
    resource.setrlimit(resource.RLIMIT_AS, before)
    if not limited:
        pytest.skip("the address space cannot be limited here")


LIMITED = """
import resource, torch, kvb
op = torch.ops.kvb
torch.set_num_threads({threads})
codes = torch.zeros(1, 1, 1, dtype=torch.int64)
keys, query = torch.randn(1, 4, 2), torch.randn(1, 1, 1, 2)
packed, small = op.pack_keys(keys), torch.zeros(1, 1, 1)
long = torch.randn(1, 1, 1, 600)
calls = dict(
    output=lambda: op.gather_backward(torch.randn(1, 1, 1, 1000), codes, 1 << 20, "none"),
    copy=lambda: op.pack_keys(small.expand(1, 1 << 20, 1 << 10)),
    scratch=lambda: op.accumulate(long, codes, 1 << 19),
    distances=lambda: op.lookup(query.expand(1 << 28, 1, 1, 2), keys, packed, torch.randn(1, 4, 1), None, "none"),
)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        print(name, error)
"""


@pytest.mark.skipif(not CPP, reason="messages of the C++ backend")
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_says_how_much_was_asked_for(threads):
    limits_the_address_space()
    done = subprocess.run([sys.executable, "-c", LIMITED.format(threads=threads)], capture_output=True, text=True)
    asked = {"output": 4194304000, "copy": 4294967296, "scratch": 2516582400, "distances": 2147483648}
    expected = [f"{name} not enough memory: {bytes} bytes cannot be allocated" for name, bytes in asked.items()]
    assert done.stdout.splitlines() == expected, done.stderr


ALL_OR_NOTHING = """
import resource, torch, kvb
op = torch.ops.kvb
torch.set_num_threads(2)
C, K, D = 8, 1 << 15, 64
state = torch.randn(C, K, D, dtype=torch.bfloat16), torch.randn(C, K, D).bfloat16(), torch.ones(C, K).bfloat16()
rest = torch.ones(C, K), torch.randn(C, K, D), None, None, 0.5, 1e-5, 0.5, 1.0, False
before = [part.clone() for part in state]
used = 4096 * int(open("/proc/self/statm").read().split()[0])
failed = 0
for spare in range(0, 240 << 20, 3 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
    try:
        op.update_keys_(*state, *rest)
    except RuntimeError as error:
        failed += 1
        assert "not enough memory" in str(error), error
        assert all(torch.equal(part, old) for part, old in zip(state, before)), "keys have moved"
    else:
        break
print(failed)
"""


@pytest.mark.skipif(not CPP, reason="memory that the C++ backend takes")
def test_keys_move_all_or_not_at_all():
    limits_the_address_space()
    done = subprocess.run([sys.executable, "-c", ALL_OR_NOTHING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
