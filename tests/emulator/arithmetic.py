"""Instructions whose result in a lane depends on that lane only: arithmetic, bits, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator import native
from emulator.convert import BUILDERS as CONVERT
from emulator.convert import from_bits, halves, keep
from emulator.program import Instruction, Unsupported
from emulator.state import DTYPES, State, Step


def elementwise(ufunc: np.ufunc) -> Callable[[State, Instruction], Step]:
    """One call of NumPy."""

    def build(state: State, at: Instruction) -> Step:
        sources = [state.source(operand, at.type) for operand in at.operands[1:]]
        out = state.target(at.operands[0], at.type)
        if out.dtype != np.dtype(DTYPES[at.type]):
            raise Unsupported(at.text)
        return lambda lanes: ufunc(*sources, out=out, where=lanes.where)

    return build


def computed(function: Callable[..., Any], kinds: Callable[[Instruction], list[str]] | None = None) -> Any:
    """A function of the sources, whose result is then kept where the instruction runs."""

    def build(state: State, at: Instruction) -> Step:
        wanted = kinds(at) if kinds else [at.type] * (len(at.operands) - 1)
        sources = [state.source(operand, kind) for operand, kind in zip(at.operands[1:], wanted, strict=True)]
        out = state.target(at.operands[0], at.type)
        return lambda lanes: keep(out, function(*sources), lanes)

    return build


# --- integers ---------------------------------------------------------------------------------------------------------


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero; all ones for a divisor of zero, which PTX leaves open."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        found = a // safe
    else:
        found = np.abs(a) // np.abs(safe)
        found = np.where((a < 0) != (safe < 0), -found, found)
    return np.where(b == 0, np.array(-1).astype(a.dtype), found)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - quotient(a, b) * b


def high_part(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    a, b = np.broadcast_arrays(a, b)
    if a.itemsize == 8:
        return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype)
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return (a.astype(wide) * b.astype(wide) >> wide.type(8 * a.itemsize)).astype(a.dtype)


def _wide(at: Instruction) -> str:
    return f"{at.type[0]}{2 * int(at.type[1:])}"


def multiply(state: State, at: Instruction) -> Step:
    if "wide" in at.parts:
        a, b = (state.source(operand, at.type) for operand in at.operands[1:3])
        out = state.target(at.operands[0], _wide(at))
        return lambda lanes: np.multiply(a, b, out, where=lanes.where, dtype=out.dtype)
    return computed(high_part)(state, at) if "hi" in at.parts else elementwise(np.multiply)(state, at)


def multiply_add(state: State, at: Instruction) -> Step:
    wide = "wide" in at.parts
    if "hi" in at.parts:
        raise Unsupported(at.text)
    a, b = (state.source(operand, at.type) for operand in at.operands[1:3])
    c = state.source(at.operands[3], _wide(at) if wide else at.type)
    out = state.target(at.operands[0], _wide(at) if wide else at.type)
    return lambda lanes: keep(out, np.multiply(a, b, dtype=out.dtype) + c, lanes)


def shift(state: State, at: Instruction) -> Step:
    """Shifts by as much as the width, or more, leave nothing, or nothing but signs."""
    value = state.source(at.operands[1], at.type)
    amount = state.source(at.operands[2], "u32")
    out = state.target(at.operands[0], at.type)
    bits, dtype = 8 * out.itemsize, out.dtype.type
    signed = at.name == "shr" and out.dtype.kind == "i"
    ufunc = np.left_shift if at.name == "shl" else np.right_shift
    if np.ndim(amount) == 0 and int(amount) < bits:
        fixed = dtype(int(amount))
        return lambda lanes: ufunc(value, fixed, out, where=lanes.where)

    def step(lanes: Any) -> None:
        shifted = ufunc(value, np.minimum(amount, bits - 1).astype(out.dtype))
        keep(out, shifted if signed else np.where(amount < bits, shifted, dtype(0)), lanes)

    return step


def extract_bits(state: State, at: Instruction) -> Step:
    value = state.source(at.operands[1], at.type)
    first, length = (state.source(operand, "u32") & np.uint32(255) for operand in at.operands[2:4])
    if np.ndim(first) or np.ndim(length):
        raise Unsupported(at.text)
    out = state.target(at.operands[0], at.type)
    bits, dtype = 8 * out.itemsize, out.dtype.type
    first, length = min(int(first), bits), min(int(length), bits)
    length = min(length, bits - first)
    if length == 0:
        raise Unsupported(at.text)
    up, down = dtype(bits - first - length), dtype(bits - length)
    return lambda lanes: keep(out, value << up >> down, lanes)  # signed numbers take their sign from the top


def permute_bytes(state: State, at: Instruction) -> Step:
    a, b = (state.source(operand, "b32") for operand in at.operands[1:3])
    selector = state.source(at.operands[3], "u32")
    out = state.target(at.operands[0], "b32")

    def step(lanes: Any) -> None:
        both = np.asarray(a, np.uint64) | np.asarray(b, np.uint64) << np.uint64(32)
        found = np.zeros(len(out), np.uint64)
        for place in range(4):
            chosen = np.asarray(selector >> np.uint32(4 * place), np.uint64)
            byte = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            found |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * place)
        keep(out, found, lanes)

    return step


def logic3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Every bit of the result is looked up by the three bits at its place."""
    found = np.zeros_like(a | b | c)
    for row in range(8):
        if int(table) >> row & 1:
            found = found | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


