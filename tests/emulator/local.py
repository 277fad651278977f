"""Memory of one thread alone, where compilers put what they index."""

from __future__ import annotations

import numpy as np

from emulator.lanes import Lanes
from emulator.memory import ACCESS, loading, storing
from emulator.program import Instruction
from emulator.state import LOCAL_BASE, State


class LocalMemory:
    """That of every lane of a batch."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.bytes = np.zeros((state.lanes, state.program.local), np.uint8)

    def begin(self) -> None:
        """Nothing was written yet: every bit is set."""
        self.bytes[:] = 255

    def columns(self, at: Instruction, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
        """Which bytes of its own each lane accesses, [lanes, size]; faults outside and if misaligned."""
        offset = (address - np.uint64(LOCAL_BASE)).astype(np.int64)
        wrong = (offset < 0) | (offset + size > self.bytes.shape[1]) | (offset % size != 0)
        if wrong.any():
            lane = int(lanes.index[np.flatnonzero(wrong)[0]])
            raise self.state.fault(at, f"a generic address is outside of local memory, or misaligned by {size}", lane)
        return offset[:, None] + np.arange(size)


def _read(state: State, at: Instruction, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
    columns = state.local.columns(at, lanes, address, size)
    return np.ascontiguousarray(state.local.bytes[lanes.index[:, None], columns]).view(ACCESS[size])[:, 0]


def _write(state: State, at: Instruction, lanes: Lanes, address: np.ndarray, new: np.ndarray, item: int) -> None:
    columns = state.local.columns(at, lanes, address, new.itemsize)
    state.local.bytes[lanes.index[:, None], columns] = new.view(np.uint8).reshape(lanes.number, new.itemsize)


load, store = loading("u64", _read), storing("u64", _write)
