"""Gradient checkpointing: what runs again finds what it found before, and is observed once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kvb import BottleneckedEncoder, KeyValueBottleneck
from kvb.compat.key_value_bottleneck.core import KeyValueBottleneck as Replica

pytestmark = pytest.mark.fallback

BUFFERS = ("keys", "keys_avg", "cluster_size", "cluster_size_counter")


class Model(nn.Module):
    """Linear maps around a bottleneck: the last one's gradient needs the values that were fetched."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(6, 6)
        self.bottleneck = KeyValueBottleneck(2, 12, 3, 4, decay=0.1, **options)
        self.after = nn.Linear(4, 4)

    def forward(self, x):
        heads = self.before(x).unflatten(-1, (2, 3))
        found = self.bottleneck(heads)
        if isinstance(found, torch.Tensor):
            return self.after(found).square().mean()
        return self.after(found.values).square().mean() + found.distances.square().mean() + found.keys.mean() * 0


def trained(model, forward, batches, accumulate=1):
    """Gradients after each backward pass, and the buffers at the end."""
    grads = []
    for begin in range(0, len(batches), accumulate):
        losses = [forward(model, x) for x in batches[begin : begin + accumulate]]
        for loss in losses:
            loss.backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return grads, [getattr(model.bottleneck, name).clone() for name in BUFFERS]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 3},
        {"sample_codebook_temperature": 0.5},
        {"return_values_only": False},
        {"threshold_ema_dead_code": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_changes_nothing(options, reentrant, accumulate, frozen):
    batches = torch.randn(6, 20, 6).requires_grad_()
    plain, saving = Model(**options), Model(**options)
    if frozen:
        plain.bottleneck.freeze_keys(), saving.bottleneck.freeze_keys()
    torch.manual_seed(5)
    want = trained(plain, lambda model, x: model(x), batches, accumulate)
    torch.manual_seed(5)
    got = trained(saving, lambda model, x: checkpoint(model, x, use_reentrant=reentrant), batches, accumulate)
    for mine, theirs in zip(got[0], want[0], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    for one, other in zip(got[1], want[1], strict=True):
        assert torch.equal(one, other)
    assert (got[1][3].sum() == 0) != frozen


def test_a_graph_that_is_kept_runs_backward_twice():
    model, x = Model(), torch.randn(20, 6)
    loss = checkpoint(model, x, use_reentrant=False)
    loss.backward(retain_graph=True)
    first = model.after.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.after.weight.grad, 2 * first)


def test_a_bottleneck_used_twice_in_one_checkpoint():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 2, 3)

    def twice(module, x):
        return module(x[0]).square().sum() + module(x[1]).pow(3).sum() + module(x[0]).sum()

    grads = []
    for run in (lambda m: twice(m, x), lambda m: checkpoint(twice, m, x, use_reentrant=False)):
        torch.manual_seed(1)
        module = KeyValueBottleneck(2, 12, 3, 4, decay=0.1)
        run(module).backward()
        grads.append(module.values.grad)
    torch.testing.assert_close(*grads)


def test_what_cannot_be_told_apart_says_so():
    x = torch.randn(20, 6)
    for reentrant in (False, True):
        model = Model()
        losses = [checkpoint(model, x.requires_grad_(), use_reentrant=reentrant) for _ in range(2)]
        with pytest.raises(RuntimeError, match="2 checkpointed forwards with the same queries searched different keys"):
            sum(losses).backward()
    model = Model()
    for _ in range(3):
        checkpoint(model, x, use_reentrant=False)  # whose graph is gone
    checkpoint(model, x, use_reentrant=False).backward()


def test_checkpoint_sequential_and_encoders():
    grads = []
    for saving in (False, True):
        torch.manual_seed(1)
        encoder = BottleneckedEncoder(nn.Identity(), 6, 2, 12, 3, 4, decay=0.1)
        model = nn.Sequential(nn.Linear(6, 6), encoder, nn.Linear(4, 4), nn.Flatten())
        for _ in range(3):
            x = torch.randn(20, 6)
            out = checkpoint_sequential(model, 1, x, use_reentrant=False) if saving else model(x)
            out.square().sum().backward()
        grads.append((encoder.values.grad, encoder.keys))
    torch.testing.assert_close(*grads)


def test_the_replica():
    grads = []
    for saving in (False, True):
        torch.manual_seed(1)
        module = Replica(2, 12, 3, 4, decay=0.1)
        for _ in range(3):
            x = torch.randn(20, 2, 1, 3)
            out = checkpoint(lambda x, module=module: module(x)[0], x, use_reentrant=False) if saving else module(x)[0]
            out.square().sum().backward()
        grads.append((module.values.grad, module.keys))
    torch.testing.assert_close(*grads)


def test_without_a_checkpoint_nothing_is_remembered():
    model = Model()
    for _ in range(3):
        model(torch.randn(20, 6)).backward()
        with torch.no_grad():
            model(torch.randn(20, 6))
        with torch.autograd.graph.save_on_cpu():
            model(torch.randn(20, 6)).backward()
    assert not model.bottleneck._forwards._latest
    checkpoint(model, torch.randn(20, 6), use_reentrant=False).backward()
    assert not model.bottleneck._forwards._latest
    waiting = checkpoint(model, torch.randn(20, 6), use_reentrant=False)
    assert len(model.bottleneck._forwards._latest) == 1
    assert not copy.deepcopy(model.bottleneck)._forwards._latest
    waiting.backward()


def test_a_forward_in_a_backward_pass_that_is_no_recomputation_says_so():
    module, x = KeyValueBottleneck(2, 12, 3, 4), torch.randn(20, 2, 3)
    out = module(x)
    out.register_hook(lambda grad: module(torch.randn(20, 2, 3)) and None)
    with pytest.raises(RuntimeError, match="a forward in training mode ran within a backward pass while keys learn"):
        out.sum().backward()
    module.freeze_keys()
    out = module(x)
    counted = module.cluster_size_counter.clone()
    out.register_hook(lambda grad: torch.zeros_like(grad) + module(x).sum().detach() * 0)
    out.sum().backward()
    assert torch.equal(module.cluster_size_counter, counted)
