"""What is measured: each suite turns a shape into kvb's contestant and the inputs of its peers, all of them verified.

Every contestant of a case gets the same keys, values and inputs. A peer's codes may differ from kvb's where two keys
are as near as float32 can tell, nowhere else, and its result must be what its own codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import SHAPES, Module
from benchmarks.suites.case import CEILING, KVB, Case
from benchmarks.suites.keys import key_update
from benchmarks.suites.modules import end_to_end, forward, memories, training_step
from benchmarks.suites.search import search
from benchmarks.suites.values import backward, gather

__all__ = ["CEILING", "KVB", "SUITES", "Case", "shapes"]

SUITES: dict[str, Callable[[Module], Case]] = {
    "search": search,
    "gather": gather,
    "backward": backward,
    "key_update": key_update,
    "forward": forward,
    "memories": memories,
    "training_step": training_step,
    "end_to_end": end_to_end,
}

# Shapes that tell nothing new: the value dim means nothing to a search, nobody learns from one sample, and so on.
LEFT_OUT = {
    "search": {"paper_cifar100"},
    "backward": {"one_sample"},
    "key_update": {"paper_cifar100", "one_sample"},
    "memories": {"paper_cifar100"},
    "training_step": {"paper_cifar100", "one_sample"},
    "end_to_end": {"paper_cifar100", "seed_b", "large_k"},
}


def shapes(suite: str) -> dict[str, Module]:
    """The shapes of a suite by name."""
    return {name: shape for name, shape in SHAPES.items() if name not in LEFT_OUT.get(suite, ())}
