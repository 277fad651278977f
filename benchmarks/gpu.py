"""The GPU backend against its peers and the card: ``python -m benchmarks.gpu --out DIR``, from the repository root.

Every result is verified before it is timed. Times are medians between events on the device; rates stand beside the
card's own, a copy and a bfloat16 matrix product measured in the same run. It takes at most five minutes: what does not
fit is listed as such, and so are peers that are not installed. The exit status is 1 where kvb is wrong. Needs no
package but torch and triton.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvb
from benchmarks import verify
from benchmarks.shapes import GPU, Lookup
from benchmarks.timing import Absent
from kvb import functional, ops, reference

LIMIT = 285.0  # seconds for everything
SAMPLE = 256  # positions that are verified
SCORES = 1 << 28  # of the eager search at a time: 1 GB
FITS = 0.6  # of the free memory may be taken by one row


# --- the clock --------------------------------------------------------------------------------------------------------


class Clock:
    """Times calls on one device, each for about ``turn`` seconds, and knows when all time is used up."""

    def __init__(self, device: torch.device, turn: float, limit: float = LIMIT) -> None:
        self.device, self.turn, self.end = device, turn, perf_counter() + limit

    def require_time(self) -> None:
        if perf_counter() > self.end:
            raise Absent("no time left: name it with --only to have it alone")

    def median(self, run: Callable[[], Any]) -> float:
        """Seconds of one call, after two that do not count."""
        run()
        calls = max(5, min(200, int(self.turn / max(self._seconds(run, 1)[0], 1e-6))))
        return statistics.median(self._seconds(run, calls))

    def _seconds(self, run: Callable[[], Any], calls: int) -> list[float]:
        if self.device.type == "cpu":
            stamps = [perf_counter()]
            for _ in range(calls):
                run()
                stamps.append(perf_counter())
            return [after - before for before, after in itertools.pairwise(stamps)]
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
        torch.cuda.synchronize(self.device)
        for before, after in pairs:
            before.record()
            run()
            after.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """Bytes a second of a copy, read and write, and operations a second of a bfloat16 matrix product."""
    source = torch.ones(1 << (18 if quick else 28), device=clock.device)
    target = torch.empty_like(source)
    size = 128 if quick else 8192
    factor = torch.ones(size, size, dtype=torch.bfloat16, device=clock.device)
    return {
        "copy": 2 * source.nbytes / clock.median(lambda: target.copy_(source)),
        "matmul": 2 * size**3 / clock.median(lambda: factor @ factor),
    }


# --- problems ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Inputs of one row on the device; positions are the batch: queries [N, 1, C, D]."""

    shape: Lookup
    queries: Tensor
    keys: Tensor
    values: Tensor
    indices: Tensor


def _row_bytes(shape: Lookup, with_values: bool) -> int:
    """Memory of all that grows with N, by position: inputs, outputs, and a gradient or two."""
    return shape.C * (4 * shape.D + 40 + 12 * shape.V * with_values)


def reduced(shape: Lookup, free: int, with_values: bool) -> Lookup:
    """The shape with as few halvings of N as make it fit into ``free`` bytes."""
    while shape.N > 1 and shape.N * _row_bytes(shape, with_values) > FITS * free:
        shape = shape._replace(N=shape.N // 2)
    return shape


def _free(device: torch.device) -> int:
    return 8 << 30 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def small(shape: Lookup) -> Lookup:
    """The same shape, fit for a test on a CPU."""
    return Lookup(min(shape.N, 64), min(shape.C, 4), min(shape.K, 300), shape.D, min(shape.V, 8))


def problem(shape: Lookup, device: torch.device, with_values: bool) -> Problem:
    shape = reduced(shape, _free(device), with_values)
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    N, C, K, D, V = shape
    indices = torch.randint(K, (N if with_values else 0, 1, C), generator=generator, device=device)
    return Problem(shape, random(N, 1, C, D), random(C, K, D), random(C, K, V), indices)


def _sample(N: int) -> Tensor:
    return torch.linspace(0, N - 1, min(SAMPLE, N)).long()


def _some(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)].cpu()


# --- operators --------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What one contestant does, how its result is judged, and what the algorithm moves and computes at least."""

    run: Callable[[], Any]
    judge: Callable[[Any], float]  # the share of wrong choices; raises WrongResult where there must be none
    nbytes: float
    flops: float


def _search_work(given: Problem) -> tuple[float, float]:
    shape = given.shape
    nbytes = shape.query_bytes + shape.key_bytes + 12 * shape.N * shape.C
    return nbytes, 2.0 * shape.N * shape.C * shape.K * shape.D


