"""A Triton driver for a GPU that this machine lacks: launches compile for it, and nothing runs.

    with compiling_for("sm_90") as kernels:
        launch.nearest(queries, keys, packed, None, 1)  # on CPU or meta tensors
    kernels[0].asm["ptx"]

Triton itself specialises every kernel on the arguments of its launch, so what is compiled is what that launch would
compile on the real machine. Results hold whatever ``torch.empty`` left in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a launch may ask of one multiprocessor, and how many multiprocessors the device has."""

    shared: int  # bytes of shared memory per program
    registers: int  # of 32 bits per thread
    multiprocessors: int


LIMITS = {
    "sm_75": Limits(64 * KIB, 255, 40),
    "sm_80": Limits(163 * KIB, 255, 108),
    "sm_90": Limits(227 * KIB, 255, 132),
    "sm_100": Limits(227 * KIB, 255, 148),
    "sm_120": Limits(99 * KIB, 255, 188),
    "gfx942": Limits(64 * KIB, 512, 304),
    "gfx950": Limits(160 * KIB, 512, 256),
}
TARGETS = tuple(LIMITS)
# Machines without a column of the launch table: kernels must compile for them, and fit.
LIMITS |= {
    "sm_89": Limits(99 * KIB, 255, 142),
    "gfx90a": Limits(64 * KIB, 512, 104),
    "gfx1100": Limits(64 * KIB, 256, 96),
    "gfx1201": Limits(64 * KIB, 256, 64),
}
COMPILE_ONLY = tuple(LIMITS)[len(TARGETS) :]

# A JITFunction keeps its kernels by device number: each driver takes a number that no machine and no driver has used.
_numbers = itertools.count(1 << 20)


class Launch(NamedTuple):
    """One launch: how many programs along each axis, and every argument by name that is no tensor."""

    grid: tuple[int, int, int]
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """One compiled kernel: a function, the constants and the argument properties that it was specialised on."""

    name: str
    target: str
    constants: dict[str, Any]  # by argument name; arguments that Triton found to be 1 or None, too
    signature: dict[str, str]  # the type of every argument
    metadata: Any  # Triton's own: num_warps, num_stages, shared, ...
    asm: dict[str, Any]  # every stage: "ttgir", "ptx", "cubin", or "amdgcn", ...
    launches: list[Launch]  # in order

    @property
    def num_warps(self) -> int:
        return self.metadata.num_warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory per program."""
        return self.metadata.shared

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name}({constants}; {self.num_warps} warps, {self.target})"


def _gpu(target: str) -> GPUTarget:
    kind, _, number = target.partition("_")
    if kind == "sm":
        return GPUTarget("cuda", int(number), 32)
    return GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)


class _Utils:
    """The part of a driver that loads binaries and knows the device."""

    def __init__(self, target: str) -> None:
        self.limits = LIMITS[target]

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Whether shared memory suffices is for the reader of the record to say: here everything loads.
        return {
            "max_shared_mem": 1 << 30,
            "max_num_regs": 1 << 16,
            "multiprocessor_count": self.limits.multiprocessors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: Any, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """Module (None: nothing to unload), function, registers, spills, and the largest number of threads."""
        return None, 1, 0, 0, 1024


class Driver(DriverBase):
    """Answers what Triton asks of a driver, and takes down what is launched."""

    def __init__(self, target: str) -> None:
        self.name, self.target, self.utils = target, _gpu(target), _Utils(target)
        self.number = next(_numbers)
        self.compiled: list[Compiled] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Called when a kernel is first launched; what it returns is called at every launch."""
        record = next((record for record in self.compiled if record.metadata is metadata), None)
        if record is None:
            record = self._record(source, metadata)
            self.compiled.append(record)

        def launched(*arguments: Any) -> None:
            # The grid and six things for the device come first.
            named = zip(source.fn.arg_names, arguments[9:], strict=True)
            scalars = {name: value for name, value in named if not isinstance(value, torch.Tensor)}
            record.launches.append(Launch((int(arguments[0]), int(arguments[1]), int(arguments[2])), scalars))

        return launched

    def _record(self, source: Any, metadata: Any) -> Compiled:
        kernels = source.fn.device_caches[self.number][0].values()
        asm = next(kernel.asm for kernel in kernels if getattr(kernel, "metadata", None) is metadata)
        names = source.fn.arg_names
        constants = {names[place[0]]: value for place, value in source.constants.items() if len(place) == 1}
        return Compiled(source.fn.__name__, self.name, constants, dict(source.signature), metadata, asm, [])

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("no kernel can be timed without its GPU: launch with one configuration, not an autotuner")


@contextlib.contextmanager
def compiling_for(target: str, driver_for: Callable[[str], Driver] = Driver) -> Iterator[list[Compiled]]:
    """Compile every kernel that is launched inside for ``target``; the list of them grows with the launches.

    ``driver_for`` makes the driver: one of a class of its own can do more with a launch than take it down.

    Raises:
        ValueError: an unknown target. RuntimeError: the kernels would be interpreted.
    """
    if target not in LIMITS:
        raise ValueError(f"target must be one of {', '.join(LIMITS)}; got {target!r}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it and start again"
        )
    before = driver._active  # the property would look for a real GPU
    ours = driver_for(target)
    driver.set_active(ours)
    try:
        yield ours.compiled
    finally:
        driver._active = before
