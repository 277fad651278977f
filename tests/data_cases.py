"""What operators are tried on: one problem of every size, one call of every operator, and data of every kind.

Data kinds take (n, C, K, D), and give queries [n, 1, C, D] and keys [C, K, D] in the default dtype.
"""

from __future__ import annotations

import torch

op = torch.ops.kvb

# B, S, C, K, D, V
SIZES = {
    "plain": (4, 3, 2, 20, 6, 5),
    "B=1": (1, 3, 2, 20, 6, 5),
    "S=1": (4, 1, 2, 20, 6, 5),
    "C=1": (4, 3, 1, 20, 6, 5),
    "K=1": (4, 3, 2, 1, 6, 5),
    "K<group": (4, 3, 2, 7, 6, 5),
    "K=group": (4, 3, 2, 16, 6, 5),
    "D=1": (4, 3, 2, 20, 1, 5),
    "D=20": (4, 3, 2, 20, 20, 5),
    "V=1": (4, 3, 2, 20, 6, 1),
    "B=0": (0, 3, 2, 20, 6, 5),
    "S=0": (4, 0, 2, 20, 6, 5),
}


def problem(sizes, dtype=torch.float32):
    B, S, C, K, D, V = sizes
    keys = torch.randn(C, K, D, dtype=dtype)
    return torch.randn(B, S, C, D, dtype=dtype), keys, op.pack_keys(keys), torch.randn(C, K, V, dtype=dtype)


def brute(queries, keys):
    return (queries[..., None, :].double() - keys.double()).square().sum(-1)


def arguments(sizes):
    """One call of every operator."""
    queries, keys, packed, values = problem(sizes)
    B, S, C, K, _, V = sizes
    indices = torch.randint(K, (B, S, C))
    return {
        "pack_keys": (keys,),
        "packed_matches": (keys, packed),
        "nearest": (queries, keys, packed, torch.rand(C, K) < 0.7, min(2, K)),
        "sample": (queries, keys, None, 0.5, torch.tensor(3)),
        "gather": (values.requires_grad_(), indices, "none", "bcsv"),
        "gather_backward": (torch.randn(B, S, V, requires_grad=True), indices, K, "mean"),
        "gather_backward_rows": (torch.randn(B, S, C, V), indices, K, "none"),
        "sgd_step_": (values.detach().clone(), indices, torch.randint(V, (B,)), 0.3, 1.0, 0.1),
        "tally_": (torch.zeros(C, K, V, dtype=torch.int32), indices, torch.randint(V, (B,)), None, False),
        "update_keys_": (
            *(
                keys.clone(),
                keys.clone(),
                torch.ones(C, K),
                *(part.float() for part in op.accumulate(queries, indices, K)),
            ),
            *(torch.randn(C, 3, keys.shape[2]), torch.tensor([0, 3] * C)[:C], 0.5, 1e-5, 0.8, 1.0, False),
        ),
        "accumulate": (queries, indices, K),
        "count": (queries, indices, K),
        "lookup": (queries, keys, packed, values, None, "mean"),
    }


# --- kinds of data ----------------------------------------------------------------------------------------------------


def normal(n, C, K, D):
    return torch.randn(n, 1, C, D), torch.randn(C, K, D)


def offset(n, C, K, D):
    return tuple(part + 100 for part in normal(n, C, K, D))


def duplicates(n, C, K, D):
    queries, keys = normal(n, C, K, D)
    return queries, keys[:, torch.randint(max(1, K // 2), (K,))]


def near_duplicates(n, C, K, D):
    """Keys that differ from one another in the last bits only."""
    queries, keys = normal(n, C, K, D)
    base = keys[:, torch.randint(max(1, K // 8), (K,))]
    bits = base.view(torch.int32) + torch.randint(-2, 3, base.shape, dtype=torch.int32)
    return queries, bits.view(torch.float32)


def lattice(n, C, K, D):
    """Small integers: nearly every query has ties, all of them exact."""
    return torch.randint(-2, 3, (n, 1, C, D)).float(), torch.randint(-2, 3, (C, K, D)).float()


def bisectors(n, C, K, D):
    """Queries half-way between two keys, up to rounding."""
    _, keys = normal(n, C, K, D)
    book = torch.arange(C)
    a, b = (keys[book, torch.randint(K, (n, C))] for _ in range(2))
    return ((a + b) / 2)[:, None], keys


def outliers(n, C, K, D):
    """Magnitudes from 1e-8 to 1e8 among the queries, and a far key."""
    queries, keys = normal(n, C, K, D)
    keys[:, 0] *= 1e4
    return queries * 10 ** torch.randint(-8, 9, (n, 1, C, 1)).float(), keys


def magnitudes(n, C, K, D):
    """Queries of all magnitudes and keys of one: 1e-300 to 1e300."""
    queries, keys = normal(n, C, K, D)
    scale = 10.0 ** torch.randint(-300, 301, (n, 1, C, 1)).to(queries.dtype)
    return queries * scale, keys * float(10.0 ** torch.randint(-300, 301, ()).double())


def scaled(factor):
    def make(n, C, K, D):
        return tuple(part * factor for part in normal(n, C, K, D))

    return make


def broken_queries(n, C, K, D):
    queries, keys = normal(n, C, K, D)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")])
    hit = torch.rand(queries.shape) < 0.1
    return torch.where(hit, bad[torch.randint(3, queries.shape)], queries), keys


def broken_keys(n, C, K, D):
    queries, keys = normal(n, C, K, D)
    keys[:, ::3, 0] = float("nan")
    keys[:, 1::5, -1] = float("inf")
    return queries, keys
