"""What single instructions compute, against values worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from emulator import native
from emulator.emulation import Emulation
from emulator.program import Unsupported
from emulator.state import Fault

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")
WIDTHS = {
    "u32": "b32",
    "s32": "b32",
    "f32": "b32",
    "b32": "b32",
    "u64": "b64",
    "s64": "b64",
    "f64": "b64",
    "b64": "b64",
}
DTYPES = {"b32": torch.int32, "u32": torch.int32, "s32": torch.int32, "f32": torch.float32}
DTYPES |= {"b64": torch.int64, "u64": torch.int64, "s64": torch.int64, "f64": torch.float64}
NAN, INF = float("nan"), float("inf")


def kernel(code: str, parameters: str, threads: int = 32, version: int = 90) -> str:
    """PTX of a kernel with plenty of registers."""
    names = "".join(f".param .u64 k_param_{place},\n" for place in range(len(parameters.split())))
    return f""".version 8.7
.target sm_{version}a
.visible .entry k(
{names.rstrip().rstrip(",")}
)
.reqntid {threads}
{{
.reg .pred %p<20>;
.reg .b16 %rs<20>;
.reg .b32 %r<200>;
.reg .b64 %rd<40>;
{code}
ret;
}}
"""


def lanes(code: str, inputs: list[tuple[str, list]], out: str, threads: int = 32) -> torch.Tensor:
    """Run ``code`` in every thread: %i0, %i1, ... are its inputs, given for the first threads, and %o is the result."""
    loads, arguments, names = [], [], {}
    for place, (kind, values) in enumerate(inputs):
        column = torch.zeros(threads, dtype=DTYPES[kind])
        column[: len(values)] = torch.tensor(values, dtype=DTYPES[kind])
        arguments.append(column)
        names[f"%i{place}"] = register = f"%{'r' if WIDTHS[kind] == 'b32' else 'rd'}{20 + place}"
        loads.append(f"ld.param.b64 %rd1, [k_param_{place}];")
        loads.append(f"mad.wide.u32 %rd2, %r1, {column.itemsize}, %rd1;")
        loads.append(f"ld.global.{WIDTHS[kind]} {register}, [%rd2];")
    result = torch.zeros(threads, dtype=DTYPES[out])
    names["%o"] = f"%{'r' if WIDTHS[out] == 'b32' else 'rd'}19"
    body = re.sub(r"%(i\d|o)\b", lambda match: names[match[0]], code)
    stores = [
        f"ld.param.b64 %rd1, [k_param_{len(inputs)}];",
        f"mad.wide.u32 %rd2, %r1, {result.itemsize}, %rd1;",
        f"st.global.{WIDTHS[out]} [%rd2], {names['%o']};",
    ]
    ptx = kernel("\n".join(["mov.u32 %r1, %tid.x;", *loads, body, *stores]), " ".join("x" * (len(inputs) + 1)), threads)
    emulation = Emulation()
    emulation.launch(ptx, (1,), [*arguments, result], 0)
    assert not emulation.report, str(emulation.report)
    return result


S, ONE = "%rs1", 1 + 2.0**-8
BRANCH = """@!%p1 bra $L1; mov.b32 %o, 1; bra $L2;
$L1:
mov.b32 %o, 2;
$L2:"""
# code, kind of the inputs, columns of inputs, kind of the result, its first values
TABLE = [
    ("add.s32 %o, %i0, %i1;", "s32", [[2**31 - 1, -5], [1, 3]], "s32", [-(2**31), -2]),
    ("sub.f32 %o, %i0, %i1;", "f32", [[1.5, INF], [0.25, INF]], "f32", [1.25, NAN]),
    ("mul.hi.u32 %o, %i0, %i1;", "u32", [[-1, 1 << 16], [-1, 1 << 16]], "u32", [-2, 1]),
    ("mul.lo.s32 %o, %i0, -3;", "s32", [[7, 1 << 30]], "s32", [-21, 1 << 30]),
    ("mul.wide.s32 %o, %i0, %i1;", "s32", [[-2, 1 << 20], [3, 1 << 20]], "s64", [-6, 1 << 40]),
    ("mul.wide.u32 %o, %i0, 2;", "u32", [[-1]], "s64", [2 * (2**32 - 1)]),
    ("mad.lo.s32 %o, %i0, %i1, 5;", "s32", [[3, -3], [4, 4]], "s32", [17, -7]),
    ("mad.wide.s32 %o, %i0, 8, 100;", "s32", [[-1, 2]], "s64", [92, 116]),
    ("div.s32 %o, %i0, %i1;", "s32", [[-7, 7, 7], [2, -2, 2]], "s32", [-3, -3, 3]),
    ("rem.s32 %o, %i0, %i1;", "s32", [[-7, 7], [2, -2]], "s32", [-1, 1]),
    ("div.u32 %o, %i0, %i1;", "u32", [[-1], [2]], "u32", [2**31 - 1]),
    ("min.s32 %o, %i0, %i1;", "s32", [[-1, 3], [1, 2]], "s32", [-1, 2]),
    ("min.u32 %o, %i0, %i1;", "u32", [[-1, 3], [1, 2]], "u32", [1, 2]),
    ("min.f32 %o, %i0, %i1;", "f32", [[NAN, 3.0, NAN], [1.0, NAN, NAN]], "f32", [1.0, 3.0, NAN]),
    ("max.f32 %o, %i0, %i1;", "f32", [[NAN, 3.0], [1.0, 5.0]], "f32", [1.0, 5.0]),
    ("max.NaN.f32 %o, %i0, %i1;", "f32", [[NAN, 3.0], [1.0, 5.0]], "f32", [NAN, 5.0]),
    ("neg.f32 %o, %i0;", "f32", [[1.0, -INF]], "f32", [-1.0, INF]),
    ("abs.f32 %o, %i0;", "f32", [[-2.0, 3.0]], "f32", [2.0, 3.0]),
    ("shl.b32 %o, %i0, %i1;", "b32", [[1, 1, 1, 3], [4, 31, 32, 255]], "b32", [16, -(2**31), 0, 0]),
    ("shr.s32 %o, %i0, %i1;", "s32", [[-16, -16, 16], [2, 40, 40]], "s32", [-4, -1, 0]),
    ("shr.u32 %o, %i0, 28;", "u32", [[-1]], "u32", [15]),
    ("bfe.u32 %o, %i0, 4, 8;", "u32", [[0xABCD]], "u32", [0xBC]),
    ("bfe.s32 %o, %i0, 4, 4;", "s32", [[0xF0, 0x70]], "s32", [-1, 7]),
    ("prmt.b32 %o, %i0, %i1, 0x5410U;", "b32", [[0x44332211], [0x08070605]], "b32", [0x06052211]),
    ("prmt.b32 %o, %i0, %i1, 0x00a8;", "b32", [[0x00800011], [0]], "b32", [0x1111FF00]),
    ("lop3.b32 %o, %i0, %i1, 12, 0x96;", "b32", [[10, 3], [6, 5]], "b32", [10 ^ 6 ^ 12, 3 ^ 5 ^ 12]),
    ("lop3.b32 %o, %i0, %i1, 12, 0xe8;", "b32", [[10], [6]], "b32", [(10 & 6) | (10 & 12) | (6 & 12)]),
    ("popc.b32 %o, %i0;", "b32", [[-1, 5]], "b32", [32, 2]),
    ("not.b64 %o, %i0;", "b64", [[0, -1]], "b64", [-1, 0]),
    ("cvt.rzi.s32.f32 %o, %i0;", "f32", [[-1.9, 2.9, 1e20, NAN, -1e20]], "s32", [-1, 2, 2**31 - 1, 0, -(2**31)]),
    ("cvt.rn.f32.s32 %o, %i0;", "s32", [[16777217, 16777219]], "f32", [16777216.0, 16777220.0]),
    ("cvt.rn.f32.f64 %o, %i0;", "f64", [[1 + 2.0**-24, 1 + 3 * 2.0**-24]], "f32", [1.0, 1 + 2.0**-22]),
    ("cvt.s64.s32 %o, %i0;", "s32", [[-5]], "s64", [-5]),
    ("cvt.u64.u32 %o, %i0;", "u32", [[-5]], "s64", [2**32 - 5]),
    (f"cvt.rn.f16.f32 {S}, %i0; cvt.u32.u16 %o, {S};", "f32", [[1.00001, 1e6, NAN]], "b32", [0x3C00, 0x7C00, 0x7FFF]),
    (f"cvt.rn.bf16.f32 {S}, %i0; cvt.f32.bf16 %o, {S};", "f32", [[ONE, ONE + 2.0**-7]], "f32", [1.0, 1.015625]),
    ("cvt.rn.f16x2.f32 %o, %i0, %i1;", "f32", [[1.0], [2.0]], "b32", [0x3C004000]),
    ("mov.b32 {%rs1, %rs2}, %i0; mov.b32 %o, {%rs2, %rs1};", "b32", [[0x12345678]], "b32", [0x56781234]),
    ("mov.b64 {_, %r5}, %i0; mov.b64 %o, {%r5, %r5};", "b64", [[7 << 32]], "b64", [(7 << 32) + 7]),
    ("setp.lt.f32 %p1, %i0, %i1; selp.b32 %o, 1, 2, %p1;", "f32", [[1.0, NAN, 2.0], [2.0, 1.0, 1.0]], "b32", [1, 2, 2]),
    ("setp.geu.f32 %p1, %i0, %i1; selp.b32 %o, 1, 2, %p1;", "f32", [[1.0, NAN], [2.0, 1.0]], "b32", [2, 1]),
    ("setp.ne.f32 %p1, %i0, %i0; selp.b32 %o, 1, 2, %p1;", "f32", [[1.0, NAN]], "b32", [2, 2]),
    ("setp.neu.f32 %p1, %i0, %i0; selp.b32 %o, 1, 2, %p1;", "f32", [[1.0, NAN]], "b32", [2, 1]),
    ("setp.nan.f32 %p1, %i0, %i1; selp.b32 %o, 1, 2, %p1;", "f32", [[1.0, NAN], [1.0, 1.0]], "b32", [2, 1]),
    ("setp.lt.u32 %p1, %i0, 5;" + BRANCH, "u32", [[1, 9]], "b32", [1, 2]),
    ("mov.b32 %o, 7; setp.eq.s32 %p1, %i0, 3; @%p1 mov.b32 %o, 8;", "s32", [[3, 4]], "b32", [8, 7]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "kind", "columns", "out", "wanted"), TABLE, ids=[row[0][:50] for row in TABLE])
def test_values(code, kind, columns, out, wanted):
    found = lanes(code, [(kind, column) for column in columns], out)[: len(wanted)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=DTYPES[out]), rtol=0, atol=0, equal_nan=True)


def test_fused_multiply_add_rounds_once():
    x = 1 + 2.0**-12
    assert (
        lanes("fma.rn.f32 %o, %i0, %i0, %i1;", [("f32", [x]), ("f32", [-(x * x // 2**-23 * 2**-23)])], "f32")[0]
        == 2**-24
    )
    assert (
        lanes("mul.f32 %r5, %i0, %i0; add.f32 %o, %r5, %i1;", [("f32", [x]), ("f32", [-1 - 2.0**-11])], "f32")[0] == 0
    )
    tiny = 1 + 2.0**-30
    assert lanes("fma.rn.f64 %o, %i0, %i0, %i1;", [("f64", [tiny]), ("f64", [-1 - 2.0**-29])], "f64")[0] == 2.0**-60


@pytest.mark.parametrize(
    ("code", "sources"),
    [
        ("shfl.sync.bfly.b32 %o, %i0, 5, 31, -1;", [lane ^ 5 for lane in range(32)]),
        ("shfl.sync.idx.b32 %o, %i0, %i1, 31, -1;", [(3 * lane) % 32 for lane in range(32)]),
        ("shfl.sync.up.b32 %o, %i0, 3, 0, -1;", [max(lane - 3, lane if lane < 3 else 0) for lane in range(32)]),
        ("shfl.sync.down.b32 %o, %i0, 3, 31, -1;", [lane + 3 if lane < 29 else lane for lane in range(32)]),
    ],
)
def test_shuffles(code, sources):
    values, places = list(range(100, 164)), [(3 * lane) % 32 for lane in range(32)] * 2
    found = lanes(code, [("b32", values), ("b32", places)], "b32", threads=64)
    assert found.tolist() == [values[lane] for lane in sources] + [values[32 + lane] for lane in sources]


@pytest.mark.parametrize(("kind", "wanted"), [("add", sum(range(-7, 25))), ("min", -7), ("max", 24)])
def test_reductions_of_a_warp(kind, wanted):
    found = lanes(f"redux.sync.{kind}.s32 %o, %i0, -1;", [("s32", list(range(-7, 25)))], "s32")
    assert found.tolist() == [wanted] * 32


def test_atomics_count_every_lane_once():
    """Old values are all different, whatever the order; results are those of any order."""
    totals, old = torch.zeros(4, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    code = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 64, %r1;
    ld.param.b64 %rd1, [k_param_0]; ld.param.b64 %rd2, [k_param_1];
    atom.global.gpu.relaxed.add.u32 %r4, [%rd1], 1;
    atom.global.gpu.relaxed.min.s32 %r5, [%rd1 + 4], -5;
    atom.global.gpu.relaxed.max.s32 %r6, [%rd1 + 8], %r1;
    mad.wide.u32 %rd3, %r3, 4, %rd2; st.global.b32 [%rd3], %r4;"""
    emulation = Emulation(seed=3)
    emulation.launch(kernel(code, "a b", 64), (2,), [totals, old], 0)
    assert totals.tolist() == [128, -5, 63, 0]
    assert sorted(old.tolist()) == list(range(128))
    assert old.tolist() != list(range(128))


