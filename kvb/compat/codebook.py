"""``vector_quantize_pytorch.Codebook`` 1.32.0 with one codebook per head: keys that learn from every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvb import collectives, functional, validation
from kvb.compat.clustering import lloyd
from kvb.modules import key_learning


class Codebook(nn.Module):
    """C codebooks of K keys that learn from every batch in training mode, also those without a hit.

    With ``learnable_codebook`` the keys are a parameter instead, and learn from the gradients of the loss. Which rows
    start k-means, and which replace dead codes, is drawn as in the published class: from the same seed, the same.

    State: initted [] bool, cluster_size [C, K], embed_avg and embed [C, K, D]. A state with initted [1] float, of
    vector-quantize-pytorch up to 1.21, loads too.
    """

    kmeans_iters: int
    decay: float
    eps: float
    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        C: int,
        K: int,
        D: int,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        use_cosine_sim: bool = False,
        ema_update: bool = True,
        sync_codebook: bool = True,
        learnable_codebook: bool = False,
    ) -> None:
        super().__init__()
        self.kmeans_iters = validation.positive_int("kmeans_iters", kmeans_iters)
        self.decay = 1.0 if decay == 1 else validation.number("decay", decay, 0.0, 1.0)
        self.eps = validation.number("eps", eps, 0.0, float("inf"), open_low=True)
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.use_cosine_sim = use_cosine_sim
        self.ema_update = ema_update
        self.sync_codebook = sync_codebook
        self.learnable_codebook = learnable_codebook
        keys = torch.zeros(C, K, D) if kmeans_init else nn.init.kaiming_uniform_(torch.empty(C, K, D))
        if use_cosine_sim:
            keys = unit(keys)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(C, K))
        self.register_buffer("embed_avg", keys.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(keys)
        else:
            self.register_buffer("embed", keys)
        self._waiting = kmeans_init  # the host's copy of ``initted``

    def forward(self, queries: Tensor, *, learn: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """queries [b, n, C, D] float32 -> the nearest keys [b, n, C, D], indices [b, n, C]; no gradient for queries.

        Keys learn from the positions where ``mask`` [b, n] is True.
        """
        queries = queries.detach()
        counting = queries if mask is None else queries[mask][None]
        if self._waiting:
            self._initialise(counting)
        indices, _ = functional.nearest(queries, self.embed.detach())
        found = functional.gather(self.embed, indices)
        if learn:
            self._learn(counting, indices if mask is None else indices[mask][None])
        return found, indices

    @torch.no_grad()
    def _initialise(self, queries: Tensor) -> None:
        """k-means on the first batch, in every mode."""
        samples = _by_codebook(queries)
        (_, N, _), K = samples.shape, self.embed.shape[1]
        if N == 0:
            return
        starts = [torch.randperm(N, device=queries.device)[:K] if N >= K else _any(N, K, queries) for _ in samples]
        means = torch.stack([rows[start] for rows, start in zip(samples, starts, strict=True)])
        means, bins = lloyd(samples, means, self.kmeans_iters, unit=self.use_cosine_sim)
        self.cluster_size.copy_(bins)
        self.embed_avg.copy_(means * self.cluster_size[..., None])
        total = self.cluster_size.sum(-1, keepdim=True)
        keys = self.embed_avg / ((self.cluster_size + self.eps) / (total + K * self.eps) * total)[..., None]
        self.embed.copy_(unit(keys) if self.use_cosine_sim else keys)
        self.initted.fill_(True)
        self._waiting = False

    @torch.no_grad()
    def _learn(self, queries: Tensor, indices: Tensor) -> None:
        if not self.ema_update and self.threshold_ema_dead_code <= 0:
            return
        hits, sums = torch.ops.kvb.accumulate(queries, indices, self.embed.shape[1])
        if self.sync_codebook:
            hits, sums = collectives.total((hits.to(sums.dtype), sums))
        keys = self.embed.detach()
        # Without ema_update the statistics still tell which codes are dead.
        moved = keys if self.ema_update else keys.clone()
        key_learning.update(
            moved,
            self.embed_avg,
            self.cluster_size,
            hits,
            sums,
            queries,
            decay=self.decay,
            eps=self.eps,
            threshold=0.0,
            rescale_all=True,
        )
        if self.ema_update and self.use_cosine_sim:
            keys.copy_(unit(keys))
        if self.threshold_ema_dead_code > 0:
            self._replace_dead(_by_codebook(queries))

    def _replace_dead(self, samples: Tensor) -> None:
        """Rows of samples [C, N, D], different ones, in place of dead codes; where N are too few, of some of them."""
        dead, N = self.cluster_size < self.threshold_ema_dead_code, samples.shape[1]
        if N == 0 or not dead.any():
            return
        for book, rows in enumerate(samples):
            places = dead[book].nonzero()[:, 0]
            if len(places) > N:
                places = places[torch.randperm(len(places), device=places.device)[:N]].sort().values
            fresh = rows[torch.randperm(N, device=places.device)[: len(places)]]
            usable = fresh.isfinite().all(-1)
            places, fresh = places[usable], fresh[usable]
            self.embed.detach()[book, places] = fresh
            self.cluster_size[book, places] = self.threshold_ema_dead_code
            self.embed_avg[book, places] = fresh * self.threshold_ema_dead_code

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        initted = state_dict.get(prefix + "initted")
        if isinstance(initted, Tensor) and initted.shape == (1,):
            state_dict[prefix + "initted"] = initted[0] != 0
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._waiting = not bool(self.initted)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle of the published class, of any version."""
        super().__setstate__(own_attributes(lambda: Codebook(1, 1, 1), state))
        self.initted = self.initted.reshape(-1)[0] != 0
        self._waiting = not bool(self.initted)


def own_attributes(example: Callable[[], nn.Module], state: dict[str, Any]) -> dict[str, Any]:
    """What a pickle of the published class and an example both have, and of the example what the pickle has not."""
    with torch.random.fork_rng(devices=[]):
        own = vars(example())
    return {**own, **{name: value for name, value in state.items() if name in own}}


def unit(x: Tensor) -> Tensor:
    """x with a last axis of length 1."""
    return F.normalize(x, dim=-1, eps=1e-6)


def _any(N: int, K: int, like: Tensor) -> Tensor:
    return torch.randint(N, (K,), device=like.device)


def _by_codebook(queries: Tensor) -> Tensor:
    """[b, n, C, D] -> [C, b*n, D]."""
    return queries.flatten(0, 1).transpose(0, 1)
