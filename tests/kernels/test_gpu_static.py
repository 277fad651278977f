"""The machine code of every kernel, compiled ahead of time as the launches ask for it: no GPU is needed.

One pass over the launch table a target: nothing spills, everything fits, matrix units and wide accesses are used.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks.triton_static import machine_code  # noqa: E402
from benchmarks.triton_static.asymmetric_sums import asymmetric_sums  # noqa: E402
from benchmarks.triton_static.offline import COMPILE_ONLY, TARGETS, compiling_for  # noqa: E402
from kvb.kernels import launch  # noqa: E402
from kvb.kernels.launch_table import SEARCH  # noqa: E402

pytestmark = pytest.mark.compiled

# A key dim for every form and every column of the launch table, and a K for each of its regimes.
DIMS = (8, 14, 30, 32, 64, 128, 300)
PAIRS = (200, 256, 600, 5000)
# CI takes every kernel and table entry once a target; `make test-all` takes the whole product.
ENTRIES = (
    *((8, 200), (14, 256), (32, 200), (32, 256), (64, 200)),
    *((8, 600), (14, 5000), (32, 5000), (64, 5000), (128, 5000), (300, 600)),
)
# Kernels whose threads may disagree about the last bit of a sum, and why that decides nothing.
HARMLESS = {
    "settle": "two keys that the last bit can order are not certain in any thread",
    "refine": "the same",
    "resident": "only of the float64 distance, and one thread stores it",
}
PRODUCT = tuple((D, K) for D in DIMS for K in PAIRS)


def untouched(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def search(D, K, dtype=torch.float32, B=4096, C=2, topk=1, mask=False, padding=0):
    """``padding`` more columns in memory than the queries have, one of them in front."""
    keys = untouched(C, K, D, dtype=dtype)
    packed = untouched(C, launch.packed_nbytes(K, D, dtype), dtype=torch.uint8)
    allowed = untouched(C, K, dtype=torch.bool) if mask else None
    queries = untouched(B, 1, C, D + padding, dtype=dtype)
    launch.nearest(queries[..., padding > 0 :][..., :D], keys, packed, allowed, topk)


def update(D, dtype=torch.float32, spare=True):
    keys, rows = untouched(2, 600, D, dtype=dtype), untouched(2, 100, D, dtype=dtype) if spare else None
    exact = torch.promote_types(dtype, torch.float32)
    launch.update_keys_(
        *(keys, untouched(2, 600, D, dtype=dtype), untouched(2, 600, dtype=dtype)),
        *(untouched(2, 600, dtype=exact), untouched(2, 600, D, dtype=exact)),
        *(rows, untouched(2, dtype=torch.int64) if spare else None),
        *(0.9, 1e-5, 0.5, 1.0, False),
    )


def everything_else():
    """One launch of every kernel that the launch table of the search does not choose."""
    for dtype in (torch.float32, torch.bfloat16):
        launch.pack_keys(untouched(2, 600, 14, dtype=dtype))
        update(14, dtype)
    launch.pack_keys(untouched(2, 600, 300))
    update(64)
    update(300)
    update(14, torch.float64)
    update(14, spare=False)
    search(14, 600, mask=True, B=64)
    search(14, 600, B=4)
    search(14, 600, topk=3)
    search(6, 60, dtype=torch.float64)
    search(14, 5000, B=1, C=1)
    for D in (1, 2, 16, 32):
        search(D, 200, padding=1)
        search(D, 600, padding=1)
    search(140, 600, padding=1)
    keys, packed = untouched(2, 600, 14), untouched(2, launch.packed_nbytes(600, 14, torch.float32), dtype=torch.uint8)
    launch.lookup(untouched(4, 1, 2, 14), keys, packed, untouched(2, 600, 64), None, "none")
    indices = untouched(256, 1, 4, dtype=torch.int64)
    for dtype in (torch.float32, torch.float16, torch.float64):
        values, rows = untouched(4, 600, 64, dtype=dtype), untouched(256, 1, 4, 64, dtype=dtype)
        for layout_of_values in ("bscv", "bcsv"):
            launch.gather(values, indices, "none", layout_of_values)
        launch.gather(values, indices, "mean", "bscv")
        for K in (200, 600):
            launch.gather_backward(rows, indices, K, "none")
            launch.accumulate(rows, indices, K)
        launch.gather_backward_rows(rows, indices, 600, "none")
        launch.sgd_step_(values, indices, untouched(256, dtype=torch.int64), 0.3, 1.0, 0.1)
    launch.count(rows, indices, 600)


def test_an_index_out_of_bounds_stops_the_device():
    """The interpreter leaves these assertions out; the machine code has them, and never touches that memory."""
    with compiling_for("sm_90") as kernels:
        values, indices = untouched(4, 600, 64), untouched(256, 1, 4, dtype=torch.int64)
        launch.gather(values, indices, "none", "bscv")
        launch.gather(values, indices, "sum", "bscv")
        for K in (600, 200):
            launch.gather_backward(untouched(256, 1, 4, 64), indices, K, "none")
    asserting = {
        kernel.name: "__assertfail" in kernel.asm["ptx"] for kernel in kernels if "indices" in kernel.signature
    }
    assert asserting.pop("add_by_product") is False  # ``check_pairs`` runs in front of it
    assert set(asserting) == {"gather_each", "gather_pooled", "add_by_atomics", "check_pairs"}
    assert all(asserting.values())


def assembled(code):
    """What NVIDIA's assembler says of PTX for sm_90."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@triton.jit
