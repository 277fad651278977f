"""What all launches share: the GPU they run on, sizes rounded up, and errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

# The column of the launch table by compute capability, else that of sm_120, which asks for little shared memory.
_NVIDIA = {75: "sm_75", 80: "sm_80", 90: "sm_90", 100: "sm_100", 101: "sm_100", 103: "sm_100"}


class _Machine(NamedTuple):
    column: str  # of the launch table
    processors: int
    matrix: str


_INTERPRETED = _Machine("sm_90", 8, "full")


def target(device: torch.device) -> str:
    """The column of the launch table: "sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942" or "gfx950".

    Triton's active driver knows; without one, that is under the interpreter, it is sm_90's.
    """
    return _machine(device).column


def processors(device: torch.device) -> int:
    """How many programs can begin at once."""
    return _machine(device).processors


def matrix_units(device: torch.device) -> str:
    """What becomes of matrix products of 16-bit numbers.

    "full": matrix units take it. "flushing": they take numbers too small for a full significand as zero (MI200).
    "none": Triton has no use for those of this architecture, and multiplies number by number (Turing).
    """
    return _machine(device).matrix


def _machine(device: torch.device) -> _Machine:
    try:
        active = driver.active
    except RuntimeError:
        return _INTERPRETED
    return _facts(active, device)


@functools.lru_cache(maxsize=64)
def _facts(active: Any, device: torch.device) -> _Machine:
    with torch.cuda.device(device if device.type == "cuda" else -1):
        found, index = active.get_current_target(), active.get_current_device()
    if found.backend == "hip":
        column = "gfx950" if str(found.arch).startswith("gfx95") else "gfx942"
    else:
        column = _NVIDIA.get(found.arch, "sm_120")
    processors = active.utils.get_device_properties(index)["multiprocessor_count"]
    matrix = "none" if column == "sm_75" else "flushing" if str(found.arch).startswith("gfx90a") else "full"
    return _Machine(column, processors, matrix)


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise RuntimeError with a message, which is put together only then."""
    if not condition:
        raise RuntimeError(message())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def multiple(size: int, of: int) -> int:
    """``size`` rounded up to a multiple of ``of``."""
    return ceil_div(size, of) * of


def power_of_two(size: int) -> int:
    """``size`` rounded up to a power of two."""
    return 1 << max(0, size - 1).bit_length()
