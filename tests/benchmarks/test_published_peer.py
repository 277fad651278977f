"""The replica against the package itself, where that is installed; same seed, same inputs, step by step.

``pip install discrete-key-value-bottleneck-pytorch==0.1.1 vector-quantize-pytorch==1.32.0``
"""

from __future__ import annotations

import pytest
import torch

import kvb
from kvb.compat import discrete_key_value_bottleneck_pytorch as replica

published = pytest.importorskip(
    "discrete_key_value_bottleneck_pytorch", reason="discrete-key-value-bottleneck-pytorch is not installed"
)
OPTIONS = [
    {},
    {"codebook_dim": 8},
    {"codebook_dim": 4, "decay": 0.99},
    {"num_memory_codebooks": 1},
    {"codebook_dim": 8, "use_cosine_sim": True},
    {"codebook_dim": 8, "rotation_trick": False, "commitment_weight": 0.25},
    {"codebook_dim": 8, "freeze_codebook": True},
    {"ema_update": False},
    {"learnable_codebook": True, "ema_update": False},
    {"learnable_codebook": True, "ema_update": False, "freeze_codebook": True},
]


def pair(options):
    sizes = {"dim": 8, "num_memories": 16, "dim_embed": 11, "num_memory_codebooks": 3, "dim_memory": 5}
    for package in (published, replica):
        torch.manual_seed(0)
        yield package.DiscreteKeyValueBottleneck(**{**sizes, **options})


def gradients(module, x, memories_weight, quantized_weight, pooled):
    x = x.clone().requires_grad_()
    module.zero_grad()
    memories, (quantized, indices, loss) = module(x, return_intermediates=True, average_pool_memories=pooled)
    ((memories * memories_weight).sum() + (quantized * quantized_weight).sum() + loss).backward()
    learned = {name: parameter.grad for name, parameter in module.named_parameters()}
    zeros = torch.zeros(())
    return indices, memories, quantized, loss, x.grad, {k: zeros if v is None else v for k, v in learned.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_by_step(options):
    theirs, ours = pair(options)
    start = theirs.state_dict()
    assert list(start) == list(ours.state_dict())
    assert all(torch.equal(value, start[name]) for name, value in ours.state_dict().items())
    books = theirs.values.shape[0]
    for step in range(5):
        x, pooled = torch.randn(2, 9, 11), bool(step % 2)
        weights = (torch.randn(2, 9, 5) if pooled else torch.randn(2, books, 9, 5), torch.randn(2, 9, 8 * books))
        want, got = (gradients(module, x, *weights, pooled) for module in (theirs, ours))
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1:5], want[1:5], rtol=1e-4, atol=1e-5)
        for name, gradient in got[5].items():
            torch.testing.assert_close(gradient, want[5][name].expand_as(gradient), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x, True), theirs.eval()(x, True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_checkpoints_go_there_and_back(options):
    theirs, other = next(pair(options)), next(pair(options))
    x = torch.randn(4, 9, 11)
    theirs(x)
    state = theirs.state_dict()
    module = kvb.compat.module_from(state)
    back = kvb.compat.to_published(module.state_dict(), "discrete_key_value_bottleneck_pytorch")
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in back.items())
    other.load_state_dict(back, strict=True)
    assert torch.equal(other.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(module.eval()(x), theirs(x))
