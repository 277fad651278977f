"""``python -m kvb check``: right backends pass, and a wrong one is found, named and turned into the exit status."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import types

import pytest
import torch

from kvb import __main__, ops, reference, testing
from kvb.ops import backends
from kvb.testing import expectations, runner

CPU = torch.device("cpu")
CASE = {case.name: case for case in testing.CASES}
FEW = (CASE["plain"], CASE["3 nearest"], CASE["queries with NaN and Inf"])
NUMBERS = [testing.CASES.index(case) for case in FEW]


def changed(name, change):
    """The reference with the results of one operator changed."""
    operators = {operator: getattr(reference, operator) for operator in ops.NAMES}
    right = operators[name]
    operators[name] = lambda *arguments: change(right(*arguments))
    return testing.Backend("broken", CPU, types.SimpleNamespace(**operators))


def test_every_operator_has_a_check():
    assert set(testing.CHECKS) == set(ops.NAMES)


def test_names_of_cases_are_distinct():
    assert len(CASE) == len(testing.CASES)


@pytest.mark.parametrize("operator", ops.NAMES)
def test_the_reference_passes(operator):
    found = testing.verdict(operator, testing.Backend("torch", CPU, reference))
    assert not found.failures
    assert str(found) == f"pass {len(testing.CASES)}"


def test_a_step_that_moves_nothing_is_found():
    idle = types.SimpleNamespace(move_rows_=lambda *arguments: None)
    found = testing.verdict("move_rows_", testing.Backend("broken", CPU, idle), FEW)
    assert found.failures
    assert "values are wrong" in found.failures[0][1]


def next_index(found):
    return (found[0] + 1) % 40, found[1]


BROKEN = {
    "the second nearest": ("nearest", next_index, "farther than the nearest"),
    "distances off by 1e-5": ("nearest", lambda found: (found[0], found[1] * (1 + 1e-5)), "distances are off"),
    "narrow indices": ("nearest", lambda found: (found[0].int(), found[1]), "expected indices torch.int64"),
    "indices out of range": ("nearest", lambda found: (found[0] + 40, found[1]), "outside of"),
    "lost codebook": ("pack_keys", lambda found: found[1:], "expected packed keys"),
    "a rounded value": ("gather", lambda found: found * (1 + 2e-7), "values"),
    "a lost gradient": ("gather_backward", lambda found: found * 0.999, "gradients"),
    "a NaN gradient": ("gather_backward", lambda found: found * torch.nan, "gradients"),
    "descending rows": ("gather_backward_rows", lambda found: (found[0].flip(0), *found[1:]), "touched rows"),
    "a wrong loss": ("sgd_step_", lambda found: (found[0] * 1.001, *found[1:]), "losses"),
    "a wrong norm": ("sgd_step_", lambda found: (found[0], found[1] * 1.001, found[2]), "norms"),
    "shrunk logits": ("sgd_step_", lambda found: (*found[:2], found[2] * 0.999), "logits"),
    "another packing": ("update_keys_", lambda found: found + 1, "the packed keys are not those of the new keys"),
    "one hit too many": ("count", lambda found: found + 1, "hits are wrong"),
    "another lowest count": ("tally_", lambda found: found + 1, "expected 0 where nothing is removed"),
    "shrunk sums": ("accumulate", lambda found: (found[0], found[1] * 0.999), "sums of queries"),
    "values of other keys": ("lookup", lambda found: (found[0], next_index(found[::-1])[0]), ""),
    "another pair": ("product_nearest", lambda found: ((found[0] + 1) % 1600, found[1]), "not among the best"),
    "sums of others": ("gather_weighted", lambda found: found.flip(-1), "weighted sums"),
    "lost weights": ("scatter_weighted_rows", lambda found: (found[0], found[1] * 0.999, found[2]), "gradients"),
    "shrunk products": ("gather_dot", lambda found: found * 0.999, "inner products"),
    "far draws": ("sample", next_index, "a far key"),
}


@pytest.mark.parametrize(("operator", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_operator_is_found(operator, change, message):
    found = testing.verdict(operator, changed(operator, change), FEW)
    assert found.failures
    assert message in found.failures[0][1]


def test_a_later_twin_is_found():
    def last(found):
        return torch.where(found[0] < 12, found[0] + 28, found[0]), found[1]

    found = testing.verdict("nearest", changed("nearest", last), [CASE["30 % duplicated keys"]])
    assert "equal one stands at a lower index" in found.failures[0][1]


def test_a_masked_pair_is_found():
    broken = changed("nearest", lambda found: found)
    search = broken.operators.nearest
    broken.operators.nearest = lambda queries, keys, packed, mask, topk: search(queries, keys, packed, None, topk)
    assert testing.verdict("nearest", broken, [CASE["masked"]]).failures


def test_a_step_of_the_wrong_length_is_found():
    broken = changed("sgd_step_", lambda found: found)
    step = broken.operators.sgd_step_
    broken.operators.sgd_step_ = lambda values, indices, targets, lr, *rest: step(
        values, indices, targets, lr * 1.01, *rest
    )
    found = testing.verdict("sgd_step_", broken, [CASE["plain"]])
    assert "values are off" in found.failures[0][1]


@pytest.mark.parametrize(
    ("place", "name"), [(0, "keys are off"), (1, "averages are off"), (2, "cluster sizes are off")]
)
def test_a_key_that_moves_elsewhere_is_found(place, name):
    broken = changed("update_keys_", lambda found: found)
    step = broken.operators.update_keys_

    def update(*arguments):
        step(*arguments)
        arguments[place][0, 0] *= 1.001
        return reference.pack_keys(arguments[0])

    broken.operators.update_keys_ = update
    found = testing.verdict("update_keys_", broken, [CASE["plain"]])
    assert name in found.failures[0][1]


def test_gradients_that_do_not_repeat_are_found():
    def noisy(grad):
        return grad * (1 + 1e-7 * torch.rand(grad.shape))

    found = testing.verdict("gather_backward", changed("gather_backward", noisy), [CASE["plain"]])
    assert "two deterministic gradients differ" in found.failures[0][1]


def test_any_exception_is_a_failure():
    class Unknown(Exception):
        pass

    def fail(found):
        raise Unknown("no such instruction")

    found = testing.verdict("count", changed("count", fail), [CASE["plain"]])
    assert found.failures == [("plain", "Unknown: no such instruction")]


def test_checking_restores_determinism_and_the_random_state():
    state = torch.get_rng_state()
    testing.verdict("gather_backward", testing.Backend("torch", CPU, reference), [CASE["plain"]])
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("case", testing.CASES, ids=CASE)
def test_problems_are_what_their_names_say(case):
    problem = testing.problem(case, CPU)
    assert problem.queries.shape == (case.B, case.S, case.C, case.D)
    assert problem.queries.stride(-1) == 1 or problem.queries.numel() == 0 or case.memory == "batch_last"
    assert problem.queries.is_contiguous() == (case.memory == "contiguous")


def test_command_line_passes(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(testing.run.__kwdefaults__, "cases", NUMBERS)
    found = tmp_path / "found.jsonl"
    assert __main__.main(["check", "--device", "cpu", "--json", str(found)]) == 0
    table = capsys.readouterr().out
    for backend in {ops.backend("cpu"), "torch"}:
        assert f"{backend} on cpu" in table
    assert "FAIL" not in table
    lines = [json.loads(line) for line in found.read_text().splitlines()]
    assert {line["operator"] for line in lines} == set(ops.NAMES)
    assert {line["case"] for line in lines} == {case.name for case in FEW}
    assert not any(line["failure"] for line in lines)


# --- processes --------------------------------------------------------------------------------------------------------


def worker(broken):
    """The command of a process in which some lines of Python come first."""
    return (sys.executable, "-c", f"{broken}\nimport sys, kvb.testing.__main__ as m\nsys.exit(m.main(sys.argv[1:]))")


def run(broken, *operators, **options):
    return testing.run([CPU], operators=operators, cases=NUMBERS, worker=worker(broken), **options)


ZEROS = "import torch; from kvb import reference; reference.gather = lambda *_: torch.zeros(1)"


def test_a_failure_is_printed_at_once_and_is_the_exit_status(capsys):
    assert not run(ZEROS, "gather", "count")
    lines = capsys.readouterr().out.splitlines()
    assert ["gather", "torch", "on", "cpu", "FAIL", "3", "of", "3"] in map(str.split, lines)
    first = next(line for line in lines if line.startswith("FAIL"))
    assert first.startswith("FAIL gather, torch on cpu, case 'plain': expected values torch.float32")
    assert any(line.startswith("count") and line.endswith("pass 3") for line in lines)
    assert lines[-1].endswith(": 3 failed")


CRASH = """
import os
from kvb.testing import checks
right, calls = checks.CHECKS["gather"], []
def crash(op, problem):
    if problem.case.name == "3 nearest":
        print("the driver says why", file=__import__("sys").stderr, flush=True)
        os._exit(7)
    right(op, problem)
