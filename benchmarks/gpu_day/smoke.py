"""What only a card can show, each step verified on the card itself or against plain PyTorch.

A step that fails does not stop the others; one that breaks the device costs a new process.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import kvb
from benchmarks.gpu_day.day import LOST, Day, finish
from benchmarks.journal import Journal, read
from benchmarks.timing import Absent, Attempt, WrongResult
from kvb import functional, reference
from kvb.testing.verdicts import device_is_lost

ROWS = 1 << 14  # queries at a time against float64
UNIT = 2.0**-24
# D, K, C, N of the searches against float64: every way of searching, and 19 million queries in all
SEARCHES = (
    (10, 4096, 16, 65536),
    (14, 4096, 8, 65536),
    (8, 512, 32, 65536),
    (32, 200, 32, 65536),
    (32, 4096, 4, 65536),
    (64, 1024, 8, 65536),
    (128, 1024, 4, 65536),
    (200, 600, 2, 65536),
    (1, 1024, 4, 65536),
)
Step = Callable[[Day], str]


def _require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise WrongResult(message)


# --- searches ---------------------------------------------------------------------------------------------------------


def _data(kind: str, N: int, C: int, K: int, D: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    device = generator.device
    q, k = (torch.randn(shape, device=device, generator=generator) for shape in ((N, 1, C, D), (C, K, D)))
    if kind == "offset":
        return q + 50, k + 50
    if kind == "clusters":
        centres_q, centres_k = (3.0 * (torch.arange(size, device=device) % 5) for size in (N, K))
        return q / 50 + centres_q[:, None, None, None], k / 50 + centres_k[None, :, None]
    if kind == "far":
        return q * 10.0 ** (torch.arange(N, device=device) % 13 - 4)[:, None, None, None], k
    return q, k


def wrong_choices(q: Tensor, k: Tensor, found: Tensor, distances: Tensor) -> int:
    """Of a search [N, 1, C]: chosen keys farther than the search's own bound allows, and distances that are off.

    In float64 on the device: scores by a product, and directly wherever the choice is not the least score.
    """
    wrong = 0
    for c in range(k.shape[0]):
        keys = k[c].double()
        mean = keys.mean(0)
        half, radius = keys.square().sum(-1) / 2, (keys - mean).norm(dim=-1).amax()
        for n in range(0, q.shape[0], ROWS):
            rows, chosen = q[n : n + ROWS, 0, c].double(), found[n : n + ROWS, 0, c]
            least = (half - rows @ keys.T).argmin(-1)
            exact = (rows - keys[chosen]).square().sum(-1)
            bound = 8 * UNIT * ((rows - mean).norm(dim=-1) + radius).square()
            wrong += int((~(exact - (rows - keys[least]).square().sum(-1) <= bound)).sum())
            off = (distances[n : n + ROWS, 0, c].double() - exact).abs() > (q.shape[-1] + 4) * UNIT * exact
            wrong += int(off.sum())
    return wrong


def exactness(day: Day) -> str:
    """Millions of queries against float64 on the card."""
    total, generator = 0, torch.Generator(day.device).manual_seed(1)
    for D, K, C, N in SEARCHES:
        if day.small:
            K, C, N = min(K, 300), 1, 40
        for kind in ("normal", "offset", "clusters", "far"):
            q, k = _data(kind, N, C, K, D, generator)
            wrong = wrong_choices(q, k, *functional.nearest(q, k))
            total += N * C
            _require(wrong == 0, f"{wrong} of {N * C} are wrong: {kind}, D={D}, K={K}, {total} looked at so far")
    return f"0 of {total} wrong"


def repeat(day: Day) -> str:
    """The same calls give the same bits."""
    q, k = torch.randn(10 if day.small else 512, 4, 8, 14), torch.randn(8, 300 if day.small else 4096, 14)
    q, k = q.to(day.device), k.to(day.device)
    found = [functional.nearest(q, k) for _ in range(5)]
    same = all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))
    _require(same, "five searches differ")
    grad = torch.randn(*q.shape[:3], 7, device=day.device)
    torch.use_deterministic_algorithms(True)
    try:
        sums = [torch.ops.kvb.gather_backward(grad, found[0][0], k.shape[1], "none") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    _require(all(torch.equal(sums[0], one) for one in sums), "three deterministic gradients differ")
    top = [functional.nearest(q[:, :1], k, topk=5)[0] for _ in range(3)]
    _require(all(torch.equal(top[0], one) for one in top), "three searches for five keys differ")
    _require((top[0].sort(-1).values.diff(dim=-1) > 0).all(), "a key stands twice among five")
    return "the same every time"


def twins(day: Day) -> str:
    """Every key twice, and the twelve nearest: equal keys come in the order of their indices."""
    k = torch.randn(4, 60, 12)
    k[:, 30:] = k[:, torch.randperm(30)]
    q = torch.randn(20 if day.small else 2048, 1, 4, 12)
    found, _ = functional.nearest(q.to(day.device), k.to(day.device), topk=12)
    expected, _ = reference.nearest(q, k, reference.pack_keys(k), None, 12)
    off = int((found.cpu() != expected).any(-1).sum())
    _require(off == 0, f"{off} of {expected[..., 0].numel()} rows of twelve are in another order")
    return "in order"


def chunks(day: Day) -> str:
    """More queries than one launch takes."""
    if day.device.type == "cpu" or day.small:
        return "skipped: too much for a trial"
    q, k = torch.randn(200_000, 1, 256, 10, device=day.device), torch.randn(256, 512, 10, device=day.device)
    torch.cuda.reset_peak_memory_stats()
    indices, distances = functional.nearest(q, k)
    some = torch.randint(200_000, (64,), device=day.device)
    again = functional.nearest(q[some], k)
    same = torch.equal(indices[some], again[0]) and torch.equal(distances[some], again[1])
    _require(same, "rows differ from the same rows alone")
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"


# --- ways of running --------------------------------------------------------------------------------------------------


def _frozen(day: Day, C: int = 8, K: int = 512, D: int = 10, V: int = 6) -> torch.nn.Module:
    torch.manual_seed(0)
    K = 40 if day.small else K
    return kvb.KeyValueBottleneck(C, K, D, V).to(day.device).freeze_keys().eval()


def graph(day: Day) -> str:
    """A forward captured as a CUDA graph, and replayed on other inputs."""
    if day.device.type == "cpu":
        return "skipped: a CPU has no graphs"
    module, x = _frozen(day), torch.randn(256, 8, 10, device=day.device)
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = module(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            captured.replay()
            torch.cuda.synchronize()
            _require(torch.equal(y, module(x)), "a replay differs from a call")
    return "replayed"


def stream(day: Day) -> str:
    """A search on another stream than the default."""
    if day.device.type == "cpu":
        return "skipped: a CPU has no streams"
    q, k = torch.randn(4096, 1, 8, 10, device=day.device), torch.randn(8, 512, 10, device=day.device)
    expected = functional.nearest(q, k)[0]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = functional.nearest(q, k)[0]
    side.synchronize()
    _require(torch.equal(found, expected), "another stream gives other indices")
    return "the same on another stream"


def compiled(day: Day) -> str:
    """``torch.compile`` in one graph."""
    if day.small:
        return "skipped: compiles for long"
    module, x = _frozen(day), torch.randn(20, 8, 10, device=day.device)
    with torch.no_grad():
        _require(torch.equal(torch.compile(module, fullgraph=True)(x), module(x)), "compiled and eager forwards differ")
    return "the same when compiled"


def autocast(day: Day) -> str:
    """Under autocast indices stay those of float32."""
    module, x = _frozen(day), torch.randn(20, 8, 10, device=day.device)
    with torch.no_grad():
        expected = module(x)
        with torch.autocast(day.device.type, dtype=torch.bfloat16):
            _require(torch.equal(module(x).to(expected.dtype), expected), "a forward under autocast differs")
    return "the same under autocast"


# --- learning ---------------------------------------------------------------------------------------------------------


def key_updates(day: Day) -> str:
    """Three updates of the keys on the device and on the CPU: the same state, as far as float32 goes."""
    torch.manual_seed(0)
    on_cpu, on_device = (kvb.KeyValueBottleneck(4, 64, 8, 5) for _ in range(2))
    on_device.load_state_dict(on_cpu.state_dict())
    on_device.to(day.device)
    apart = 0.0
    for _ in range(3):
        x = torch.randn(200, 4, 8)
        on_cpu(x)
        on_device(x.to(day.device))
        for name, state in on_cpu.state_dict().items():
            if isinstance(state, Tensor) and state.is_floating_point():
                there = on_device.state_dict()[name].cpu().double()
                apart = max(apart, float((there - state.double()).abs().max()))
        on_device.load_state_dict(on_cpu.state_dict())  # a query between two keys may go either way, and then moves on
    _require(apart < 1e-4, f"an update on the device is {apart:.3g} off that on the CPU")
    return f"at most {apart:.2g} apart"


def training(day: Day) -> str:
    """A whole run on codes: search, encode, train, and what was learned is known afterwards."""
    torch.manual_seed(0)
    N, classes, C = (300, 3, 8) if day.small else (20_000, 10, 64)
    centres, labels = torch.randn(classes, C, 8) * 2, torch.randint(classes, (N,))
    x = (centres[labels] + torch.randn(N, C, 8)).to(day.device)
    module = kvb.KeyValueBottleneck(C, 20 if day.small else 256, 8, classes, init_mode="random").to(day.device)
    module.init_keys(x)
    module.freeze_keys()
    torch.nn.init.zeros_(module.values)
    codes, labels = module.encode(x), labels.to(day.device)
    losses = []
    for start in range(0, N - 99, 100):
        loss, *_ = kvb.training.sgd_step(module.values, codes[start : start + 100], labels[start : start + 100])
        losses.append(float(loss))
    right = float((module.decode(codes, pool="mean").argmax(-1) == labels).double().mean())
    _require(right > 0.9, f"{right:.1%} of the samples are known after training")
    return f"{right:.1%} known after training, the loss went from {losses[0]:.3g} to {losses[-1]:.3g}"


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (exactness, repeat, twins, graph, stream, key_updates, training, autocast, chunks, compiled)
}


# --- running them -----------------------------------------------------------------------------------------------------


def _run(day: Day, names: Sequence[str]) -> Iterator[dict[str, object]]:
    for name in names:
        before, says = day.left, ""
        with Attempt() as attempt:  # whatever a step meets, the next one is tried
            if day.left <= 0:
                raise Absent("no time left")
            says = STEPS[name](day)
        if attempt.error and not attempt.absent:
            traceback.print_exception(attempt.error)
            says = attempt.error_line
        yield {
            "step": name,
            "passed": not attempt.error,
            "says": attempt.why if attempt.absent else says,
            "seconds": round(before - day.left, 2),
        }


def steps(day: Day, names: Sequence[str]) -> int:
    """Some steps in this process; ``LOST`` if one of them broke the device."""
    journal, wrong = Journal(day.out / "smoke.jsonl", go_on=True), False
    for facts in _run(day, names or tuple(STEPS)):
        journal.write(facts)
        verdict = "passed" if facts["passed"] else "FAILED"
        print(f"smoke: {facts['step']:<12} {verdict} in {facts['seconds']:6.1f} s: {facts['says']}", flush=True)
        wrong = wrong or not facts["passed"]
        if not facts["passed"] and device_is_lost(day.device):
            return LOST
    return int(wrong)


def main(day: Day, only: Sequence[str]) -> int:
    """All steps, in as many processes as it takes."""
    journal = Journal(day.out / "smoke.jsonl")
    left = list(only or STEPS)
    while left and day.left > 1:
        command = day.command("smoke-steps", day.left - 1, "--only", *left)
        (status,) = finish([day.start(command)], day.left)
        done = {line["step"] for line in read(journal.path)}
        left = [name for name in left if name not in done]
        if left and status is not None and status != LOST:
            journal.write({"step": left.pop(0), "passed": False, "says": f"the process ended with status {status}"})
    lines = list(read(journal.path))
    return int(bool(left) or not all(line["passed"] for line in lines))