def add_pairs(state: State, at: Instruction) -> Step:
    """Two 16-bit sums side by side."""
    a, b = (state.array(operand, "b32").view(np.uint16) for operand in at.operands[1:])
    out = state.target(at.operands[0], "b32")
    return lambda lanes: keep(out, (a + b).view(np.uint32), lanes)


def absolute(state: State, at: Instruction) -> Step:
    if at.type[0] == "s":
        return elementwise(np.abs)(state, at)
    signs = {"f32": (0x7FFFFFFF, "b32"), "f64": (0x7FFFFFFFFFFFFFFF, "b64")}
    signs |= {
        "f16": (0x7FFF, "b16"),
        "bf16": (0x7FFF, "b16"),
        "f16x2": (0x7FFF7FFF, "b32"),
        "bf16x2": (0x7FFF7FFF, "b32"),
    }
    mask, kind = signs[at.type]
    value, out = state.source(at.operands[1], kind), state.target(at.operands[0], kind)
    return lambda lanes: np.bitwise_and(value, out.dtype.type(mask), out, where=lanes.where)


# --- floating point ---------------------------------------------------------------------------------------------------


def fused(state: State, at: Instruction) -> Step:
    """One rounding of a * b + c."""
    sources = [state.array(operand, at.type) for operand in at.operands[1:]]
    out = state.target(at.operands[0], at.type)
    call = native.library().fma_float if at.type == "f32" else native.library().fma_double
    if at.type not in ("f32", "f64"):
        raise Unsupported(at.text)
    pointers, number = [array.ctypes.data for array in (*sources, out)], state.lanes
    state.constants += sources  # what C points to must stay
    return lambda lanes: call(*pointers, lanes.pointer, number)


def approximate(x: np.ndarray, units: int) -> np.ndarray:
    """Off by up to ``units`` in the last place, always the same for the same number, as instructions for speed are."""
    x = np.ascontiguousarray(x, np.float32)
    hashed = x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(16)
    moved = (x.view(np.int32) + (hashed % np.uint32(2 * units + 1)).astype(np.int32) - units).view(np.float32)
    return np.where(np.isfinite(x) & (x != 0) & np.isfinite(moved), moved, x)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _fast(exact: Callable[..., Any], units: int) -> Callable[[State, Instruction], Step]:
    """A function of which PTX promises ``units`` in the last place where it is ``.approx`` or ``.full``."""

    def build(state: State, at: Instruction) -> Step:
        rough = "approx" in at.parts or "full" in at.parts
        if rough and at.type != "f32":
            raise Unsupported(at.text)
        flush = flushed if "ftz" in at.parts else np.asarray

        def function(*sources: np.ndarray) -> np.ndarray:
            found = exact(*(flush(source) for source in sources))
            return flush(approximate(found, units)) if rough else found

        return computed(function)(state, at)

    return build


