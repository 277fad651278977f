"""``cost``: what a training step sends and a process holds, for each way to train with several processes.

A model of bytes, not of a network: latency, overlap and topology are left out.
"""

from __future__ import annotations

from typing import NamedTuple

from kvb import validation

SPEEDS = (25, 100, 400)  # GB/s: a fast network card, several of them, links between GPUs of one machine


class Cost(NamedTuple):
    """Bytes of one process.

    Examples:
        >>> from kvb.distributed import cost
        >>> found = cost(B=256, C=256, K=4096, V=10, processes=8)["sync_values"]
        >>> found.seconds(gigabytes=100) == found.sent / 100e9
        True
    """

    held: int  # values, keys, their statistics and the mask
    all_reduce: int  # handed to ``all_reduce`` in one step
    all_gather: int  # handed to ``all_gather``
    processes: int

    @property
    def sent(self) -> int:
        """What leaves a process in one step, in a ring: all_reduce sends its bytes twice but for 1/n of them."""
        n = self.processes
        return round(2 * (n - 1) / n * self.all_reduce + (n - 1) * self.all_gather)

    def seconds(self, gigabytes: float) -> float:
        """The time to send that at a speed in GB/s."""
        return self.sent / gigabytes / 1e9


def cost(
    B: int, C: int, K: int, V: int, *, D: int = 14, processes: int = 8, value_bytes: int = 4, topk: int = 1
) -> dict[str, Cost]:
    """What each way to train the values of a table costs: a forward with ``pool="mean"`` of one position, a backward.

    Args:
        B: samples that one process has in a step. Where a table is split, the processes have the same ones.
        C, K, V, D: codebooks, pairs in each, value and key dims.
        processes: n.
        value_bytes: of one number in the table; 2 for bfloat16.
        topk: of the bottleneck.
    Returns:
        by name: "dense", ``DistributedDataParallel`` or ``fully_shard`` without resharding; "sync_values", codes and
        gradients of what was fetched; "codebooks" and "pairs", the two ways of ``parallelize``.
    Raises:
        TypeError, ValueError: a size that is no positive integer.
    Examples:
        >>> from kvb.distributed import cost
        >>> found = cost(B=256, C=256, K=4096, V=10, processes=8)
        >>> found["sync_values"].sent < found["dense"].sent / 10
        True
    """
    sizes = {"B": B, "C": C, "K": K, "V": V, "D": D, "processes": processes, "value_bytes": value_bytes, "topk": topk}
    for name, size in sizes.items():
        validation.positive_int(name, size)
    pair = value_bytes * V + 4 * (2 * D + 2) + 8
    table, code = C * K * pair, 2 if K <= 1 << 15 else 4
    votes = B * 4 * V * topk
    return {
        "dense": Cost(table, C * K * V * value_bytes, 0, processes),
        "sync_values": Cost(table, 0, B * topk * C * code + B * topk * V * 4, processes),
        "codebooks": Cost(-(-C // processes) * K * pair, votes, 0, processes),
        "pairs": Cost(C * -(-K // processes) * pair, votes, B * C * topk * (8 + 4 * D), processes),
    }


def as_markdown() -> str:
    """The table of the documentation: from 10^6 to 10^11 pairs."""
    lines = [
        "| pairs | way | held | sent in a step | " + " | ".join(f"at {speed} GB/s" for speed in SPEEDS) + " |",
        "|---|---|---|---|" + "---|" * len(SPEEDS),
    ]
    for power in range(6, 12):
        many = cost(256, 256, -(-(10**power) // 256), 16, processes=64)
        for name, each in {**many, "pairs": cost(256, 1, 10**power, 16, processes=64)["pairs"]}.items():
            times = " | ".join(_time(each.seconds(speed)) for speed in SPEEDS)
            lines.append(f"| 10^{power} | {name} | {_bytes(each.held)} | {_bytes(each.sent)} | {times} |")
    return "\n".join(lines)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
