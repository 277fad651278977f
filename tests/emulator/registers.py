"""Which virtual registers may share storage, and which may be read before anything is written to them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

from emulator.program import Program


def doubtful(program: Program) -> set[str]:
    """Registers that are read where, on some path, nothing may have been written to them."""
    bit = _numbered(program)
    writes = {
        start: _union(
            bit, [name for at in program.code[start : block.stop] if not at.predicate for name in at.registers[1]]
        )
        for start, block in program.blocks.items()
    }
    written = {0: 0}  # at the start of each block that is reached, on every path
    waiting = [0]
    while waiting:
        start = waiting.pop()
        after = written[start] | writes[start]
        for successor in program.blocks[start].successors:
            known = written.get(successor)
            if known is None or known & after != known:
                written[successor] = after if known is None else known & after
                waiting.append(successor)
    found: set[str] = set()
    for start, known in written.items():
        for at in program.code[start : program.blocks[start].stop]:
            reads, writes_here = at.registers
            found |= {name for name in reads if not known & bit[name]}
            known |= 0 if at.predicate else _union(bit, writes_here)
    return found


def _numbered(program: Program) -> dict[str, int]:
    """One bit for each register."""
    names = sorted({name for at in program.code for part in at.registers for name in part})
    return {name: 1 << place for place, name in enumerate(names)}


def _union(bit: dict[str, int], names: Iterable[str]) -> int:
    return functools.reduce(operator.or_, (bit[name] for name in names), 0)


def _intervals(program: Program) -> dict[str, tuple[int, int]]:
    """The first and the last instruction between which a register may hold something that is read later."""
    bit = _numbered(program)
    needs, kills = {}, {}  # by block: read before it is written, and written, whatever comes
    for start, block in program.blocks.items():
        need = kill = 0
        for at in program.code[start : block.stop]:
            reads, writes = at.registers
            need |= _union(bit, reads) & ~kill
            kill |= 0 if at.predicate else _union(bit, writes)
        needs[start], kills[start] = need, kill
    entering = dict(needs)
    leaving = dict.fromkeys(program.blocks, 0)
    changed = True
    while changed:
        changed = False
        for start in sorted(program.blocks, reverse=True):
            after = functools.reduce(
                operator.or_, (entering.get(successor, 0) for successor in program.blocks[start].successors), 0
            )
            before = needs[start] | after & ~kills[start]
            changed |= before != entering[start]
            leaving[start], entering[start] = after, before
    names = list(bit)
    first: dict[str, int] = {}
    last: dict[str, int] = {}

    def alive(name: str, place: int) -> None:
        first[name] = min(place, first.get(name, place))
        last[name] = max(place, last.get(name, place))

    for start, block in program.blocks.items():
        for at in program.code[start : block.stop]:
            for name in (*at.registers[0], *at.registers[1]):
                alive(name, at.place)
        for place, registers in ((start, entering[start]), (block.stop - 1, leaving[start])):
            while registers:
                lowest = registers & -registers
                alive(names[lowest.bit_length() - 1], place)
                registers ^= lowest
    return {name: (first[name], last[name]) for name in first}


def slots(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """Where each register lies among those of its width, and how many places each width needs.

    Registers that are never alive together share a place.
    """
    place: dict[str, int] = {}
    count: dict[str, int] = dict.fromkeys(program.widths.values(), 0)
    free: dict[str, list[int]] = {width: [] for width in count}
    alive: list[tuple[int, str, int]] = []  # last use, width, place
    for name, (start, stop) in sorted(_intervals(program).items(), key=lambda item: item[1]):
        width = program.widths[name.strip("%0123456789")]
        for gone in [entry for entry in alive if entry[0] < start]:
            alive.remove(gone)
            free[gone[1]].append(gone[2])
        if free[width]:
            place[name] = free[width].pop()
        else:
            place[name] = count[width]
            count[width] += 1
        alive.append((stop, width, place[name]))
    return place, count
