"""An optimizer follows a table that grows: the old part moves as if nothing had grown."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kvb
from kvb.optim import RowwiseAdagrad, RowwiseAdam, RowwiseSGD, grow

pytestmark = pytest.mark.fallback

C, K, V = 2, 6, 3
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "AMSGrad": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5),
    "RowwiseSGD": lambda params: RowwiseSGD(params, lr=0.1),
    "RowwiseAdagrad": lambda params: RowwiseAdagrad(params, lr=0.1, initial_accumulator_value=0.5),
    "RowwiseAdam": lambda params: RowwiseAdam(params, lr=0.1, weight_decay=0.01),
}
BY_TABLE = "Adam", "AMSGrad", "NAdam"  # which count the steps of a whole table
GROWTHS = {
    "expand_values": (C, K, V + 2),
    "expand_pairs": (C, K + 3, V),
    "expand_codebooks": (C + 1, K, V),
}


def module():
    return kvb.KeyValueBottleneck(C, K, 4, V).freeze_keys()


def gradient(shape, step, *, sparse=False):
    """The same numbers at the same places, whatever the shape; every other row of pairs has none."""
    whole = torch.randn(C + 1, K + 3, V + 2, generator=torch.Generator().manual_seed(step))
    whole[:, step % 2 :: 2] = 0
    grad = whole[tuple(map(slice, shape))].clone()
    return grad.to_sparse(2) if sparse else grad


def train(optimizer, table, steps, *, sparse=False):
    for step in steps:
        table.grad = gradient(table.shape, step, sparse=sparse)
        optimizer.step()


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_old_part_moves_as_if_nothing_had_grown(name, growth):
    here = module()
    other = nn.Parameter(torch.zeros(2))
    alone = nn.Parameter(here.values.detach().clone())
    optimizer, reference = OPTIMIZERS[name]([other, here.values]), OPTIMIZERS[name]([alone])
    train(optimizer, here.values, range(5))
    train(reference, alone, range(5))
    old, shape = here.values, GROWTHS[growth]
    getattr(here, growth)(*(new for new, size in zip(shape, (C, K, V), strict=True) if new != size))
    grow(optimizer, old, here.values)
    assert optimizer.param_groups[0]["params"][0] is other
    assert optimizer.param_groups[0]["params"][1] is here.values
    assert old not in optimizer.state
    train(optimizer, here.values, range(5, 9))
    train(reference, alone, range(5, 9))
    corner = here.values[:C, :K, :V]
    assert torch.equal(corner, alone)
    assert here.values.shape == shape


@pytest.mark.parametrize("growth", ["expand_pairs", "expand_codebooks"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in BY_TABLE])
def test_new_rows_move_as_those_of_a_new_optimizer(name, growth):
    here = module()
    optimizer = OPTIMIZERS[name]([here.values])
    train(optimizer, here.values, range(5))
    old = here.values
    getattr(here, growth)({"expand_pairs": K + 3, "expand_codebooks": C + 1}[growth])
    new = (slice(None), slice(K, None)) if growth == "expand_pairs" else (slice(C, None),)
    fresh = nn.Parameter(here.values.detach().clone())
    reference = OPTIMIZERS[name]([fresh])
    grow(optimizer, old, here.values)
    train(optimizer, here.values, range(5, 9))
    train(reference, fresh, range(5, 9))
    assert torch.equal(here.values[new], fresh[new])


@pytest.mark.parametrize("name", ["momentum", "RowwiseSGD", "RowwiseAdagrad", "RowwiseAdam"])
@pytest.mark.parametrize("growth", GROWTHS)
def test_with_sparse_gradients(name, growth):
    build = OPTIMIZERS[name] if name != "momentum" else lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
    here = module()
    alone = nn.Parameter(here.values.detach().clone())
    optimizer, reference = build([here.values]), build([alone])
    train(optimizer, here.values, range(4), sparse=True)
    train(reference, alone, range(4), sparse=True)
    old, shape = here.values, GROWTHS[growth]
    getattr(here, growth)(*(new for new, size in zip(shape, (C, K, V), strict=True) if new != size))
    grow(optimizer, old, here.values)
    train(optimizer, here.values, range(4, 8), sparse=True)
    train(reference, alone, range(4, 8), sparse=True)
    torch.testing.assert_close(here.values[:C, :K, :V], alone, rtol=0, atol=0)


def test_the_state_in_plain_pytorch():
    here = module()
    optimizer = RowwiseAdam([here.values], lr=0.1)
    train(optimizer, here.values, range(3))
    old, before = here.values, {name: kept.clone() for name, kept in optimizer.state[here.values].items()}
    here.expand_values(V + 2).expand_pairs(K + 3)
    grow(optimizer, old, here.values)
    state = optimizer.state[here.values]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    pad = nn.functional.pad
    assert torch.equal(state["step"], pad(before["step"], (0, 0, 0, 3)))
    assert state["step"].dtype == torch.int32
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], pad(before[name], (0, 2, 0, 3)))


def test_steps_of_rows_with_one_number():
    table, wide = nn.Parameter(torch.zeros(1, 4, 1)), nn.Parameter(torch.zeros(1, 4, 5))
    optimizer = RowwiseAdam([table], lr=0.1)
    table.grad = torch.ones(1, 4, 1)
    optimizer.step()
    grow(optimizer, table, wide)
    assert optimizer.state[wide]["step"].tolist() == [[[1], [1], [1], [1]]]
    assert optimizer.state[wide]["exp_avg"].shape == (1, 4, 5)


def test_a_checkpoint_of_a_grown_optimizer(tmp_path):
    here = module()
    optimizer = RowwiseAdam([here.values], lr=0.1)
    train(optimizer, here.values, range(3))
    old = here.values
    grow(optimizer, old, here.expand_values(V + 2).values)
    torch.save((here.state_dict(), optimizer.state_dict()), tmp_path / "both.pt")
    other = kvb.KeyValueBottleneck(C, K, 4, V + 2)
    again = RowwiseAdam([other.values], lr=0.1)
    states = torch.load(tmp_path / "both.pt")
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    train(optimizer, here.values, range(3, 6))
    train(again, other.values, range(3, 6))
    assert torch.equal(other.values, here.values)


def test_before_the_first_step_there_is_no_state():
    here = module()
    optimizer = torch.optim.Adam([here.values], lr=0.1)
    old = here.values
    grow(optimizer, old, here.expand_pairs(K + 1).values)
    assert not optimizer.state
    train(optimizer, here.values, range(2))


def test_what_cannot_follow_changes_nothing():
    table, small = nn.Parameter(torch.zeros(C, K, V)), nn.Parameter(torch.zeros(C, K, V - 1))
    optimizer = torch.optim.Adafactor([table]) if hasattr(torch.optim, "Adafactor") else None
    plain = torch.optim.SGD([table], lr=0.1, momentum=0.9)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        grow([], table, table)
    with pytest.raises(TypeError, match="new must be a parameter, got int"):
        grow(plain, table, 3)
    with pytest.raises(ValueError, match=r"expected new to be like old, .* and larger; got torch.float32 \(2, 6, 2\)"):
        grow(plain, table, small)
    with pytest.raises(ValueError, match="and larger; got torch.float64"):
        grow(plain, table, nn.Parameter(table.detach().double()))
    with pytest.raises(ValueError, match="it trains no such tensor"):
        grow(plain, small, table)
    with pytest.raises(ValueError, match="no parameter of the optimizer yet"):
        grow(plain, table, table)
    if optimizer is not None:
        table.grad = torch.ones_like(table)
        optimizer.step()
        before = copy.copy(optimizer.state[table])
        wide = nn.Parameter(torch.zeros(C, K, V + 1))
        optimizer.state[table]["strange"] = torch.zeros(7)
        with pytest.raises(
            ValueError, match=r"Adafactor keeps 'strange' of shape \(7,\), which is not like \(2, 6, 3\)"
        ):
            grow(optimizer, table, wide)
        assert set(before) < set(optimizer.state[table])
        assert optimizer.param_groups[0]["params"][0] is table
