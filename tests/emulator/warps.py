"""Instructions in which the lanes of a warp exchange numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.lanes import WARP, Lanes
from emulator.program import Instruction, Unsupported
from emulator.state import State, Step


def partner(mode: str, lane: np.ndarray, operand: np.ndarray, clamp: int) -> np.ndarray:
    """The lane that each lane of a warp reads, in a shuffle over the whole warp; out of range, itself."""
    if clamp != (0 if mode == "up" else 31):
        raise Unsupported(f"shfl.{mode} within parts of a warp")
    if mode == "idx":
        return operand & 31
    if mode == "bfly":
        found = lane ^ operand
    elif mode in ("up", "down"):
        found = lane - operand if mode == "up" else lane + operand
    else:
        raise Unsupported(f"shfl.{mode}")
    return np.where((found >= 0) & (found < WARP), found, lane)


def sources_of_shuffle(state: State, at: Instruction) -> Callable[[], np.ndarray]:
    """For every lane of the batch, the lane that a shuffle reads."""
    operand, clamp = (state.source(name, "u32") for name in at.operands[2:4])
    first, lane = np.arange(state.lanes) // WARP * WARP, state.lane_of_warp.astype(np.int64)

    def find() -> np.ndarray:
        return first + partner(at.parts[2], lane, np.asarray(operand, np.int64), int(clamp))

    if np.ndim(operand):
        return find
    fixed = find()
    return lambda: fixed


def shuffle(state: State, at: Instruction) -> Step:
    if at.parts[1] != "sync" or "|" in at.operands[0]:
        raise Unsupported(at.text)
    value, target = state.array(at.operands[1], "b32"), state.target(at.operands[0], "b32")
    partners = sources_of_shuffle(state, at)

    def step(lanes: Lanes) -> None:
        state.require_whole_warps(at, lanes)
        np.copyto(target, value[partners()], where=lanes.where)

    return step


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def reduce(state: State, at: Instruction) -> Step:
    """``redux.sync``."""
    value, target = state.source(at.operands[1], at.type), state.target(at.operands[0], at.type)
    function = REDUCTIONS[at.parts[2]]

    def step(lanes: Lanes) -> None:
        state.require_whole_warps(at, lanes)
        rows = np.broadcast_to(value, state.lanes).reshape(-1, WARP)
        np.copyto(target, np.repeat(function.reduce(rows, axis=1, dtype=rows.dtype), WARP), where=lanes.where)

    return step


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {"shfl": shuffle, "redux": reduce}
