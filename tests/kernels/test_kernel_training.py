"""The GPU kernels, interpreted: gradients, and keys that learn."""

from __future__ import annotations

import pytest
import torch

from kvb import KeyValueBottleneck, ops

if ops.backend("cpu") != "triton":  # Triton decides at its import whether to interpret
    pytest.skip("kernels run where TRITON_INTERPRET=1 KVB_CPU_CAPABILITY=triton is set", allow_module_level=True)


pytestmark = [
    pytest.mark.contract,
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, where numbers overflow on purpose
]
op = torch.ops.kvb


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_gradients_need_no_atomics(dtype, launched):
    indices = torch.randint(300, (40, 2, 3)) * (torch.rand(40, 2, 3) < 0.5)
    grad = torch.randn(40, 2, 3, 5, dtype=dtype)
    free = op.gather_backward(grad, indices, 300, "none")
    assert "add_by_atomics" in launched.names
    launched.clear()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (op.gather_backward(grad, indices, 300, "none") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "add_by_atomics" not in launched.names
    assert "join_runs" in launched.names
    assert torch.equal(first, again)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(first, free, rtol=2 * unit, atol=20 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_deterministic_gradients_are_the_merged_rows(pool, launched):
    """Bit for bit: the same kernels add the same numbers in the same order. Other ways add in another order."""
    indices = torch.randint(300, (40, 2, 3)) * (torch.rand(40, 2, 3) < 0.5)
    grad = torch.randn(40, 2, 3, 5) if pool == "none" else torch.randn(40, 2, 5)
    rows, grads, count = op.gather_backward_rows(grad, indices, 300, pool)
    merged = launched.names
    launched.clear()
    torch.use_deterministic_algorithms(True)
    try:
        dense = op.gather_backward(grad, indices, 300, pool)
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched.names == [name for name in merged if name != "find_runs"]
    n = int(count)
    assert torch.equal(dense.view(-1, 5)[rows[:n]], grads[:n])
    assert dense.count_nonzero() == grads.count_nonzero()


# --- keys that learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("D", "dtype", "kernels"),
    [
        (14, torch.float32, ["update", "pack"]),
        (64, torch.bfloat16, ["update", "pack"]),
        (65, torch.float32, ["update", "survey", "pack"]),
        (14, torch.float64, ["update"]),
    ],
)
def test_an_update_is_one_pass_and_a_packing(D, dtype, kernels, launched):
    state = torch.randn(2, 300, D).to(dtype), torch.randn(2, 300, D).to(dtype), torch.ones(2, 300).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    hits, sums = torch.ones(2, 300, dtype=exact), torch.randn(2, 300, D, dtype=exact)
    packed = op.update_keys_(*state, hits, sums, None, None, 0.9, 1e-5, 0.0, 1.0, False)
    assert launched.names == kernels
    assert torch.equal(packed, op.pack_keys(state[0]))


def test_the_next_forward_searches_what_the_update_packed(launched):
    module = KeyValueBottleneck(2, 40, 6, 3, threshold_ema_dead_code=0.9)
    for _ in range(2):
        launched.clear()
        module(torch.randn(5, 2, 6))
        packing = [name for name in launched.names if name in ("survey", "update", "pack")]
        # The interpreter holds on to what it launched, as somebody who may write would: the keys are compared, too.
        assert packing == ["survey", "pack", "update", "pack"]
        keys, packed = module._packed_keys()
        assert torch.equal(packed, op.pack_keys(keys))
