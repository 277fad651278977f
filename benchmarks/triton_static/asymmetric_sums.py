"""Finds sums that come out differently in the threads that share them: ``x * x + shuffle(x * x)``, contracted.

Where a sum is shared out over threads, each adds what it received from another thread to what it has. If both are bare
products, a compiler that may contract turns the addition and one's own product into a multiply-add, which does not
round that product, while the other thread's came rounded. So the replicas of one sum differ in their last bit, and who
stores all of them to one place stores any of them.

Read in LLVM's code, which the compilers for NVIDIA and for AMD share.
"""

from __future__ import annotations

import re

from benchmarks.triton_static.offline import Compiled

_DEFINITION = re.compile(r"\s+(%[\w.]+) = (?:tail )?(\w+) (.*)")
_VALUE = re.compile(r"%[\w.]+")
_SHUFFLE = re.compile(r"@llvm\.(nvvm\.(shfl|redux)|amdgcn\.(update\.dpp|mov\.dpp|ds\.swizzle|ds\.bpermute|permlane))")
_SAME_BITS = {
    "bitcast",
    "extractelement",
    "insertelement",
    "extractvalue",
    "shufflevector",
    "zext",
    "trunc",
    "shl",
    "or",
}

Definitions = dict[str, tuple[str, str]]  # by value: the operation and what it is given


def _operands(rest: str) -> list[str]:
    return _VALUE.findall(rest.partition(", !")[0])


def _from_another_thread(value: str, known: Definitions, depth: int = 12) -> bool:
    operation, rest = known.get(value, ("", ""))
    if operation == "call":
        return _SHUFFLE.search(rest) is not None
    return (
        depth > 0
        and operation in _SAME_BITS
        and any(_from_another_thread(operand, known, depth - 1) for operand in _operands(rest))
    )


def _is_product(value: str, known: Definitions, depth: int = 4) -> bool:
    operation, rest = known.get(value, ("", ""))
    if operation == "extractelement":
        return depth > 0 and _is_product(_operands(rest)[0], known, depth - 1)
    return operation == "fmul"


def asymmetric_sums(kernel: Compiled) -> list[str]:
    """The additions of a bare product and what a shuffle brings, as lines of LLVM's code, if they may be contracted."""
    if not kernel.metadata.enable_fp_fusion:
        return []
    return find(kernel.asm["llir"])


def find(code: str) -> list[str]:
    """Such additions in LLVM's code of one kernel."""
    known: Definitions = {}
    found = []
    for line in code.splitlines():
        if not (definition := _DEFINITION.match(line)):
            continue
        value, operation, rest = definition.groups()
        known[value] = operation, rest
        if operation in ("fadd", "fsub"):
            operands = _operands(rest)
            for one, other in (operands, operands[::-1]) if len(operands) == 2 else ():
                if _is_product(one, known) and _from_another_thread(other, known):
                    found.append(line.strip())
                    break
    return found
