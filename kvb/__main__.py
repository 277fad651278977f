"""The command line: ``python -m kvb demo``, ``bench``, ``check`` and ``info``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import kvb

STUDIES = {"digits": "digits", "mnist": "mnist", "20ng": "newsgroups"}  # and their modules in kvb.experiments


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text}")
    return seed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvb", description=kvb.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,bench,check,info}")
    demo = commands.add_parser(
        "demo", help="learn real data a few classes at a time: the bottleneck against a linear and an MLP head"
    )
    demo.add_argument(
        "--data",
        choices=STUDIES,
        default="digits",
        help="digits come with scikit-learn; the others need `make data-mnist` or `make data-20ng` (%(default)s)",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="gets a figure and its numbers (%(default)s)"
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="S", help="of everything random (%(default)s)")
    _add_bench(commands.add_parser("bench", help="how fast kvb is on this machine, against what you might use instead"))
    check = commands.add_parser("check", help="hold every operator of every backend of this machine to the contract")
    check.add_argument("--device", metavar="D", help="cpu or cuda (all that are there)")
    commands.add_parser("info", help="versions, and which backend answers on each device")
    return parser


def _demo(data: str, out: Path, seed: int) -> None:
    try:
        from kvb.experiments import demo
        from kvb.experiments.packages import MissingPackageError

        study = importlib.import_module(f"kvb.experiments.{STUDIES[data]}").STUDY
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("numpy", "sklearn", "matplotlib"):
            raise
        sys.exit(f"The demo needs {error.name}, which is not installed. Install it with: pip install 'kvb[demo]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out must be a folder that can be written to, got {out} ({error.strerror}). Choose another one.")
    try:
        demo.main(study, out, seed)
    except MissingPackageError as error:
        sys.exit(f"{error}\nOr get all that this demo reads with: make data-{data}")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    length = bench.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="search and forward: about a minute (the default)")
    length.add_argument("--full", action="store_true", help="every suite, every peer: several minutes")
    bench.add_argument("--peers", action="store_true", help="only list the peers, and why some are absent")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    bench.add_argument("--plot", type=Path, metavar="DIR", help="draw them there, too")


def _bench(full: bool, peers: bool, target: Path | None, plots: Path | None) -> int:
    try:
        bench = importlib.import_module("benchmarks.bench")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "benchmarks":
            raise
        sys.exit("The benchmarks come with the source, not with the package: run this in a checkout of kvb.")
    for path in (target and target.parent, plots and plots.parent):
        if path and not path.is_dir():
            sys.exit(f"There is no folder {path} to write to. Make it, or choose another one.")
    return bench.main(full, peers, target, plots)


def _check(device: str | None) -> int:
    from kvb import check

    there = {found.type: found for found in check.devices()}
    if device is not None and device not in there:
        sys.exit(f"--device must be one of the devices of this machine, {', '.join(there)}; got {device!r}")
    print(f"kvb {kvb.__version__}, torch {torch.__version__}")
    return 0 if check.run([there[device]] if device else list(there.values())) else 1


def _info() -> None:
    facts = kvb.info()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.command == "check":
        return _check(chosen.device)
    if chosen.command == "bench":
        return _bench(chosen.full, chosen.peers, chosen.json, chosen.plot)
    if chosen.command == "demo":
        _demo(chosen.data, chosen.out, chosen.seed)
    else:
        _info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
