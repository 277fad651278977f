"""Global memory: tensors at addresses of their own, so far apart that no access meant for one can hit another."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from emulator.convert import keep
from emulator.lanes import Lanes
from emulator.program import Instruction, Unsupported
from emulator.state import DTYPES, State, Step

ROOM = 40  # bits of an address inside of one storage; it begins in the middle
MIDDLE = 1 << ROOM - 1
# Elements of one access; a vector of 16 bytes or more is moved as it is.
ACCESS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16", 32: "V32"}


class Region:
    """One storage: its bytes, and which of them belong to a tensor of the launch."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storage = tensors[0].untyped_storage()
        self.pointer = storage.data_ptr()
        self.shift = self.pointer % 16  # keeps the alignment that the kernel was compiled for
        spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
        self.spans: list[tuple[int, int]] = []
        for start, stop in spans:
            if self.spans and start <= self.spans[-1][1]:
                self.spans[-1] = self.spans[-1][0], max(stop, self.spans[-1][1])
            else:
                self.spans.append((start, stop))
        size = storage.nbytes() + self.shift
        self.bytes = np.zeros(0, np.uint8)
        if storage.nbytes():
            self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pointer - self.shift))
        self.writers: np.ndarray | None = None  # of each byte that begins an element: a program of the launch, from 1

    def elements(self, size: int) -> np.ndarray:
        """The bytes as elements of an access."""
        return self.bytes[: len(self.bytes) // size * size].view(ACCESS[size])

    def holds(self, offset: np.ndarray, size: int) -> np.ndarray:
        """Whether ``size`` bytes from there belong to a tensor."""
        inside = np.zeros(len(offset), bool)
        for start, stop in self.spans:
            inside |= (offset >= start + self.shift) & (offset + size <= stop + self.shift)
        return inside


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """From the first to the last byte, in its storage."""
    reach = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    first, last = sum(step for step in reach if step < 0), sum(step for step in reach if step > 0)
    start = tensor.storage_offset()
    return (start + first) * tensor.itemsize, (start + last + 1) * tensor.itemsize


class GlobalMemory:
    """The tensors of one launch."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        shared: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            shared.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.regions = [Region(group) for group in shared.values()]
        self._numbers = {pointer: number for number, pointer in enumerate(shared)}

    def address(self, tensor: torch.Tensor) -> int:
        """What the kernel gets as a pointer."""
        number = self._numbers[tensor.untyped_storage().data_ptr()]
        offset = tensor.storage_offset() * tensor.itemsize + self.regions[number].shift
        return (number + 1 << ROOM) + MIDDLE + offset

    def find(
        self, state: State, at: Instruction, lanes: Lanes, address: np.ndarray, size: int
    ) -> Iterator[tuple[Region, Any, np.ndarray]]:
        """For each region that is accessed: which of the addresses lie in it, and their offsets. Faults outside."""
        if size > 1 and (wrong := address & np.uint64(size - 1)).any():
            lane = int(lanes.index[np.flatnonzero(wrong)[0]])
            raise state.fault(at, f"an access of {size} bytes is misaligned by {int(wrong[wrong > 0][0])}", lane)
        number = (address >> np.uint64(ROOM)).astype(np.int64) - 1
        offset = (address & np.uint64((1 << ROOM) - 1)).astype(np.int64) - MIDDLE
        numbers = [int(number[0])] if (number == number[0]).all() else np.unique(number).tolist()
        for one in numbers:
            chosen = slice(None) if len(numbers) == 1 else np.flatnonzero(number == one)
            if not 0 <= one < len(self.regions):
                raise state.fault(at, "an address belongs to no tensor", int(lanes.index[chosen][0]))
            region, place = self.regions[one], offset[chosen]
            good = region.holds(place, size)
            if not good.all():
                worst = int(np.flatnonzero(~good)[0])
                spans = ", ".join(f"[{start}, {stop})" for start, stop in region.spans)
                raise state.fault(
                    at,
                    f"an access of {size} bytes at byte {int(place[worst]) - region.shift} of a storage whose tensors "
                    f"take {spans or 'nothing'}",
                    int(lanes.index[chosen][worst]),
                )
            yield region, chosen, place


def joined(values: list[Any], size: int, lanes: Lanes) -> np.ndarray:
    """One element an access out of the numbers that a vector of registers holds in these lanes."""
    columns = np.empty((lanes.number, len(values)), f"u{size}")
    for place, value in enumerate(values):
        columns[:, place] = value[lanes.select] if np.ndim(value) else value
    return columns.view(ACCESS[size * len(values)])[:, 0]


def parts(elements: np.ndarray, kind: str, count: int) -> list[np.ndarray]:
    """The other way round: the numbers of each register."""
    columns = elements.view(DTYPES[kind]).reshape(len(elements), count)
    return [columns[:, place] for place in range(count)]


def differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which elements are not the same, bit for bit."""
    if a.dtype.kind == "V":
        return (a.view("u8").reshape(len(a), -1) != b.view("u8").reshape(len(b), -1)).any(1)
    return a != b


def vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def itemsize(kind: str) -> int:
    return int(np.dtype(DTYPES[kind]).itemsize)


def unsigned(kind: str) -> str:
    """The kind as bits."""
    return f"b{8 * itemsize(kind)}"


# --- instructions -----------------------------------------------------------------------------------------------------


Build = Callable[[State, Instruction], Step]
Read = Callable[[State, Instruction, Lanes, np.ndarray, int], np.ndarray]
Write = Callable[[State, Instruction, Lanes, np.ndarray, np.ndarray, int], None]


def loading(address_kind: str, read: Read) -> Build:
    """A load of one number or several in a row: ``read`` finds those of each lane, as one element, at its address."""

    def build(state: State, at: Instruction) -> Step:
        names, kind = vector(at.operands[0]), at.type
        targets = [state.target(name, kind) for name in names]
        address, size = state.address(at.operands[1], address_kind), itemsize(kind) * len(names)

        def step(lanes: Lanes) -> None:
            found = read(state, at, lanes, address()[lanes.select], size)
            for target, value in zip(targets, parts(found, kind, len(names)), strict=True):
                target[lanes.select] = value

        return step

    return build


def storing(address_kind: str, write: Write) -> Build:
    """A store of the same: ``write`` puts the element of each lane at its address, given the bytes of one number."""

    def build(state: State, at: Instruction) -> Step:
        sources = [state.source(name, unsigned(at.type)) for name in vector(at.operands[1])]
        address, item = state.address(at.operands[0], address_kind), itemsize(at.type)

        def step(lanes: Lanes) -> None:
            write(state, at, lanes, address()[lanes.select], joined(sources, item, lanes), item)

        return step

    return build


def _read(state: State, at: Instruction, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
    found = np.empty(lanes.number, ACCESS[size])
    for region, chosen, place in state.memory.find(state, at, lanes, address, size):
        found[chosen] = region.elements(size)[place // size]
        if region.writers is not None:
            writer, mine = region.writers[place], state.number[lanes.select][chosen]
            if ((writer != 0) & (writer != mine)).any():
                state.note(at, "a program reads what another one of the same launch stores")
    return found


def _write(state: State, at: Instruction, lanes: Lanes, address: np.ndarray, values: np.ndarray, item: int) -> None:
    size = values.itemsize
    for region, chosen, place in state.memory.find(state, at, lanes, address, size):
        elements, index, new = region.elements(size), place // size, values[chosen]
        if region.writers is None:
            region.writers = np.zeros(len(region.bytes), np.int32)
        writer, mine = region.writers[place], state.number[lanes.select][chosen]
        if ((writer != 0) & (writer != mine) & differ(elements[index], new)).any():
            state.note(at, "two programs store different numbers in one place")
        for part in range(0, size, item):
            region.writers[place + part] = mine
        scatter(state, at, elements, index, new, "threads store different numbers in one place")


load, store = loading("u64", _read), storing("u64", _write)


def scatter(
    state: State, at: Instruction, elements: np.ndarray, index: np.ndarray, new: np.ndarray, otherwise: str
) -> None:
    """Store; where several lanes store different numbers in one place, any of them may win, and a note says so."""
    elements[index] = new
    if differ(elements[index], new).any():
        state.note(at, otherwise)
        order = state.random.permutation(len(index))
        elements[index[order]] = new[order]


ATOMIC: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
ATOMIC |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def atomic(state: State, at: Instruction) -> Step:
    """Lanes take their turns in random order. The old values are found only where the program reads them."""
    if "global" not in at.parts or at.type not in ("u32", "s32", "f32", "u64", "s64", "f64", "b32", "b64"):
        raise Unsupported(at.text)
    operands = list(at.operands)
    names = vector(operands.pop(0)) if at.name == "atom" else []
    kind = at.type
    sources = [state.source(name, kind) for name in vector(operands[1])]
    targets = [state.target(name, kind) for name in names]
    wanted = any(name in state.read for name in names)
    function = next((ATOMIC[part] for part in at.parts if part in ATOMIC), None)
    if function is None:
        raise Unsupported(at.text)
    address, item = state.address(operands[0], "u64"), itemsize(kind)

    def step(lanes: Lanes) -> None:
        columns = np.stack([np.broadcast_to(source, state.lanes)[lanes.select] for source in sources], 1)
        before = np.zeros_like(columns)
        for region, chosen, place in state.memory.find(state, at, lanes, address()[lanes.select], item * len(sources)):
            elements = region.elements(item).view(DTYPES[kind])
            rows = np.arange(lanes.number)[chosen]
            for turn in state.random.permutation(len(rows)) if wanted else ():
                first, row = int(place[turn]) // item, rows[turn]
                slot = slice(first, first + len(sources))
                before[row] = elements[slot]
                elements[slot] = function(elements[slot], columns[row])
            if not wanted:
                order = state.random.permutation(len(rows))
                index = (place[order] // item)[:, None] + np.arange(len(sources))
                function.at(elements, index, columns[rows[order]])
        for target, old in zip(targets, before.T, strict=True):
            target[lanes.select] = old

    return step


def parameter(state: State, at: Instruction) -> Step:
    place, _ = state.program.parameters[at.operands[1].strip("[] ")]
    value = state.parameters[place : place + 1].view(DTYPES[at.type])[:1]
    out = state.target(at.operands[0], at.type)
    return lambda lanes: keep(out, value, lanes)


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {"atom": atomic, "red": atomic}
