"""``cp.async``: copies from global to shared memory that are there only after they were waited for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from emulator import native
from emulator.lanes import Lanes
from emulator.memory import ACCESS
from emulator.program import Instruction, Unsupported
from emulator.state import State, Step


@dataclasses.dataclass
class _Copy:
    """What some lanes have under way."""

    index: np.ndarray  # lanes
    group: np.ndarray  # of each lane
    element: np.ndarray  # of shared memory
    granule: np.ndarray
    data: np.ndarray

    def only(self, chosen: np.ndarray) -> _Copy:
        return _Copy(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


class Copies:
    """All copies under way. Each lane has groups of its own, closed by ``commit_group``."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.closed = np.zeros(state.lanes, np.int64)  # groups of each lane
        self.waiting: list[_Copy] = []

    def begin(self) -> None:
        self.closed[:] = 0
        self.waiting = []

    def _count(self, granule: np.ndarray, size: int, step: int) -> None:
        shared = self.state.shared
        covered = granule[:, None] + np.arange(max(1, size // shared.granule))
        np.add.at(shared.granules["copies"], covered.ravel(), step)

    def start(self, at: Instruction, index: np.ndarray, address: np.ndarray, data: np.ndarray) -> None:
        """Until it is waited for, a copy leaves nothing but rubbish."""
        shared, size = self.state.shared, data.itemsize
        element, granule = shared.place(at, index, address, size)
        shared.access(at, index, granule, size, np.ones(len(index), bool), native.CHECK)
        self._count(granule, size, 1)
        shared.elements(size)[element] = np.full(size, 255, np.uint8).view(data.dtype)
        self.waiting.append(_Copy(index, self.closed[index], element, granule, data))

    def commit(self, lanes: Lanes) -> None:
        self.closed[lanes.select] += 1

    def wait(self, at: Instruction, lanes: Lanes, left: int) -> None:
        """Finish all groups of these lanes but the last ``left`` that they closed."""
        shared, still = self.state.shared, []
        for copy in self.waiting:
            done = lanes.mask[copy.index] & (copy.group < self.closed[copy.index] - left)
            if done.any():
                ready = copy.only(done)
                size = ready.data.itemsize
                self._count(ready.granule, size, -1)
                shared.elements(size)[ready.element] = ready.data
                shared.access(at, ready.index, ready.granule, size, np.ones(len(ready.index), bool), native.TOUCH)
                copy = copy.only(~done)
            if len(copy.index):
                still.append(copy)
        self.waiting = still

    def end(self) -> None:
        if self.waiting:
            self.state.note(self.state.program.code[-1], "an asynchronous copy was never waited for")


def build(state: State, at: Instruction) -> Step:
    if at.says("cp", "async", "commit_group"):
        return state.copies.commit
    if at.says("cp", "async", "wait_group"):
        left = int(at.operands[0])
        return lambda lanes: state.copies.wait(at, lanes, left)
    if at.says("cp", "async", "wait_all"):
        return lambda lanes: (state.copies.commit(lanes), state.copies.wait(at, lanes, 0))[0]
    if at.parts[:2] != ("cp", "async") or at.parts[2] not in ("ca", "cg"):
        raise Unsupported(at.text)
    to, source = state.address(at.operands[0], "u32"), state.address(at.operands[1], "u64")
    size = int(at.operands[2], 0)
    given = state.source(at.operands[3], "u32") if len(at.operands) > 3 else np.uint32(size)

    def step(lanes: Lanes) -> None:
        taken = np.broadcast_to(given, state.lanes)[lanes.select]
        if ((taken != 0) & (taken != size)).any():
            raise Unsupported(f"{at.text}: part of a copy")
        data = np.zeros(lanes.number, ACCESS[size])
        if taken.any():
            reading = (
                lanes if taken.all() else Lanes(lanes.mask & np.broadcast_to(given != 0, state.lanes), lanes.living)
            )
            rows = np.flatnonzero(taken)
            for region, chosen, place in state.memory.find(state, at, reading, source()[reading.select], size):
                data[rows[chosen]] = region.elements(size)[place // size]
        state.copies.start(at, lanes.index, to()[lanes.select], data)

    return step


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {"cp": build}
