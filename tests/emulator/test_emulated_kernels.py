"""The project's kernels as Triton compiles them, emulated: right results, and nothing noticed.

Programs run in random order, any thread may win where several store to one place, and uninitialised memory is rubbish.
What the emulator notices fails a test, but for one thing that is proven harmless.
"""

from __future__ import annotations

import os
import re
import types
import zlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from search_data import GRID, OPEN

from emulator import native
from emulator.launcher import emulating
from emulator.state import Report
from kvb import ops, reference
from kvb.kernels import (
    launch,
    launch_filter,
    launch_scan,
    launch_table,
    pack,
    resident,
    scan,
    scatter,
    search,
    statistics,
    update,
    values,
)
from kvb.testing.cases import CASES, Case
from kvb.testing.checks import Backend
from kvb.testing.verdicts import attempt

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")
TARGETS = ("sm_80", "sm_90")
OPERATORS = [name for name in ops.NAMES if hasattr(launch, name)]
EMULATED = Backend(
    "emulated", torch.device("cpu"), types.SimpleNamespace(**{name: getattr(launch, name) for name in OPERATORS})
)
# Threads that share a row in these kernels may disagree about the last bit of a squared difference, and so about which
# of two keys is nearer. Then the two are closer together than ``certain`` allows in any thread: the row is listed, and
# ``rescan`` stores its index and distance again.
HARMLESS = {
    (kernel, "race: threads store different numbers in one place of shared memory")
    for kernel in ("kvb_nearest_settle", "kvb_nearest_refine")
}
# Every operator, and every kernel that its launches choose from, once.
SELECTION = [
    ("pack_keys", Case("columns in pieces", K=70, D=130)),
    ("nearest", Case("resident, refine and rescan", B=70, S=1, K=200, D=32, data="duplicates")),
    ("nearest", Case("prepare, search and settle", B=70, S=1, K=300, D=14, data="duplicates", masked=0.3)),
    ("nearest", Case("norms in one row", B=20, S=1, C=1, K=300, D=8, data="outliers")),
    ("nearest", Case("scan", B=4, S=1, K=60, D=14, T=3, dtype=torch.float16, data="duplicates")),
    ("nearest", Case("scan of float64", B=4, S=1, K=40, D=6, dtype=torch.float64)),
    ("nearest", Case("merge", B=1, S=1, C=1, K=2100, D=10, data="broken_keys")),
    ("gather", Case("gather", B=7, V=20, codes=torch.int16, memory="codebooks_second")),
    ("gather_backward", Case("two slices of one-hot products", B=24, V=20, memory="expanded")),
    ("gather_backward", Case("large", B=9, K=300, V=5)),
    ("gather_backward_rows", Case("rows", B=9, K=300, V=20)),
    ("sgd_step_", Case("step", B=9, K=300, V=20)),
    ("update_keys_", Case("update", B=9, K=70, D=14)),
    ("accumulate", Case("accumulate", B=9, K=70, D=14, data="broken_queries")),
    ("count", Case("count", B=9, K=70, D=14, data="broken_queries")),
    ("lookup", Case("lookup of few", B=1, S=2, K=40, V=70)),
]


def kernels_of(target: str) -> set[str]:
    """All that the launch files name; small codebooks stay on the chip of sm_90 only."""
    source = "".join(path.read_text() for path in Path(launch.__file__).parent.glob("launch_*.py"))
    found = set()
    for module in (pack, resident, scan, scatter, search, statistics, update, values):
        room = module.__name__.rsplit(".", 1)[1]
        found |= {name for name in vars(module) if re.search(rf"\b{room}\.{name}\b", source)}
    return {name for name in found if launch_table.SEARCH[target].resident or name not in ("resident", "refine")}


def require_silence(report: Report) -> None:
    wrong = [note for note in report if (note.kernel, note.what) not in HARMLESS]
    assert not wrong, str(report)


def require(operator: str, case: Case, target: str, **options) -> list[str]:
    """The operator passes the case, and nothing is noticed; the kernels that it launched."""
    with emulating(target, seed=zlib.crc32(f"{operator} {case.name}".encode()), **options) as emulation:
        failure = attempt(operator, EMULATED, case)
    assert not failure, f"{operator}, {case.name}: {failure}"
    require_silence(emulation.report)
    return [kernel.name for kernel in emulation.kernels if kernel.launches]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target):
    launched = set()
    for operator, case in SELECTION:
        launched.update(require(operator, case, target))
    assert launched >= kernels_of(target), kernels_of(target) - launched