def divide(state: State, at: Instruction) -> Step:
    return (_fast(np.divide, 2) if at.type[0] == "f" else computed(quotient))(state, at)


def extreme(integers: np.ufunc, numbers: np.ufunc, with_nan: np.ufunc) -> Callable[[State, Instruction], Step]:
    """Minimum or maximum: of a number and NaN it is the number, but with ``.NaN`` it is NaN."""

    def build(state: State, at: Instruction) -> Step:
        if at.type[0] != "f":
            return elementwise(integers)(state, at)
        if at.type not in ("f32", "f64") or "xorsign" in at.parts:
            raise Unsupported(at.text)
        return elementwise(with_nan if "NaN" in at.parts else numbers)(state, at)

    return build


# --- comparisons ------------------------------------------------------------------------------------------------------

ORDERED: dict[str, np.ufunc] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def compare(how: str, a: np.ndarray, b: np.ndarray, floating: bool) -> np.ndarray:
    if not floating:
        return ORDERED[how](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    if how == "ne":
        return (a != b) & ~unordered
    return ORDERED[how](a, b) if how in ORDERED else ORDERED[how[:-1]](a, b) | unordered


def set_predicate(state: State, at: Instruction) -> Step:
    if len(at.parts) != 3:
        raise Unsupported(at.text)
    how, kind = at.parts[1:]
    a, b = (state.source(operand, kind) for operand in at.operands[1:3])
    targets = [state.target(name.strip(), "pred") for name in at.operands[0].split("|")]
    if kind.endswith("x2"):

        def pairs(lanes: Any) -> None:
            for out, x, y in zip(targets, halves(a, kind[:-2]), halves(b, kind[:-2]), strict=True):
                keep(out, compare(how, x, y, True), lanes)

        return pairs
    (out,) = targets
    if kind in ("f16", "bf16"):
        return lambda lanes: keep(out, compare(how, from_bits(a, kind), from_bits(b, kind), True), lanes)
    floating = kind in ("f32", "f64")
    if how in ORDERED and not (floating and how == "ne"):
        ufunc = ORDERED[how]
        return lambda lanes: ufunc(a, b, out, where=lanes.where)
    return lambda lanes: keep(out, compare(how, a, b, floating), lanes)


def select(state: State, at: Instruction) -> Step:
    a, b = (state.source(operand, at.type) for operand in at.operands[1:3])
    condition, out = state.source(at.operands[3], "pred"), state.target(at.operands[0], at.type)
    return lambda lanes: keep(out, np.where(condition, a, b), lanes)


def add(state: State, at: Instruction) -> Step:
    return (add_pairs if at.type.endswith("x2") else elementwise(np.add))(state, at)


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {
    **CONVERT,
    "add": add,
    "sub": elementwise(np.subtract),
    "mul": multiply,
    "mad": multiply_add,
    "div": divide,
    "rem": computed(remainder),
    "fma": fused,
    "sqrt": _fast(np.sqrt, 1),
    "rsqrt": _fast(lambda x: 1 / np.sqrt(x.astype(np.float64)), 2),
    "rcp": _fast(lambda x: 1 / x, 1),
    "ex2": _fast(np.exp2, 2),
    "lg2": _fast(np.log2, 2),
    "and": elementwise(np.bitwise_and),
    "or": elementwise(np.bitwise_or),
    "xor": elementwise(np.bitwise_xor),
    "not": elementwise(np.invert),
    "neg": elementwise(np.negative),
    "abs": absolute,
    "min": extreme(np.minimum, np.fmin, np.minimum),
    "max": extreme(np.maximum, np.fmax, np.maximum),
    "shl": shift,
    "shr": shift,
    "bfe": extract_bits,
    "prmt": permute_bytes,
    "lop3": computed(logic3, lambda at: ["b32", "b32", "b32", "u32"]),
    "popc": computed(np.bitwise_count),
    "setp": set_predicate,
    "selp": select,
}
