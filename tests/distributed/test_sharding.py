"""A table split over codebooks or over pairs gives what one process gives: indices bit for bit, sums to rounding."""

from __future__ import annotations

import pytest
import torch
from sharding_cases import CASES, GIANT, near, one_process, pair, queries, same_state, whole

from kvb.training import sgd_step

HALVES = range(0, len(CASES), 11)


def _looked_up(split, begin):
    """Every output of every way to look up, in 4 processes."""
    for number, case in list(enumerate(CASES if split == "codebooks" else GIANT))[begin : begin + 11]:
        alone, there = (each.eval() for each in pair(case, (4,), **{split: "table"}))
        x, what = queries(case), f"case {number}"
        wanted, found = alone(x), there(x)
        assert torch.equal(found.indices, wanted.indices), what
        assert found.distances.equal(wanted.distances) or wanted.distances.isnan().any(), what
        near(found.distances, wanted.distances, what)
        near(found.keys, wanted.keys, what)
        near(found.values, wanted.values, what)
        codes = there.encode(x, dtype="auto")
        assert torch.equal(codes, alone.encode(x, dtype="auto")), what
        for pool in ("none", "mean", "sum"):
            scale = case.C * case.options.get("topk", 1)
            near(
                there(x, pool=pool, return_values_only=True),
                alone(x, pool=pool, return_values_only=True),
                f"{what}, {pool}",
                scale=4 * scale,
            )
            near(there.decode(codes, pool), alone.decode(codes, pool), f"{what}, {pool}", scale=4 * scale)


@pytest.mark.parametrize("begin", HALVES)
@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_lookups_are_those_of_one_process(processes, split, begin):
    processes(4, _looked_up, split, begin)


# --- training ---------------------------------------------------------------------------------------------------------


def _trained(split, begin):
    """Gradients, plain steps, fused steps, moving keys and counted hits."""
    for number, case in list(enumerate(CASES if split == "codebooks" else GIANT))[begin : begin + 11]:
        alone, there = pair(case, (4,), **{split: "table"})
        x, what = queries(case), f"case {number}"
        for step in range(3):  # keys move
            with one_process():
                wanted = alone(x + step)
            near(there(x + step).distances, wanted.distances, f"{what}, step {step}", scale=30)
            same_state(there, alone, f"{what}, step {step}")
        for module in (alone, there):
            module.freeze_keys()
        with one_process():
            alone(x)
        there(x)
        same_state(there, alone, f"{what}, counted")
        near(there.fraction_of_unused_keys(), alone.fraction_of_unused_keys(), what)
        near(there.perplexity(), alone.perplexity(), what, scale=10)
        if case.options.get("sparse_grad"):
            continue
        codes = alone.encode(x)
        weight = torch.linspace(-1, 2, case.V, dtype=case.dtype)
        for module in (alone, there):
            voted = module.decode(codes, "mean") + module.eval()(x, return_values_only=True).mean(1)
            (voted * weight).sum().backward()
        near(whole(there.values.grad), alone.values.grad, f"{what}, gradient", scale=case.B + 1)
        for module in (alone, there):
            torch.nn.utils.clip_grad_norm_([module.values], 1.0)
            torch.optim.SGD([module.values], lr=0.3).step()
        near(whole(there.values), alone.values, f"{what}, stepped", scale=4)
        if case.V > 1 and case.options.get("topk", 1) == 1:
            _stepped(case, alone, there, codes, what)


def _stepped(case, alone, there, codes, what):
    targets = torch.arange(case.B) % case.V
    for _ in range(3):
        wanted = sgd_step(alone.values, codes, targets, max_norm=0.5)
        found = sgd_step(there.values, codes, targets, max_norm=0.5)
        for name in ("loss", "norm", "logits"):
            near(getattr(found, name), getattr(wanted, name), f"{what}, {name}", scale=10)
        near(whole(there.values), alone.values, f"{what}, fused step", scale=10)


@pytest.mark.parametrize("begin", HALVES)
@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_training_is_that_of_one_process(processes, split, begin):
    processes(4, _trained, split, begin)
