"""The published implementations of the same method, with kvb's keys and values in them.

They hold every distance, and a one-hot row for it, in memory at once: ``DISTANCES`` times B*S*C*K float32 numbers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.peers import need
from benchmarks.peers.peer import Peer
from benchmarks.shapes import FEW
from benchmarks.timing import Contestant

DISTANCES = 4.1  # as measured: distances, their negatives, and one-hot rows, int64 before they are float32
INSTALL = "discrete-key-value-bottleneck-pytorch vector-quantize-pytorch"


def _need_distances(what: str, N: int, keys: Tensor) -> None:
    need.memory(
        4.0 * DISTANCES * N * keys.shape[0] * keys.shape[1],
        f"{what}, which holds every distance {DISTANCES}×,",
        keys.device,
    )


def quantizer(keys: Tensor, N: int, decay: float = 0.8) -> nn.Module:
    """vector-quantize-pytorch for N positions [B, S, C*D], one head and one codebook of the given keys for each C."""
    package = need.package("vector_quantize_pytorch", "vector-quantize-pytorch")
    _need_distances("vector-quantize-pytorch", N, keys)
    C, K, D = keys.shape
    sizes = {"dim": C * D, "codebook_dim": D, "codebook_size": K, "heads": C}
    module = package.VectorQuantize(**sizes, separate_codebook_per_head=True, decay=decay).to(keys.device).eval()
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
    module = package.DiscreteKeyValueBottleneck(D, codebook_dim=D, **sizes).to(keys.device).eval()
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


def search(given: Any) -> Contestant:
    B, S, C, _ = given.queries.shape
    module = quantizer(given.keys, B * S).requires_grad_(False)
    flat = given.queries.flatten(2)
    return given.contestant(lambda: module(flat), lambda found: found[1].view(B, S, C))


def key_update(given: Any) -> Contestant:
    B, S, _, _ = given.queries.shape
    module = quantizer(given.keys, B * S, given.decay).requires_grad_(False).train()
    book, flat = module._codebook, given.queries.flatten(2).contiguous()
    return given.contestant(lambda: module(flat), book.embed.data, book.embed_avg.data, book.cluster_size.data)


def memories(given: Any) -> Contestant:
    B, S, C, _ = given.queries.shape
    module = discrete(given.projection, given.keys, given.values, B * S).requires_grad_(False)

    def run() -> tuple[Tensor, Tensor]:
        out, (_, found, _) = module(given.x, return_intermediates=True)
        return out, found.view(B, S, C)

    return given.contestant(run)


def training_step(given: Any) -> Contestant:
    (B, S, C, _), (K, V) = given.queries.shape, given.start.shape[1:]
    # The gradient of ``gather`` on memories that are expanded over the batch has the size of all of them.
    need.memory(1.1 * 4.0 * B * C * K * V, "the gradient of dkvb-pytorch, B*C*K*V numbers,")
    module = discrete(given.projection, given.keys, given.start, B * S).requires_grad_(False)

    def look_up() -> tuple[Tensor, Tensor]:
        out, (_, found, _) = module(given.x, return_intermediates=True)
        return out, found.view(B, S, C)

    return given.contestant(module.values, look_up)


def forward(given: Any) -> Contestant:
    B, S, C, _ = given.queries.shape
    module = authors(given.keys, given.values, B * S).requires_grad_(False)

    def run() -> tuple[Tensor, Tensor]:
        out, _, found = module(given.heads)[:3]
        return out, found.reshape(B, C, S).transpose(1, 2)

    return given.contestant(run)


PEERS = (
    Peer(
        "vector-quantize",
        "vector-quantize-pytorch",
        {"search": search, "key_update": key_update},
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        quick=False,
    ),
    Peer(
        "dkvb-pytorch",
        "discrete-key-value-bottleneck-pytorch",
        {"memories": memories, "training_step": training_step},
        "discrete_key_value_bottleneck_pytorch",
        INSTALL,
        shapes=(*FEW, "paper-256", "few-queries"),
    ),
    Peer("authors", "the authors' package", {"forward": forward}, "key_value_bottleneck.core"),
)
