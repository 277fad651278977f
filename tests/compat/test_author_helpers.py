"""The authors' splitters and helpers under their published names and signatures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kvb
from kvb.compat.key_value_bottleneck import core, splitters, utils

pytestmark = pytest.mark.fallback


@pytest.mark.parametrize("kind", ["RandomDownProjection", "LearnedDownProjection", "Chunker"])
def test_splitters_take_the_published_arguments(kind):
    splitter = getattr(splitters, kind)(4, 12, 3)
    again = getattr(splitters, kind)(num_codebooks=4, num_channels=12, dim_keys=3)
    assert isinstance(splitter, splitters.Splitter)
    assert getattr(core, kind) is type(splitter)
    again.load_state_dict(splitter.state_dict())
    for shape in ((2, 12), (2, 5, 12), (2, 5, 6, 12)):
        x = torch.randn(shape)
        heads = splitter(x)
        learned = kind == "LearnedDownProjection"  # published so: its positions are one axis, also where there is none
        assert heads.shape == (2, 4, *((x[0].numel() // 12,) if learned else shape[1:-1]), 3)
        assert torch.equal(again(x), heads)


def test_what_splitters_compute():
    x = torch.randn(2, 5, 12)
    random = splitters.RandomDownProjection(4, 12, 3)
    torch.testing.assert_close(random(x), torch.einsum("bnd,cdk->bcnk", x, random.rand_proj))
    torch.testing.assert_close(random.rand_proj.norm(dim=1), torch.ones(4, 3))
    learned = splitters.LearnedDownProjection(4, 12, 3)
    torch.testing.assert_close(learned(x), learned.proj(x).view(2, 5, 3, 4).permute(0, 3, 1, 2))
    torch.testing.assert_close(learned(x[:, 0]), learned(x[:, :1]))
    assert torch.equal(splitters.Chunker(4, 12)(x), x.view(2, 5, 4, 3).transpose(1, 2))
    assert splitters.Chunker(4, 12).dim_keys == 3
    with pytest.raises(ValueError, match="dim_keys must be num_channels / num_codebooks = 12 / 4 = 3"):
        splitters.Chunker(4, 12, 5)


def test_names_stand_where_they_are_published():
    for name in ("kmeans", "gumbel_sample", "ema_inplace", "laplace_smoothing", "sample_vectors"):
        assert getattr(core, name) is getattr(utils, name)
    assert not issubclass(kvb.splitters.Chunk, splitters.Splitter)


def test_gumbel_sample():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert utils.gumbel_sample(logits, temperature=0).tolist() == [[1]]
    assert utils.gumbel_sample(logits, temperature=0, topk=0).tolist() == [1]
    assert utils.gumbel_sample(logits, temperature=0, topk=3).tolist() == [[1, 3, 2]]
    drawn = utils.gumbel_sample(logits.expand(20_000, -1), temperature=2.0, topk=2)
    share = drawn[:, 0].bincount(minlength=4) / 20_000
    assert (share - (logits[0] / 2).softmax(-1)).abs().max() < 0.02
    assert (drawn[:, 0] != drawn[:, 1]).all()


def test_averages_and_counts():
    average = torch.tensor([1.0, 2.0])
    utils.ema_inplace(average, torch.tensor([3.0, 2.0]), 0.75)
    assert average.tolist() == [1.5, 2.0]
    counts = torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    torch.testing.assert_close(utils.laplace_smoothing(counts, 2, eps=1.0), (counts + 1) / torch.tensor([[5.0], [4.0]]))
    bins = utils.batched_bincount(torch.tensor([[0, 0, 2], [1, 2, 2]]), dim=-1, max_value=3)
    assert bins.tolist() == [[2, 0, 1], [0, 1, 2]]
    torch.testing.assert_close(utils.log(torch.zeros(1)), torch.tensor([1e-20]).log())


def test_kmeans():
    centres = torch.tensor([[[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]]).expand(2, -1, -1)
    samples = centres.repeat_interleave(50, 1) + torch.rand(2, 150, 2)
    samples[0, 0] = torch.nan
    torch.manual_seed(3)
    means, bins = utils.kmeans(samples, 6, num_iters=8)
    assert means.shape == (2, 6, 2)
    assert bins.sum(-1).tolist() == [149, 150]
    assert means.isfinite().all()
    gap = torch.cdist(samples[1:], means[1:])[0]
    assert torch.equal(gap.argmin(-1).bincount(minlength=6).sort().values, bins[1].sort().values)
    hit = F.one_hot(gap.argmin(-1), 6).float()
    used = bins[1] > 0
    torch.testing.assert_close((hit.T @ samples[1] / bins[1][:, None])[used], means[1][used], rtol=0, atol=1e-3)
