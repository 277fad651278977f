"""Registers of a batch of programs, what instructions see of them, and where findings are written down."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from emulator import registers
from emulator.lanes import WARP, Lanes
from emulator.program import Instruction, Program, Unsupported

Step = Callable[[Lanes], None]
DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16", "f16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2", "u16x2", "s16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": np.float32, "f64": np.float64},
}
SHARED_BASE = 1024  # where shared memory begins: not at 0, so that an address that was never set is outside
LOCAL_BASE = 1 << 60  # the same for the local memory of a thread
SYMBOLS = {"global_smem": SHARED_BASE, "__local_depot0": LOCAL_BASE}


class Fault(Exception):
    """Something that stops a program on a GPU, or leaves its result undefined."""


class Note(NamedTuple):
    """Something that may be wrong: which kernel, what, and at which instruction."""

    kernel: str
    what: str
    instruction: str


class Report(collections.Counter[Note]):
    """How often each thing was noticed."""

    def __str__(self) -> str:
        return "\n".join(f"{number} x {note.kernel}: {note.what}: {note.instruction}" for note, number in self.items())


class State:
    """Registers and parameters of ``count`` programs that run side by side, as arrays of one element a lane."""

    # What a machine adds: memories, and what is under way.
    memory: Any
    shared: Any
    local: Any
    copies: Any
    products: Any
    number: np.ndarray  # of the program of each lane in its launch, from 1
    read: set[str]  # registers that some instruction reads
    constants: list[np.ndarray]  # that C code points to

    def __init__(self, program: Program, count: int, report: Report, random: np.random.Generator) -> None:
        self.program, self.count, self.report, self.random = program, count, report, random
        self.threads = program.threads
        self.lanes = count * self.threads
        if self.threads % WARP:
            raise Unsupported(f"{program.name}: {self.threads} threads are no whole number of warps")
        self.warps = self.threads // WARP  # of one program
        self.slots, sizes = registers.slots(program)
        self.banks = {width: np.zeros((size, self.lanes), DTYPES[width]) for width, size in sizes.items()}
        self.parameters = np.zeros(len(program.parameters), np.uint64)
        self.living = np.ones(self.lanes, bool)
        lane = np.arange(self.lanes, dtype=np.uint32)
        self.thread, self.cta = lane % self.threads, (lane // self.threads).astype(np.int64)
        self.lane_of_warp = (lane % WARP).astype(np.uint8)
        self.warp = (self.thread // WARP).astype(np.uint8)  # in its program
        self.special = {f"%ctaid.{axis}": np.zeros(self.lanes, np.uint32) for axis in "xyz"}
        self.special |= {f"%nctaid.{axis}": np.zeros(1, np.uint32) for axis in "xyz"}
        self.special |= {"%tid.x": self.thread, "%tid.y": np.uint32(0), "%tid.z": np.uint32(0)}
        self.special |= {"%ntid.x": np.uint32(self.threads), "%laneid": self.lane_of_warp.astype(np.uint32)}

    def begin(self, grid: tuple[int, int, int], programs: np.ndarray) -> None:
        """Registers hold rubbish, and lanes belong to these programs [number, 3]; lanes beyond them rest."""
        for bank in self.banks.values():
            raw = bank.view(np.uint8)
            raw[:] = self.random.integers(0, 2 if bank.dtype == bool else 256, raw.shape[1], np.uint8)
        self.living[:] = self.cta < len(programs)
        for place, axis in enumerate("xyz"):
            self.special[f"%nctaid.{axis}"][:] = grid[place]
            self.special[f"%ctaid.{axis}"][: len(programs) * self.threads] = np.repeat(programs[:, place], self.threads)

    # --- operands -----------------------------------------------------------------------------------------------------

    def register(self, name: str) -> np.ndarray:
        """All lanes of a register, in its own width."""
        return self.banks[self.program.widths[name.strip("%0123456789")]][self.slots[name]]

    def source(self, operand: str, kind: str) -> Any:
        """What an instruction reads: an array that follows the register, of a wide one its low part, or a number."""
        dtype = np.dtype(DTYPES[kind])
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("%"):
            array = self.register(operand)
            if array.itemsize < dtype.itemsize or (array.dtype == bool) != (kind == "pred"):
                raise Unsupported(f"{operand} as {kind}")
            return array.view(dtype)[:: array.itemsize // dtype.itemsize]
        return constant(operand, dtype)

    def array(self, operand: str, kind: str) -> np.ndarray:
        """The same, one element a lane and next to each other, for C: such an operand has the width of its register."""
        found = self.source(operand, kind)
        return np.ascontiguousarray(np.broadcast_to(found, self.lanes)) if np.ndim(found) == 0 else found

    def target(self, operand: str, kind: str) -> np.ndarray:
        """What an instruction writes; a register that is wider than what it writes takes it extended."""
        if operand == "_":
            return np.zeros(self.lanes, DTYPES[kind])
        array, dtype = self.register(operand), np.dtype(DTYPES[kind])
        if array.itemsize > dtype.itemsize:
            dtype = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{array.itemsize}")
        if array.itemsize < dtype.itemsize:
            raise Unsupported(f"{operand} for {kind}")
        return array.view(dtype)

    def address(self, operand: str, kind: str) -> Callable[[], np.ndarray]:
        """Of ``[%rd1 + 4]``: the address in every lane."""
        inner = operand.strip("[] \t")
        match = re.fullmatch(r"([%\w$]+?)\s*(?:\+\s*(-?\d+))?", inner)
        if match is None:
            raise Unsupported(f"address {operand}")
        base = self.source(match[1], kind)
        offset = int(match[2] or 0)
        if np.ndim(base) == 0:
            base = np.full(self.lanes, base)
        if offset == 0:
            return lambda: base
        step = base.dtype.type(offset % (1 << 8 * base.itemsize))
        return lambda: base + step

    # --- findings -----------------------------------------------------------------------------------------------------

    def note(self, at: Instruction, what: str) -> None:
        self.report[Note(self.program.name, what, at.text)] += 1

    def fault(self, at: Instruction | None, what: str, lane: int | None = None) -> Fault:
        """To be raised: names the kernel, the instruction, and the program and thread of ``lane``."""
        where = ""
        if lane is not None:
            program = [int(self.special[f"%ctaid.{axis}"][lane]) for axis in "xyz"]
            where = f" in thread {int(self.thread[lane])} of program {program}"
        return Fault(f"{self.program.name}: {what}{where}" + (f": {at.place}: {at.text}" if at else ""))

    def require_whole_warps(self, at: Instruction, lanes: Lanes) -> None:
        if not lanes.whole_warps:
            warp = int(np.flatnonzero(lanes.warps % WARP)[0])
            raise self.fault(at, f"only {int(lanes.warps[warp])} threads of a warp are here together", warp * WARP)


def constant(text: str, dtype: np.dtype) -> Any:
    """A literal, or the address of a symbol: 0 for texts of assertions."""
    if match := re.fullmatch(r"0f([0-9A-Fa-f]{8})", text):
        return np.array([int(match[1], 16)], np.uint32).view(dtype)[0]
    if match := re.fullmatch(r"0d([0-9A-Fa-f]{16})", text):
        return np.array([int(match[1], 16)], np.uint64).view(dtype)[0]
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        number = int(text.rstrip("U"), 0)
        if dtype.kind == "b":
            return np.bool_(number)
        bits = np.array([number % (1 << 8 * dtype.itemsize)], f"u{dtype.itemsize}")
        return bits.view(dtype)[0]
    if text in ("true", "false"):
        return np.bool_(text == "true")
    if text in SYMBOLS:
        return dtype.type(SYMBOLS[text])
    if re.fullmatch(r"[\w$]+", text):
        return dtype.type(0)
    raise Unsupported(f"operand {text!r}")
