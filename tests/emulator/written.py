"""Registers that may be read before anything was written to them, and where what was in them ends up.

A compiler may well let such a number through arithmetic whose result nobody uses: a sum over four lanes that all 32
take part in. So unknown numbers are followed from register to register, and noted where they decide something: an
address, a predicate, a branch, or what is stored. Followed are only registers that some path leaves unwritten, and what
depends on them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.lanes import WARP, Lanes
from emulator.program import Instruction
from emulator.state import State, Step
from emulator.warps import sources_of_shuffle

MEMORY = ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "mma", "wgmma")


def followed(code: list[Instruction], doubtful: set[str]) -> set[str]:
    """These registers and all whose contents may depend on them."""
    found = set(doubtful)
    size = -1
    while size != len(found):
        size = len(found)
        for at in code:
            if at.name not in MEMORY and not found.isdisjoint(at.registers[0]):
                found.update(at.registers[1])
    return found


class Written:
    """For each register that is followed: the lanes in which what it holds is known."""

    def __init__(self, state: State, doubtful: set[str]) -> None:
        self.state, self.doubtful = state, doubtful
        self.known = {name: np.ones(state.lanes, bool) for name in followed(state.program.code, doubtful)}

    def begin(self) -> None:
        for name, known in self.known.items():
            known[:] = name not in self.doubtful

    def require(self, at: Instruction, names: list[str], lanes: Lanes) -> None:
        for name in names:
            if not self.known[name][lanes.select].all():
                self.state.note(at, f"{name} decides something before anything was written to it")

    def watch(self, at: Instruction, step: Step) -> Step:
        """The instruction, with what it makes known or unknown."""
        reads = [name for name in at.registers[0] if name in self.known and name != at.predicate]
        writes = [name for name in at.registers[1] if name in self.known]
        if not reads and not writes:
            return step
        rule = None if at.name in MEMORY else self._rule(at, reads)

        def watched(lanes: Lanes) -> None:
            if rule is None:
                self.require(at, reads, lanes)
            known = rule() if rule else np.True_
            step(lanes)
            for name in writes:
                np.copyto(self.known[name], known, where=lanes.mask)

        return watched

    def _rule(self, at: Instruction, reads: list[str]) -> Callable[[], np.ndarray]:
        """Where the result is known, before the instruction runs."""

        def every() -> np.ndarray:
            return np.logical_and.reduce([self.known[name] for name in reads]) if reads else np.True_

        def of(operand: str) -> np.ndarray:
            return self.known.get(operand, np.True_)

        if at.name == "shfl" and at.operands[1] in self.known:
            partners = sources_of_shuffle(self.state, at)
            return lambda: every()[partners()]
        if at.name == "redux":
            return lambda: np.repeat(every().reshape(-1, WARP).all(1), WARP)
        if at.name == "selp" and at.operands[3] not in self.known:
            condition = self.state.source(at.operands[3], "pred")
            return lambda: np.where(condition, of(at.operands[1]), of(at.operands[2]))
        if at.name in ("and", "or") and at.type == "pred":
            a, b = (self.state.source(operand, "pred") for operand in at.operands[1:])
            deciding = at.name == "or"  # the value that settles the result alone
            return lambda: (
                of(at.operands[1]) & of(at.operands[2])
                | of(at.operands[1]) & (a == deciding)
                | of(at.operands[2]) & (b == deciding)
            )
        return every
