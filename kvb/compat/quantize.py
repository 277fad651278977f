"""The part of vector-quantize-pytorch 1.32.0 that the published ``DiscreteKeyValueBottleneck`` stands on.

One codebook a head, keys learned by moving averages; same state, same random initialisation, on kvb's operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvb import functional, validation
from kvb.modules import key_learning, streams

# Arguments of the published class that only do something else than here at values other than these.
FIXED: dict[str, Any] = {
    "separate_codebook_per_head": True,
    "sync_kmeans": True,
    "layernorm_after_project_in": False,
    "channel_last": True,
    "accept_image_fmap": False,
    "accept_3d_fmap": False,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "manual_ema_update": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "return_zeros_for_masked_padding": True,
    "route_gradients_to_input": True,
}


class Codebook(nn.Module):
    """C codebooks of K keys that learn from every batch in training mode, also those without a hit.

    With ``learnable`` the keys are a parameter instead, and learn from the gradients of the loss.

    State: initted [] bool, cluster_size [C, K], embed_avg and embed [C, K, D]. A state with initted [1] float, of
    vector-quantize-pytorch up to 1.21, loads too.
    """

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
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        use_cosine_sim: bool,
        ema_update: bool,
        sync: bool,
        learnable: bool,
    ) -> None:
        super().__init__()
        self.kmeans_iters = validation.positive_int("kmeans_iters", kmeans_iters)
        self.decay = 1.0 if decay == 1 else validation.number("decay", decay, 0.0, 1.0)
        self.eps = validation.number("eps", eps, 0.0, float("inf"), open_low=True)
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.use_cosine_sim = use_cosine_sim
        self.ema_update = ema_update
        self.sync = sync
        self.learnable = learnable
        keys = torch.zeros(C, K, D) if kmeans_init else nn.init.kaiming_uniform_(torch.empty(C, K, D))
        if use_cosine_sim:
            keys = _unit(keys)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(C, K))
        self.register_buffer("embed_avg", keys.clone())
        if learnable:
            self.embed = nn.Parameter(keys)
        else:
            self.register_buffer("embed", keys)
        self._waiting = kmeans_init  # the host's copy of ``initted``

    def forward(self, queries: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        """queries [b, n, C, D] float32 -> the nearest keys [b, n, C, D], indices [b, n, C]; no gradient for queries."""
        queries = queries.detach()
        if self._waiting:
            self._initialise(queries)
        indices, _ = functional.nearest(queries, self.embed.detach())
        found = functional.gather(self.embed, indices)
        if learn:
            self._learn(queries, indices)
        return found, indices

    @torch.no_grad()
    def _initialise(self, queries: Tensor) -> None:
        """k-means on the first batch, in every mode."""
        K = self.embed.shape[1]
        passes = key_learning.passes_needed("kmeans", self.kmeans_iters, 0)
        stream = streams.Stream(streams.cut(queries), _as_it_is, _as_it_is, passes=passes, progress=False)
        keys = key_learning.kmeans(stream, K, self.embed, iters=self.kmeans_iters, plus=False, generator=None)
        self.cluster_size.copy_(torch.ops.kvb.count(queries, functional.nearest(queries, keys)[0], K))
        self.embed_avg.copy_(keys * self.cluster_size[..., None])
        self.embed.copy_(_unit(keys) if self.use_cosine_sim else keys)
        self.initted.fill_(True)
        self._waiting = False

    @torch.no_grad()
    def _learn(self, queries: Tensor, indices: Tensor) -> None:
        if not self.ema_update and self.threshold_ema_dead_code <= 0:
            return
        statistics = torch.ops.kvb.accumulate(queries, indices, self.embed.shape[1])
        synced = key_learning.sync_statistics(*statistics) if self.sync else statistics
        state = (self.embed.detach(), self.embed_avg, self.cluster_size)
        threshold, at_once = self.threshold_ema_dead_code, self.ema_update and not self.use_cosine_sim
        # Without ema_update the statistics still tell which codes are dead.
        moved = (state if self.ema_update else (state[0].clone(), *state[1:])) + synced
        key_learning.update(
            *(*moved, queries),
            decay=self.decay,
            eps=self.eps,
            threshold=threshold if at_once else 0.0,
            start=threshold,
            rescale_all=True,
        )
        if self.ema_update and self.use_cosine_sim:
            self.embed.copy_(_unit(self.embed))
        if threshold > 0 and not at_once:
            key_learning.replace_dead(*state, queries, threshold=threshold, start=threshold)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        initted = state_dict.get(prefix + "initted")
        if isinstance(initted, Tensor) and initted.shape == (1,):
            state_dict[prefix + "initted"] = initted[0] != 0
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._waiting = not bool(self.initted)


class VectorQuantize(nn.Module):
    """Splits [b, n, dim] into heads, quantises each with its own codebook, and joins them again.

    With more than one head, and unless ``codebook_dim * heads == dim``, two linear maps stand around it: published so.

    State: project_in.*, project_out.* where there are any, _codebook.*.

    Args:
        dim, codebook_size, codebook_dim, heads, decay, eps, freeze_codebook, kmeans_init, kmeans_iters, use_cosine_sim,
            threshold_ema_dead_code, commitment_weight, rotation_trick, sync_codebook, ema_update, learnable_codebook:
            as published; ``sync_codebook=None`` looks at every step whether there is more than one process.
        others: the published arguments in ``FIXED``, at their default only.
    Raises:
        ValueError: one of ``FIXED`` at another value; ``learnable_codebook`` with moving averages or cosine
        similarity. TypeError: an unknown one.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for name, value in others.items():
            if name not in FIXED:
                raise TypeError(f"VectorQuantize() got an unexpected keyword argument {name!r}")
            if value != FIXED[name]:
                raise ValueError(
                    f"{name}={value!r} is not part of this replica, which has {name}={FIXED[name]!r} only; "
                    "vector-quantize-pytorch has it"
                )
        learnable = bool(learnable_codebook)
        ema_update = True if ema_update is None else ema_update
        if learnable and (ema_update or use_cosine_sim):
            raise ValueError("learnable_codebook=True needs ema_update=False and use_cosine_sim=False")
        self.dim = validation.positive_int("dim", dim)
        self.heads = validation.positive_int("heads", heads)
        self.codebook_size = validation.positive_int("codebook_size", codebook_size)
        codebook_dim = dim if codebook_dim is None else validation.positive_int("codebook_dim", codebook_dim)
        inner = codebook_dim * heads
        self.project_in = nn.Identity() if inner == dim else nn.Linear(dim, inner)
        self.project_out = nn.Identity() if inner == dim else nn.Linear(inner, dim)
        self.commitment_weight = commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.freeze_codebook = freeze_codebook
        self._codebook = Codebook(
            heads,
            codebook_size,
            codebook_dim,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
            ema_update=ema_update,
            sync=sync_codebook is not False,
            learnable=learnable,
        )

    @property
    def codebook(self) -> Tensor:
        """The keys [C, K, D]."""
        return self._codebook.embed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, n, dim] -> (quantized [b, n, dim], indices [b, n, C], or [b, n] for one head, commitment loss []).

        In training mode the loss is the mean squared distance times ``commitment_weight``, and x gets a gradient
        through both; in eval mode it is 0.
        """
        heads = self.project_in(x).float().unflatten(-1, (self.heads, -1))
        if self._codebook.use_cosine_sim:
            heads = _unit(heads)
        learn = self._codebook.training and not self.freeze_codebook
        quantized, indices = self._codebook(heads, learn=learn)
        loss = heads.new_zeros((), requires_grad=self.training)
        if self.training:
            if self.commitment_weight > 0:
                found = quantized.detach() if self.freeze_codebook else quantized
                loss = loss + F.mse_loss(found, heads) * self.commitment_weight
            if x.requires_grad:
                quantized = _rotated(heads, quantized) if self.rotation_trick else heads + (quantized - heads).detach()
        joined = self.project_out(quantized.to(x.dtype).flatten(-2))
        return joined, indices if self.heads > 1 else indices[..., 0], loss


def _as_it_is(queries: Tensor) -> Tensor:
    return queries


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-6)


def _rotated(source: Tensor, target: Tensor) -> Tensor:
    """``target``, with the gradient of the rotation and scaling that takes ``source`` there.

    Source: Fifty et al., Restructuring Vector Quantization with the Rotation Trick (arXiv:2410.06424), section 4.2.
    """
    long = source.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    target = target.detach()
    wide = target.norm(dim=-1, keepdim=True)
    start, end = source.detach() / long, target / wide.clamp(min=1e-6)
    middle = _unit(start + end)
    reflected = source - 2 * middle * (middle * source).sum(-1, keepdim=True)
    return (reflected + 2 * end * (start * source).sum(-1, keepdim=True)) * (wide / long)
