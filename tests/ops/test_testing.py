"""``python -m kvb check``: right backends pass, and a wrong one is found, named and turned into the exit status."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from kvb import __main__, ops, reference, testing

CPU = torch.device("cpu")
CASE = {case.name: case for case in testing.CASES}
FEW = (CASE["plain"], CASE["3 nearest"], CASE["queries with NaN and Inf"])


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
    "shrunk sums": ("accumulate", lambda found: (found[0], found[1] * 0.999), "sums of queries"),
    "values of other keys": ("lookup", lambda found: (found[0], next_index(found[::-1])[0]), ""),
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
    problem = testing._problem(case, CPU)
    assert problem.queries.shape == (case.B, case.S, case.C, case.D)
    assert problem.queries.stride(-1) == 1 or problem.queries.numel() == 0
    assert problem.queries.is_contiguous() == (case.strides == "contiguous")


def test_command_line_passes(monkeypatch, capsys):
    monkeypatch.setattr(testing, "CASES", FEW)
    monkeypatch.setattr(testing.run, "__defaults__", (FEW,))
    assert __main__.main(["check", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    for backend in {ops.backend("cpu"), "torch"}:
        assert f"{backend} on cpu" in table
    assert "FAIL" not in table


def test_command_line_names_the_first_failure(monkeypatch, capsys):
    monkeypatch.setattr(testing.run, "__defaults__", (FEW,))
    monkeypatch.setattr(reference, "gather", lambda *arguments: torch.zeros(1))
    assert __main__.main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["gather", "torch", "on", "cpu", "FAIL", "3", "of", "3"] for line in lines)
    assert lines[-1].startswith("first failure: gather, torch on cpu, case 'plain': expected values torch.float32")


def test_an_absent_device_is_named():
    with pytest.raises(SystemExit, match="must be one of the devices of this machine, cpu.*got 'tpu'"):
        __main__.main(["check", "--device", "tpu"])


def test_expected_results_are_computed_once():
    problem = testing._problem(CASE["plain"], CPU)
    assert problem.exact is problem.exact
    assert dataclasses.replace(problem).exact is not problem.exact
