"""What a peer needs before it can run: a package, a compiler, memory. ``Absent`` says what is missing."""

from __future__ import annotations

import importlib
import shutil
from types import ModuleType

import torch

from benchmarks import machine
from benchmarks.timing import Absent

SHARE = 0.5  # of the available memory may be taken by one contestant


def package(name: str, install: str) -> ModuleType:
    """The module of that name; ``install`` is what pip calls it, "" if pip cannot get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        how = f"pip install {install}" if install else "it is not on PyPI"
        raise Absent(f"{name} cannot be imported ({error}): {how}") from error


def memory(nbytes: float, what: str, device: torch.device = machine.CPU) -> None:
    """Raises ``Absent`` if so many bytes are more than the device can spare."""
    available = machine.available_bytes(device)
    if nbytes > SHARE * available:
        raise Absent(f"{what} would take {nbytes / 1e9:.3g} GB; {SHARE:.0%} of {available / 1e9:.3g} GB may be taken")


def compiler(why: str) -> None:
    if not (shutil.which("g++") or shutil.which("c++")):
        raise Absent(f"{why} needs a C++ compiler (g++)")


def gpu(device: torch.device, what: str) -> None:
    if device.type == "cpu":
        raise Absent(f"{what} has no CPU kernels")


def cpu(device: torch.device, what: str) -> None:
    if device.type != "cpu":
        raise Absent(f"{what} runs on CPUs only here")
