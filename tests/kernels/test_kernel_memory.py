"""The GPU kernels, interpreted: no launch reads or writes beyond its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvb import ops, reference

if ops.backend("cpu") != "triton":  # Triton decides at its import whether to interpret
    pytest.skip("kernels run where TRITON_INTERPRET=1 KVB_CPU_CAPABILITY=triton is set", allow_module_level=True)

import triton
import triton.language as tl
from launches import FEW, LAUNCHERS, require_the_nearest

from kvb.kernels import (
    launch_pack,
    launcher,
)
from kvb.testing.data import (
    a_slice,
    batch_last,
    clusters,
    codebooks_first,
    contiguous,
    lattice,
    one_codebook,
    overflowing,
)

pytestmark = [
    pytest.mark.contract,
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, where numbers overflow on purpose
]
op = torch.ops.kvb


GUARD = 1 << 18  # bytes before and behind: more than any tile that a kernel loads at once
POISONS = {"NaN": 0xFF, "zero": 0x00}  # the second is a key that could win, and a pair that exists


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Its first and its last byte but one, in its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize if tensor.numel() else start


def guarded(poison: int) -> Callable[..., None]:
    """A launcher whose kernels find every tensor amid poison, and must leave that as it is."""

    def run(kernel: Any, grid: tuple[int, ...], *options: launcher.Options, **arguments: Any) -> None:
        tensors = [argument for argument in arguments.values() if isinstance(argument, Tensor)]
        islands = {}
        for place in {tensor.untyped_storage().data_ptr() for tensor in tensors}:
            shared = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() == place]
            start, stop = min(_span(t)[0] for t in shared) // 64 * 64, max(_span(t)[1] for t in shared)
            island = torch.full((2 * GUARD + stop - start,), poison, dtype=torch.uint8)
            island[GUARD : GUARD + stop - start] = _bytes(shared[0])[start:stop]
            islands[place] = island, start, stop, _bytes(shared[0])

        def moved(tensor: Tensor) -> Tensor:
            island, start, _, _ = islands[tensor.untyped_storage().data_ptr()]
            first = (GUARD + _span(tensor)[0] - start) // tensor.itemsize
            return torch.empty(0, dtype=tensor.dtype).set_(
                island.untyped_storage(), first, tensor.shape, tensor.stride()
            )

        given = {name: moved(a) if isinstance(a, Tensor) else a for name, a in arguments.items()}
        launcher.run(kernel, grid, *options, **given)
        for island, start, stop, source in islands.values():
            end = GUARD + stop - start
            assert (island[:GUARD] == poison).all(), f"{kernel.fn.__name__} wrote in front of a tensor"
            assert (island[end:] == poison).all(), f"{kernel.fn.__name__} wrote behind a tensor"
            source[start:stop] = island[GUARD:end]

    return run


@pytest.fixture(params=POISONS)
def amid_poison(request, monkeypatch, poisoned) -> None:
    """Tensors of kernels lie amid poison, and what nothing was written to is poison itself."""
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "run", guarded(POISONS[request.param]))


@triton.jit
def copy_sixteen(source, out, first):
    place = first + tl.arange(0, 16)
    tl.store(out + place, tl.load(source + place))


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_guards_see_what_is_read_and_written(poison):
    run, fifteen, out = guarded(poison), torch.ones(15), torch.zeros(16)
    run(copy_sixteen, (1,), source=fifteen, out=out, first=0)
    assert out[:15].eq(1).all()
    assert not out[15].eq(1)
    run(copy_sixteen, (1,), source=torch.arange(20.0)[2:18], out=out, first=0)
    assert out.tolist() == list(range(2, 18))
    with pytest.raises(AssertionError, match="copy_sixteen wrote behind a tensor"):
        run(copy_sixteen, (1,), source=torch.ones(16), out=fifteen, first=0)
    with pytest.raises(AssertionError, match="copy_sixteen wrote in front of a tensor"):
        run(copy_sixteen, (1,), source=torch.ones(32)[1:], out=fifteen, first=-1)


@pytest.mark.parametrize("V", [1, 5, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_stays_in_its_memory(V, dtype, amid_poison):
    indices, targets = torch.randint(30, (7, 3, 2)), torch.randint(V, (7,))
    values = torch.randn(2, 30, V, dtype=dtype)
    mine, theirs = values.clone(), values.clone()
    got = op.sgd_step_(mine, indices, targets, 0.3, 0.01, 0.1)
    want = reference.sgd_step_(theirs, indices, targets, 0.3, 0.01, 0.1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("K", "D"), [(1, 1), (70, 14), (300, 3), (33, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_updates_stay_in_their_memory(K, D, dtype, amid_poison):
    state = torch.randn(2, K, D).to(dtype), torch.randn(2, K, D).to(dtype), torch.rand(2, K).to(dtype) + 0.1
    exact = torch.promote_types(dtype, torch.float32)
    hits = torch.randint(3, (2, K)).to(exact)
    given = hits, torch.randn(2, K, D, dtype=exact), torch.randn(2, 5, D).to(dtype), torch.tensor([3, 5])
    mine, theirs = [part.clone() for part in state], [part.clone() for part in state]
    packed = op.update_keys_(*mine, *given, 0.7, 1e-5, 0.5, 1.0, False)
    reference.update_keys_(*theirs, *given, 0.7, 1e-5, 0.5, 1.0, False)
    for part, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(part, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(packed, op.pack_keys(mine[0]))


# N, K, D, dtype, memory, masked, topk
SEARCHES = {
    "a small codebook": (20, 200, 33, torch.float32, contiguous, False, 1),
    "resident, one product": (70, 200, 32, torch.float32, codebooks_first, True, 1),
    "resident, one key": (17, 1, 1, torch.float16, a_slice, False, 1),
    "norms in one row": (20, 257, 10, torch.float32, contiguous, False, 1),
    "norms in spare columns": (20, 300, 14, torch.float16, a_slice, True, 1),
    "norms apart, two parts": (20, 600, 31, torch.float32, codebooks_first, False, 1),
    "pieces of columns": (20, 257, 130, torch.float32, contiguous, False, 1),
    "scan": (FEW, 70, 17, torch.float32, batch_last, True, 3),
    "scan of float64": (5, 33, 5, torch.float64, a_slice, False, 1),
    "parts": (FEW, 2100, 3, torch.float32, one_codebook, False, 1),
}


@pytest.mark.parametrize(("N", "K", "D", "dtype", "memory", "masked", "topk"), SEARCHES.values(), ids=SEARCHES)
def test_searches_stay_in_their_memory(N, K, D, dtype, memory, masked, topk, amid_poison):
    C = 1 if K > 2000 else 2
    # Far from zero: a key of poison would be the nearest.
    keys = (torch.randn(C, K, D) + 4).to(dtype)
    queries = memory((torch.randn(N, 1, C, D) / 9).to(dtype))
    mask = torch.rand(C, K) < 0.5 if masked else None
    require_the_nearest(queries, keys, mask, topk)


@pytest.mark.parametrize(("K", "D"), [(31, 5), (257, 14), (70, 130)])
def test_packed_keys_know_nothing_of_their_surroundings(K, D, monkeypatch, poisoned):
    keys, mask = torch.randn(2, K, D), torch.rand(2, K) < 0.7
    packed = []
    for run in (launcher.run, *(guarded(poison) for poison in POISONS.values())):
        monkeypatch.setattr(launch_pack, "run", run)
        packed.append(launch_pack.packed(keys, mask))
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])


@pytest.mark.parametrize(
    ("data", "K", "D"), [(lattice, 300, 3), (overflowing, 31, 64), (overflowing, 40, 8), (clusters, 200, 32)]
)
def test_listed_rows_stay_in_their_memory(data, K, D, amid_poison):
    require_the_nearest(*data(20, 2, K, D))


@pytest.mark.parametrize("K", [20, 300])
@pytest.mark.parametrize("sizes", [(7, 3, 2, 5), (40, 1, 3, 17), (1, 1, 1, 1)])
def test_values_stay_in_their_memory(sizes, K, amid_poison, monkeypatch):
    (B, S, C, V), values = sizes, torch.randn(sizes[2], K, sizes[3])
    indices = torch.randint(K, (B, S, C)) * (torch.rand(B, S, C) < 0.5)
    x = torch.randn(B, S, C, V + 1)[..., :V]
    for pool, layout in (("none", "bscv"), ("none", "bcsv"), ("mean", "bscv")):
        want = reference.gather(values, indices, pool, layout)
        torch.testing.assert_close(op.gather(values, indices, pool, layout), want, rtol=1e-6, atol=1e-6)
    for deterministic in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda answer=deterministic: answer)
        want = reference.gather_backward(x, indices, K, "none")
        torch.testing.assert_close(op.gather_backward(x, indices, K, "none"), want, rtol=1e-6, atol=1e-5)
        hits, sums = op.accumulate(x, indices, K)
        assert torch.equal(hits, reference.count(x, indices, K))
        torch.testing.assert_close(sums, want, rtol=1e-6, atol=1e-5)
    assert torch.equal(op.count(x, indices, K), hits)
    rows, grads, count = op.gather_backward_rows(x[:, :, 0], indices, K, "mean")
    want = reference.gather_backward_rows(x[:, :, 0], indices, K, "mean")
    assert torch.equal(rows, want[0])
    torch.testing.assert_close(grads, want[1], rtol=1e-6, atol=1e-5)
    assert torch.equal(count, want[2])
