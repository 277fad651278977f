"""Launches of Triton kernels on CPU tensors, emulated: ``with emulating("sm_90"): kernel[grid](...)``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks.triton_static import offline
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
    rewrite: Callable[[str, str], str] | None = None  # of the name of a kernel and its PTX: the PTX to run instead
    report: Report = dataclasses.field(default_factory=Report)
    kernels: list[offline.Compiled] = dataclasses.field(default_factory=list)  # compiled so far, with their launches
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
        machine.launch(size, programs, values, tensors, self.report)


def _cell(number: Any, kind: str) -> int:
    """A parameter's bits."""
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind != "f":
        return int(number) % (1 << 8 * dtype.itemsize)
    return int(np.array([number], dtype).view(f"u{dtype.itemsize}")[0])


class _Driver(offline.Driver):
    """Runs what is launched."""

    def __init__(self, emulation: Emulation, target: str) -> None:
        super().__init__(target)
        self.emulation = emulation

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        noted = super().launcher_cls(source, metadata)
        record = next(record for record in self.compiled if record.metadata is metadata)
        names = source.fn.arg_names
        given = [place for place, name in enumerate(names) if record.signature[name] != "constexpr"]

        def launched(*arguments: Any) -> None:
            noted(*arguments)
            # The grid and six things for the device come first.
            values = arguments[9:]
            ptx = record.asm["ptx"]
            if self.emulation.rewrite is not None:
                ptx = self.emulation.rewrite(record.name, ptx)
            grid = [int(extent) for extent in arguments[:3]]
            self.emulation.launch(ptx, grid, [values[place] for place in given], record.shared)

        return launched


@contextlib.contextmanager
def emulating(target: str, **options: Any) -> Iterator[Emulation]:
    """Inside, Triton kernels that are launched on CPU tensors are compiled for ``target`` and emulated.

    Args:
        target: "sm_80" or "sm_90".
        options: fields of ``Emulation``: ``seed``, ``together``, ``rewrite``.
    """
    emulation = Emulation(**options)
    with offline.compiling_for(target, functools.partial(_Driver, emulation)) as kernels:
        emulation.kernels = kernels
        yield emulation
