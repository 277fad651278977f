"""What a file of this folder says of a peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import FEW
from benchmarks.timing import Contestant

# Takes what a suite hands to every peer (``benchmarks.suites``); prepares it, and may raise ``Absent``.
Offer = Callable[[Any], Contestant]


@dataclass(frozen=True)
class Peer:
    """A package, or a way to use PyTorch, that does the job of one or more suites."""

    name: str
    about: str
    suites: Mapping[str, Offer]
    module: str = "torch"  # what it imports
    install: str = ""  # what pip calls it; "" where pip cannot get it
    shapes: tuple[str, ...] = FEW  # where ``make bench`` and ``benchmarks.gpu`` include it
    quick: bool = True  # whether it is part of a quick look
    compiles: bool = False  # for seconds or more, at the first call
