"""Measures by a rehearsal what an optimizer does to rows of a value table that get no gradient."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvb.optim_groups import value_tables

BEFORE, AFTER = 20, 200  # steps of the rehearsal on one task, and then on another
_WIDTH = 8  # numbers in a rehearsed row
_UNKNOWN = float("nan")
# Common names for entries of an optimizer's state.
_MEMORIES = {
    "momentum_buffer": "momentum",
    "exp_avg": "Adam's averages",
    "exp_inf": "Adam's averages",
    "acc_delta": "Adadelta's averages",
}
_warned: weakref.WeakKeyDictionary[Any, set[Finding]] = weakref.WeakKeyDictionary()


class Finding(NamedTuple):
    """One reason why an optimizer moves rows of a value table that get no gradient.

    table: its name in the model. optimizer: the class. cause: "momentum", "weight decay", "Adam's averages" or the
    like. drift: how far 200 steps on other rows move a row, relative to what the row learned before (in 20 steps), or,
    for weight decay, to its size; NaN where the optimizer could not be tried.

    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> optimizer = torch.optim.SGD([bottleneck.values], lr=0.1, momentum=0.9)
        >>> [finding.cause for finding in kvb.optim.audit(optimizer, bottleneck, warn=False)]
        ['momentum']
    """

    table: str
    optimizer: str
    cause: str
    drift: float

    def __str__(self) -> str:
        if self.drift != self.drift:
            return f"{self.table}: {self.optimizer} is unknown here and may move rows that get no gradient"
        what = "its size" if self.cause == "weight decay" else f"what it learned in {BEFORE} steps"
        return (
            f"{self.table}: {self.cause} of {self.optimizer} moves a row by {self.drift:.2g} of {what} "
            f"during {AFTER} steps on other rows"
        )


def audit(optimizer: torch.optim.Optimizer, model: nn.Module, *, warn: bool = True) -> list[Finding]:
    """Find what in an optimizer moves rows that get no gradient: momentum, weight decay, averages like Adam's.

    Equivalent to training some rows of a small table for 20 steps with the optimizer's class and options, then others
    for 200, and looking at the former; neither ``optimizer`` nor ``model`` changes. Rows that move in this way are
    forgotten although nothing fetches them; ``kvb.optim.RowwiseSGD``, ``RowwiseAdagrad`` and ``RowwiseAdam`` keep them
    bit for bit.

    Args:
        optimizer: any ``torch.optim.Optimizer``; one from outside ``torch.optim`` and kvb is not tried.
        model: a module that holds ``KeyValueBottleneck``s. Tables that ``optimizer`` does not train are skipped.
        warn: issue one ``UserWarning`` with what was found; each finding of an optimizer only once.
    Returns:
        a list of ``Finding``s, empty where all is well.
    Raises:
        TypeError: not an optimizer, or not a module.
    Source: the measurement is ours; PyTorch considers the behaviour to be by design (pytorch #18404).
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> kvb.optim.audit(kvb.optim.RowwiseAdam([bottleneck.values]), bottleneck)
        []
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    findings: list[Finding] = []
    for name, table in value_tables(model).items():
        if id(table) in groups:
            findings += _judge(name, optimizer, groups[id(table)])
    warned = _warned.setdefault(optimizer, set())
    fresh = [finding for finding in findings if finding not in warned]
    if warn and fresh:
        warned.update(fresh)
        lines = "\n  ".join(map(str, fresh))
        warnings.warn(
            f"this optimizer moves rows that are no longer fetched, and so forgets what they learned:\n  {lines}\n"
            "use kvb.optim.RowwiseSGD, RowwiseAdagrad or RowwiseAdam, or SGD without momentum and weight decay",
            stacklevel=2,
        )
    return findings


def _judge(name: str, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Finding]:
    kind = type(optimizer)
    # An optimizer from elsewhere may keep its own parameters, which a rehearsal would move.
    if not kind.__module__.startswith(("torch.optim", "kvb.")) or kind is torch.optim.LBFGS:
        return [Finding(name, kind.__name__, "unknown", _UNKNOWN)]
    findings = []
    still = {**group, "weight_decay": 0.0} if "weight_decay" in group else group
    moved, shrunk, state = _rehearse(optimizer, still)
    if moved > 0 or shrunk > 0:
        cause = next((_MEMORIES[key] for key in _MEMORIES if isinstance(state.get(key), Tensor)), "other state")
        findings.append(Finding(name, kind.__name__, cause, max(moved, shrunk)))
    if group.get("weight_decay", 0.0):
        decayed = _rehearse(optimizer, group)[1]
        if decayed != shrunk:
            findings.append(Finding(name, kind.__name__, "weight decay", decayed))
    return findings


@torch.no_grad()
def _rehearse(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
    """Train rows of a small table: how far a row moves after its last gradient, relative to what it had learned;
    how far a row without any gradient moves meanwhile, relative to its size; and the optimizer's state."""
    table = torch.zeros(1, 3, _WIDTH)
    table[0, 2] = 1
    table.requires_grad_()
    # As a pickle restores it: the options, and nothing learned.
    copy = type(optimizer).__new__(type(optimizer))
    options = {**group, "params": [table]} | {name: False for name in ("capturable", "fused") if name in group}
    copy.__setstate__({"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": [options]})
    directions = torch.randn(3, _WIDTH, generator=torch.Generator().manual_seed(0))

    def train(row: int, steps: int) -> None:
        for _ in range(steps):
            if isinstance(optimizer, torch.optim.SparseAdam):
                places = torch.tensor([[0], [row]])
                table.grad = torch.sparse_coo_tensor(
                    places, directions[row : row + 1], table.shape, check_invariants=False, is_coalesced=True
                )
            else:
                table.grad = torch.zeros_like(table)
                table.grad[0, row] = directions[row]
            copy.step()

    train(0, BEFORE)
    before = table.detach().clone()
    train(1, AFTER)
    after = (table - before)[0].norm(dim=-1)
    learned = float(before[0, 0].norm())
    return float(after[0]) / learned if learned else 0.0, float(after[2] / before[0, 2].norm()), copy.state[table]
