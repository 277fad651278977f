"""Every operator of every backend of this machine, held to the contract: ``python -m kvb check``.

Expected results are spelled out here in float64; plain PyTorch is judged by them like every other backend.
"""

from __future__ import annotations

from kvb.testing.cases import CASES, Case, Problem, problem
from kvb.testing.checks import CHECKS, Backend
from kvb.testing.data import DATA, MEMORY
from kvb.testing.expectations import UNIT, Wrong
from kvb.testing.runner import run
from kvb.testing.verdicts import Verdict, attempt, backends, devices, verdict

__all__ = [
    "CASES",
    "CHECKS",
    "DATA",
    "MEMORY",
    "UNIT",
    "Backend",
    "Case",
    "Problem",
    "Verdict",
    "Wrong",
    "attempt",
    "backends",
    "devices",
    "problem",
    "run",
    "verdict",
]
