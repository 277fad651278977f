"""``key_value_bottleneck.utils``: the published helpers, on kvb's operators; from the same seed, the same draws."""

from __future__ import annotations

import torch
from torch import Tensor

from kvb.compat.clustering import lloyd

TINY = 1e-20  # what the published logarithms take for numbers that are smaller


def log(t: Tensor, eps: float = TINY) -> Tensor:
    """log(max(t, eps))."""
    return t.clamp(min=eps).log()


def gumbel_noise(t: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of t."""
    return -log(-log(torch.rand_like(t)))


def gumbel_sample(t: Tensor, temperature: float = 1.0, dim: int = -1, topk: int = 1) -> Tensor:
    """Indices of ``topk`` logits, drawn without replacement from softmax(t / temperature); the largest ones for 0.

    Args:
        t: logits [..., J]: negative squared distances, say.
        temperature: 0 draws nothing.
        dim: the axis of the J; the last one for ``topk`` > 0.
        topk: 0 gives one index and no axis for it.
    Returns:
        int64 [..., topk], or [...] for ``topk=0``.
    """
    noisy = t / temperature + gumbel_noise(t) if temperature != 0 else t
    if topk > 1:
        return noisy.topk(topk, dim=dim).indices
    best = noisy.argmax(dim)
    return best if topk == 0 else best[..., None]


def ema_inplace(moving_avg: Tensor, new: Tensor, decay: float) -> None:
    """moving_avg = decay * moving_avg + (1 - decay) * new."""
    with torch.no_grad():
        moving_avg.mul_(decay).add_(new, alpha=1 - decay)


def laplace_smoothing(x: Tensor, n_categories: int, eps: float = 1e-5) -> Tensor:
    """Shares of counts x [J] or [C, J], as if ``eps`` more had been counted in each of ``n_categories``."""
    counted = x.sum(-1, keepdim=True)
    return x.add(eps).div(counted.add(eps * n_categories))


def sample_vectors(samples: Tensor, num: int) -> Tensor:
    """``num`` rows of each codebook, with replacement: samples [C, N, D] -> [C, num, D]."""
    C, N, D = samples.shape
    drawn = torch.randint(N, (C, num), device=samples.device)
    return samples.gather(1, drawn[..., None].expand(-1, -1, D))


def batched_bincount(x: Tensor, dim: int, max_value: int) -> Tensor:
    """How often each of [0, max_value) stands in every row of x [C, N]: [C, max_value]."""
    counts = x.new_zeros(x.shape[0], max_value)
    return counts.scatter_add_(dim, x, x.new_ones(()).expand_as(x))


def kmeans(samples: Tensor, num_clusters: int, num_iters: int = 10) -> tuple[Tensor, Tensor]:
    """k-means of samples [C, N, D] from means drawn with replacement: means [C, J, D], and their samples [C, J].

    No differences of size C x N x J x D, which the published code makes, are ever in memory.
    """
    return lloyd(samples, sample_vectors(samples, num_clusters), num_iters)
