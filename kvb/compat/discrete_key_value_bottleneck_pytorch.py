"""``discrete_key_value_bottleneck_pytorch`` 0.1.1: what goes in, what comes out, what is saved.

With more than one codebook, and unless ``codebook_dim=dim`` is given, the published class projects all heads together
with two linear maps of C·dim x C·C·dim numbers before and after the keys. So does this one, since the published files
hold them; ``kvb.DiscreteKeyValueBottleneck`` does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvb import functional, validation
from kvb.compat.quantize import VectorQuantize, adopted
from kvb.modules.outputs import Recall


class DiscreteKeyValueBottleneck(nn.Module):
    """The published class: embeddings [b, n, dim_embed] to memories [b, n, dim_memory].

    Keys learn on every forward in training mode, unless ``vq.eval()`` or ``freeze_codebook=True``.

    Args:
        dim: of the keys, and the default of the other two.
        num_memories: K.
        dim_embed: of the embeddings.
        num_memory_codebooks: C.
        encoder: makes the embeddings; put into eval mode by every forward, without gradients.
        dim_memory: of the memories.
        average_pool_memories: return the mean over codebooks.
        options: of ``VectorQuantize``.
    State:
        values [C, K, dim_memory], rand_proj [C, dim_embed, dim], vq.*
    Raises:
        TypeError, ValueError: a size that is no positive integer; an option that ``VectorQuantize`` does not have.
    """

    dim_embed: int
    __call__: Recall[tuple[Tensor, Tensor, Tensor]]
    vq: VectorQuantize
    values: nn.Parameter
    rand_proj: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_memories: int,
        dim_embed: int | None = None,
        num_memory_codebooks: int = 1,
        encoder: nn.Module | None = None,
        dim_memory: int | None = None,
        average_pool_memories: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        C = validation.positive_int("num_memory_codebooks", num_memory_codebooks)
        validation.positive_int("dim", dim)
        self.encoder = encoder
        self.dim_embed = validation.positive_int("dim_embed", dim if dim_embed is None else dim_embed)
        V = validation.positive_int("dim_memory", dim if dim_memory is None else dim_memory)
        self.vq = VectorQuantize(dim=dim * C, codebook_size=num_memories, heads=C, **options)
        self.values = nn.Parameter(torch.randn(C, num_memories, V))
        self.register_buffer("rand_proj", nn.init.xavier_normal_(torch.empty(C, self.dim_embed, dim)))
        self.average_pool_memories = average_pool_memories

    def forward(
        self,
        x: Any,
        return_intermediates: bool = False,
        average_pool_memories: bool | None = None,
        **encoder_arguments: Any,
    ) -> Any:
        """x [b, n, dim_embed], or what the encoder takes -> memories [b, n, V], or [b, C, n, V] if not pooled.

        Args:
            return_intermediates: return ``(memories, (quantized, indices, commit_loss))``, as ``VectorQuantize``.
            average_pool_memories: overrides the module's for this call.
            encoder_arguments: go to the encoder; ignored without one.
        Raises:
            TypeError: not a floating-point tensor. ValueError: not [b, n, dim_embed].
        """
        memories, intermediates = self._recall(x, average_pool_memories, encoder_arguments)
        return (memories, intermediates) if return_intermediates else memories

    def _recall(
        self, x: Any, average_pool_memories: bool | None, encoder_arguments: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        x = embedded(self.encoder, x, encoder_arguments)
        validation.floating(type(self).__name__, "x", x)
        validation.shape("x", x, "b n dim_embed", (None, None, self.dim_embed), "dim_embed defaults to dim")
        heads = torch.einsum("bnd,cde->bnce", x, self.rand_proj)
        intermediates = self.vq(heads.flatten(-2))
        indices = intermediates[1].view(heads.shape[:3])
        pooled = self.average_pool_memories if average_pool_memories is None else average_pool_memories
        memories = functional.gather(self.values, indices, pool="mean" if pooled else "none", layout="bcsv")
        return memories, intermediates

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle of the published class.

        Raises:
            ValueError: it is one of version 0.0.x.
        """
        if "random_project_embed" in state:
            raise ValueError(
                "this pickle holds a module of discrete-key-value-bottleneck-pytorch 0.0.x, which concatenates its "
                'memories: call kvb.compat.alias("published-0.0") before loading it'
            )
        super().__setstate__(state)
        self.dim_embed = self.rand_proj.shape[1]
        self.vq = adopted(VectorQuantize, self.vq)


def embedded(encoder: nn.Module | None, x: Any, arguments: dict[str, Any]) -> Any:
    """x, or what the encoder makes of it in eval mode and without gradients."""
    if encoder is None:
        return x
    encoder.eval()
    with torch.no_grad():
        return encoder(x, **arguments).detach()