def test_approximations_are_near_and_the_same_for_the_same_number():
    x = torch.rand(32) + 0.5
    once, again = (lanes("sqrt.approx.ftz.f32 %o, %i0;", [("f32", x.tolist())], "f32") for _ in range(2))
    assert torch.equal(once, again)
    off = (once.view(torch.int32) - x.double().sqrt().float().view(torch.int32)).abs()
    assert 0 < off.max() <= 1


def exact_product(a: np.ndarray, b: np.ndarray, c: np.ndarray, group: int, fraction: int, least: int) -> np.ndarray:
    """a [M, 16], b [N, 16], c [M, N] in whole numbers of arbitrary size."""

    def exponent(x: float, least: int) -> int:
        return max(int(np.frexp(np.float64(x))[1]) - 1, least)

    out = np.empty_like(c)
    for m, n in np.ndindex(*c.shape):
        total = c[m, n]
        for first in range(0, 16, group):
            terms = [(float(total), exponent(total, -126))] if total else []
            for k in range(first, first + group):
                if a[m, k] and b[n, k]:
                    terms.append((float(a[m, k]) * float(b[n, k]), exponent(a[m, k], least) + exponent(b[n, k], least)))
            unit = 2.0 ** (max((e for _, e in terms), default=0) - fraction)
            whole = sum(int(np.trunc(value / unit)) for value, _ in terms) * unit
            rounded = np.float32(whole)
            total = rounded if abs(float(rounded)) <= abs(whole) else np.nextafter(rounded, np.float32(0))
        out[m, n] = total
    return out


