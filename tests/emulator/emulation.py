"""One kernel's PTX, launched on CPU tensors: what an emulation gets, and what it notices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from emulator.machine import Machine, batch_size
from emulator.memory import GlobalMemory
from emulator.program import Program
from emulator.state import DTYPES, Report

KEPT = 24  # machines, for launches to come


@functools.lru_cache(maxsize=512)
def _program(ptx: str) -> Program:
    return Program(ptx)


@dataclasses.dataclass
class Emulation:
    """How launches are emulated, and what was noticed."""

    seed: int = 0
    together: int | None = None  # programs at most that run side by side; by default as many as is fast
    apart: bool = False  # warps run in random order, some far ahead of others, and not in step where they can
    rewrite: Callable[[str, str], str] | None = None  # of the name of a kernel and its PTX: the PTX to run instead
    report: Report = dataclasses.field(default_factory=Report)
    kernels: list[Any] = dataclasses.field(default_factory=list)  # what Triton compiled so far, with its launches
    _machines: OrderedDict[tuple[str, int, int], Machine] = dataclasses.field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def launch(self, ptx: str, grid: Sequence[int], arguments: Sequence[Any], shared_bytes: int) -> None:
        """Run PTX of one kernel on CPU tensors and numbers, programs in random order.

        Raises:
            Fault: what would stop a GPU. Unsupported: what this emulator does not know.
        """
        program = _program(ptx)
        tensors = GlobalMemory([value for value in arguments if isinstance(value, torch.Tensor)])
        values = np.zeros(len(program.parameters), np.uint64)
        for (place, kind), value in zip(program.parameters.values(), arguments, strict=False):
            number = tensors.address(value) if isinstance(value, torch.Tensor) else value
            values[place] = _cell(number, kind)
        size = (*grid, 1, 1)[:3]
        programs = np.array(list(itertools.product(*(range(extent) for extent in size))), np.uint32).reshape(-1, 3)
        programs = self._random.permutation(programs)
        count = min(batch_size(program, shared_bytes, len(programs)), self.together or len(programs))
        key = ptx, count, shared_bytes
        machine = self._machines.pop(key, None) or Machine(program, count, shared_bytes, self._random)
        self._machines[key] = machine
        while len(self._machines) > KEPT:
            self._machines.popitem(last=False)
        machine.apart = self.apart
        machine.launch(size, programs, values, tensors, self.report)

    def forget(self) -> None:
        """Give back the memory that launches to come would have reused."""
        self._machines.clear()


def _cell(number: Any, kind: str) -> int:
    """A parameter's bits."""
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind != "f":
        return int(number) % (1 << 8 * dtype.itemsize)
    return int(np.array([number], dtype).view(f"u{dtype.itemsize}")[0])
