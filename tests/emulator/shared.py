"""Shared memory: what it holds, who touched what since the last barrier, and copies that arrive later.

Two accesses of different warps to one place, one of them a write, need a barrier of the program in between; accesses of
different lanes of a warp need one of that warp. Each granule, the smallest piece that the program accesses, remembers
who read and who wrote it after which barrier: whatever is not in order is noted, whichever came first here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from emulator import native
from emulator.lanes import WARP, Lanes
from emulator.memory import ACCESS, differ, itemsize, loading, scatter, storing, vector
from emulator.program import Instruction, Program
from emulator.state import SHARED_BASE, State, Step

WRONG = {
    native.COPY: "shared memory that an asynchronous copy still writes is accessed",
    native.PRODUCT: "shared memory that an asynchronous product still reads is written",
    native.UNWRITTEN: "shared memory that nothing was written to is read",
    native.READ_AFTER_WRITE: "race: read of what another {} wrote, without a barrier",
    native.WRITE_AFTER_READ: "race: write of what another {} read, without a barrier",
    native.WRITE_AFTER_WRITE: "race: write of what another {} wrote, without a barrier",
}


def smallest_access(program: Program) -> int:
    """The smallest access to shared memory in bytes."""
    sizes = [16]
    for at in program.code:
        if at.name in ("ld", "st") and "shared" in at.parts:
            sizes.append(itemsize(at.type) * len(vector(at.operands[0 if at.name == "ld" else 1])))
        elif at.says("cp", "async") and len(at.operands) > 2:
            sizes.append(int(at.operands[2], 0))
    return min(sizes)


class SharedMemory:
    """That of every program of a batch."""

    def __init__(self, state: State, size: int) -> None:
        self.state, self.size = state, size
        self.granule = smallest_access(state.program)
        self.stride = -(-size // 128) * 128  # bytes of one program
        self.bytes = np.zeros(state.count * self.stride, np.uint8)
        self.granules = np.zeros(len(self.bytes) // self.granule, native.GRANULE)
        self.first = state.cta * self.stride  # of the program of each lane
        self.clock = np.ones(state.lanes, np.int32)  # counts barriers of the program
        self.warp_clock = np.ones(state.lanes, np.int32)  # of the warp: no two warps of a program share a number
        watched = self.granules, self.clock, self.warp_clock, state.warp, state.lane_of_warp
        self._pointers = [part.ctypes.data for part in watched]
        self._first = self.first.ctypes.data

    def begin(self) -> None:
        """Nothing was written yet: every bit is set, which is NaN and -1."""
        self.bytes[:] = 255
        self.granules[:] = 0
        self.clock[:] = 1
        self.warp_clock[:] = self.state.warps + self.state.warp

    def pass_barrier(self, lanes: Lanes) -> None:
        """All warps of these programs are in step again."""
        self.clock[lanes.select] += 1
        self.pass_warp_barrier(lanes)

    def pass_warp_barrier(self, lanes: Lanes) -> None:
        self.warp_clock[lanes.select] += self.state.warps

    def pass_proxy_fence(self, lanes: Lanes) -> None:
        """What these warps have written, or what was written before their last barrier, is for products to see."""
        per = self.stride // self.granule
        for cta in np.unique(self.state.cta[lanes.index]).tolist():
            mine = lanes.index[self.state.cta[lanes.index] == cta]
            fencing = np.bitwise_or.reduce(np.uint32(1) << self.state.warp[mine].astype(np.uint32))
            granules = self.granules[cta * per : (cta + 1) * per]
            visible = (granules["clock"] != self.clock[mine[0]]) | (granules["writers"] & ~fencing == 0)
            granules["unfenced"][visible] = 0

    # --- accesses -----------------------------------------------------------------------------------------------------

    def place(
        self, at: Instruction, index: np.ndarray, address: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Accesses of ``size`` bytes by the lanes ``index``: which elements of that size, and their first granules.

        Raises:
            Fault: one of them is outside or misaligned.
        """
        address = np.ascontiguousarray(address, np.uint32)
        element, granule = np.empty((2, len(index)), np.int64)
        pointers = address.ctypes.data, index.ctypes.data, self._first, len(index)
        wrong = native.library().shared_place(
            *pointers, SHARED_BASE, self.size, size, self.granule, element.ctypes.data, granule.ctypes.data
        )
        if wrong >= 0:
            offset = int(address[wrong]) - SHARED_BASE
            kind = "a misaligned access" if 0 <= offset <= self.size - size else "an access"
            what = f"{kind} of {size} bytes at byte {offset} of {self.size} of shared memory"
            raise self.state.fault(at, what, int(index[wrong]))
        return element, granule

    def elements(self, size: int) -> np.ndarray:
        return self.bytes.view(ACCESS[size])

    def access(
        self, at: Instruction, index: np.ndarray, granule: np.ndarray, size: int, changes: Any = None, steps: int = 3
    ) -> None:
        """Note what is wrong with these reads or, if ``changes`` says which of them change something, writes."""
        writes = changes is not None
        pointer = changes.ctypes.data if writes else None
        found = native.library().shared_access(
            *(*self._pointers, index.ctypes.data, granule.ctypes.data, pointer),
            *(len(index), max(1, size // self.granule), writes, steps),
        )
        if found:
            for bit, what in WRONG.items():
                if found & bit:
                    self.state.note(at, what.format("lane or warp" if found & native.IN_WARP else "warp"))

    def read(self, at: Instruction, index: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        element, granule = self.place(at, index, address, size)
        self.access(at, index, granule, size)
        return self.elements(size)[element]

    def write(self, at: Instruction, index: np.ndarray, address: np.ndarray, new: np.ndarray) -> None:
        size = new.itemsize
        element, granule = self.place(at, index, address, size)
        elements = self.elements(size)
        self.access(at, index, granule, size, differ(elements[element], new))
        race = "race: threads store different numbers in one place of shared memory"
        scatter(self.state, at, elements, element, new, race)


def _read(state: State, at: Instruction, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
    return state.shared.read(at, lanes.index, address, size)


def _write(state: State, at: Instruction, lanes: Lanes, address: np.ndarray, new: np.ndarray, item: int) -> None:
    state.shared.write(at, lanes.index, address, new)


load, store = loading("u32", _read), storing("u32", _write)


def _matrix_rows(
    state: State, at: Instruction, lanes: Lanes, address: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each of ``count`` matrices, the lanes that hold the addresses of its eight rows, and those addresses."""
    state.require_whole_warps(at, lanes)
    index, where = lanes.index.reshape(-1, WARP), address[lanes.select].reshape(-1, WARP)
    for number in range(count):
        rows = slice(8 * number, 8 * number + 8)
        yield np.ravel(index[:, rows]), np.ravel(where[:, rows])


def _turned(at: Instruction, matrices: np.ndarray) -> np.ndarray:
    """Matrices [n, 8, 8] as the instruction wants them."""
    return np.ascontiguousarray(matrices.transpose(0, 2, 1) if "trans" in at.parts else matrices)


def matrix_load(state: State, at: Instruction) -> Step:
    """``ldmatrix``: eight rows of 16 bytes a matrix, of which every lane gets two halves next to each other."""
    targets = [state.target(name, "b32") for name in vector(at.operands[0])]
    address = state.address(at.operands[1], "u32")

    def step(lanes: Lanes) -> None:
        rows = _matrix_rows(state, at, lanes, address(), len(targets))
        for target, (index, where) in zip(targets, rows, strict=True):
            matrices = state.shared.read(at, index, where, 16).view(np.uint16).reshape(-1, 8, 8)
            target[lanes.select] = _turned(at, matrices).view(np.uint32).ravel()

    return step


def matrix_store(state: State, at: Instruction) -> Step:
    """``stmatrix``, the other way round."""
    sources = [state.source(name, "b32") for name in vector(at.operands[1])]
    address = state.address(at.operands[0], "u32")

    def step(lanes: Lanes) -> None:
        rows = _matrix_rows(state, at, lanes, address(), len(sources))
        for source, (index, where) in zip(sources, rows, strict=True):
            matrices = np.ascontiguousarray(source[lanes.select]).view(np.uint16).reshape(-1, 8, 8)
            new = _turned(at, matrices).reshape(-1, 8).view("V16")[:, 0]
            state.shared.write(at, index, where, new)

    return step


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {"ldmatrix": matrix_load, "stmatrix": matrix_store}