def asserting_product(x, y, out, N, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(N):
        part = tl.load(x + step * SIZE * SIZE + at)
        tl.device_assert(part < 1, "too large")
        total += tl.dot(part, tl.load(y + at))
    tl.store(out + at, total)


def test_products_that_wait_for_one_another_are_seen():
    half = untouched(64, 64, dtype=torch.float16)
    with compiling_for("sm_90") as kernels:
        asserting_product[(1,)](half, half, untouched(64, 64), 3, SIZE=64, debug=True)
    assert "C7510" in assembled(kernels[0].asm["ptx"])


def check(kernels):
    """Hold kernels to the limits of their target; their machine code by kernel."""
    assert kernels
    codes = {kernel: machine_code.read(kernel) for kernel in kernels}
    assert all(kernel.metadata.name.startswith("kvb_") for kernel in kernels), "a profiler cannot tell whose they are"
    for kernel, code in codes.items():
        assert machine_code.excesses(kernel, code) == [], str(kernel)
        sums = asymmetric_sums(kernel)
        assert not sums or kernel.name in HARMLESS, f"{kernel}: {sums[0]}"
        assert kernel.name != "resident" or all("fadd double" in line for line in sums), f"{kernel}: {sums[0]}"
        if "wgmma" in kernel.asm.get("ptx", ""):
            assert "C7510" not in assembled(kernel.asm["ptx"]), f"the products of {kernel} wait for one another"
        if kernel.name in ("search", "resident"):
            assert code.total().matrix > 0, f"{kernel} does not use the matrix units"
            loads = code.search_loop().loads if kernel.name == "search" else code.total().loads
            # AMD's compiler moves tiles to shared memory in pieces whose width depends on its version.
            assert kernel.target.startswith("gfx") or max(loads, default=128) == 128, f"{kernel} loads {loads}"
    return codes


@pytest.mark.parametrize("target", TARGETS)
def test_every_entry_of_the_launch_table(target):
    with compiling_for(target) as kernels:
        for D, K in ENTRIES:
            search(D, K)
    codes = check(kernels)
    if target == "sm_90":
        loops = [code.search_loop() for kernel, code in codes.items() if kernel.name == "search"]
        assert loops
        assert not any(loop.shuffles for loop in loops), "scores leave their thread before the last key"
    if not SEARCH[target].filters:
        return
    filters = {(k.constants["BN"], k.constants["BK"], k.num_warps) for k in kernels if k.name == "search"}
    BNs = {entry.BN for entry in SEARCH[target].filters.values()}
    assert {BN for BN, _, _ in filters} == BNs


# One target of each family within a CI run; the launch table is compiled for all of them above.
OFTEN = ("sm_75", "sm_80", "sm_90", "gfx942")


@pytest.mark.parametrize("target", [pytest.param(t, marks=() if t in OFTEN else pytest.mark.slow) for t in TARGETS])
def test_every_other_kernel(target):
    with compiling_for(target) as kernels:
        everything_else()
    check(kernels)


@pytest.mark.parametrize("target", COMPILE_ONLY)
def test_other_machines_take_the_nearest_column(target):
    values, indices = untouched(4, 200, 64), untouched(256, 1, 4, dtype=torch.int64)
    with compiling_for(target) as kernels:
        search(14, 200)
        search(64, 600)
        launch.gather(values, indices, "mean", "bscv")
        launch.gather_backward(untouched(256, 1, 4, 64), indices, 200, "none")
    check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILE_ONLY)
