"""Runs a program: batches of its copies side by side, instruction by instruction, until all of them are through.

Lanes that branch apart run in turns, the earliest place in the code first, and join where they meet. A barrier holds
the lanes of a program until all of them are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from emulator import arithmetic, copies, local, matrices, memory, registers, shared, warps
from emulator.lanes import WARP, Lanes
from emulator.memory import GlobalMemory
from emulator.program import Instruction, Program, Unsupported
from emulator.state import Report, State, Step
from emulator.written import Written

LANES = 8192  # of a batch
GRANULES = 1 << 20  # of a batch: pieces of shared memory that are watched
ENDLESS = 5_000_000  # blocks
BUILDERS = (
    arithmetic.BUILDERS | memory.BUILDERS | shared.BUILDERS | copies.BUILDERS | matrices.BUILDERS | warps.BUILDERS
)
SPACES: dict[tuple[str, str], Callable[[State, Instruction], Step]] = {
    **{("ld", "global"): memory.load, ("st", "global"): memory.store},
    **{("ld", "shared"): shared.load, ("st", "shared"): shared.store},
    **{("ld", "generic"): local.load, ("st", "generic"): local.store},
    **{("ld", "local"): local.load, ("st", "local"): local.store},
    ("ld", "param"): memory.parameter,
}


class Machine(State):
    """``count`` copies of a program, with all that one of them has to itself."""

    def __init__(self, program: Program, count: int, shared_bytes: int, random: np.random.Generator) -> None:
        super().__init__(program, count, Report(), random)
        self.constants = []
        self.number = np.zeros(self.lanes, np.int32)
        self.read = {name for at in program.code for name in at.registers[0]}
        self.memory = GlobalMemory([])
        self.shared = shared.SharedMemory(self, shared_bytes)
        self.local = local.LocalMemory(self)
        self.copies = copies.Copies(self)
        self.products = matrices.Products(self)
        self.apart = False
        # What may run ahead of the rest: a warp, or four that multiply together.
        self.unit = matrices.GROUP if any(at.name == "wgmma" for at in program.code) else WARP
        self.watched = matrices.registers_of_products(program.code)
        self.written = Written(self, registers.doubtful(program))
        self.blocks: dict[int, list[Step]] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        programs: np.ndarray,
        values: np.ndarray,
        tensors: GlobalMemory,
        report: Report,
    ) -> None:
        """Run these programs [number, 3] of a grid, in this order."""
        self.memory, self.report = tensors, report
        self.parameters[:] = values
        with np.errstate(all="ignore"):
            for first in range(0, len(programs), self.count):
                batch = programs[first : first + self.count]
                self.begin(grid, batch)
                self.number[:] = first + self.cta + 1
                self.shared.begin()
                self.local.begin()
                self.copies.begin()
                self.products.begin()
                self.written.begin()
                self._run()
                self.copies.end()
                self.products.end()

    # --- instructions -------------------------------------------------------------------------------------------------

    def steps(self, start: int) -> list[Step]:
        """The instructions of a block, but for the one that ends it."""
        if start not in self.blocks:
            block = self.program.blocks[start]
            code = self.program.code[start : block.stop - (block.end is not None)]
            self.blocks[start] = [step for at in code if (step := self._step(at)) is not None]
        return self.blocks[start]

    def _step(self, at: Instruction) -> Step | None:
        bare = self._bare(at)
        if bare is None:
            return None
        step = self.products.watch(at, self.watched, self.written.watch(at, bare))
        if not at.predicate:
            return step
        condition, doubtful = self.source(at.predicate, "pred"), [at.predicate] * (at.predicate in self.written.known)

        def guarded(lanes: Lanes) -> None:
            self.written.require(at, doubtful, lanes)
            chosen = lanes.where_true(condition, at.negated)
            if chosen is not None:
                step(chosen)

        return guarded

    def _bare(self, at: Instruction) -> Step | None:
        if at.says("st", "param"):
            return None  # of an assertion that is about to fail
        if at.says("bar", "warp", "sync"):
            return functools.partial(self._warp_barrier, at)
        if at.says("fence", "proxy", "async"):
            return self.shared.pass_proxy_fence
        if at.name in ("ld", "st"):
            space = next((part for part in at.parts if part in ("global", "shared", "local", "param")), "generic")
            build = SPACES.get((at.name, space))
        else:
            build = BUILDERS.get(at.name)
        if build is None:
            raise Unsupported(f"{self.program.name}: {at.text}")
        return build(self, at)

    def _warp_barrier(self, at: Instruction, lanes: Lanes) -> None:
        if at.operands[0] not in ("-1", "0xffffffff"):
            raise Unsupported(at.text)
        self.require_whole_warps(at, lanes)
        self.shared.pass_warp_barrier(lanes)

    # --- control flow -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        running = {0: Lanes(self.living.copy(), self.living)}
        waiting: dict[int, Lanes] = {}
        for _ in range(ENDLESS):
            if not running:
                if not waiting:
                    return
                self._meet(waiting)
                running, waiting = {self.program.blocks[start].stop: lanes for start, lanes in waiting.items()}, {}
            start, lanes = self._next(running)
            if start not in self.program.blocks:
                raise self.fault(None, "a program ran beyond the end of its code", int(lanes.index[0]))
            for step in self.steps(start):
                step(lanes)
            end = self.program.blocks[start].end
            if end is not None and end.name == "bar":
                self.require_whole_warps(end, lanes)
                _merge(waiting, start, lanes)
            else:
                self._leave(running, start, lanes)
        raise self.fault(None, "a program does not end")

    def _next(self, running: dict[int, Lanes]) -> tuple[int, Lanes]:
        """Take those who run a block now."""
        if not self.apart:
            start = min(running)
            return start, running.pop(start)
        start = list(running)[int(self.random.integers(len(running)))]
        lanes = running.pop(start)
        chosen = np.repeat(self.random.random(self.lanes // self.unit) < 0.5, self.unit)
        ahead, behind = lanes.split(chosen, False)
        if ahead is None or behind is None:
            return start, lanes
        running[start] = behind
        return start, ahead

    def _leave(self, running: dict[int, Lanes], start: int, lanes: Lanes) -> None:
        """Where lanes go from the end of a block."""
        block = self.program.blocks[start]
        end, going, staying = block.end, None, lanes
        if end is not None:
            going, staying = lanes, None
            if end.predicate:
                self.written.require(end, [end.predicate] * (end.predicate in self.written.known), lanes)
                going, staying = lanes.split(self.source(end.predicate, "pred"), end.negated)
        if staying is not None:
            _merge(running, block.stop, staying)
        if going is None:
            return
        if end.name in ("trap", "call"):
            raise self.fault(end, "a device assertion failed", int(going.index[0]))
        if end.name in ("ret", "exit"):
            self._finish(running, going)
        else:
            _merge(running, block.target, going)

    def _finish(self, running: dict[int, Lanes], going: Lanes) -> None:
        self.living[going.index] = False
        for start, lanes in running.items():  # they find out again who is left
            running[start] = Lanes(lanes.mask, self.living)

    def _meet(self, waiting: dict[int, Lanes]) -> None:
        """All lanes of a program have to wait at the same barrier: none anywhere else, and none that left."""
        lanes = next(iter(waiting.values()))
        if len(waiting) > 1 or not lanes.all:
            here = sum((start + 1) * part.mask.reshape(self.count, -1) for start, part in waiting.items())
            held = here.any(1)
            apart = held & (here != here[:, :1]).any(1)
            if apart.any():
                program = int(np.flatnonzero(apart)[0])
                missing = int(np.flatnonzero(here[program] != here[program].max())[0])
                at = self.program.blocks[int(here[program].max()) - 1].end
                what = "part of a program waits at a barrier, and the rest does not come: first of it"
                raise self.fault(at, what, program * self.threads + missing)
            lanes = Lanes(np.repeat(held, self.threads), self.living)
        self.shared.pass_barrier(lanes)


def _merge(places: dict[int, Lanes], start: int, lanes: Lanes) -> None:
    places[start] = places[start] | lanes if start in places else lanes


def batch_size(program: Program, shared_bytes: int, number: int) -> int:
    """How many of ``number`` programs to run side by side."""
    granules = -(-shared_bytes // 128) * 128 // shared.smallest_access(program)
    most = min(LANES // program.threads, GRANULES // max(1, granules))
    return max(1, min(number, most))
