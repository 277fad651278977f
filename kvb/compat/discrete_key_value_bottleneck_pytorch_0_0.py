"""``discrete_key_value_bottleneck_pytorch`` 0.0.8: one projection for all codebooks, memories concatenated.

Packages written for it, enformer-pytorch among them, do not run with 0.1.x. Its files hold a ``rand_proj`` of two axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvb import functional, validation
from kvb.compat.discrete_key_value_bottleneck_pytorch import embedded
from kvb.compat.quantize import VectorQuantize, adopted
from kvb.modules.outputs import Recall


class DiscreteKeyValueBottleneck(nn.Module):
    """The published class: embeddings [b, n, dim] to memories [b, n, C*dim_memory], the codebooks' one after the other.

    Keys learn on every forward in training mode, unless ``vq.eval()`` or ``freeze_codebook=True``. With more than one
    codebook, and unless ``codebook_dim=embed_dim // num_memory_codebooks`` is given, ``VectorQuantize`` adds two linear
    maps, as published.

    Args:
        dim: of the embeddings.
        num_memories: K.
        num_memory_codebooks: C.
        encoder: makes the embeddings; put into eval mode by every forward, without gradients.
        dim_memory: of the memories of one codebook; ``embed_dim / C`` by default.
        random_project_embed: project the embeddings to ``embed_dim`` with one fixed random matrix.
        embed_dim: what is quantised, a multiple of C; ``dim`` by default.
        options: of ``VectorQuantize``.
    State:
        values [C, K, dim_memory], vq.*, and with ``random_project_embed`` rand_proj [dim, embed_dim].
    Raises:
        TypeError, ValueError: a size that is no positive integer; C does not divide ``embed_dim``; an option that
        ``VectorQuantize`` does not have.
    """

    dim: int
    __call__: Recall[tuple[Tensor, Tensor, Tensor]]
    vq: VectorQuantize
    values: nn.Parameter
    rand_proj: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_memories: int,
        num_memory_codebooks: int = 1,
        encoder: nn.Module | None = None,
        dim_memory: int | None = None,
        random_project_embed: bool = True,
        embed_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        C = validation.positive_int("num_memory_codebooks", num_memory_codebooks)
        self.dim = validation.positive_int("dim", dim)
        embed_dim = validation.positive_int("embed_dim", dim if embed_dim is None else embed_dim)
        if embed_dim % C:
            raise ValueError(f"embed_dim ({embed_dim}) must be divisible by num_memory_codebooks ({C})")
        self.encoder = encoder
        V = validation.positive_int("dim_memory", embed_dim // C if dim_memory is None else dim_memory)
        self.vq = VectorQuantize(dim=embed_dim, codebook_size=num_memories, heads=C, **options)
        self.values = nn.Parameter(torch.randn(C, num_memories, V))
        self.random_project_embed = random_project_embed
        if random_project_embed:
            self.register_buffer("rand_proj", nn.init.xavier_normal_(torch.empty(dim, embed_dim)))

    def forward(self, x: Any, return_intermediates: bool = False, **encoder_arguments: Any) -> Any:
        """x [b, n, dim], or what the encoder takes -> memories [b, n, C*dim_memory].

        Args:
            return_intermediates: return ``(memories, (quantized, indices, commit_loss))``, as ``VectorQuantize``.
            encoder_arguments: go to the encoder; ignored without one.
        Raises:
            TypeError: not a floating-point tensor. ValueError: not [b, n, dim].
        """
        x = embedded(self.encoder, x, encoder_arguments)
        validation.floating(type(self).__name__, "x", x)
        validation.shape("x", x, "b n dim", (None, None, self.dim))
        intermediates = self.vq(x @ self.rand_proj if self.random_project_embed else x)
        indices = intermediates[1].view(*x.shape[:2], self.values.shape[0])
        memories = functional.gather(self.values, indices).flatten(-2)
        return (memories, intermediates) if return_intermediates else memories

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle of the published class.

        Raises:
            ValueError: it is one of version 0.1.x.
        """
        if "random_project_embed" not in state:
            raise ValueError(
                "this pickle holds a module of discrete-key-value-bottleneck-pytorch 0.1.x, which has a projection for "
                'each codebook: call kvb.compat.alias("published") before loading it'
            )
        super().__setstate__(state)
        self.vq = adopted(VectorQuantize, self.vq)
        self.dim = self.rand_proj.shape[0] if self.random_project_embed else self.vq.dim
