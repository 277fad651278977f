"""Faults are planted, in small programs and in kernels of the project, and each of them is noticed."""

from __future__ import annotations

import pytest
import torch

from emulator import native
from emulator.emulation import Emulation
from emulator.state import Fault
from emulator.test_instructions import kernel

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")
START = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.b32 %r3, global_smem; mad.lo.s32 %r4, %r1, 4, %r3;
ld.param.b64 %rd1, [k_param_0]; mad.wide.u32 %rd2, %r1, 4, %rd1;"""


def run(code: str, tensor: torch.Tensor | None = None, threads: int = 64, grid: int = 1, shared: int = 1024, **options):
    """Run PTX on one tensor, by default of one word per thread; what was noticed."""
    emulation = Emulation(**options)
    tensor = torch.arange(threads, dtype=torch.int32) if tensor is None else tensor
    emulation.launch(kernel(START + code, "tensor", threads), (grid,), [tensor], shared)
    return emulation.report


def noticed(code: str, **options) -> str:
    """All that was noticed, as text."""
    return str(run(code, **options))


# --- addresses --------------------------------------------------------------------------------------------------------


def test_beyond_a_tensor():
    tensor = torch.zeros(63, dtype=torch.int32)
    with pytest.raises(
        Fault, match=r"4 bytes at byte 252 .* take \[0, 252\) in thread 63 of program \[0, 0, 0\]: .*st.glob"
    ):
        run("st.global.b32 [%rd2], %r1;", tensor)
    with pytest.raises(Fault, match="at byte -4 of a storage"):
        run("ld.global.b32 %r5, [%rd1 + -4];")
    run("setp.lt.u32 %p1, %r1, 63; @%p1 st.global.b32 [%rd2], %r1;", tensor)


def test_between_the_rows_of_a_view_is_allowed_but_not_around_it():
    storage = torch.zeros(100, dtype=torch.int32)
    run("st.global.b32 [%rd2], %r1;", storage[20:84])
    with pytest.raises(Fault, match=r"at byte 336 of a storage whose tensors take \[80, 336\)"):
        run("st.global.b32 [%rd2 + 4], %r1;", storage[20:84])


def test_an_address_that_is_none():
    with pytest.raises(Fault, match="an address belongs to no tensor"):
        run("mov.b64 %rd3, 64; ld.global.b32 %r5, [%rd3];")


def test_misaligned():
    with pytest.raises(Fault, match="an access of 8 bytes is misaligned by 4"):
        run("ld.global.v2.b32 {%r5, %r6}, [%rd1 + 4];")
    with pytest.raises(Fault, match="a misaligned access of 4 bytes at byte 2 of 1024 of shared memory"):
        run("st.shared.b32 [%r3 + 2], %r1;")


def test_beyond_shared_memory():
    with pytest.raises(Fault, match="an access of 4 bytes at byte 1024 of 1024 of shared memory"):
        run("st.shared.b32 [%r3 + 1024], %r1;")
    with pytest.raises(Fault, match="an access of 4 bytes at byte -4 "):
        run("ld.shared.b32 %r5, [%r3 + -4];")


# --- registers --------------------------------------------------------------------------------------------------------


def test_an_unwritten_register():
    """It may go through arithmetic; it may not decide what is stored, or where, or whether."""
    reduce = """setp.lt.u32 %p1, %r1, 4; @%p1 ld.global.b32 %r5, [%rd2];
    shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; add.s32 %r7, %r5, %r6;"""
    assert not run(f"{reduce} setp.eq.u32 %p2, %r1, 0; @%p2 st.global.b32 [%rd2], %r7;")
    assert not run(f"{reduce} selp.b32 %r8, %r7, 0, %p1; st.global.b32 [%rd2], %r8;")
    assert "%r7 decides something before anything was written" in noticed(f"{reduce} st.global.b32 [%rd2], %r7;")
    assert "%r5 decides something" in noticed("mad.lo.s32 %r6, %r5, 0, 0; st.shared.b32 [%r4], %r5;")
    assert "%p1 decides something" in noticed("@%p1 st.global.b32 [%rd2], %r1;")
    assert "%p1 decides something" in noticed("@%p1 bra $L1; mov.b32 %r5, 0;\n$L1:")
    assert "%r9 decides something" in noticed(
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; mov.b32 %r9, 0;\n$L1:\nst.global.b32 [%rd2], %r9;"
    )


def test_registers_hold_rubbish():
    first, second = (torch.zeros(64, dtype=torch.int32) for _ in range(2))
    for seed, tensor in enumerate((first, second)):
        run("st.global.b32 [%rd2], %r9;", tensor, seed=seed)
    assert (first != second).any()


# --- barriers and races -----------------------------------------------------------------------------------------------

EXCHANGE = """st.shared.b32 [%r4], %r1;
bar.sync 0;
xor.b32 %r5, %r1, 33; mad.lo.s32 %r6, %r5, 4, %r3; ld.shared.b32 %r7, [%r6];
bar.sync 0;
st.shared.b32 [%r4], %r7;"""


def test_a_missing_barrier():
    assert not run(EXCHANGE)
    first, second = EXCHANGE.replace("bar.sync 0;", "", 1), "".join(EXCHANGE.rsplit("bar.sync 0;", 1))
    assert "race: read of what another warp wrote" in noticed(first)
    assert "race: write of what another warp read" in noticed(second)


def test_a_missing_barrier_of_a_warp():
    code = EXCHANGE.replace("33", "1").replace("bar.sync 0;", "bar.warp.sync -1;")
    assert not run(code)
    assert "race: read of what another lane or warp wrote" in noticed(code.replace("bar.warp.sync -1;", "", 1))
    assert "race: read of what another warp wrote" in noticed(EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;"))


def test_a_race_shows_when_warps_run_apart():
    code = EXCHANGE.replace("bar.sync 0;", "bra $L1;\n$L1:", 1) + "st.global.b32 [%rd2], %r7;"
    wanted, found = torch.arange(64, dtype=torch.int32) ^ 33, set()
    for seed in range(8):
        tensor = torch.zeros(64, dtype=torch.int32)
        run(code, tensor, apart=True, seed=seed)
        found.add(torch.equal(tensor, wanted))
    assert False in found


def test_two_warps_write_one_place():
    assert not run("st.shared.b32 [%r3], 5;")
    assert "threads store different numbers in one place of shared memory" in noticed("st.shared.b32 [%r3], %r1;")
    code = "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r3], 5; @!%p1 st.shared.b32 [%r3], 6;"
    assert "race: write of what another warp wrote" in noticed(code)


def test_any_thread_may_win():
    winners = set()
    for seed in range(20):
        tensor = torch.zeros(64, dtype=torch.int32)
        assert "threads store different numbers in one place" in str(
            run("st.global.b32 [%rd1], %r1;", tensor, seed=seed)
        )
        winners.add(int(tensor[0]))
    assert len(winners) > 10
    assert winners <= set(range(64))


def test_programs_run_in_any_order():
    orders = set()
    for seed in range(20):
        tensor = torch.zeros(1, dtype=torch.int32)
        report = run("st.global.b32 [%rd1], %r2;", tensor, grid=4, together=1, seed=seed)
        assert "two programs store different numbers in one place" in str(report)
        orders.add(int(tensor))
    assert orders == {0, 1, 2, 3}


def test_a_program_reads_what_another_one_stores():
    code = "setp.eq.u32 %p1, %r2, 0; @%p1 st.global.b32 [%rd2], %r1; @!%p1 ld.global.b32 %r5, [%rd2];"
    assert "reads what another one of the same launch stores" in noticed(code, grid=2)


def test_part_of_a_program_at_a_barrier():
    for rest in ("ret;", "bar.sync 0; ret;"):
        with pytest.raises(Fault, match="part of a program waits at a barrier, and the rest does not come"):
            run(f"setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; {rest}\n$L1:\nbar.sync 0;")
    with pytest.raises(Fault, match="only 8 threads of a warp are here together"):
        run("setp.lt.u32 %p1, %r1, 8; @%p1 bra $L1; ret;\n$L1:\nbar.sync 0;")


def test_shared_memory_that_nothing_was_written_to():
    assert "shared memory that nothing was written to is read" in noticed("ld.shared.b32 %r5, [%r4];")


def test_an_assertion():
    with pytest.raises(Fault, match="a device assertion failed in thread 40 "):
        run("setp.eq.u32 %p1, %r1, 40; @!%p1 bra $L1; trap;\n$L1:")


# --- asynchronous copies and products ---------------------------------------------------------------------------------

COPY = """mad.lo.s32 %r10, %r1, 16, %r3; and.b32 %r11, %r1, 15; mad.wide.u32 %rd3, %r11, 16, %rd1;
cp.async.cg.shared.global [%r10], [%rd3], 0x10;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
xor.b32 %r12, %r1, 33; mad.lo.s32 %r13, %r12, 16, %r3; ld.shared.b32 %r14, [%r13];
st.global.b32 [%rd2], %r14;"""


def test_a_copy_read_too_early():
    tensor = torch.arange(64, dtype=torch.int32)
    assert not run(COPY, tensor)
    assert torch.equal(tensor, 4 * ((torch.arange(64, dtype=torch.int32) ^ 33) % 16))
    assert "that an asynchronous copy still writes" in noticed(COPY.replace("wait_group 0", "wait_group 1"))
    assert "that an asynchronous copy still writes" in noticed(COPY.replace("cp.async.wait_group 0;", ""))
    assert "read of what another warp wrote" in noticed(COPY.replace("bar.sync 0;", ""))
    assert "never waited for" in noticed(COPY.split("cp.async.wait", 1)[0])


# A and B in shared memory: 8 rows of 16 bytes follow each other, halves of columns 128 bytes apart, rows 256.
D = ", ".join(f"%r{20 + j}" for j in range(4))
PRODUCT = f"""mov.b32 %r5, 0x3C003C00; mad.lo.s32 %r6, %r1, 16, %r3;
st.shared.v4.b32 [%r6], {{%r5, %r5, %r5, %r5}};
mad.lo.s32 %r6, %r1, 16, %r3; st.shared.v4.b32 [%r6 + 2048], {{%r5, %r5, %r5, %r5}};
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b64 %rd10, 0x0000001000080040; mov.b64 %rd11, 0x00000010000800C0;
mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0f3F800000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{D}}}, %rd10, %rd11, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
bar.sync 0;
st.shared.b32 [%r6], %r23;
st.global.b32 [%rd2], %r23;"""


def product(code: str) -> str:
    return noticed(code, threads=128, shared=4096)


def test_a_product_that_all_is_right_with():
    tensor = torch.zeros(128, dtype=torch.float32)
    assert not run(PRODUCT, tensor, threads=128, shared=4096)
    assert tensor.eq(17).all()


def test_a_missing_proxy_fence():
    assert "written without a proxy fence since" in product(PRODUCT.replace("fence.proxy.async.shared::cta;", ""))


def test_a_product_without_its_barriers():
    assert "race: wgmma reads what a warp wrote" in product(PRODUCT.replace("bar.sync 0;", "", 1))
    assert "race: write of what another" in product("".join(PRODUCT.rsplit("bar.sync 0;", 1)))


def test_a_product_used_too_early():
    for code in (PRODUCT.replace("wgmma.wait_group.sync.aligned 0;", ""), PRODUCT.replace("aligned 0;", "aligned 1;")):
        found = product(code)
        assert "%r23 is used while an asynchronous product owns it" in found
        assert "shared memory that an asynchronous product still reads is written" in found


def test_a_product_without_its_fence():
    assert "written without a wgmma.fence since" in product(PRODUCT.replace("wgmma.fence.sync.aligned;", ""))


def test_a_product_of_what_is_not_there():
    assert "wgmma reads shared memory that nothing was written to" in product(PRODUCT.replace("+ 2048", "+ 0"))
    with pytest.raises(Fault, match="wgmma reads bytes .* of 4096 of shared memory"):
        product(PRODUCT.replace("0x00000010000800C0", "0x00000010000803C0"))
    with pytest.raises(Fault, match="wgmma needs groups of four warps"):
        noticed(PRODUCT, threads=64, shared=4096)
