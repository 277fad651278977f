"""The command line: ``python -m benchmarks.gpu_day first --out DIR``, then ``second``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_day
from benchmarks.gpu_day import counters, smoke, tune
from benchmarks.gpu_day.day import Day, finish
from kvb import testing

BUDGETS = {"first": 470.0, "second": 230.0}  # seconds; other parts may take as long as the first
CHECKING = 175.0  # seconds of ``check`` next to ``smoke``, so that ``bench`` gets the rest
PROCESSES = 14  # of ``check`` at a time
FEW_ROWS = ("lookup:paper-256", "pack")  # of ``bench``, for a trial


def check(day: Day, only: Sequence[str]) -> int:
    """``python -m kvb check``."""
    cases = range(3 if day.small else len(testing.CASES))
    options = {"processes": 2 if day.small else PROCESSES, "seconds": day.left, "json_lines": day.out / "check.jsonl"}
    return 0 if testing.run([day.device], cases=cases, **options) else 1


def bench(day: Day, only: Sequence[str]) -> int:
    """``python -m benchmarks.gpu``, in a process that ends with the budget."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(day.out), "--device", day.device.type]
    # A row that has begun takes some seconds more.
    command += ["--limit", f"{max(1.0, min(285.0, day.left - 15)):.0f}", *["--small", "--only", *FEW_ROWS] * day.small]
    (status,) = finish([day.start(command)], day.left)
    return 1 if status is None else status


def first(day: Day, only: Sequence[str]) -> int:
    budget = min(CHECKING, 0.6 * day.left)
    children = [day.start(day.command(part, budget - 5)) for part in ("check", "smoke")]
    statuses = dict(zip(("check", "smoke"), finish(children, budget), strict=True))
    statuses["bench"] = bench(day, ())
    return _summary(statuses)


def second(day: Day, only: Sequence[str]) -> int:
    statuses: dict[str, int | None] = {}
    for part, share in (("tune", 0.75), ("counters", 1.0)):
        budget = share * day.left
        (statuses[part],) = finish([day.start(day.command(part, budget - 5))], budget)
    return _summary(statuses)


def _summary(statuses: dict[str, int | None]) -> int:
    for part, status in statuses.items():
        says = "was cut off: see its files" if status is None else "passed" if status == 0 else f"FAILED ({status})"
        print(f"{part} {says}", flush=True)
    return int(any(statuses.values()) or None in statuses.values())


def tune_check(day: Day, only: Sequence[str]) -> int:
    name, _, share = only[0].partition(":")
    return tune.check(day, name, int(share))


PARTS: dict[str, Callable[[Day, Sequence[str]], int]] = {
    "first": first,
    "second": second,
    "check": check,
    "smoke": smoke.main,
    "bench": bench,
    "tune": lambda day, only: tune.main(day),
    "counters": lambda day, only: counters.main(day),
    # Started by the others.
    "smoke-steps": smoke.steps,
    "tune-check": tune_check,
    "workload": lambda day, only: counters.workload(day, only[0]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=gpu_day.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets all results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny problems, to try the program itself")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"for everything ({BUDGETS})")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"steps of smoke: {', '.join(smoke.STEPS)}"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_day needs a CUDA or HIP device, and torch finds none here")
    budget = options.budget or BUDGETS.get(options.part, BUDGETS["first"])
    options.out.mkdir(parents=True, exist_ok=True)
    day = Day(options.out.resolve(), torch.device(options.device), options.small, budget)
    return PARTS[options.part](day, options.only)


if __name__ == "__main__":
    sys.exit(main())
