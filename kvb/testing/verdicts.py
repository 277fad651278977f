"""How one operator of one backend does on all cases, in this process."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence

import torch

from kvb import ops, reference
from kvb.testing.attempts import Attempt
from kvb.testing.cases import CASES, Case, problem
from kvb.testing.checks import CHECKS, Backend
from kvb.testing.expectations import Wrong


def attempt(operator: str, backend: Backend, case: Case) -> str:
    """Run one case of an operator: what was wrong, or ""."""
    with Attempt() as tried:
        CHECKS[operator](backend.operators, problem(case, backend.device))
    return str(tried.error) if isinstance(tried.error, Wrong) else tried.error_line


def device_is_lost(device: torch.device) -> bool:
    """Whether an error stuck to this process's context of the device, so that everything after it fails too."""
    if device.type == "cpu":
        return False
    with Attempt() as tried:
        torch.cuda.synchronize(device)
    return tried.error is not None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one operator of one backend did."""

    operator: str
    backend: str
    cases: int
    failures: list[tuple[str, str]]  # the case, and what was wrong
    missing: int = 0  # cases that did not run: there was no time left

    def __str__(self) -> str:
        if self.missing:
            return f"CUT after {self.cases - self.missing} of {self.cases}, {len(self.failures)} failed"
        return f"FAIL {len(self.failures)} of {self.cases}" if self.failures else f"pass {self.cases}"


def verdict(operator: str, backend: Backend, cases: Sequence[Case] = CASES) -> Verdict:
    """Run all cases of one operator."""
    found = [(case.name, attempt(operator, backend, case)) for case in cases]
    failures = [(case, failure) for case, failure in found if failure]
    return Verdict(operator, f"{backend.name} on {backend.device}", len(cases), failures)


def backends(device: torch.device) -> dict[str, Backend]:
    """By name: the operators of the device's fast backend, if it has one, and plain PyTorch with all of them."""
    found = {}
    if fast := ops.operators(device.type):
        operators = types.SimpleNamespace(**{name: getattr(torch.ops.kvb, name) for name in fast})
        found[ops.backend(device.type)] = Backend(ops.backend(device.type), device, operators)
    return {**found, "torch": Backend("torch", device, reference)}


def devices() -> list[torch.device]:
    """The CPU, and the GPU if there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
