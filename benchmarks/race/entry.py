"""What takes part for one shape: kvb, and whoever computes the same another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.peers import need
from benchmarks.race.draws import Draw
from benchmarks.timing import Contestant


class Entry(NamedTuple):
    """One shape's contestants; the opponents are prepared one by one, and may raise ``Absent``."""

    kvb: Contestant
    opponents: Mapping[str, Callable[[], Contestant]]


def called(draw: Draw, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, or what a compiler makes of it."""
    if not draw.compiled:
        return run
    need.compiler("torch.compile")
    return torch.compile(run, dynamic=False)
