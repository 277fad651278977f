"""The published implementations of the same method, with kvb's keys and values in them.

They hold every distance, and a one-hot row for it, in memory at once: ``DISTANCES`` times B*S*C*K float32 numbers.
"""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.peers import need

DISTANCES = 4.1  # as measured: distances, their negatives, and one-hot rows, int64 before they are float32
INSTALL = "discrete-key-value-bottleneck-pytorch vector-quantize-pytorch"


def _need_distances(what: str, N: int, keys: Tensor) -> None:
    need.memory(
        4.0 * DISTANCES * N * keys.shape[0] * keys.shape[1], f"{what}, which holds every distance {DISTANCES}×,"
    )


def quantizer(keys: Tensor, N: int, decay: float = 0.8) -> nn.Module:
    """vector-quantize-pytorch for N positions [B, S, C*D], one head and one codebook of the given keys for each C."""
    package = need.package("vector_quantize_pytorch", "vector-quantize-pytorch")
    _need_distances("vector-quantize-pytorch", N, keys)
    C, K, D = keys.shape
    sizes = {"dim": C * D, "codebook_dim": D, "codebook_size": K, "heads": C}
    module = package.VectorQuantize(**sizes, separate_codebook_per_head=True, decay=decay).eval()
    module._codebook.embed.data.copy_(keys)
    return module


def discrete(projection: Tensor, keys: Tensor, values: Tensor, N: int) -> nn.Module:
    """discrete-key-value-bottleneck-pytorch for N embeddings [B, S, E], with ``codebook_dim=dim``.

    So it has no learned projections, and computes what ``kvb.DiscreteKeyValueBottleneck`` does.
    """
    package = need.package("discrete_key_value_bottleneck_pytorch", INSTALL)
    _need_distances("discrete-key-value-bottleneck-pytorch", N, keys)
    (C, K, D), V = keys.shape, values.shape[-1]
    sizes = {"dim_embed": projection.shape[1], "num_memories": K, "num_memory_codebooks": C, "dim_memory": V}
    module = package.DiscreteKeyValueBottleneck(D, codebook_dim=D, **sizes).eval()
    module.rand_proj.copy_(projection)
    module.vq._codebook.embed.data.copy_(keys)
    module.values.data.copy_(values)
    return module


def authors(keys: Tensor, values: Tensor, N: int) -> nn.Module:
    """The authors' ``KeyValueBottleneck``, frozen, which takes heads [B, C, S, D]. Their package is not on PyPI."""
    package = need.package("key_value_bottleneck.core", "")
    _need_distances("the authors' package", N, keys)
    (C, K, D), V = keys.shape, values.shape[-1]
    sizes = {"num_codebooks": C, "key_value_pairs_per_codebook": K, "dim_keys": D, "dim_values": V}
    module = package.KeyValueBottleneck(**sizes, return_values_only=False)
    module.keys.data.copy_(keys)
    module.values.data.copy_(values)
    module.freeze_keys()
    return module.eval()
