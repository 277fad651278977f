"""Barriers and waits of ``search`` and ``resident`` are left out in turn: it is noticed, unless the others suffice."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from emulator.emulation import Emulation
from emulator.launcher import emulating
from emulator.state import Fault, Report
from kvb.kernels import launch, launch_filter


class Launch:
    """One launch of a kernel, to be repeated with other PTX on the same numbers."""

    def __init__(self, ptx, grid, arguments, shared) -> None:
        self.ptx, self.grid, self.arguments, self.shared = ptx, grid, arguments, shared
        self.tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        self.before = [_storage(tensor).clone() for tensor in self.tensors]

    def again(self, ptx: str, **options) -> tuple[Report, list[torch.Tensor]]:
        """What was noticed, and what all tensors hold afterwards."""
        for tensor, before in zip(self.tensors, self.before, strict=True):
            _storage(tensor).copy_(before)
        emulation = Emulation(**options)
        try:
            emulation.launch(ptx, self.grid, self.arguments, self.shared)
        except Fault as fault:
            emulation.report[("fault", str(fault))] += 1
        return emulation.report, [_storage(tensor).clone() for tensor in self.tensors]


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def launch_of(name: str, N: int, K: int, D: int, target: str, monkeypatch) -> Launch:
    """How a search launches this kernel; few programs, so that each of them takes several tiles."""
    found, last, run = [], [], Emulation.launch

    def note(kernel, ptx):
        last.append(re.search(r"\.entry (\w+)", ptx)[1])
        return ptx

    def spy(self, ptx, grid, arguments, shared):
        if last[-1] == name:
            found.append(Launch(ptx, grid, arguments, shared))
        run(self, ptx, grid, arguments, shared)

    monkeypatch.setattr(Emulation, "launch", spy)
    monkeypatch.setattr(launch_filter, "processors", lambda device: 1)
    monkeypatch.setattr(launch_filter, "RESIDENT_PROGRAMS", 1)
    queries, keys = torch.randn(N, 1, 1, D), torch.randn(1, K, D)
    with emulating(target, rewrite=note) as emulation:
        launch.nearest(queries, keys, launch.pack_keys(keys), None, 1)
    assert not emulation.report, str(emulation.report)
    monkeypatch.setattr(Emulation, "launch", run)
    assert found, f"no launch of {name}, but of {sorted(set(last))}"
    return found[0]


def without(ptx: str, what: str, left_out: int) -> str:
    """The PTX without the line that is number ``left_out`` of those with ``what`` in them."""
    places = [place for place, line in enumerate(ptx.splitlines()) if what in line]
    return "\n".join(line for place, line in enumerate(ptx.splitlines()) if place != places[left_out])


@pytest.mark.parametrize(
    ("name", "N", "K", "D", "target", "spare"),
    [
        # One that lies between copies to different buffers; one after a product of which the barrier before the next
        # product lets every warp know, too; one between a load and a store of the same thread.
        ("kvb_nearest_filter", 70, 600, 14, "sm_90", 3),
        ("kvb_nearest_filter", 70, 600, 14, "sm_80", 3),
        ("kvb_nearest_resident", 140, 200, 32, "sm_90", 0),
        pytest.param("kvb_nearest_filter", 70, 300, 200, "sm_90", 0, marks=pytest.mark.slow),
        pytest.param("kvb_nearest_filter", 140, 600, 64, "sm_80", 3, marks=pytest.mark.slow),
        pytest.param("kvb_nearest_filter", 300, 1100, 32, "sm_90", 3, marks=pytest.mark.slow),
        pytest.param("kvb_nearest_resident", 140, 256, 14, "sm_90", 0, marks=pytest.mark.slow),
    ],
)
def test_every_barrier(name, N, K, D, target, spare, monkeypatch):
    """What is not noticed changes nothing: then warps that run far apart come to the same results, bit for bit."""
    launched = launch_of(name, N, K, D, target, monkeypatch)
    report, wanted = launched.again(launched.ptx)
    assert not report
    number = sum("bar.sync" in line for line in launched.ptx.splitlines())
    silent = [place for place in range(number) if not launched.again(without(launched.ptx, "bar.sync", place))[0]]
    print(f"{name}, {target}, D={D}: {number - len(silent)} of {number} noticed, not {silent}")
    assert len(silent) <= spare
    for place in silent:
        for seed in range(3):
            report, found = launched.again(without(launched.ptx, "bar.sync", place), apart=True, seed=seed)
            assert not report
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), f"barrier {place}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_wait(target, monkeypatch):
    """For copies, and for the last of the products that add to the same sums: the others may well be under way."""
    launched = launch_of("kvb_nearest_filter", 70, 600, 14, target, monkeypatch)
    ptx = launched.ptx
    waits = [("cp.async.wait_group", place) for place in range(ptx.count("cp.async.wait_group"))]
    waits += [("wgmma.wait_group", ptx.count("wgmma.wait_group") - 1)] * (target == "sm_90")
    assert len(waits) >= 2
    for what, place in waits:
        report, _ = launched.again(without(ptx, what, place))
        assert "asynchronous" in str(report), f"{what}, number {place}"


def test_proxy_fences(monkeypatch):
    """The one before the loop covers what is written there, the one in the loop what copies bring."""
    launched = launch_of("kvb_nearest_filter", 70, 600, 14, "sm_90", monkeypatch)
    report, _ = launched.again(launched.ptx.replace("fence.proxy.async.shared::cta;", ""))
    assert "without a proxy fence" in str(report)
    report, _ = launched.again(without(launched.ptx, "fence.proxy.async", 1))
    assert "without a proxy fence" in str(report)