@pytest.mark.parametrize(("version", "group", "fraction"), [(80, 8, 24), (90, 16, 25)])
@pytest.mark.parametrize(("kind", "least"), [("f16", -14), ("bf16", -126)])
def test_products_are_cut_off_like_those_of_tensor_cores(version, group, fraction, kind, least):
    random = np.random.default_rng(0)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    scales = 2.0 ** random.integers(-12, 8, (2, 24, 16))
    a, b = (torch.tensor(random.standard_normal((24, 16)) * s).to(dtype).float().numpy() for s in scales)
    a[:3] *= 0
    a[3, 5], b[4, 5] = 2.0**-15, 2.0**-14 + 2.0**-24  # subnormal in float16
    c = random.standard_normal((24, 24)).astype(np.float32)
    found = native.multiply(a[None], b[None], c[None], version, kind)[0]
    assert np.array_equal(found, exact_product(a, b, c, group, fraction, least))
    assert np.abs(found - (c + a.astype(np.float64) @ b.T)).max() < 1e-2


def test_products_of_infinity():
    a, b = np.ones((1, 2, 16), np.float32), np.ones((1, 8, 16), np.float32)
    a[0, 0, 3], a[0, 1, 3], a[0, 1, 4] = np.inf, np.inf, -np.inf
    found = native.multiply(a, b, np.zeros((1, 2, 8)), 90, "f16")[0]
    assert (found[0] == np.inf).all()
    assert np.isnan(found[1]).all()


