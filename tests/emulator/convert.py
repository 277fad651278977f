"""Moves and conversions between types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.lanes import Lanes
from emulator.program import Instruction, Unsupported
from emulator.state import DTYPES, State, Step


def keep(out: np.ndarray, value: Any, lanes: Lanes) -> None:
    """Write where the instruction runs."""
    np.copyto(out, value, where=lanes.where, casting="unsafe")


def from_bits(bits: Any, kind: str) -> np.ndarray:
    """Numbers of 16 bits as float32."""
    bits = np.ascontiguousarray(bits, np.uint16)
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def to_bits(numbers: Any, kind: str) -> np.ndarray:
    """Rounded to 16 bits, to nearest even; a NaN is 0x7FFF."""
    numbers = np.ascontiguousarray(numbers)
    if kind == "f16":
        bits = numbers.astype(np.float16).view(np.uint16)
    else:
        wide = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = (wide + 0x7FFF + (wide >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), bits)


def halves(bits: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high number of a pair, as float32."""
    pairs = np.ascontiguousarray(bits, np.uint32).reshape(-1).view(np.uint16)
    return from_bits(pairs[::2], kind), from_bits(pairs[1::2], kind)


def to_integer(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cut off towards zero; what does not fit becomes the nearest that does, NaN becomes 0."""
    limits = np.iinfo(dtype)
    whole = np.trunc(np.nan_to_num(np.asarray(numbers, np.float64), nan=0.0))
    inside = np.clip(whole, float(limits.min), float(limits.max))
    found = np.where(inside >= float(limits.max), 0, inside).astype(dtype)
    return np.where(inside >= float(limits.max), dtype.type(limits.max), found)


def move(state: State, at: Instruction) -> Step:
    out, value = at.operands
    if out.startswith("{"):
        return _unpack(state, at)
    if value.startswith("{"):
        return _pack(state, at)
    source, target = state.source(value, at.type), state.target(out, at.type)
    return lambda lanes: np.copyto(target, source, where=lanes.where)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def _unpack(state: State, at: Instruction) -> Step:
    parts = _parts(at.operands[0])
    kind = f"b{int(at.type[1:]) // len(parts)}"
    whole = state.source(at.operands[1], at.type).view(DTYPES[kind])
    pairs = [(state.target(part, kind), whole[place :: len(parts)]) for place, part in enumerate(parts) if part != "_"]

    def step(lanes: Lanes) -> None:
        for out, value in [(out, value.copy()) for out, value in pairs]:
            keep(out, value, lanes)

    return step


def _pack(state: State, at: Instruction) -> Step:
    parts = _parts(at.operands[1])
    kind = f"b{int(at.type[1:]) // len(parts)}"
    sources = [state.source(part, kind) for part in parts]
    out = state.target(at.operands[0], at.type)

    def step(lanes: Lanes) -> None:
        whole = np.empty((state.lanes, len(parts)), DTYPES[kind])
        for place, source in enumerate(sources):
            whole[:, place] = source
        keep(out, whole.view(out.dtype)[:, 0], lanes)

    return step


def convert(state: State, at: Instruction) -> Step:
    kind, given = at.parts[-2:]
    if "sat" in at.parts or "relu" in at.parts:
        raise Unsupported(at.text)
    if kind in ("f16x2", "bf16x2"):
        high, low = (state.source(operand, "f32") for operand in at.operands[1:])
        out = state.target(at.operands[0], "b32")

        def pair(lanes: Lanes) -> None:
            upper, lower = (to_bits(value, kind[:-2]).astype(np.uint32) for value in (high, low))
            keep(out, upper << np.uint32(16) | lower, lanes)

        return pair
    source = state.source(at.operands[1], given)
    out = state.target(at.operands[0], kind)
    function = _conversion(kind, given, at)
    return lambda lanes: keep(out, function(source), lanes)


def _conversion(kind: str, given: str, at: Instruction) -> Callable[[Any], np.ndarray]:
    dtype = np.dtype(DTYPES[kind])
    floating = given in ("f16", "bf16", "f32", "f64")
    whole = kind[0] in "sub" and kind != "bf16"

    def number(bits: Any) -> np.ndarray:
        return from_bits(bits, given) if given in ("f16", "bf16") else np.asarray(bits)

    if floating and whole:
        if "rzi" not in at.parts:
            raise Unsupported(at.text)
        return lambda bits: to_integer(number(bits), dtype)
    if not re.fullmatch(r"rn|", "".join(part for part in at.parts[1:-2] if part != "ftz")):
        raise Unsupported(at.text)
    if kind in ("f16", "bf16"):
        return lambda bits: to_bits(number(bits), kind)
    return lambda bits: number(bits).astype(dtype)


def same_address(state: State, at: Instruction) -> Step:
    """``cvta``: an address of global memory is the same in the generic space."""
    source, out = state.source(at.operands[1], "b64"), state.target(at.operands[0], "b64")
    return lambda lanes: keep(out, source, lanes)


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {"mov": move, "cvt": convert, "cvta": same_address}
