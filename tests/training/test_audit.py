"""``audit``: which optimizers move rows without a gradient, why, and by how much."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from kvb import KeyValueBottleneck
from kvb.compat import discrete_key_value_bottleneck_pytorch
from kvb.optim import RowwiseAdagrad, RowwiseAdam, RowwiseSGD, audit

HARMLESS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p),
    "RowwiseSGD": lambda p: RowwiseSGD(p, weight_decay=0.1),
    "RowwiseAdagrad": lambda p: RowwiseAdagrad(p, weight_decay=0.1),
    "RowwiseAdam": lambda p: RowwiseAdam(p, weight_decay=0.1),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_audit_is_silent_about_optimizers_that_keep_rows(name):
    module = KeyValueBottleneck(2, 5, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audit(HARMLESS[name](list(module.parameters())), module) == []


def by_hand(kind, options, weight):
    """The drift that the finding promises: one number that learns for 20 steps and then waits for 200."""
    param = nn.Parameter(torch.tensor([weight]))
    optimizer = kind([param], **options)
    for step in range(220):
        if step == 20:
            learned, size = abs(param.item() - weight), abs(param.item())
            then = param.item()
        param.grad = torch.tensor([1.0 if step < 20 and weight == 0.0 else 0.0])
        optimizer.step()
    return abs(param.item() - then) / (learned if weight == 0.0 else size)


@pytest.mark.parametrize(
    ("kind", "options", "memory"),
    [
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}, "momentum"),
        (torch.optim.SGD, {"lr": 0.3, "weight_decay": 1e-4}, None),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 1e-3}, "momentum"),
        (torch.optim.Adam, {"lr": 1e-2}, "Adam's averages"),
        (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2}, "Adam's averages"),
        (torch.optim.AdamW, {"lr": 3e-2}, "Adam's averages"),
        (torch.optim.AdamW, {"lr": 3e-2, "fused": True}, "Adam's averages"),
        (torch.optim.AdamW, {"lr": 3e-2, "capturable": True}, "Adam's averages"),
        (torch.optim.NAdam, {}, "Adam's averages"),
        (torch.optim.RMSprop, {"momentum": 0.9}, "momentum"),
    ],
)
def test_audit_names_the_cause_and_the_drift(kind, options, memory):
    module = KeyValueBottleneck(2, 5, 3, 4)
    before = module.values.detach().clone()
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "memory": module})
    optimizer = kind(model.parameters(), **options)
    with pytest.warns(UserWarning, match="moves rows that are no longer fetched") as caught:
        findings = audit(optimizer, model)
    assert len(caught) == 1
    found = {finding.cause: finding for finding in findings}
    decay = optimizer.defaults.get("weight_decay", 0)
    assert set(found) == {cause for cause in (memory, "weight decay" if decay else None) if cause}
    run = {name: value for name, value in options.items() if name != "capturable"}
    if memory:
        plain = run | ({"weight_decay": 0.0} if decay else {})
        assert found[memory].drift == pytest.approx(by_hand(kind, plain, 0.0), rel=1e-3)
    if decay:
        assert found["weight decay"].drift == pytest.approx(by_hand(kind, run, 1.0), rel=0.02)
    for finding in findings:
        assert (finding.table, finding.optimizer) == ("memory.values", kind.__name__)
        assert f"{finding.drift:.2g}" in str(caught[0].message)
        assert finding.cause in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audit(optimizer, model) == findings  # warned once
    assert torch.equal(module.values, before)
    assert not optimizer.state


def test_audit_looks_at_the_group_of_the_table():
    module, net = KeyValueBottleneck(2, 5, 3, 4), nn.Linear(2, 2)
    model = nn.ModuleDict({"net": net, "memory": module})
    safe = {"params": module.parameters(), "momentum": 0.0}
    assert audit(torch.optim.SGD([{"params": net.parameters()}, safe], 0.1, momentum=0.9), model) == []
    assert audit(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), model) == []
    peer = discrete_key_value_bottleneck_pytorch.DiscreteKeyValueBottleneck(8, num_memories=5)
    (finding,) = audit(torch.optim.SGD(peer.parameters(), 0.1, momentum=0.9), peer, warn=False)
    assert finding.table == "values"


def test_audit_does_not_try_optimizers_that_it_does_not_know():
    class Mine(torch.optim.SGD):
        pass

    module = KeyValueBottleneck(2, 5, 3, 4)
    for optimizer in (Mine(module.parameters(), 0.1), torch.optim.LBFGS(module.parameters())):
        with pytest.warns(UserWarning, match="is unknown here and may move rows"):
            (finding,) = audit(optimizer, module)
        assert math.isnan(finding.drift)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got int"):
        audit(3, module)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        audit(torch.optim.SGD(module.parameters(), 0.1), 3)
