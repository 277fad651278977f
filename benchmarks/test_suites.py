"""Every suite at every shape, kvb and all peers that are here: ``make bench``. Each result is verified, then timed.

With ``--benchmark-disable`` every one runs once, on small shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from benchmarks import suites
from benchmarks.suites import KVB, Case
from benchmarks.timing import Absent, verified

TIME = 0.3  # seconds of timed calls a row
MOST = 50  # calls a row
COMPILED = ("pykeops", "torch.compile")  # too long for a small shape


def _rows() -> list[tuple[str, str]]:
    """("suite:shape", contestant): who takes part does not depend on the shape."""
    found = []
    for suite in suites.SUITES:
        known = suites.shapes(suite)
        with torch.no_grad():
            peers = suites.SUITES[suite](known["seed_a"].small()).peers
        found += [(f"{suite}:{shape}", who) for shape in known for who in (KVB, *peers)]
    return found


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case | str:
    """A suite at a shape, prepared once for kvb and all peers; or why it is absent."""
    suite, _, name = request.param.partition(":")
    shape = suites.shapes(suite)[name]
    small = request.config.getoption("benchmark_disable")
    with torch.no_grad():
        try:
            return suites.SUITES[suite](shape.small() if small else shape)
        except Absent as absent:
            return str(absent)


@pytest.mark.parametrize(("case", "who"), _rows(), indirect=["case"], scope="module")
def test_suites(case, who, request, benchmark):
    small = request.config.getoption("benchmark_disable")
    if isinstance(case, str):
        pytest.skip(case)
    if small and who in COMPILED:
        pytest.skip("compiles for long")
    absent: dict[str, str] = {}
    # What is wrong with a peer is its own affair, but on small shapes all have been seen to be right.
    with contextlib.nullcontext() if small or who == KVB else suites.attempt(who, absent):
        try:
            contestant = case.kvb if who == KVB else case.peers[who]()
            seconds = verified(contestant)
        except Absent as why:
            absent[who] = str(why)
    if absent:
        pytest.skip(absent[who])

    def begin() -> None:
        if contestant.before is not None:
            contestant.before()

    benchmark.group = request.node.callspec.params["case"]
    benchmark.pedantic(contestant.run, setup=begin, rounds=max(1, min(MOST, int(TIME / seconds))))
