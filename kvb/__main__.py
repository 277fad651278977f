"""The command line: ``kvb demo``, ``protocol``, ``unlearn``, ``study``, ``report``, ``bench``, ``check``, ``info``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kvb
from kvb.checkpoints import CheckpointError

FEATURES = {"digits": "data.digits", "mnist": "data.mnist", "20ng": "data.newsgroups"}  # modules of kvb.experiments
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # there is no room for what is to be written
STUDIES = {**FEATURES, "toy": "toy"}


class WrongUsage(SystemExit):
    """Ends the process as argparse does, after saying what is wrong: for what only a command can know."""

    def __init__(self, why: str) -> None:
        super().__init__(2)
        self.why = why
        print(why, file=sys.stderr)

    def __str__(self) -> str:
        return self.why


def _number(text: str, kind: type[int] | type[float], low: float, high: float, expected: str) -> Any:
    """A number in [low, high)."""
    with contextlib.suppress(ValueError):
        if low <= (number := kind(text)) < high:
            return number
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _seed(text: str) -> int:
    return int(_number(text, int, 0, 1 << 63, "an integer from 0 to 2**63 - 1"))


def _count(text: str) -> int:
    return int(_number(text, int, 1, float("inf"), "a positive integer"))


def _seconds(text: str) -> float:
    return float(_number(text, float, 0, float("inf"), "a number of seconds"))


def _labels(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _add_protocol(commands: Any) -> None:
    protocol = commands.add_parser(
        "protocol",
        help="the paper's protocol: three scenarios, eleven heads, mean and spread over seeds; its ablations",
    )
    protocol.add_argument("--data", choices=FEATURES, default="digits", help="as for the demo (%(default)s)")
    scenarios = ("class-incremental", "task-incremental", "iid", "domain-incremental")
    protocol.add_argument("--scenario", choices=scenarios, help="only this one (the first three)")
    protocol.add_argument("--seeds", type=_count, default=5, metavar="N", help="seeds 0 to N-1 (%(default)s)")
    protocol.add_argument("--epochs", type=_count, metavar="N", help="passes over a task (as the data needs)")
    protocol.add_argument("--patience", type=_count, metavar="N", help="end a task N epochs after its lowest loss")
    protocol.add_argument("--quick", action="store_true", help="everything tiny, for a first look")
    protocol.add_argument(
        "--labels",
        type=_labels,
        nargs="+",
        default=[None],
        metavar="N",
        help="N labelled examples of a class (all); several numbers, such as 1 5 20 50 all: a curve over them",
    )
    protocol.add_argument("--heads", nargs="+", metavar="HEAD", help="only these, by their names in the table (all)")
    what = protocol.add_mutually_exclusive_group()
    axes = ("codebooks", "pairs", "dim_keys", "key_data")
    what.add_argument("--ablate", choices=axes, help="vary this, as the paper does; the bottleneck only")
    what.add_argument("--full", action="store_true", help="one class-incremental run of the paper's 400,000 steps")
    protocol.add_argument(
        "--out", type=Path, default=Path("protocol_out"), metavar="DIR", help="gets figures, numbers (%(default)s)"
    )


def _parser() -> argparse.ArgumentParser:
    called = "python -m kvb" if Path(sys.argv[0]).name == "__main__.py" else "kvb"
    parser = argparse.ArgumentParser(prog=called, description=(kvb.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"kvb {kvb.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
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
    _add_protocol(commands)
    unlearn = commands.add_parser(
        "unlearn", help="forget classes of real data by masking their pairs, and relearn them"
    )
    unlearn.add_argument(
        "--data",
        choices=FEATURES,
        default="digits",
        help="as for demo (%(default)s)",
    )
    unlearn.add_argument(
        "--classes", type=int, nargs="+", default=[], metavar="L", help="forget these together (each class by itself)"
    )
    unlearn.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="as for demo (%(default)s)")
    unlearn.add_argument("--seed", type=_seed, default=0, metavar="S", help="of everything random (%(default)s)")
    study = commands.add_parser("study", help="edit samples, forget them, edit thousands: what changes besides")
    study.add_argument("name", choices=("edits", "forgetting", "continual"), help="which one")
    study.add_argument("--data", choices=FEATURES, default="digits", help="as for demo (%(default)s)")
    study.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="as for demo (%(default)s)")
    study.add_argument("--seed", type=_seed, default=0, metavar="S", help="of everything random (%(default)s)")
    report = commands.add_parser("report", help="write a page about the bottleneck in a file: sizes, usage, pictures")
    report.add_argument("file", type=Path, help="of kvb.save, or a folder of save_pretrained")
    report.add_argument("--data", type=Path, metavar="CODES", help="count these codes, a .npy of encode_dataset")
    report.add_argument("--accuracies", type=Path, metavar="JSON", help="draw these: a row of tasks after each task")
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="HTML", help="the page (%(default)s)")
    _add_bench(commands.add_parser("bench", help="how fast kvb is on this machine, against what you might use instead"))
    check = commands.add_parser("check", help="hold every operator of every backend of this machine to the contract")
    check.add_argument("--device", metavar="D", help="cpu or cuda (both, where there are both)")
    check.add_argument("--processes", type=_count, metavar="N", help="at a time (one per CPU, 14 at most)")
    check.add_argument("--seconds", type=_seconds, metavar="S", help="end after so long; what did not run is no pass")
    check.add_argument("--json", type=Path, metavar="FILE", help="gets a line of JSON for every case, when it is done")
    commands.add_parser("info", help="versions, and which backend runs on each device")
    return parser


def _experiment(name: str, chosen: argparse.Namespace, run: Callable[[Any, Any], None]) -> None:
    """Give ``run`` a module of kvb.experiments and that of the data; say in one line what they lack."""
    try:
        from kvb.experiments.data.packages import MissingPackageError

        modules = [importlib.import_module(f"kvb.experiments.{module}") for module in (name, STUDIES[chosen.data])]
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("numpy", "sklearn", "matplotlib"):
            raise
        sys.exit(
            f"The {chosen.command} command needs {error.name}, which is not installed. "
            "Install it with: pip install 'kvb[demo]'"
        )
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongUsage(
            f"--out must be a folder that can be written to, got {chosen.out} ({error.strerror}). Choose another one."
        ) from None
    try:
        run(*modules)
    except MissingPackageError as error:
        sys.exit(f"{error}\nOr get all that this reads with: make data-{chosen.data}")


def _demo(chosen: argparse.Namespace) -> None:
    name = "toy" if chosen.data == "toy" else "demo"
    _experiment(name, chosen, lambda demo, data: demo.main(data.STUDY, chosen.out, chosen.seed))


def _unlearn(chosen: argparse.Namespace) -> None:
    def run(unlearning: Any, data: Any) -> None:
        from kvb.experiments.unlearning import ClassesError  # with packages that not every command needs

        try:
            unlearning.main(data.STUDY, chosen.out, chosen.seed, classes=chosen.classes)
        except ClassesError as error:
            raise WrongUsage(f"--{error}") from None

    _experiment("unlearning", chosen, run)


def _study(chosen: argparse.Namespace) -> None:
    _experiment("editing", chosen, lambda editing, data: editing.main(data.STUDY, chosen.name, chosen.out, chosen.seed))


def _protocol(chosen: argparse.Namespace) -> None:
    def run(report: Any, data: Any) -> None:
        scenarios = (chosen.scenario,) if chosen.scenario else report.SCENARIOS
        heads = tuple(chosen.heads or report.HEADS)
        if unknown := [name for name in heads if name not in report.HEADS]:
            raise WrongUsage(f"--heads must be of {', '.join(report.HEADS)}; got {unknown[0]!r}")
        options = chosen.epochs, chosen.patience, chosen.quick, chosen.labels[0], heads
        plan = report.Plan(chosen.seeds, scenarios, *options)
        if chosen.full:
            from kvb.experiments import full, shares

            shares.results((data.SOURCE,), lambda source: full.main(source, plan, chosen.out))
        elif chosen.ablate:
            report.ablate(data.SOURCE, chosen.ablate, plan, chosen.out)
        elif len(chosen.labels) > 1:
            report.curves(data.SOURCE, plan, chosen.labels, chosen.out)
        else:
            report.compare(data.SOURCE, plan, chosen.out)

    _experiment("report", chosen, run)


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
    for path in filter(None, (target, plots)):
        _require_folder(path)
    return bench.main(full, peers, target, plots)


def _require_folder(path: Path) -> None:
    """Of what is to be written; before hours of work."""
    if not path.parent.is_dir():
        raise WrongUsage(f"There is no folder {path.parent} to write to. Make it, or choose another one.")


def _check(device: str | None, **options: Any) -> int:
    from kvb import testing

    there = {found.type: found for found in testing.devices()}
    if device is not None and device not in there:
        raise WrongUsage(f"--device must be one of the devices of this machine, {', '.join(there)}; got {device!r}")
    if options["json_lines"]:
        _require_folder(options["json_lines"])
    print(f"kvb {kvb.__version__}, torch {torch.__version__}")
    return 0 if testing.run([there[device]] if device else list(there.values()), **options) else 1


def _report(source: Path, out: Path, data: Path | None, accuracies: Path | None) -> int:
    try:
        from kvb import report
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        sys.exit("The report command needs matplotlib, which is not installed. Install it with: pip install matplotlib")
    _require_folder(out)
    try:
        print(report.write(source, out, data, accuracies))
    except FileNotFoundError as error:
        sys.exit(f"There is no file {error.filename}.")
    except CheckpointError as error:
        sys.exit(str(error))
    except ValueError as error:
        sys.exit(str(error))
    return 0


def _info() -> None:
    facts = kvb.info()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")


def _run(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    if chosen.command == "check":
        return _check(chosen.device, processes=chosen.processes, seconds=chosen.seconds, json_lines=chosen.json)
    if chosen.command == "bench":
        return _bench(chosen.full, chosen.peers, chosen.json, chosen.plot)
    if chosen.command == "report":
        return _report(chosen.file, chosen.out, chosen.data, chosen.accuracies)
    if chosen.command == "demo":
        _demo(chosen)
    elif chosen.command == "protocol":
        _protocol(chosen)
    elif chosen.command == "unlearn":
        _unlearn(chosen)
    elif chosen.command == "study":
        _study(chosen)
    else:
        _info()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. One line says why it stopped early."""
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _stopped("Interrupted.", 130)
    except BrokenPipeError:
        return _stopped("Stopped: nobody reads the output any longer.", 141)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return _stopped(f"Cannot write {error.filename or 'the output'}: {error.strerror}. Make room and try again.", 1)
    return status


def _stopped(why: str, status: int) -> int:
    """Say it, and throw away what is still to be printed: nobody could read it, or there is no room."""
    print(why, file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):  # where the output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
