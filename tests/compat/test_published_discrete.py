"""discrete_key_value_bottleneck_pytorch, alone and behind a config: its own numbers, its contract, its versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kvb.compat import discrete_key_value_bottleneck as configured
from kvb.compat import discrete_key_value_bottleneck_pytorch as lucidrains

pytestmark = pytest.mark.fallback

GOLDEN = torch.load(Path(__file__).parents[1] / "data" / "golden.pt", weights_only=True)


# --- lucidrains 0.1.1, alone and behind a config ----------------------------------------------------------------------


CASES = ["lucidrains_codebook_dim", "lucidrains_default_projections", "lucidrains_one_codebook", "config_readme"]


def discrete(name, **options):
    state = GOLDEN[name]["state"]
    C, K, V = state["values"].shape
    E, D = state["rand_proj"].shape[1:]
    sizes = {"num_memories": K, "num_memory_codebooks": C, "dim_embed": E, "dim_memory": V}
    options |= {"codebook_dim": D} if "codebook_dim" in name else {}
    if name.startswith("config"):  # with the published decay, .8
        config = configured.DiscreteKeyValueBottleneckConfig(dim=D, **sizes)
        module = configured.DiscreteKeyValueBottleneck(config, **options)
    else:
        module = lucidrains.DiscreteKeyValueBottleneck(D, **sizes, decay=0.9, **options)
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("name", CASES)
def test_discrete(name):
    case, module = GOLDEN[name], discrete(name)
    memories, (quantized, indices, commit_loss) = module.eval()(case["x"], return_intermediates=True)
    torch.testing.assert_close(memories, case["memories"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantized, case["quantized"], rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, case["indices"])
    torch.testing.assert_close(commit_loss, case["commit_loss"])
    assert torch.equal(module(case["x"], average_pool_memories=False), case["memories_not_pooled"])
    module.train()
    for step in case["train_steps"]:
        torch.testing.assert_close(module(step["x"]), step["memories"], rtol=1e-5, atol=1e-5)
        codebook = module.vq._codebook
        for part in ("embed", "embed_avg", "cluster_size"):
            torch.testing.assert_close(getattr(codebook, part), step[part], rtol=1e-6, atol=1e-6)


def test_discrete_keys_stay_where_the_published_ways_freeze_them():
    x = torch.randn(2, 6, 8)
    for module in (discrete(CASES[0]), discrete(CASES[0], freeze_codebook=True)):
        if not module.vq.freeze_codebook:
            module.vq.eval()
        before = module.vq.codebook.clone()
        module(x)
        assert torch.equal(module.vq.codebook, before)
        module.vq.train().freeze_codebook = False
        module(x)
        assert not torch.equal(module.vq.codebook, before)


def test_discrete_kmeans_starts_from_the_first_batch():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, kmeans_init=True, kmeans_iters=5).eval()
    assert not module.vq._codebook.initted
    assert not module.vq.codebook.any()
    module(torch.randn(50, 6, 4))
    codebook = module.vq._codebook
    assert codebook.initted
    assert codebook.cluster_size.sum() == 300
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * codebook.cluster_size[..., None])


def test_discrete_replaces_dead_codes():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, threshold_ema_dead_code=50)
    module(torch.randn(5, 6, 4))
    assert (module.vq._codebook.cluster_size == 50).all()


def test_discrete_keys_learn_from_the_loss_instead():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, learnable_codebook=True, ema_update=False)
    assert [name for name, _ in module.vq.named_parameters()] == ["_codebook.embed"]
    x = torch.randn(5, 6, 4)
    _, (_, indices, loss) = module(x, return_intermediates=True)
    before = module.vq.codebook.detach().clone()
    loss.backward()
    assert torch.equal(module.vq.codebook, before)
    hit = module.vq.codebook.grad.abs().sum(-1)[0] > 0
    assert torch.equal(hit.nonzero()[:, 0], indices.unique())


def test_discrete_without_moving_averages_still_replaces_dead_codes():
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, ema_update=False, threshold_ema_dead_code=0.9)
    x = torch.randn(5, 1, 4)
    before = module.vq.codebook.clone()
    indices = module(x, return_intermediates=True)[1][1]
    kept = torch.zeros(9, dtype=torch.bool).scatter(0, indices.flatten(), True)
    assert torch.equal((module.vq.codebook == before).all(-1)[0], kept)


def test_discrete_gradients_through_the_quantised_output():
    """The rotation trick: as a rotation keeps lengths, so does the gradient, up to the keys' and queries' lengths."""
    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, commitment_weight=0.0)
    x = torch.randn(5, 6, 4)
    heads = torch.einsum("bnd,de->bne", x, module.rand_proj[0]).requires_grad_()
    quantized, _, loss = module.vq(heads)
    assert loss == 0
    upstream = torch.randn_like(quantized)
    quantized.backward(upstream)
    scale = quantized.detach().norm(dim=-1) / heads.detach().norm(dim=-1)
    torch.testing.assert_close(heads.grad.norm(dim=-1), upstream.norm(dim=-1) * scale, rtol=1e-4, atol=1e-6)
    straight = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, commitment_weight=0.0, rotation_trick=False)
    heads.grad = None
    straight.vq(heads)[0].backward(upstream)
    assert torch.equal(heads.grad, upstream)


def test_discrete_with_an_encoder_and_its_arguments():
    class Encoder(nn.Linear):
        def forward(self, x, shift):
            return super().forward(x) + shift

    module = lucidrains.DiscreteKeyValueBottleneck(4, num_memories=9, encoder=Encoder(3, 4))
    module(torch.randn(5, 6, 3), shift=1.0).sum().backward()
    assert not module.encoder.training
    assert module.encoder.weight.grad is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stochastic_sample_codes": True}, ValueError, "stochastic_sample_codes=True is not part of this replica"),
        ({"learnable_codebook": True}, ValueError, "learnable_codebook=True needs ema_update=False"),
        ({"typo": 1}, TypeError, "unexpected keyword argument 'typo'"),
        ({"num_memory_codebooks": 0}, ValueError, "num_memory_codebooks must be a positive integer, got 0"),
    ],
)
def test_discrete_bad_parameters(options, error, message):
    with pytest.raises(error, match=message):
        lucidrains.DiscreteKeyValueBottleneck(4, **{"num_memories": 9, **options})


def test_discrete_bad_inputs():
    with pytest.raises(ValueError, match=r"expected x of shape \(b, n, dim_embed\) = \(b, n, 8\), got \(2, 8\)"):
        discrete(CASES[0])(torch.randn(2, 8))
    with pytest.raises(ValueError, match="dim: Value must be positive, got 0"):
        configured.DiscreteKeyValueBottleneckConfig(dim=0, num_memories=1)
