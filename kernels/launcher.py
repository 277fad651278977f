"""Launching kernels: which compiled kernel a launch takes is looked up here, not in Triton, which takes 25 us for that.

Triton compiles a kernel again where an argument differs in what it specialises on: the dtype and alignment of a tensor;
whether an integer is 1, divisible by 16, or too large for 32 bits; constants and options. What is remembered here tells
launches apart by no less, so that a launch takes the kernel that Triton would have taken.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvb.kernels.device import target

MOST_REGISTERS = 255  # of a thread on NVIDIA


class Options(NamedTuple):
    """How a kernel is compiled."""

    warps: int = 4
    stages: int | None = None  # of a software pipeline; None for what Triton takes
    # That a thread may have on NVIDIA: left to itself, its assembler would rather spill than let fewer programs share a
    # multiprocessor.
    registers: int | None = None
    # Where threads share a sum of squares, each adds what it gets from another to its own square. A multiply-add does
    # not round its own, so the threads would disagree about the last bit of what must be one number.
    contract: bool = True
    # Assertions about indices, which no build of Triton leaves in unasked.
    asserts: bool = False

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """As Triton takes them."""
        found: dict[str, Any] = {"num_warps": self.warps, "enable_fp_fusion": self.contract}
        if self.stages is not None:
            found["num_stages"] = self.stages
        if self.registers is not None and target(device).startswith("sm_"):
            found["maxnreg"] = self.registers
        if self.asserts:
            found |= {"debug": True, "sanitize_overflow": False}
        return found


class _Launcher:
    """One kernel: what was compiled for which kind of arguments."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        names = kernel.arg_names
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        self.first = names[0]
        self.all = operator.itemgetter(*names)
        self.constants = operator.itemgetter(*(name for name in names if name in constants))
        self.given = operator.itemgetter(*(name for name in names if name not in constants))
        self.compiled: dict[Any, CompiledKernel] = {}

    def __call__(self, grid: tuple[int, ...], options: Options, arguments: dict[str, Any]) -> None:
        active = driver.active
        device = active.get_current_device()
        where = arguments[self.first].device
        if where.type == "cuda" and where.index != device:
            with torch.cuda.device(where):
                return self(grid, options, arguments)
        kind = _kind_on_amd if target(where).startswith("gfx") else _kind
        key = device, options, self.constants(arguments), *map(kind, self.given(arguments))
        if (kernel := self.compiled.get(key)) is not None:
            grid = (*grid, 1, 1)[:3]
            kernel[grid](*self.all(arguments), stream=active.get_current_stream(device))
            return None
        kernel = self.kernel[grid](**arguments, **options.keywords(where))
        if isinstance(kernel, CompiledKernel):
            self.compiled[key] = kernel
        return None


def _kind(value: Tensor | int | None) -> Any:
    """What Triton may specialise a kernel on."""
    if type(value) is int:
        return (value == 1) + 2 * (value % 16 == 0) + 4 * (-(1 << 31) <= value < 1 << 31)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value


def _kind_on_amd(value: Tensor | int | None) -> Any:
    """The same there: also whether 32 bits reach all of a tensor's memory."""
    reached = isinstance(value, Tensor) and value.untyped_storage().nbytes() < 1 << 31
    return _kind(value), reached


_PLAIN = Options()
_launchers: dict[int, _Launcher] = {}  # by the id of a kernel, which they keep alive: its hash is that of its source


def run(kernel: Any, grid: tuple[int, ...], options: Options = _PLAIN, /, **arguments: Any) -> None:
    """Launch ``kernel`` on the device of its first argument, a tensor."""
    launcher = _launchers.get(id(kernel))
    if launcher is not None:
        launcher(grid, options, arguments)
    elif isinstance(kernel, JITFunction):
        _launchers[id(kernel)] = launcher = _Launcher(kernel)
        launcher(grid, options, arguments)
    else:  # interpreted
        kernel[grid](**arguments, **options.keywords(next(iter(arguments.values())).device))
