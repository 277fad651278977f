"""PTX as text becomes a ``Program``: instructions, basic blocks, parameters and registers; nothing is run here."""

from __future__ import annotations

import dataclasses
import functools
import re

ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\n\{", re.S)
PARAMETER = re.compile(r"\.param \.(\w+)(?: \.ptr[^\n]*?| \.align \d+)?\s+(\w+)[,\s]*(?:\n|$)")
STATEMENT = re.compile(r"(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
REGISTER = re.compile(r"%(?:[a-z]+\d+|SPL?)")
ENDS = ("bra", "ret", "exit", "trap", "call")  # what ends a basic block, besides bar.sync
STORES = ("st", "stmatrix", "cp", "red")  # their first operand is an address, not a destination


class Unsupported(Exception):
    """PTX that this emulator does not know."""


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction: ``@!%p1 add.s32 %r1, %r2, 5`` has parts ("add", "s32") and operands ("%r1", "%r2", "5")."""

    place: int
    text: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str = ""
    negated: bool = False

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    def says(self, *parts: str) -> bool:
        """Whether the operation begins so: ``says("cp", "async")``."""
        return self.parts[: len(parts)] == parts

    @functools.cached_property
    def registers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Registers read, the predicate among them, and registers written."""
        operands = list(self.operands)
        reads = [self.predicate] if self.predicate else []
        writes: list[str] = []
        if self.name not in (*STORES, *ENDS, "bar", "fence") and operands:
            writes = REGISTER.findall(operands.pop(0))
        if self.says("wgmma", "mma_async") and operands[2:3] not in (["0"], ["false"]):
            reads += writes
        for operand in operands:
            reads += REGISTER.findall(operand)
        return tuple(reads), tuple(writes)


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions [start, stop) that run one after the other, and where the program goes from there."""

    start: int
    stop: int
    end: Instruction | None  # the last of them, if it is one of ``ENDS``
    target: int | None  # of its branch

    @property
    def successors(self) -> list[int]:
        end = self.end
        if end is None or end.name == "bar":
            return [self.stop]
        branch = [] if self.target is None else [self.target]
        return [*branch, self.stop] if end.predicate else branch


class Program:
    """A compiled kernel."""

    def __init__(self, ptx: str) -> None:
        head, version = ENTRY.search(ptx), re.search(r"\.target sm_(\d+)", ptx)
        if head is None or version is None:
            raise Unsupported("expected the PTX of one kernel: a .target and a .visible .entry")
        self.name, self.version = head[1], int(version[1])
        self.parameters = {name: (place, kind) for place, (kind, name) in enumerate(PARAMETER.findall(head[2]))}
        threads = re.search(r"\.reqntid (\d+)", head[3])
        if threads is None:
            raise Unsupported(f"{self.name}: expected .reqntid, the number of threads of a program")
        self.threads = int(threads[1])
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.local = 0  # bytes of local memory of a thread
        self.widths: dict[str, str] = {}  # by the prefix of a register: "r" is b32
        self._parse(ptx[head.end() :])
        self.blocks = self._blocks()

    def _parse(self, body: str) -> None:
        for raw in body.splitlines():
            line = raw.split("//")[0].strip()
            if line.startswith(".section"):
                break
            if declared := re.match(r"\.reg \.(\w+)\s+%(\w+)(?:<\d+>)?;", line):
                self.widths[declared[2]] = declared[1]
            elif label := re.match(r"([$\w]+):$", line):
                self.labels[label[1]] = len(self.code)
            elif local := re.match(r"\.local \.align \d+ \.b8\s+__local_depot0\[(\d+)\]", line):
                self.local = int(local[1])
            elif not line.startswith("."):
                for statement in line.split(";"):
                    self._add(statement.strip())

    def _add(self, statement: str) -> None:
        if statement in ("", "{", "}"):
            return
        match = STATEMENT.match(statement)
        if match is None:
            raise Unsupported(f"{self.name}: cannot read {statement!r}")
        self.code.append(
            Instruction(
                len(self.code),
                " ".join(statement.split()),
                tuple(match[3].replace("::", ".").split(".")),
                tuple(split(match[4])),
                f"%{match[2]}" if match[2] else "",
                match[1] == "!",
            )
        )

    def _blocks(self) -> dict[int, Block]:
        ends = {at.place for at in self.code if at.name in ENDS or at.says("bar", "sync")}
        starts = sorted({0, *self.labels.values(), *(place + 1 for place in ends)} - {len(self.code)})
        blocks = {}
        for start, stop in zip(starts, [*starts[1:], len(self.code)], strict=True):
            end = self.code[stop - 1] if stop - 1 in ends else None
            target = self.labels[end.operands[0]] if end is not None and end.name == "bra" else None
            blocks[start] = Block(start, stop, end, target)
        return blocks


def split(text: str) -> list[str]:
    """Operands at the outermost commas: "{%r1, %r2}, [%rd1 + 4]" are two."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*found, last] if last else found