checks.CHECKS["gather"] = crash
"""


def test_a_crash_costs_one_case(capsys):
    assert not run(CRASH, "gather", "count")
    said = capsys.readouterr().out
    for backend in {ops.backend("cpu"), "torch"}:
        message = (
            f"FAIL gather, {backend} on cpu, case '3 nearest': the process ended with status 7: the driver says why"
        )
        assert said.count(message) == 1
    assert "FAIL 1 of 3" in said
    assert sum(line.startswith("count") and "pass 3" in line for line in said.splitlines()) == len(
        {ops.backend("cpu"), "torch"}
    )


LOST = """
from kvb.testing import __main__ as process, checks
right, lost = checks.CHECKS["gather"], []
def stick(op, problem):
    if problem.case.name == "plain":
        lost.append(True)
    if lost:
        raise RuntimeError("an illegal memory access was encountered")
    right(op, problem)
checks.CHECKS["gather"] = stick
process.device_is_lost = lambda device: bool(lost)
"""


@pytest.mark.slow
def test_an_error_that_sticks_to_the_device_costs_one_case(capsys):
    assert not run(LOST, "gather")
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failures) == len({ops.backend("cpu"), "torch"})
    assert all("case 'plain': RuntimeError: an illegal memory access" in line for line in failures)


def test_a_process_that_does_not_start_fails_its_cases(capsys):
    assert not run("raise ImportError('no such library')", "count")
    said = capsys.readouterr().out
    assert "ImportError: no such library" in said
    assert "FAIL 3 of 3" in said


def test_what_is_printed_beside_the_results_does_no_harm():
    assert run("import os; os.write(1, b'')\nfrom kvb.testing import checks\n"
               "right = checks.CHECKS['count']\n"
               "checks.CHECKS['count'] = lambda op, problem: (print('compiling', flush=True), right(op, problem))",
               "count")  # fmt: skip


def test_nothing_is_lost_when_time_runs_out(capsys, tmp_path, monkeypatch):
    names = {ops.backend("cpu"), "torch"}
    found = tmp_path / "found.jsonl"

    def wait(futures, timeout):
        """Time runs out when every process has done its first case, and hangs in the second."""
        assert timeout == 5.0
        while found.read_text().count("\n") < len(names) and not any(future.done() for future in futures):
            time.sleep(0.05)

    monkeypatch.setattr(runner.concurrent.futures, "wait", wait)
    hanging = CRASH.replace("os._exit(7)", "__import__('time').sleep(600)")
    assert not run(hanging, "gather", seconds=5.0, json_lines=found)
    said = capsys.readouterr().out
    assert said.count("CUT after 1 of 3, 0 failed") == len(names)
    assert f"{2 * len(names)} did not run: no time left" in said
    assert [json.loads(line)["case"] for line in found.read_text().splitlines()] == ["plain"] * len(names)


def test_kernels_get_processes_of_their_own(monkeypatch):
    fast = testing.Backend("triton", CPU, types.SimpleNamespace(gather=None, count=None))
    monkeypatch.setattr(runner, "backends", lambda device: {"triton": fast})
    assert [len(job.steps) for job in runner.jobs([torch.device("cuda")], ops.NAMES, range(5))] == [3, 2, 3, 2]
    assert [len(job.steps) for job in runner.jobs([CPU], ops.NAMES, range(5))] == [5, 5]


def test_an_absent_device_is_named():
    with pytest.raises(SystemExit, match="must be one of the devices of this machine, cpu.*got 'tpu'"):
        __main__.main(["check", "--device", "tpu"])


def test_expected_results_are_computed_once():
    problem = testing.problem(CASE["plain"], CPU)
    assert expectations.exact(problem) is expectations.exact(problem)
    assert expectations.exact(dataclasses.replace(problem)) is not expectations.exact(problem)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_float64_additions_passes(seed):
    """One after the other, in a random order: the worst that a right backend may do."""

    def shuffled(grad, indices, K, pool):
        C = indices.shape[2]
        rows = grad if pool == "none" else grad[:, :, None].expand(-1, -1, C, -1)
        rows = rows / C if pool == "mean" else rows
        flat = (indices.long() + torch.arange(C) * K).flatten()
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
        out = grad.new_zeros(C * K, grad.shape[-1])
        for place in order.tolist():
            out[flat[place]] += rows.reshape(-1, grad.shape[-1])[place]
        return out.view(C, K, -1)

    case = dataclasses.replace(CASE["many queries"], dtype=torch.float64)
    backend = testing.Backend("shuffled", CPU, types.SimpleNamespace(gather_backward=shuffled))
    with torch.random.fork_rng():
        assert testing.verdict("gather_backward", backend, [case]).failures == []


def test_an_operator_without_a_kernel_runs_in_plain_pytorch(monkeypatch):
    monkeypatch.setattr(backends, "_kernels", lambda: types.SimpleNamespace(count=lambda *_: "the kernel's"))
    registered = {}
    library = types.SimpleNamespace(impl=lambda name, run, key: registered.setdefault(name, run))
    monkeypatch.setattr(backends, "_backends", {"cpu": ("triton", "")})
    plain = {name: getattr(reference, name) for name in ops.NAMES}
    backends.register_kernels(library, plain, lambda name, run: run)
    values, indices = torch.randn(2, 5, 3), torch.randint(5, (4, 1, 2))
    found = registered["gather"](values, indices, "none", "bscv")
    assert torch.equal(found, reference.gather(values, indices, "none", "bscv"))
    assert registered["count"]() == "the kernel's"
    assert backends.among(ops.NAMES, "cpu") == ("count",)
