"""The driver without a GPU and the reader of machine code, on small kernels whose code is known."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime import driver  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks import gpu_static  # noqa: E402
from benchmarks.shapes import GPU  # noqa: E402
from benchmarks.triton_static import kernels, machine_code, predict  # noqa: E402
from benchmarks.triton_static.machine_code import Instruction  # noqa: E402
from benchmarks.triton_static.offline import LIMITS, TARGETS, compiling_for  # noqa: E402

pytestmark = pytest.mark.compiled

NVIDIA = [target for target in TARGETS if target.startswith("sm")]


@triton.jit(do_not_specialize=["size"])
def add_one(source, out, size, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place * stride, tl.load(source + place, mask=place < size) + 1, mask=place < size)


@triton.jit
def least_product(queries, keys, out, K, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr):
    n, k, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, D)
    x = tl.load(queries + n[:, None] * D + d[None, :])
    best = tl.full((BN,), float("inf"), tl.float32)
    for first in range(0, K, BK):
        y = tl.load(keys + (first + k)[None, :] * D + d[:, None])
        best = tl.minimum(best, tl.min(tl.dot(x, y), 1))
    tl.store(out + n, best)


@triton.jit
def two_loops(source, out, n, m, BLOCK: tl.constexpr):
    """The inner loop cannot be moved out of the outer one; neither has a matrix product."""
    place = tl.arange(0, BLOCK)
    x = tl.load(source + place)
    for _ in range(n):
        for i in range(m):
            x = tl.exp2(x) + i
        tl.store(out + place, x)
        out += BLOCK


@triton.jit
def too_much(source, out, n, SIZE: tl.constexpr):
    """Keeps two numbers of every place alive: more than there are registers, where those are limited."""
    place = tl.arange(0, SIZE)
    a = tl.load(source + place)
    b = tl.load(source + SIZE + place)
    for _ in range(n):
        a, b = b * a + 1.0, a - b
    tl.store(out + place, a + b)


def compiled(target, kernel, *arguments, grid=(1,), **options):
    with compiling_for(target) as kernels:
        kernel[grid](*arguments, **options)
    (found,) = kernels
    return found


def numbers(size=4096, dtype=torch.float32):
    return torch.zeros(size, dtype=dtype)


def products(target, BN=128, BK=128, D=32, num_warps=4):
    half = numbers(128 * D, torch.float16)
    return compiled(target, least_product, half, half, numbers(), 128, BN=BN, BK=BK, D=D, num_warps=num_warps)


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_launches_compile_for_a_gpu_that_is_not_there(target):
    kernel = compiled(target, add_one, numbers(), numbers(), 1000, 1, BLOCK=256)
    assert kernel.name == "add_one"
    assert kernel.target == target
    assert kernel.constants == {"BLOCK": 256, "stride": 1}
    assert kernel.num_warps == 4
    assert kernel.shared <= LIMITS[target].shared
    assert ("cubin" if target in NVIDIA else "amdgcn") in kernel.asm


def test_arguments_are_specialised_as_on_the_machine():
    x = numbers()
    with compiling_for("sm_90") as kernels:
        for size, stride, grid in ((1000, 1, (4,)), (1001, 1, (5, 2)), (1000, 2, (4,)), (1000, 1, (4,))):
            add_one[grid](x, x, size, stride, BLOCK=256)
        assert len(kernels) == 2  # the stride is specialised on 1, the size is not specialised
        add_one[(4,)](x[1:], x, 1000, 1, BLOCK=256)  # not aligned
        add_one[(4,)](x.half(), x, 1000, 1, BLOCK=256)
    assert len(kernels) == 4
    assert [launch.grid for launch in kernels[0].launches] == [(4, 1, 1), (5, 2, 1), (4, 1, 1)]
    assert [launch.arguments["size"] for launch in kernels[0].launches] == [1000, 1001, 1000]
    assert kernels[0].launches[0].arguments == {"size": 1000, "stride": 1, "BLOCK": 256}
    assert kernels[0].signature["source"] == "*fp32"
    assert kernels[3].signature["source"] == "*fp16"


def test_tensors_without_memory_will_do():
    large = torch.empty(10**12, device="meta")
    assert len(compiled("sm_90", add_one, large, large, 10**12, 1, BLOCK=256).launches) == 1


def test_every_record_is_its_own():
    x = numbers()
    first, second = (compiled("sm_90", add_one, x, x, 1000, 1, BLOCK=256) for _ in range(2))
    assert first.asm["cubin"] == second.asm["cubin"]


def test_the_driver_before_comes_back():
    before = driver._active
    with compiling_for("sm_90"):
        with pytest.raises(ValueError, match="a failure"), compiling_for("gfx942"):
            raise ValueError("a failure")
        assert driver.active.get_current_target().arch == 90
    assert driver._active is before


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match="sm_80, sm_90.*got 'sm_70'"), compiling_for("sm_70"):
        pass


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compiling_for("sm_90"):
        pass


# --- the reader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_75"])  # without products to Triton
def test_the_loop_of_products_is_found_and_counted(target):
    code = machine_code.read(products(target))
    loop = code.search_loop()
    assert 0 < loop.matrix <= loop.all < code.total().all
    assert loop.alu > 0
    assert loop.barriers > 0
    assert loop.loads[128] > 0
    assert 0 < code.registers <= LIMITS[target].registers
    if target != "sm_100":  # where the shape of a product is no part of the instruction
        assert loop.flops * 4 == 2 * 128 * 128 * 32


def test_counts_of_a_known_loop():
    loop = machine_code.read(products("sm_90")).search_loop()
    # Two warpgroup products of 64 rows, two steps of depth 16; 128 * 128 / 128 minima per thread.
    assert loop.matrix == loop.names["HGMMA"] == 4
    assert 127 <= loop.names["FMNMX"] <= 140
    assert loop.fma <= 2
    assert loop.spills == loop.conversions == 0
    assert not loop.stores


@pytest.mark.parametrize("target", NVIDIA)
def test_nested_loops(target):
    code = machine_code.read(compiled(target, two_loops, numbers(), numbers(), 7, 9, BLOCK=256))
    outer, *others = code.loops
    assert others
    assert all(inner < outer or not inner & outer for inner in others)
    assert any(inner < outer for inner in others)
    assert any(instruction.name.startswith("STG") for instruction in code.within(outer))
    with pytest.raises(ValueError, match="expected a loop with matrix instructions"):
        code.search_loop()


def test_code_that_jumps_back_from_the_end_is_no_loop():
    """As compilers place what hardly ever runs: out of line, and back."""
    lines = ["ISETP P0", "@P0 BRA 0x5", "MOV R1", "STG R1", "EXIT", "MOV R2", "BRA 0x2", "BRA 0x7"]
    code = tuple(parsed(place, line) for place, line in enumerate(lines))
    assert machine_code._natural_loops(machine_code._successors(code, {})) == []


def test_a_natural_loop():
    lines = ["MOV R1", "IADD3 R1", "@P1 BRA 0x5", "@P0 BRA 0x1", "EXIT", "MOV R2", "BRA 0x3"]
    code = tuple(parsed(place, line) for place, line in enumerate(lines))
    assert machine_code._natural_loops(machine_code._successors(code, {})) == [frozenset({1, 2, 3, 5, 6})]


def test_scheduling_notes_are_no_operands():
    line = "        /*1dd0*/              @P0 BRA.U !UP0, 0x880      &req={1}   ?trans6;    /* 0x0000 */"
    assert machine_code._SASS.match(line).groups() == ("1dd0", "@P0", "BRA.U", "!UP0, 0x880")


def parsed(address, line):
    predicate, name, operands = re.fullmatch(r"(@\w+ )?(\w+) ?(.*)", line).groups()
    return Instruction(address, name, operands, predicate is not None)


@pytest.mark.parametrize("target", NVIDIA)
def test_a_spilling_kernel_is_seen(target):
    x = numbers(2 * 2048)
    kernel = compiled(target, too_much, x, x, 5, SIZE=2048, num_warps=1, maxnreg=48)
    code = machine_code.read(kernel)
    assert code.spilled > 0
    assert code.total().spills > 0
    (sentence,) = machine_code.excesses(kernel, code)
    assert sentence.startswith("too_much(SIZE=2048; 1 warps")
    assert "spills" in sentence


def test_spills_on_amd_are_read():
    kernel = compiled("gfx942", add_one, numbers(), numbers(), 1000, 1, BLOCK=256)
    assert machine_code.read(kernel).spilled == 0
    spilled = re.sub(r"\.vgpr_spill_count:\s+0", ".vgpr_spill_count: 7", kernel.asm["amdgcn"])
    assert machine_code.read(dataclasses.replace(kernel, asm={"amdgcn": spilled})).spilled == 7


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_within_limits_has_no_excess(target):
    kernel = products(target, BN=64, BK=64)
    assert machine_code.excesses(kernel, machine_code.read(kernel)) == []


def test_too_much_shared_memory_is_seen():
    kernel = products("sm_120", BN=64, BK=64, D=512)
    (sentence,) = machine_code.excesses(kernel, machine_code.read(kernel))[:1]
    assert f"{kernel.shared} bytes of shared memory, the limit is {99 * 1024}" in sentence


@pytest.mark.parametrize("target", TARGETS)
def test_wide_accesses_are_told_from_narrow_ones(target):
    aligned, unaligned = numbers(), numbers()[1:]
    wide = machine_code.read(compiled(target, add_one, aligned, aligned, 4096, 1, BLOCK=1024)).total()
    narrow = machine_code.read(compiled(target, add_one, unaligned, unaligned, 4096, 3, BLOCK=1024)).total()
    assert set(narrow.loads) == set(narrow.stores) == {32}
    # The size is not known to be a multiple of four, so the mask may keep accesses narrow; without one they are wide.
    assert 128 in machine_code.read(products(target)).total().loads
    assert wide.loads


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32), ("LDG.E.128.CONSTANT", 128), ("LDG.E.U16", 16), ("LDG.E.U8", 8), ("STG.E.64", 64),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128), ("LDGSTS.E.LTC128B", 32), ("global_load_dwordx4", 128),
        ("buffer_load_dwordx2", 64), ("global_load_ushort", 16), ("buffer_store_byte", 8), ("buffer_load_dword", 32),
        ("buffer_load_short_d16_hi", 16), ("global_load_ubyte_d16", 8),
    ],
)  # fmt: skip
def test_widths(name, bits):
    assert machine_code._bits(name) == bits


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x128x16.F32", 2 * 64 * 128 * 16 / 4),
        ("HGMMA.64x8x16.F32.BF16", 2 * 64 * 8 * 16 / 4),
        ("HMMA.16816.F32", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("v_mfma_f32_32x32x8_f16", 2 * 32 * 32 * 8),
        ("v_mfma_f32_16x16x32_bf16", 2 * 16 * 16 * 32),
        ("v_mfma_f32_4x4x4_16b_f16", 2 * 4 * 4 * 4 * 16),
    ],
)
def test_products(name, flops):
    assert machine_code.matrix_flops(name) == flops


def test_kinds():
    names = {
        "shuffles": ["SHFL.BFLY", "ds_bpermute_b32", "v_mov_b32_dpp"],
        "barriers": ["BAR.SYNC.DEFER_BLOCKING", "s_barrier"],
        "conversions": ["F2FP.F16.F32.PACK_AB", "I2F", "v_cvt_f16_f32_e32"],
        "spills": ["STL", "LDL.LU", "scratch_load_dword"],
        "matrix": ["HGMMA.64x128x16.F32", "UTCHMMA", "HMMA.16816.F32", "DMMA.884", "v_mfma_f32_32x32x8_f16"],
        "alu": ["FMNMX", "FSETP.GT.AND", "LOP3.LUT", "v_min3_f32"],
        "fma": ["FFMA", "FADD.FTZ", "IMAD.WIDE", "v_fma_f32", "v_fmac_f32_e32", "v_mul_f32_e32"],
        "tensor_copies": ["UTMALDG.2D"],
    }
    for kind, members in names.items():
        counts = machine_code.count([Instruction(place, name, "", False) for place, name in enumerate(members)])
        assert getattr(counts, kind) == len(members), kind


# --- predictions ------------------------------------------------------------------------------------------------------


def plain_cost(shape):
    compiled, packed = kernels.plain_kernels(shape)
    return predict.cost(compiled, shape, packed)


def test_the_plain_kernel_is_measured():
    shape = GPU["k65536-d8"]
    found = plain_cost(shape)
    assert found.padding == 1
    assert found.loop_alu < found.loop_all
    assert 4 < found.loop_alu < 9
    assert found.loop_alu == pytest.approx(found.alu, rel=0.01)  # 65536 keys: the loop is everything
    assert found.matrix_seconds == pytest.approx(2 * 48 * shape.N * shape.C * shape.K / predict.MATRIX)
    assert found.seconds == found.matrix_seconds + found.alu_seconds


def test_padding_counts():
    shape = GPU["seed"]
    found = plain_cost(shape)
    assert found.padding == pytest.approx(256 / 200)
    assert found.alu > found.loop_alu * found.padding


def test_floors_are_those_of_arithmetic():
    memory, matrix = predict.floor(GPU["paper-131k"])
    assert memory == pytest.approx(0.69e-3, rel=0.01)
    assert matrix == pytest.approx(16.5e-3, rel=0.01)
    memory, matrix = predict.floor(GPU["seed"])
    assert memory == pytest.approx(0.37e-3, rel=0.01)
    assert matrix == pytest.approx(0.40e-3, rel=0.02)


def test_bars_and_verdicts():
    assert gpu_static.bars(GPU["seed"]) == {"padding": 1.15, "ratio": 1.7}
    assert gpu_static.bars(GPU["paper-256"])["ratio"] == 2.5
    assert gpu_static.bars(gpu_static.LOOPS["loop-d32"], "alone") == {"loop_alu": 1.5, "loop_all": 3.1}
    assert gpu_static._verdict({"ratio": 2.4}, {"ratio": 2.5}) == "ok"
    assert gpu_static._verdict({"ratio": 2.6}, {"ratio": 2.5}) == "above: ratio 2.6 > 2.5"
    assert gpu_static._verdict({"ratio": 2.6}, {}) == ""


def test_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_static, "kernels_of_search", kernels.plain_kernels)
    report = tmp_path / "report.json"
    assert gpu_static.main(["--only", "seed", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "above: padding 1.28 > 1.15" in out
    ours, plain = json.loads(report.read_text())["rows"]
    assert (ours["who"], plain["who"], plain["bars"]) == ("kvb", "plain", {})
