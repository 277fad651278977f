"""The part of vector-quantize-pytorch 1.32.0 that the published ``DiscreteKeyValueBottleneck`` stands on.

One codebook per head, keys learned by moving averages; same state, same random initialisation, on kvb's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvb import functional, validation
from kvb.compat.codebook import Codebook, own_attributes, unit

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
_Module = TypeVar("_Module", bound=nn.Module)


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

    __call__: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dim: int
    heads: int
    codebook_size: int
    project_in: nn.Identity | nn.Linear
    project_out: nn.Identity | nn.Linear
    rotation_trick: bool

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
        for name in others.keys() - FIXED.keys():
            raise TypeError(f"VectorQuantize() got an unexpected keyword argument {name!r}")
        _require_fixed(others)
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
            sync_codebook=sync_codebook is not False,
            learnable_codebook=learnable,
        )

    @property
    def codebook(self) -> Tensor:
        """The keys [C, K, D]."""
        return self._codebook.embed

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, n, dim] -> (quantized [b, n, dim], indices [b, n, C], or [b, n] for one head, commitment loss []).

        One position per sample may go without its axis: x [b, dim]. In training mode the loss is the mean squared
        distance times ``commitment_weight``, and x gets a gradient through both; in eval mode it is 0.

        Args:
            mask: bool [b, n], True where a position counts. At the others quantized is 0 and the index -1, and they
                enter neither keys nor loss.
            lens: [b], the first so many positions of each sample count; instead of ``mask``.
            freeze_codebook: overrides the module's for this call.
        Raises:
            ValueError: both ``mask`` and ``lens``, or one of another shape.
        """
        counts = self._counts(x, mask, lens)
        heads = self.project_in(x[:, None] if x.dim() == 2 else x).float().unflatten(-1, (self.heads, -1))
        if self._codebook.use_cosine_sim:
            heads = unit(heads)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        quantized, indices = self._codebook(heads, learn=self._codebook.training and not frozen, mask=counts)
        loss = heads.new_zeros((), requires_grad=self.training)
        if self.training:
            if self.commitment_weight > 0:
                found, wanted = quantized.detach() if frozen else quantized, heads
                if counts is not None:
                    found, wanted = found[counts], wanted[counts]
                loss = loss + F.mse_loss(found, wanted) * self.commitment_weight
            if x.requires_grad:
                quantized = _rotated(heads, quantized) if self.rotation_trick else heads + (quantized - heads).detach()
        joined = self.project_out(quantized.to(x.dtype).flatten(-2))
        if counts is not None:
            joined, indices = joined.masked_fill(~counts[..., None], 0), indices.masked_fill(~counts[..., None], -1)
        if x.dim() == 2:
            joined, indices = joined[:, 0], indices[:, 0]
        return joined, indices if self.heads > 1 else indices[..., 0], loss

    def _counts(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        if mask is not None and lens is not None:
            raise ValueError("expected mask or lens, got both")
        if lens is not None:
            mask = torch.arange(x.shape[1], device=x.device) < lens[:, None]
        if mask is not None and (x.dim() != 3 or mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"expected a mask torch.bool (b, n) for x (b, n, dim) = {tuple(x.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        return mask

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The keys of indices [b, ..., C], joined: [b, ..., C*D]. For one head the indices have no axis C."""
        shape = indices.shape if self.heads > 1 else (*indices.shape, 1)
        keys = functional.gather(self._codebook.embed, indices.reshape(1, -1, self.heads))
        return keys.reshape(*shape[:-1], -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` in eval mode returns as quantized for these indices."""
        output: Tensor = self.project_out(self.get_codes_from_indices(indices))
        return output

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle of the published class, of any version.

        Raises:
            ValueError: it was made with one of ``FIXED`` at another value.
        """
        _require_fixed({name: state[name] for name in FIXED if name in state})
        super().__setstate__(own_attributes(lambda: VectorQuantize(1, 1), state))
        self._buffers.pop("zero", None)  # version 1.32 keeps one
        self._non_persistent_buffers_set.discard("zero")
        cosine = type(self._codebook).__name__ == "CosineSimCodebook"  # a class of its own up to version 1.27
        self._codebook = adopted(Codebook, self._codebook)
        self._codebook.use_cosine_sim |= cosine
        self.dim = getattr(self.project_in, "in_features", self.heads * self.codebook.shape[-1])


def adopted(kind: type[_Module], module: nn.Module) -> _Module:
    """The replica of a published module that came out of a pickle, where the package is installed."""
    if isinstance(module, kind):
        return module
    replica = kind.__new__(kind)
    replica.__setstate__(dict(vars(module)))
    return replica


def _require_fixed(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value != FIXED[name]:
            raise ValueError(
                f"{name}={value!r} is not part of this replica, which has {name}={FIXED[name]!r} only; "
                "vector-quantize-pytorch has it"
            )


def _rotated(source: Tensor, target: Tensor) -> Tensor:
    """``target``, with the gradient of the rotation and scaling that takes ``source`` there.

    Source: Fifty et al., Restructuring Vector Quantization with the Rotation Trick (arXiv:2410.06424), section 4.2.
    """
    long = source.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    target = target.detach()
    wide = target.norm(dim=-1, keepdim=True)
    start, end = source.detach() / long, target / wide.clamp(min=1e-6)
    middle = unit(start + end)
    reflected = source - 2 * middle * (middle * source).sum(-1, keepdim=True)
    return (reflected + 2 * end * (start * source).sum(-1, keepdim=True)) * (wide / long)
