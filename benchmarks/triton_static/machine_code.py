"""Reads compiled kernels: instructions, natural loops, counts by kind, registers, and what exceeds the target's limits.

NVIDIA kernels are read from the disassembled binary (SASS), AMD kernels from the assembler's text. Counts are of
instructions that a warp issues, once for every place in the code, predicated ones included.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import triton

from benchmarks.triton_static.offline import LIMITS, Compiled


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    name: str  # with all modifiers: "LDG.E.128"
    operands: str
    predicated: bool


# --- what an instruction is -------------------------------------------------------------------------------------------

# "alu": vector integer, logic, compare and select, 64 lanes per clock and multiprocessor on Hopper, half the FMA pipe.
NVIDIA_ALU = re.compile(
    r"(FSETP|FSEL|FSET|FMNMX3?|FCHK|HSETP2|HSET2|V?HMNMX2?|ISETP|SEL|CSEL|V?IMNMX3?|VIADDMNMX|IABS|IADD3?|VIADD|LEA"
    r"|LOP3?|PLOP3|SHF|SHL|SHR|PRMT|BMSK|SGXT|MOV|P2R|R2P|VABSDIFF4?|FLO)\b"
)
NVIDIA_FMA = re.compile(r"(FFMA2?|FMUL2?|FADD2?|IMAD|HFMA2?|HADD2?|HMUL2?|FSWZADD|IDP|DFMA|DADD|DMUL)\b")
NVIDIA_KINDS = {
    "alu": NVIDIA_ALU,
    "fma": NVIDIA_FMA,
    "shuffles": re.compile(r"SHFL\b|REDUX\b"),
    "barriers": re.compile(r"U?BAR\b"),
    "conversions": re.compile(r"(F2F|F2I|I2F|F2FP|I2FP|F2IP|I2I|I2IP|FRND)\b"),
    "spills": re.compile(r"(LDL|STL)\b"),
    "matrix": re.compile(r"[HIQDBO]G?MMA\b|UTC[HIQO]MMA\b"),
    "loads": re.compile(r"(LDG|LDGSTS|LD)\b"),
    "stores": re.compile(r"(STG|ST)\b"),
    "shared": re.compile(r"(LDS|STS|LDSM|STSM|ATOMS)\b"),
    "tensor_copies": re.compile(r"(UTMALDG|UTMASTG|UBLKCP)\b"),
}
AMD_KINDS = {
    "shuffles": re.compile(r"ds_(b?permute|swizzle)|v_(permlane|readlane|writelane)|v_\w+_dpp"),
    "barriers": re.compile(r"s_barrier"),
    "conversions": re.compile(r"v_cvt_"),
    "spills": re.compile(r"scratch_(load|store)"),
    "matrix": re.compile(r"v_s?mfma|v_wmma"),
    "loads": re.compile(r"(global|buffer|flat)_load"),
    "stores": re.compile(r"(global|buffer|flat)_store"),
    "shared": re.compile(r"ds_(read|write|load|store)"),
    "alu": re.compile(r"v_(?!s?mfma|wmma|cvt_|fma|mul|mad|pk_fma|permlane|readlane|writelane)"),
    "fma": re.compile(r"v_(fma|fmac|mul|mad|pk_fma)"),
}
AMD_WIDTHS = {
    "dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "sshort": 16, "byte": 8,
    "ubyte": 8, "sbyte": 8, "b128": 128, "b96": 96, "b64": 64, "b32": 32, "b16": 16, "u16": 16, "u8": 8, "b8": 8,
}  # fmt: skip


def _root(name: str) -> str:
    return name.partition(".")[0]


def _bits(name: str) -> int:
    """The bits that one lane loads or stores."""
    parts = set(re.split(r"[._]", name))
    if name.islower():
        return max((bits for part, bits in AMD_WIDTHS.items() if part in parts), default=0)
    for part, bits in (("256", 256), ("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if part in parts:
            return bits
    return 32


# Rows, columns and depth of a warp's product; a warpgroup's HGMMA is shared by four warps.
_WARPGROUP = re.compile(r"[HIQ]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
_WARP = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "884": (8, 8, 4)}
_AMD_MATRIX = re.compile(r"v_s?mfma_[a-z]+\d+_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?")


def matrix_flops(name: str) -> float:
    """Multiplications and additions that one warp does with a matrix instruction; NaN where its name does not say."""
    if found := _WARPGROUP.match(name):
        rows, columns, depth = map(int, found.groups())
        return 2 * rows * columns * depth / 4
    if found := _AMD_MATRIX.match(name):
        rows, columns, depth, blocks = (int(part or 1) for part in found.groups())
        return 2.0 * rows * columns * depth * blocks
    for part in name.split("."):
        if part in _WARP:
            rows, columns, depth = _WARP[part]
            return 2.0 * rows * columns * depth
    return float("nan")


# --- counts -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """Instructions of a warp by kind; ``loads`` and ``stores`` of global memory by the bits that a lane moves."""

    all: int
    alu: int
    fma: int
    matrix: int
    flops: float  # of the matrix instructions
    shuffles: int
    barriers: int
    conversions: int
    spills: int
    shared: int
    tensor_copies: int
    loads: dict[int, int]
    stores: dict[int, int]
    names: dict[str, int]  # all of them, most frequent first, without modifiers on NVIDIA


def _kind(name: str, kind: str) -> bool:
    kinds = AMD_KINDS if name.islower() else NVIDIA_KINDS
    return kind in kinds and kinds[kind].match(name) is not None


def count(instructions: Iterable[Instruction]) -> Counts:
    """Sort instructions by kind."""
    names = [instruction.name for instruction in instructions]

    def of(kind: str) -> list[str]:
        return [name for name in names if _kind(name, kind)]

    numbers = {
        kind: len(of(kind))
        for kind in ("alu", "fma", "matrix", "shuffles", "barriers", "conversions", "spills", "shared", "tensor_copies")
    }
    return Counts(
        all=len(names),
        flops=sum(map(matrix_flops, of("matrix"))),
        loads=dict(collections.Counter(map(_bits, of("loads")))),
        stores=dict(collections.Counter(map(_bits, of("stores")))),
        names=dict(collections.Counter(map(_root, names)).most_common()),
        **numbers,
    )


# --- control flow -----------------------------------------------------------------------------------------------------

_ENDS = re.compile(r"EXIT\b|s_endpgm|RET\b|BRX\b|KILL\b")
_JUMPS = re.compile(r"BRA\b|JMP\b|s_branch|s_cbranch")


def _successors(code: tuple[Instruction, ...], labels: dict[str, int]) -> list[list[int]]:
    """For every instruction, those that may run next."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    following: list[list[int]] = []
    for place, instruction in enumerate(code):
        after = [place + 1] if place + 1 < len(code) else []
        if _JUMPS.match(instruction.name):
            target = _target(instruction.operands, places, labels)
            # "BRA.U UP0, 0x1c0" and "BRA P0, 0x1c0" have their condition among the operands.
            always = not instruction.predicated and "cbranch" not in instruction.name
            always = always and re.fullmatch(r"\S+", instruction.operands) is not None
            after = ([] if always else after) + ([] if target is None else [target])
        elif _ENDS.match(instruction.name) and not instruction.predicated:
            after = []
        following.append(after)
    return following