@pytest.mark.parametrize("operator", ["nearest", "accumulate"])
def test_warps_may_run_far_apart(operator):
    require(operator, Case("apart", B=20, S=1, C=1, K=60, D=14, V=3), "sm_90", apart=True)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_case(target, operator):
    for case in CASES:
        require(operator, case, target)


# --- searches that are hard -------------------------------------------------------------------------------------------


def require_the_nearest(queries, keys, mask, topk, target, seed=0):
    """The same indices as the reference, and distances up to their last rounding."""
    with emulating(target, seed=seed) as emulation:
        indices, distances = launch.nearest(queries, keys, launch.pack_keys(keys), mask, topk)
    require_silence(emulation.report)
    want = reference.nearest(queries, keys, reference.pack_keys(keys), mask, topk)
    assert torch.equal(indices, want[0]), f"{int((indices != want[0]).sum())} of {indices.numel()} differ"
    unit = torch.finfo(distances.dtype).eps
    rounding = unit if distances.dtype == torch.float32 else 4 * unit
    torch.testing.assert_close(distances, want[1], rtol=rounding, atol=0, equal_nan=True)


@pytest.fixture
def one_processor(monkeypatch):
    """So that programs take several tiles, one after the other."""
    for module in (launch_filter, launch_scan):
        monkeypatch.setattr(module, "processors", lambda device: 1)
    monkeypatch.setattr(launch_filter, "RESIDENT_PROGRAMS", 1)
    monkeypatch.setattr(launch_scan, "RESCAN_PROGRAMS", 3)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "D", "dtype", "data", "memory"), GRID)
@pytest.mark.parametrize("target", TARGETS)
def test_the_grid(target, K, D, dtype, data, memory, one_processor):
    queries, keys = (part.to(dtype) for part in data(34, 2, K, D))
    require_the_nearest(memory(queries), keys, None, 1, target)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("K", "D", "dtype", "data"), [row[1:] for row in OPEN])
def test_rows_that_one_product_leaves_open(K, D, dtype, data, masked, one_processor):
    queries, keys = (part.to(dtype) for part in data(140, 2, K, D))
    require_the_nearest(queries, keys, torch.rand(2, K) < 0.5 if masked else None, 1, "sm_90")


# N, C, K, D, topk, dtype
TWINS = [
    (2, 1, 60, 7, 1, torch.float32),
    (2, 1, 60, 16, 1, torch.float32),
    (2, 2, 60, 14, 12, torch.float32),
    (17, 1, 60, 12, 12, torch.float32),
    (1, 1, 60, 33, 20, torch.float32),
    (3, 1, 60, 6, 12, torch.float64),
    (18, 1, 60, 14, 12, torch.float64),
    (2, 1, 40, 64, 1, torch.float64),
    (2, 1, 40, 16, 8, torch.float16),
]


def twins(N, C, K, D, dtype):
    """The second half of the keys is the first half in another order."""
    queries, keys = torch.randn(N, 1, C, D).to(dtype), torch.randn(C, K, D).to(dtype)
    keys[:, K // 2 :] = keys[:, torch.randperm(K // 2)]
    return queries, keys


@pytest.mark.parametrize("target", TARGETS)
def test_twins(target):
    for N, C, K, D, topk, dtype in TWINS[2:8:3]:
        require_the_nearest(*twins(N, C, K, D, dtype), None, topk, target)


def test_threads_that_disagree_about_a_sum_are_noticed(monkeypatch):
    """Contracted, ``x * x + shuffled(x * x)`` is rounded differently in the two threads that share it."""
    monkeypatch.setattr(launch_scan, "SCAN", launch_scan.SCAN._replace(contract=True))
    with emulating("sm_90") as emulation:
        queries, keys = twins(17, 1, 60, 12, torch.float32)
        launch.nearest(queries, keys, launch.pack_keys(keys), None, 12)
    assert "race: threads store different numbers in one place of shared memory" in str(emulation.report)


@pytest.mark.slow
@pytest.mark.parametrize(("N", "C", "K", "D", "topk", "dtype"), TWINS)
@pytest.mark.parametrize("target", TARGETS)
def test_twins_with_twenty_seeds(target, N, C, K, D, topk, dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        require_the_nearest(*twins(N, C, K, D, dtype), None, topk, target, seed)