def search(given: Problem) -> Work:
    """``nearest`` with packed keys: indices and distances."""
    packed = functional.pack_keys(given.keys)
    rows = _sample(given.shape.N)

    def judge(found: tuple[Tensor, Tensor]) -> float:
        verify.nearest(_some(given.queries, rows), given.keys.cpu(), _some(found[0], rows), _some(found[1], rows))
        return 0.0

    return Work(lambda: functional.nearest(given.queries, given.keys, packed=packed), judge, *_search_work(given))


def graphed(given: Problem) -> Work:
    """The same search, captured once as a CUDA graph and replayed."""
    work = search(given)
    if given.queries.device.type == "cpu":
        raise Absent("a CPU has no CUDA graphs")
    work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work.run()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return found

    return work._replace(run=replay)


def pack(given: Problem) -> Work:
    keys = given.keys

    def judge(packed: Tensor) -> float:
        verify.equal(functional.pack_keys(keys), packed, "packing twice")
        return 0.0

    return Work(lambda: functional.pack_keys(keys), judge, keys.nbytes + functional.pack_keys(keys).nbytes, 0.0)


def gather(given: Problem, pool: str = "none") -> Work:
    shape, rows = given.shape, _sample(given.shape.N)

    def judge(out: Tensor) -> float:
        verify.fetched(given.values.cpu(), _some(given.indices, rows), _some(out, rows), pool, "bscv")
        return 0.0

    written = 4 * shape.N * shape.V * (shape.C if pool == "none" else 1)
    nbytes = given.indices.nbytes + written + min(given.values.nbytes, 4 * shape.N * shape.C * shape.V)
    return Work(lambda: functional.gather(given.values, given.indices, pool=pool), judge, nbytes, 0.0)


def backward(given: Problem, pool: str = "none") -> Work:
    shape = given.shape
    size = (shape.N, 1, shape.C, shape.V) if pool == "none" else (shape.N, 1, shape.V)
    grad = torch.randn(size, device=given.keys.device)

    def judge(found: Tensor) -> float:
        rows = grad[:, :, :1] if pool == "none" else grad[:, :, None] / shape.C
        verify.sums(rows.cpu(), given.indices[:, :, :1].cpu(), found[:1].cpu())
        return 0.0

    nbytes = grad.nbytes + given.indices.nbytes + given.values.nbytes
    return Work(lambda: torch.ops.kvb.gather_backward(grad, given.indices, shape.K, pool), judge, nbytes, 0.0)


def accumulate(given: Problem) -> Work:
    shape = given.shape

    def judge(found: tuple[Tensor, Tensor]) -> float:
        hits, sums = found
        first = (part[:, :, :1].cpu() for part in (given.queries, given.indices))
        verify.sums(*first, sums[:1].cpu(), hits[:1].cpu())
        return 0.0

    nbytes = shape.query_bytes + given.indices.nbytes + shape.key_bytes
    return Work(lambda: torch.ops.kvb.accumulate(given.queries, given.indices, shape.K), judge, nbytes, 0.0)


def lookup(given: Problem) -> Work:
    """Search and mean over codebooks in one call."""
    packed, rows = functional.pack_keys(given.keys), _sample(given.shape.N)

    def judge(found: tuple[Tensor, Tensor]) -> float:
        out, indices = (_some(part, rows) for part in found)
        verify.sampled_choice(_some(given.queries, rows), given.keys.cpu(), indices)
        verify.fetched(given.values.cpu(), indices, out, "mean", "bscv")
        return 0.0

    nbytes, flops = _search_work(given)
    run = functools.partial(functional.lookup, given.queries, given.keys, given.values, packed=packed, pool="mean")
    return Work(run, judge, nbytes + 4 * given.shape.N * given.shape.V, flops)


# --- peers ------------------------------------------------------------------------------------------------------------


def _share_wrong(given: Problem, found: Tensor) -> float:
    """Of a peer's indices [C, N]: the share in the sample whose key is farther than exact search allows."""
    rows = _sample(given.shape.N)
    queries, keys = _some(given.queries, rows), given.keys.cpu()
    chosen = found[:, rows.to(found.device)].T.cpu().long()[:, None]
    expected = reference.nearest(queries, keys, reference.pack_keys(keys), None, 1)[0][..., 0]
    n, c = (chosen != expected).nonzero(as_tuple=True)[::2]
    q, mean = queries[n, 0, c].double(), keys.double().mean(1)
    radius = (keys - mean[:, None]).norm(dim=-1).amax(-1)
    bound = 8 * verify.UNIT * ((q - mean[c]).norm(dim=-1) + radius[c]).square()
    far, near = ((q - keys[c, which[n, 0, c]]).square().sum(-1) for which in (chosen, expected))
    return int((far - near > bound).sum()) / chosen.numel()


