"""``processes``: what runs a test's function in several processes, see ``pool.py``."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
from pool import TIMEOUT, Pool


@pytest.fixture(scope="session")
def _pools():
    pools: list[Pool] = []
    yield pools
    for pool in pools:
        pool.stop()


@pytest.fixture
def processes(_pools, tmp_path):
    """``processes(world, function, *arguments)``: the results by rank. A process that fails or hangs fails the test.

    ``grouped=False`` leaves it to the function to make a process group.
    """
    number = iter(range(100))

    def run(world: int, function: Callable[..., Any], *arguments: Any, grouped: bool = True) -> list[Any]:
        if not _pools:
            _pools.append(Pool())
        try:
            store = str(tmp_path / f"store{next(number)}") if grouped else None
            found = _pools[0].run(world, store, function, arguments)
            failed = [f"process {rank}:\n{error}" for rank, _, error in found if error]
        except queue.Empty:
            failed = [f"{function.__name__}: {world} processes did not end within {TIMEOUT:.0f} s"]
        if failed:
            _pools.pop().stop()  # what failed in them must not spoil the next test
            pytest.fail("\n".join(failed))
        return [result for _, result, _ in found]

    return run
