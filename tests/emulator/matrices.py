"""Matrix products: ``mma.sync`` of a warp, and ``wgmma`` of four warps, which runs while they go on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from emulator import native
from emulator.convert import from_bits
from emulator.lanes import WARP, Lanes
from emulator.memory import vector
from emulator.program import Instruction, Unsupported
from emulator.state import SHARED_BASE, State, Step

GROUP = 4 * WARP  # lanes that share one wgmma
SPANS = {0: 1, 3: 2, 2: 4, 1: 8}  # by swizzle mode: units of 16 bytes in a row of its atom


# --- fragments: [registers][lanes] and matrices -----------------------------------------------------------------------


def left_matrices(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Four registers of pairs become [warps, 16, 16]; lane 4g + t holds columns 2t, 2t + 1 of rows g and g + 8."""
    pairs = np.stack([from_bits(np.ascontiguousarray(part).view(np.uint16), kind) for part in registers])
    # column half, row half, warp, g, t, one of a pair
    return pairs.reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def right_matrices(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Two registers of pairs become [warps, 8 columns, 16]: lane 4g + t holds column g."""
    pairs = np.stack([from_bits(np.ascontiguousarray(part).view(np.uint16), kind) for part in registers])
    return pairs.reshape(2, -1, 8, 4, 2).transpose(1, 2, 0, 3, 4).reshape(-1, 8, 16)


def accumulators(registers: list[np.ndarray]) -> np.ndarray:
    """Any multiple of four registers of float32 becomes [warps, 16, columns]."""
    parts = np.stack([np.ascontiguousarray(part).view(np.float32) for part in registers])
    # eight columns, row half, one of a pair, warp, g, t
    return (
        parts.reshape(-1, 2, 2, parts.shape[1] // WARP, 8, 4)
        .transpose(3, 1, 4, 0, 5, 2)
        .reshape(parts.shape[1] // WARP, 16, -1)
    )


def registers_of(matrices: np.ndarray) -> np.ndarray:
    """The other way round: [warps, 16, columns] becomes [registers, lanes]."""
    warps, _, columns = matrices.shape
    parts = matrices.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(parts).reshape(columns // 2, warps * WARP)


def multiply_warps(state: State, at: Instruction) -> Step:
    """``mma.sync``."""
    if at.parts[3:6] != ("m16n8k16", "row", "col") or at.parts[6] != "f32" or at.parts[9] != "f32":
        raise Unsupported(at.text)
    kind = at.parts[7]
    if kind not in ("f16", "bf16") or at.parts[8] != kind:
        raise Unsupported(at.text)
    targets = [state.target(name, "f32") for name in vector(at.operands[0])]
    a, b, c = ([state.array(name, "b32") for name in vector(operand)] for operand in at.operands[1:])

    def step(lanes: Lanes) -> None:
        state.require_whole_warps(at, lanes)
        here = lanes.select
        found = native.multiply(
            left_matrices([part[here] for part in a], kind),
            right_matrices([part[here] for part in b], kind),
            accumulators([part[here] for part in c]),
            state.program.version,
            kind,
        )
        for target, value in zip(targets, registers_of(found), strict=True):
            target[here] = value

    return step


# --- asynchronous products --------------------------------------------------------------------------------------------


def operand_places(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Addresses [rows, 16] of the halves of an operand in shared memory, by its descriptor.

    PTX ISA, "Matrix descriptor" and "Strides": 8 rows of 16 bytes, or of a whole swizzle atom, form a core matrix.
    ``transposed``: rows lie next to each other in memory, not columns.
    """
    start, leading, stride = ((descriptor >> first & 0x3FFF) << 4 for first in (0, 16, 32))
    base, mode = descriptor >> 49 & 7, descriptor >> 62 & 3
    if base:
        raise Unsupported("a descriptor with a base offset")
    row, column = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    span = SPANS[mode]
    if not transposed:
        inner = row % 8 * 16 * span + row // 8 * stride + column % 8 * 2
        place = inner + column // 8 * (leading if mode == 0 else 16)
    else:
        unit = row // 8
        inner = row % 8 * 2 + column % 8 * 16 * span
        if mode == 0:
            place = inner + unit * stride + column // 8 * leading
        else:
            place = inner + unit % span * 16 + unit // span * leading + column // 8 * stride
    place = place + start
    return place ^ (place >> 7 & span - 1) << 4


@dataclasses.dataclass
class _Product:
    """What a group of four warps has under way."""

    group: int
    number: int  # of its closed groups of products, when this one began
    granules: np.ndarray  # that it reads
    registers: tuple[str, ...]


class Products:
    """All products under way, by groups of four warps of the batch."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.closed = np.zeros(max(1, state.lanes // GROUP), np.int64)
        self.waiting: list[_Product] = []
        self.busy: dict[str, set[int]] = {}  # registers of products under way, and of which groups
        self.loose: dict[str, np.ndarray] = {}  # lanes that wrote registers of products since their last wgmma.fence
        self._known: dict[tuple[int, int, bool], tuple[np.ndarray, np.ndarray]] = {}

    def begin(self) -> None:
        self.closed[:] = 0
        self.waiting, self.busy, self.loose = [], {}, {}

    def groups(self, at: Instruction, lanes: Lanes) -> np.ndarray:
        """The groups that are here, each of them whole."""
        if self.state.threads % GROUP:
            raise self.state.fault(at, "wgmma needs groups of four warps")
        here = lanes.mask.reshape(-1, GROUP)
        if (here.any(1) != here.all(1)).any():
            raise self.state.fault(at, "only part of a group of four warps is here", int(lanes.index[0]))
        return np.flatnonzero(here[:, 0])

    def places(self, at: Instruction, descriptor: int, rows: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Where an operand lies in a program's shared memory: halves [rows, 16], and granules."""
        key = descriptor, rows, transposed
        if key not in self._known:
            shared = self.state.shared
            place = operand_places(descriptor, rows, transposed) - SHARED_BASE
            if place.min() < 0 or place.max() + 2 > shared.size:
                what = f"wgmma reads bytes {place.min()} to {place.max() + 2} of {shared.size} of shared memory"
                raise self.state.fault(at, what)
            self._known[key] = place // 2, np.unique(place // shared.granule)
        return self._known[key]

    def operand(
        self, at: Instruction, groups: np.ndarray, descriptors: np.ndarray, rows: int, transposed: bool, kind: str
    ) -> np.ndarray:
        """Matrices [groups, rows, 16] from shared memory, once it is sure that they are there."""
        shared, found = self.state.shared, np.empty((len(groups), rows, 16), np.float32)
        every = descriptors.reshape(-1, GROUP)[groups]
        if (every != every[:, :1]).any():
            raise self.state.fault(at, "a descriptor differs inside of a group of four warps")
        halves = shared.bytes.view(np.uint16)
        for descriptor in np.unique(every[:, 0]).tolist():
            place, granules = self.places(at, descriptor, rows, transposed)
            rows_here = np.flatnonzero(every[:, 0] == descriptor)
            first = shared.first[groups[rows_here] * GROUP]
            found[rows_here] = from_bits(halves[place + (first // 2)[:, None, None]], kind)
            for group, start in zip(groups[rows_here].tolist(), first.tolist(), strict=True):
                self._read(at, group, granules + start // shared.granule)
        return found

    def _read(self, at: Instruction, group: int, granules: np.ndarray) -> None:
        state = self.state
        seen = state.shared.granules[granules]
        if seen["copies"].any():
            state.note(at, "wgmma reads shared memory that an asynchronous copy still writes")
        if not seen["written"].all():
            state.note(at, "wgmma reads shared memory that nothing was written to")
        if seen["unfenced"].any():
            state.note(at, "wgmma reads what was written without a proxy fence since")
        if (seen["writers"][seen["clock"] == state.shared.clock[group * GROUP]] != 0).any():
            state.note(at, "race: wgmma reads what a warp wrote, without a barrier")
        state.shared.granules["products"][granules] += 1
        self.waiting.append(_Product(group, int(self.closed[group]), granules, at.registers[1]))

    def start(self, at: Instruction, groups: np.ndarray, registers: tuple[str, ...], fenced: list[str]) -> None:
        """These registers belong to the product until it was waited for."""
        lanes = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
        for name in fenced:
            if name in self.loose and self.loose[name][lanes].any():
                self.state.note(at, "wgmma reads registers that were written without a wgmma.fence since")
        for name in registers:
            self.busy.setdefault(name, set()).update(groups.tolist())

    def fence(self, lanes: Lanes) -> None:
        for name in list(self.loose):
            self.loose[name] &= ~lanes.mask
            if not self.loose[name].any():
                del self.loose[name]

    def commit(self, at: Instruction, lanes: Lanes) -> None:
        self.closed[self.groups(at, lanes)] += 1

    def wait(self, at: Instruction, lanes: Lanes, left: int) -> None:
        shared, still = self.state.shared, []
        groups = set(self.groups(at, lanes).tolist())
        for product in self.waiting:
            group = product.group
            if group not in groups or product.number >= self.closed[group] - left:
                still.append(product)
                continue
            shared.granules["products"][product.granules] -= 1
            index = np.repeat(group * GROUP + WARP * np.arange(4), len(product.granules))
            shared.access(at, index, np.tile(product.granules, 4), shared.granule, steps=native.TOUCH)
        self.waiting = still
        for name, owners in list(self.busy.items()):
            busy = {product.group for product in still if name in product.registers}
            self.busy[name] = owners - groups | owners & busy
            if not self.busy[name]:
                del self.busy[name]

    def watch(self, at: Instruction, watched: set[str], step: Step) -> Step:
        """The instruction, and before it a look whether it touches registers of products."""
        reads, writes = ([name for name in part if name in watched] for part in at.registers)
        if at.name == "wgmma" or not (reads or writes):
            return step

        def look(lanes: Lanes) -> None:
            for name in (*reads, *writes):
                if name in self.busy and any(lanes.mask[group * GROUP] for group in self.busy[name]):
                    self.state.note(at, f"{name} is used while an asynchronous product owns it")
            for name in writes:
                self.loose[name] = self.loose[name] | lanes.mask if name in self.loose else lanes.mask.copy()
            step(lanes)

        return look

    def end(self) -> None:
        if self.waiting:
            self.state.note(self.state.program.code[-1], "an asynchronous product was never waited for")


def multiply_groups(state: State, at: Instruction) -> Step:
    """``wgmma.mma_async``: D = A B or D += A B, with B, and maybe A, in shared memory."""
    shape, kind = re.fullmatch(r"m64n(\d+)k16", at.parts[4]), at.parts[6]
    if shape is None or at.parts[5:] != ("f32", kind, kind) or kind not in ("f16", "bf16"):
        raise Unsupported(at.text)
    columns = int(shape[1])
    names = vector(at.operands[0])
    targets = [state.target(name, "f32") for name in names]
    in_registers = at.operands[1].startswith("{")
    left = vector(at.operands[1]) if in_registers else [at.operands[1]]
    a = [state.array(name, "b32" if in_registers else "b64") for name in left]
    b = state.array(at.operands[2], "b64")
    scale = state.source(at.operands[3], "pred")
    signs, transposed = at.operands[4:6], [operand != "0" for operand in at.operands[6:]]
    if list(signs) != ["1", "1"]:
        raise Unsupported(at.text)

    def step(lanes: Lanes) -> None:
        state.require_whole_warps(at, lanes)
        products, here = state.products, lanes.select
        groups = products.groups(at, lanes)
        right = products.operand(at, groups, b, columns, transposed[-1], kind)
        if in_registers:
            matrix = left_matrices([part[here] for part in a], kind).reshape(-1, 64, 16)
        else:
            matrix = products.operand(at, groups, a[0], 64, transposed[0], kind)
        adding = np.broadcast_to(scale, state.lanes)[here].reshape(-1, GROUP)[:, 0]
        before = accumulators([target[here] for target in targets]).reshape(-1, 64, columns)
        before = np.where(adding[:, None, None], before, np.float32(0))
        found = native.multiply(matrix, right, before, state.program.version, kind)
        for target, value in zip(targets, registers_of(found.reshape(-1, 16, columns)), strict=True):
            target[here] = value
        owned = [*(left if in_registers else []), *names]
        products.start(at, groups, tuple(owned), [*(left if in_registers else []), *(names if adding.any() else [])])

    return step


def build(state: State, at: Instruction) -> Step:
    what = at.parts[1]
    if what == "mma_async":
        return multiply_groups(state, at)
    if what == "fence":
        return state.products.fence
    if what == "commit_group":
        return lambda lanes: state.products.commit(at, lanes)
    if what == "wait_group":
        left = int(at.operands[0])
        return lambda lanes: state.products.wait(at, lanes, left)
    raise Unsupported(at.text)


def registers_of_products(code: list[Instruction]) -> set[str]:
    """Registers that a wgmma multiplies or adds to."""
    found: set[str] = set()
    for at in code:
        if at.says("wgmma", "mma_async"):
            found.update(vector(at.operands[0]))
            found.update(vector(at.operands[1]) if at.operands[1].startswith("{") else [])
    return found


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {"mma": multiply_warps, "wgmma": build}
