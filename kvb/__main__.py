"""The command line: ``python -m kvb demo``, ``unlearn``, ``check`` and ``info``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kvb

STUDIES = {
    "digits": "digits",
    "mnist": "mnist",
    "20ng": "newsgroups",
    "toy": "toy",
}  # and their modules in kvb.experiments


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text}")
    return seed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvb", description=kvb.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,unlearn,check,info}")
    demo = commands.add_parser(
        "demo", help="learn real data a few classes at a time: the bottleneck against a linear and an MLP head"
    )
    demo.add_argument(
        "--data",
        choices=STUDIES,
        default="digits",
        help="digits come with scikit-learn, toy is drawn; the others need `make data-mnist` or `make data-20ng` "
        "(%(default)s)",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="gets a figure and its numbers (%(default)s)"
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="S", help="of everything random (%(default)s)")
    unlearn = commands.add_parser(
        "unlearn", help="forget classes of real data by masking their pairs, and relearn them"
    )
    unlearn.add_argument(
        "--data",
        choices=[name for name in STUDIES if name != "toy"],
        default="digits",
        help="as for demo (%(default)s)",
    )
    unlearn.add_argument(
        "--classes", type=int, nargs="+", default=[], metavar="L", help="forget these together (each class by itself)"
    )
    unlearn.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="as for demo (%(default)s)")
    unlearn.add_argument("--seed", type=_seed, default=0, metavar="S", help="of everything random (%(default)s)")
    check = commands.add_parser("check", help="hold every operator of every backend of this machine to the contract")
    check.add_argument("--device", metavar="D", help="cpu or cuda (all that are there)")
    commands.add_parser("info", help="versions, and which backend answers on each device")
    return parser


def _experiment(name: str, data: str, out: Path, seed: int, **options: Any) -> None:
    try:
        from kvb.experiments.packages import MissingPackageError

        experiment = importlib.import_module(f"kvb.experiments.{name}")
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
        experiment.main(study, out, seed, **options)
    except MissingPackageError as error:
        sys.exit(f"{error}\nOr get all that this demo reads with: make data-{data}")


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
    if chosen.command == "demo":
        _experiment("toy" if chosen.data == "toy" else "demo", chosen.data, chosen.out, chosen.seed)
    elif chosen.command == "unlearn":
        _experiment("unlearning", chosen.data, chosen.out, chosen.seed, classes=chosen.classes)
    else:
        _info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
