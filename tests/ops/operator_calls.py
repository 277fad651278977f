"""One call of every operator, on the problems of ``kvb.testing`` that differ in their sizes alone, and are small."""

from __future__ import annotations

import torch

from kvb import testing

op = torch.ops.kvb

SIZES = {case.name: case for case in testing.CASES if case.name[1] == "=" and case.K * case.D <= 1000}
PLAIN = testing.Case("plain", B=4, S=3, C=2, K=20, D=6, V=5)


def problem(case):
    """Queries, keys, packed keys and values, other ones at every call."""
    queries = torch.randn(case.B, case.S, case.C, case.D, dtype=case.dtype)
    keys = torch.randn(case.C, case.K, case.D, dtype=case.dtype)
    return queries, keys, op.pack_keys(keys), torch.randn(case.C, case.K, case.V, dtype=case.dtype)


def brute(queries, keys):
    return (queries[..., None, :].double() - keys.double()).square().sum(-1)


def arguments(case):
    """One call of every operator."""
    queries, keys, packed, values = problem(case)
    B, S, C, K, V = case.B, case.S, case.C, case.K, case.V
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
        "rows_to_places": (torch.randint(C * K, (B,)), K),
        "places_to_rows": (torch.stack([torch.randint(C, (B,)), torch.randint(K, (B,))]), K),
        "clip_rows_": (torch.randn(K, V), torch.arange(K)[None], 0.3),
        "move_rows_": (values.detach().flatten(0, 1).clone(), torch.arange(K)[None], torch.randn(K, V), 0.3),
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
        "product_nearest": (
            queries.flatten(0, 2)[:, None].repeat(1, 2, 2),
            keys[[0, -1, -1, 0]].unflatten(0, (2, 2)),
            min(3, K),
        ),
        "gather_weighted": (values.detach()[0].requires_grad_(), indices.flatten(1), torch.randn(B, S * C)),
        "gather_dot": (values.detach()[0].requires_grad_(), indices.flatten(1), torch.randn(B, V)),
        "scatter_weighted_rows": (torch.randn(B, V), indices.flatten(1), torch.randn(B, S * C), K),
        "accumulate": (queries, indices, K),
        "count": (queries, indices, K),
        "lookup": (queries, keys, packed, values, None, "mean"),
    }