def test_all_that_other_machines_may_run(target):
    with compiling_for(target) as kernels:
        for D, K in ENTRIES:
            search(D, K)
        everything_else()
    check(kernels)


def test_offsets_beyond_2_to_the_31_are_64_bits():
    """2^26 keys of 32 columns: the last tiles begin where 32 bits end."""
    with compiling_for("sm_90") as kernels:
        search(8, 1 << 26, C=1)
        search(32, 1 << 26, C=1)
    for kernel in kernels:
        if kernel.name == "search":
            step = kernel.constants["BK"] * kernel.constants["DP"]
            starts = re.findall(rf"arith\.muli %\S+, %c{step}_(i\d+)", kernel.asm["ttir"])
            assert starts
            assert set(starts) == {"i64"}, str(kernel)


@triton.jit
def sum_of_squares(x, out, BLOCK: tl.constexpr):
    part = tl.load(x + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), part * 0 + tl.sum(part * part, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_asymmetric_sums_are_found(target):
    """One product per thread is contracted with what another thread sends; two are summed up first."""
    with compiling_for(target) as kernels:
        for size in (32, 64, 512):
            x = untouched(size)
            sum_of_squares[(1,)](x, x, BLOCK=size, num_warps=1)
        sum_of_squares[(1,)](untouched(32), untouched(32), BLOCK=32, num_warps=1, enable_fp_fusion=False)
    alone, few, many, apart = kernels
    warp = alone.metadata.warp_size if target.startswith("gfx") else 32
    assert asymmetric_sums(alone)
    assert bool(asymmetric_sums(few)) == (warp == 64)
    assert not asymmetric_sums(many)
    assert not asymmetric_sums(apart)


@pytest.mark.parametrize("books_outermost", [False, True])
@pytest.mark.parametrize(("D", "K"), [(14, 600), (14, 200), (32, 5000)])
def test_twenty_batch_sizes_compile_once(D, K, books_outermost):
    keys = untouched(2, K, D)
    packed = untouched(2, launch.packed_nbytes(K, D, keys.dtype), dtype=torch.uint8)
    with compiling_for("sm_90") as kernels:
        for B in (65, *range(100, 2000, 101)):
            queries = untouched(2, B, 3, D).permute(1, 2, 0, 3) if books_outermost else untouched(B, 3, 2, D)
            launch.nearest(queries, keys, packed, None, 1)
    names = [kernel.name for kernel in kernels]
    assert len(names) == len(set(names)), names
    assert all(len(kernel.launches) == 20 for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_product_of_sizes(target, dtype):
    with compiling_for(target) as kernels:
        for D, K in PRODUCT:
            search(D, K, dtype)
            launch.pack_keys(untouched(2, K, D, dtype=dtype))
    check(kernels)
