"""Memory of one thread alone, where compilers put what they index."""

from __future__ import annotations

import numpy as np

from emulator.lanes import Lanes
from emulator.memory import ACCESS, itemsize, joined, parts, unsigned, vector
from emulator.program import Instruction
from emulator.state import LOCAL_BASE, State, Step


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


def load(state: State, at: Instruction) -> Step:
    names, kind = vector(at.operands[0]), at.type
    targets = [state.target(name, kind) for name in names]
    address, size = state.address(at.operands[1], "u64"), itemsize(kind) * len(names)

    def step(lanes: Lanes) -> None:
        columns = state.local.columns(at, lanes, address()[lanes.select], size)
        found = np.ascontiguousarray(state.local.bytes[lanes.index[:, None], columns]).view(ACCESS[size])[:, 0]
        for target, value in zip(targets, parts(found, kind, len(names)), strict=True):
            target[lanes.select] = value

    return step


def store(state: State, at: Instruction) -> Step:
    sources = [state.source(name, unsigned(at.type)) for name in vector(at.operands[1])]
    address, item = state.address(at.operands[0], "u64"), itemsize(at.type)

    def step(lanes: Lanes) -> None:
        size = item * len(sources)
        columns = state.local.columns(at, lanes, address()[lanes.select], size)
        new = joined(sources, item, lanes)
        state.local.bytes[lanes.index[:, None], columns] = new.view(np.uint8).reshape(lanes.number, size)

    return step