def _least(halves: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
    return torch.baddbmm(halves, queries, columns, alpha=-1).argmin(-1)


def eager(given: Problem, least: Callable[[Tensor, Tensor, Tensor], Tensor] = _least) -> Work:
    """``baddbmm`` and ``argmin``, at most SCORES scores at a time; key norms and transposed keys prepared."""
    N, C, K, D, _ = given.shape
    halves, columns = given.keys.square().sum(-1)[:, None] / 2, given.keys.transpose(1, 2)
    rows = min(N, max(1, SCORES // K))
    books = min(C, max(1, SCORES // (rows * K)))

    def run() -> Tensor:
        indices = torch.empty(C, N, dtype=torch.int64, device=given.keys.device)
        queries = given.queries.view(N, C, D).transpose(0, 1)
        for c in range(0, C, books):
            book = slice(c, c + books)
            for n in range(0, N, rows):
                indices[book, n : n + rows] = least(halves[book], queries[book, n : n + rows], columns[book])
        return indices

    return Work(run, functools.partial(_share_wrong, given), *_search_work(given))


def compiled(given: Problem) -> Work:
    return eager(given, torch.compile(_least, dynamic=False))


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{package} cannot be imported ({error}): pip install {package}") from error


def flash_kmeans(given: Problem) -> Work:
    """Its assignment step on float16, codebooks as its batch; rows transposed beforehand."""
    assign = _import("flash_kmeans.assign_euclid_triton", "flash-kmeans").euclid_assign_triton
    if given.keys.device.type == "cpu":
        raise Absent("flash-kmeans has no CPU kernels")
    N, C, _, D, _ = given.shape
    queries = given.queries.view(N, C, D).transpose(0, 1).half().contiguous()
    keys, norms = given.keys.half(), queries.float().square().sum(-1)
    run = functools.partial(assign, queries, keys, norms, use_heuristic=True)
    return Work(run, functools.partial(_share_wrong, given), *_search_work(given))


def published(given: Problem) -> Work:
    """A forward of the published module, its projection of features included; the same keys and values."""
    package = "discrete-key-value-bottleneck-pytorch"
    module_class = _import("discrete_key_value_bottleneck_pytorch", package).DiscreteKeyValueBottleneck
    N, C, K, D, V = given.shape
    if _free(given.keys.device) < N * C * K * 4 * 6:
        raise Absent(f"{package} materialises every distance: {N * C * K * 4 / 1e9:.3g} GB, several times over")
    options = {"num_memories": K, "num_memory_codebooks": C, "dim_memory": V, "dim_embed": C * D, "codebook_dim": D}
    module = module_class(D, **options).to(given.keys.device).eval().requires_grad_(False)
    module.vq._codebook.embed.copy_(given.keys)
    module.values.copy_(given.values)
    # The projection that only picks its head's features.
    eye = torch.eye(C * D, device=given.keys.device).view(C * D, C, D).transpose(0, 1)
    module.rand_proj.copy_(eye)
    x = given.queries.reshape(1, N, C * D)

    def judge(out: Tensor) -> float:
        expected, _ = functional.lookup(given.queries, given.keys, given.values, pool="mean")
        apart = (out.view_as(expected) - expected).abs().amax(-1) > 1e-4 * expected.abs().amax()
        return float(apart.float().mean())

    nbytes, flops = _search_work(given)
    return Work(lambda: module(x), judge, nbytes + 4 * N * V, flops)


# --- the table --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line: an operator or a peer at a shape."""

    operator: str
    shape: str
    who: str
    work: Callable[[Problem], Work]
    with_values: bool = True

    @property
    def name(self) -> str:
        return f"{self.operator}:{self.shape}"


def _rows() -> tuple[Row, ...]:
    """The most telling rows first: time may run out."""
    compiled_at, published_at = ("paper-256", "seed"), ("paper-256", "few-queries")
    rows = []
    for shape in GPU:
        rows.append(Row("search", shape, "kvb", search, False))
        if shape in ("paper-256", "few-queries"):
            rows.append(Row("search", shape, "kvb, CUDA graph", graphed, False))
    for shape in ("paper-256", "paper-8k", "seed", "few-queries"):
        rows.append(Row("lookup", shape, "kvb", lookup))
    for shape in ("paper-8k", "paper-131k", "seed"):
        rows += [Row("gather", shape, "kvb", gather)]
        rows += [Row("pooled gather", shape, "kvb", functools.partial(gather, pool="mean"))]
        rows += [Row("backward", shape, "kvb", backward)]
        rows += [Row("pooled backward", shape, "kvb", functools.partial(backward, pool="mean"))]
        rows += [Row("accumulate", shape, "kvb", accumulate)]
    rows += [Row("pack", shape, "kvb", pack, False) for shape in ("paper-256", "seed", "k65536-d64")]
    for who, work in (("eager", eager), ("flash-kmeans, float16", flash_kmeans)):
        rows += [Row("search", shape, who, work, False) for shape in GPU if shape != "paper-1m"]
    rows += [Row("lookup", shape, "discrete-key-value-bottleneck-pytorch", published) for shape in published_at]
    rows += [Row("search", shape, "torch.compile", compiled, False) for shape in compiled_at]
    return tuple(rows)


ROWS = _rows()

COLUMNS = "{:<27} {:<22} {:>8} {:>10} {:>8} {:>6} {:>8} {:>6} {:>8}"
HEAD = COLUMNS.format("row", "who", "N", "time", "GB/s", "copy", "TFLOP/s", "matmul", "wrong")


class _Attempt:
    """Keeps what stopped a row: a missing peer or device feature, a wrong result, or a failure inside of a peer."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours
        self.outcome: dict[str, str] = {}

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Absent):
            self.outcome = {"absent": str(error)}
        elif isinstance(error, Exception):
            says = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            # Nobody can list how other packages fail, but their failure must not stop the run.
            self.outcome = {"wrong": says} if self.ours else {"absent": f"failed: {says}"}
        return isinstance(error, Exception)


def measure(row: Row, clock: Clock, limits: dict[str, float], quick: bool) -> dict[str, Any]:
    """Verify and time one row; what the JSON report says of it."""
    facts: dict[str, Any] = {"operator": row.operator, "shape": row.shape, "who": row.who}
    with _Attempt(row.who.startswith("kvb")) as attempt:
        clock.require_time()
        given = problem(small(GPU[row.shape]) if quick else GPU[row.shape], clock.device, row.with_values)
        work = row.work(given)
        wrong = work.judge(work.run())
        seconds = clock.median(work.run)
        rates = {"GB/s": work.nbytes / seconds / 1e9, "TFLOP/s": work.flops / seconds / 1e12}
        shares = {
            "of copy": work.nbytes / seconds / limits["copy"],
            "of matmul": work.flops / seconds / limits["matmul"],
        }
        facts |= {"sizes": given.shape._asdict(), "seconds": seconds, **rates, **shares, "share wrong": wrong}
    return facts | attempt.outcome


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} us"


def line(facts: dict[str, Any]) -> str:
    name = f"{facts['operator']}:{facts['shape']}"
    for outcome, word in (("absent", "absent: "), ("wrong", "WRONG: ")):
        if outcome in facts:
            return f"{name:<27} {facts['who']:<22} {word}{facts[outcome]}"
    computes = facts["TFLOP/s"] > 0
    return COLUMNS.format(
        name,
        facts["who"],
        facts["sizes"]["N"],
        _time(facts["seconds"]),
        f"{facts['GB/s']:.0f}",
        f"{facts['of copy']:.0%}",
        f"{facts['TFLOP/s']:.3g}" if computes else "",
        f"{facts['of matmul']:.0%}" if computes else "",
        f"{facts['share wrong']:.2%}",
    )


def _machine(device: torch.device) -> dict[str, str]:
    name = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    platform = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return {"device": name, "platform": platform, "backend": ops.backend(device.type), **kvb.info()}


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA or HIP device, and torch finds none here")
    return torch.device(name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets gpu.json and gpu.txt")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program itself")
    parser.add_argument("--quick", action="store_true", help="small problems, short times")
    parser.add_argument("--only", nargs="+", metavar="NAME", help='operators ("search") or rows ("search:seed")')
    options = parser.parse_args(arguments)
    known = {row.name for row in ROWS} | {row.operator for row in ROWS}
    for name in options.only or ():
        if name not in known:
            parser.error(f"no row {name!r}; there are: {', '.join(sorted(known))}")
    device = _device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(device, 0.01 if options.quick else 0.3)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    machine = _machine(device)
    for name, fact in machine.items():
        say(f"{name:<16} {fact}")
    with torch.no_grad():
        limits = ceilings(clock, options.quick)
        say(f"ceilings: copy {limits['copy'] / 1e9:.4g} GB/s, bfloat16 matmul {limits['matmul'] / 1e12:.4g} TFLOP/s")
        say(HEAD)
        found = []
        for row in ROWS:
            if options.only and not {row.name, row.operator} & set(options.only):
                continue
            found.append(measure(row, clock, limits, options.quick))
            say(line(found[-1]))
    report = {"machine": machine, "ceilings": limits, "rows": found}
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "gpu.txt").write_text("\n".join(lines) + "\n")
    return 1 if any("wrong" in facts for facts in found) else 0


if __name__ == "__main__":
    sys.exit(main())
