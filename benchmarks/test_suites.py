"""Every suite at every shape, kvb and all peers that are here: ``make bench``. Each result is verified, then timed.

With ``--benchmark-disable`` every one runs once, on small shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from benchmarks import peers, suites
from benchmarks.suites import KVB, Case
from benchmarks.timing import Absent, Attempt, verified

TIME = 0.3  # seconds of timed calls per row
MOST = 50  # calls per row


def _rows() -> list[tuple[str, str, str]]:
    """(suite, shape, contestant), by case: all peers at some shapes; ``python -m kvb bench --full`` has them at all."""
    found = []
    for suite in suites.SUITES:
        for shape in suites.shapes(suite):
            found += [(suite, shape, KVB)]
            found += [(suite, shape, who) for who in peers.offers(suite) if shape in peers.known()[who].shapes]
    return found


@functools.lru_cache(maxsize=1)
def _case(suite: str, name: str, small: bool) -> Case:
    """Prepared once for kvb and all peers, whose rows follow each other."""
    shape = suites.shapes(suite)[name]
    return suites.SUITES[suite](shape.small() if small else shape)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("suite", "shape", "who"), _rows())
def test_suites(suite, shape, who, request, benchmark):
    small = request.config.getoption("benchmark_disable")
    if small and who != KVB and peers.known()[who].compiles:
        pytest.skip("compiles for long")
    try:
        case = _case(suite, shape, small)
    except Absent as absent:
        pytest.skip(str(absent))
    with Attempt() as attempt:
        contestant = case.kvb if who == KVB else peers.offers(suite)[who](case.given)
        seconds = verified(contestant)
    # What is wrong with a peer is its own affair, but on small shapes all have been seen to be right.
    if attempt.why and not attempt.absent and (small or who == KVB):
        pytest.fail(attempt.why)
    if attempt.why:
        pytest.skip(attempt.why)

    def begin() -> None:
        if contestant.before is not None:
            contestant.before()

    benchmark.group = f"{suite}:{shape}"
    benchmark.pedantic(contestant.run, setup=begin, rounds=max(1, min(MOST, int(TIME / seconds))))