def _target(operands: str, places: dict[int, int], labels: dict[str, int]) -> int | None:
    word = operands.split()[-1] if operands else ""
    if word in labels:
        return labels[word]
    return places.get(int(word, 16)) if re.fullmatch(r"0x[0-9a-f]+", word) else None


def _order(following: list[list[int]]) -> list[int]:
    """Reverse postorder from the first instruction."""
    seen, order, stack = {0}, [], [(0, iter(following[0]))]
    while stack:
        place, rest = stack[-1]
        for after in rest:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(following[after])))
                break
        else:
            order.append(place)
            stack.pop()
    return order[::-1]


def _dominators(order: list[int], preceding: dict[int, list[int]]) -> dict[int, int]:
    """The closest dominator of every reachable instruction, by the iteration of Cooper, Harvey and Kennedy."""
    rank = {place: number for number, place in enumerate(order)}
    closest = {order[0]: order[0]}

    def meet(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = closest[a]
            while rank[b] > rank[a]:
                b = closest[b]
        return a

    changed = True
    while changed:
        changed = False
        for place in order[1:]:
            found = functools.reduce(meet, [before for before in preceding[place] if before in closest])
            if closest.get(place) != found:
                closest[place], changed = found, True
    return closest


def _natural_loops(following: list[list[int]]) -> list[frozenset[int]]:
    """Loops by header: a jump back to an instruction that dominates it, and all that leads to the jump from there.

    A jump back alone is not enough: code that hardly ever runs stands at the end and jumps back without a loop.
    """
    if not following:
        return []
    order = _order(following)
    preceding: dict[int, list[int]] = {place: [] for place in order}
    for place in order:
        for after in following[place]:
            preceding[after].append(place)
    closest = _dominators(order, preceding)

    def dominates(header: int, place: int) -> bool:
        while place != header and place != closest[place]:
            place = closest[place]
        return place == header

    bodies: dict[int, set[int]] = {}
    for place in order:
        for header in following[place]:
            # An instruction that jumps to itself is where the code has ended.
            if header != place and dominates(header, place):
                body = bodies.setdefault(header, {header})
                stack = [place]
                while stack:
                    member = stack.pop()
                    if member not in body:
                        body.add(member)
                        stack += preceding[member]
    return sorted(map(frozenset, bodies.values()), key=len, reverse=True)


# --- a whole kernel ---------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """A kernel in instructions, and where its labels stand."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Code:
    """The machine code of one kernel; instructions and loops are read when they are asked for, which takes a second."""

    registers: int  # per thread
    spilled: int  # NVIDIA: bytes of local memory per thread; AMD: vector and scalar registers that were spilled
    disassemble: Callable[[], Listing]

    @functools.cached_property
    def _listing(self) -> Listing:
        return self.disassemble()

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return self._listing.instructions

    @functools.cached_property
    def loops(self) -> list[frozenset[int]]:
        """Places in ``instructions``, the largest loop first."""
        return _natural_loops(_successors(*self._listing))

    def within(self, loop: Iterable[int]) -> Iterator[Instruction]:
        return (self.instructions[place] for place in sorted(loop))

    def total(self) -> Counts:
        """Counts of the whole kernel, every instruction once."""
        return count(self.instructions)

    def search_loop(self) -> Counts:
        """Counts of the largest loop that holds matrix instructions."""
        return count(self.within(self.search_body()))

    def search_body(self) -> frozenset[int]:
        """Where that loop's instructions stand.

        Raises:
            ValueError: no loop holds a matrix instruction.
        """
        for loop in self.loops:
            if any(_kind(instruction.name, "matrix") for instruction in self.within(loop)):
                return loop
        raise ValueError(f"expected a loop with matrix instructions, found {len(self.loops)} loops without any")


def _cuobjdump(option: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


# Address, predicate, name, operands; newer disassemblers append scheduling notes: "&req={1} ?trans6".
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:[&?]\S+\s*)*;")


def _disassemble_nvidia(binary: bytes) -> Listing:
    lines = (_SASS.match(line) for line in _cuobjdump("-sass", binary).splitlines())
    code = tuple(
        Instruction(int(line[1], 16), line[3], line[4], line[2] not in (None, "@UPT", "@PT")) for line in lines if line
    )
    return Listing(code, {})


def _disassemble_amd(text: str) -> Listing:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.partition(".section\t.rodata")[0].splitlines():
        line = line.partition(";")[0].rstrip()
        if label := re.match(r"(\.?\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+([a-z]\w+)\s*(.*)", line):
            code.append(Instruction(len(code), found[1], found[2], False))
    # A label at the very end belongs to no instruction.
    return Listing(tuple(code), {label: place for label, place in labels.items() if place < len(code)})


def read(kernel: Compiled) -> Code:
    """The machine code of a kernel."""
    if "cubin" in kernel.asm:
        binary = kernel.asm["cubin"]
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", binary)))
        spilled = int(usage["STACK"]) + int(usage["LOCAL"])
        return Code(int(usage["REG"]), spilled, functools.partial(_disassemble_nvidia, binary))
    text = kernel.asm["amdgcn"]
    facts = {name: int(number) for name, number in re.findall(r"\.((?:[av]gpr|sgpr)_(?:spill_)?count):\s+(\d+)", text)}
    spilled = facts["vgpr_spill_count"] + facts["sgpr_spill_count"]
    return Code(facts["vgpr_count"], spilled, functools.partial(_disassemble_amd, text))


def excesses(kernel: Compiled, code: Code) -> list[str]:
    """What of a kernel exceeds its target's limits, in sentences; spills count on NVIDIA targets only."""
    limits = LIMITS[kernel.target]
    found = []
    if kernel.shared > limits.shared:
        found.append(f"{kernel}: {kernel.shared} bytes of shared memory, the limit is {limits.shared}")
    if code.registers > limits.registers:
        found.append(f"{kernel}: {code.registers} registers per thread, the limit is {limits.registers}")
    # Without a frame there are no spills; a frame that nothing reads or writes costs nothing.
    if "cubin" in kernel.asm and code.spilled and (spills := code.total().spills):
        found.append(f"{kernel}: spills, {code.spilled} bytes per thread and {spills} accesses")
    return found
