"""What is remembered of launches: every launch takes the compiled kernel that Triton itself would take."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks import host  # noqa: E402
from benchmarks.triton_static.offline import compiling_for  # noqa: E402
from kvb.kernels.launcher import Options, run  # noqa: E402


@triton.jit(do_not_specialize=["rows"])
def add(source, other, out, rows, stride, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + place * stride, mask=place < rows)
    if other is not None:
        value += tl.load(other + place, mask=place < rows)
    tl.store(out + place, value * 2 if TWICE else value, mask=place < rows)


numbers = torch.zeros(64)
TENSORS = (numbers, numbers[1:], numbers[4:], numbers.half(), numbers.to(torch.int64))
SIZES = (1, 2, 16, 17, 48, -16, (1 << 31) - 1, 1 << 31, 1 << 40)


def variants():
    """Arguments and options that Triton specialises on, and some that it does not."""
    plain = {"source": numbers, "other": None, "out": numbers, "rows": 64, "stride": 1, "BLOCK": 64, "TWICE": False}
    for source, other in itertools.product(TENSORS, (None, *TENSORS[:2])):
        yield plain | {"source": source, "other": other}, Options()
    for rows, stride in itertools.product(SIZES, SIZES):
        yield plain | {"rows": rows, "stride": stride}, Options()
    for block, twice in itertools.product((32, 64), (False, True)):
        yield plain | {"BLOCK": block, "TWICE": twice}, Options()
    for options in (
        Options(8),
        Options(stages=1),
        Options(registers=64),
        Options(contract=False),
        Options(asserts=True),
    ):
        yield plain, options


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_launches_take_the_kernels_that_triton_takes(target):
    """Each variant twice, the second time in another order: what Triton compiled, and how often each was launched."""
    device = torch.device("cpu")
    with compiling_for(target) as expected:
        for arguments, options in [*variants(), *reversed([*variants()])]:
            add[(3,)](**arguments, **options.keywords(device))
    with compiling_for(target) as found:
        for arguments, options in [*variants(), *reversed([*variants()])]:
            run(add, (3,), options, **arguments)
    assert len(found) == len(expected) > 20
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.signature == theirs.signature
        assert ours.constants == theirs.constants
        assert ours.launches == theirs.launches


def test_a_launch_that_is_known_does_not_ask_triton(monkeypatch):
    arguments, options = next(variants())
    with compiling_for("sm_90") as kernels:
        run(add, (3,), options, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(type(add), "run", lambda *_, **__: pytest.fail("Triton was asked"))
            run(add, (5, 2), options, **dict(reversed(arguments.items())) | {"rows": 63 + 1})
    assert [launch.grid for launch in kernels[0].launches] == [(3, 1, 1), (5, 2, 1)]


def test_devices_have_kernels_of_their_own():
    arguments, options = next(variants())
    for target in ("sm_90", "sm_80", "sm_90"):
        with compiling_for(target) as kernels:
            run(add, (3,), options, **arguments)
            run(add, (3,), options, **arguments)
        assert [(kernel.target, len(kernel.launches)) for kernel in kernels] == [(target, 2)]


def test_arguments_that_are_missing_or_unknown_are_named():
    arguments, options = next(variants())
    with compiling_for("sm_90"):
        with pytest.raises(KeyError, match="stride"):
            run(add, (3,), options, **{name: value for name, value in arguments.items() if name != "stride"})
        with pytest.raises(KeyError, match="strides"):
            run(add, (3,), options, **arguments, strides=3, TWO=2)


def test_the_host_times_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(host, "REPEATS", 1)
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "BARS", dict.fromkeys(host.BARS, 0))
    assert host.main([]) == 1
    assert capsys.readouterr().out.count(", above") == len(host.BARS)