def test_a_product_of_a_warp():
    """Fragments lie as the manual draws them: small whole numbers come out exactly."""
    random = np.random.default_rng(1)
    a, b = random.integers(-4, 5, (16, 16)), random.integers(-4, 5, (16, 8))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4

    def pair(low: np.ndarray, high: np.ndarray) -> list[int]:
        return np.stack([low, high], 1).astype(np.float16).view(np.int32)[:, 0].tolist()

    rows = [(g + 8 * (j % 2), 2 * t + 8 * (j // 2)) for j in range(4)]
    inputs = [pair(a[row, col], a[row, col + 1]) for row, col in rows]
    inputs += [pair(b[2 * t + 8 * j, g], b[2 * t + 8 * j + 1, g]) for j in range(2)]
    for j in range(4):
        code = (
            "mov.b32 %r50, 0f3F800000; mov.b32 %r51, %r50; mov.b32 %r52, %r50; mov.b32 %r53, %r50;"
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r50, %r51, %r52, %r53}, {%i0, %i1, %i2, %i3},"
            f" {{%i4, %i5}}, {{%r50, %r51, %r52, %r53}}; mov.b32 %o, %r{50 + j};"
        )
        found = lanes(code, [("b32", column) for column in inputs], "f32")
        assert found.tolist() == (1 + a @ b)[g + 8 * (j // 2), 2 * t + j % 2].tolist()


def test_what_is_not_known_is_said():
    with pytest.raises(Unsupported, match="vote.sync"):
        lanes("vote.sync.ballot.b32 %o, 1, -1;", [], "b32")
    with pytest.raises(Fault, match="only 8 threads of a warp are here together"):
        lanes("setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %o, %r1, 1, 31, -1;", [], "b32")
