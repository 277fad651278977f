"""Launches of Triton kernels on CPU tensors, emulated: ``with emulating("sm_90"): kernel[grid](...)``."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks.triton_static import offline
from emulator.emulation import Emulation


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
        try:
            yield emulation
        finally:
            emulation.forget()  # Triton keeps its launchers for ever, and they hold the emulation
