"""Tables that are split over processes cannot grow, and say so; keys can be given to them."""

from __future__ import annotations

import pytest
import torch
from sharding_cases import mesh
from torch import nn

import kvb
from kvb.distributed import parallelize


def _refused(split):
    module = parallelize(kvb.KeyValueBottleneck(4, 8, 2, 3), mesh(2), **{split: "table"})
    values = module.values
    for method, size in (("expand_values", 5), ("expand_pairs", 9), ("expand_codebooks", 6)):
        with pytest.raises(NotImplementedError, match=rf"{method}\(\.\.\.\) needs whole tables"):
            getattr(module, method)(size)
    assert module.values is values
    optimizer = torch.optim.SGD([values], lr=0.1)
    with pytest.raises(NotImplementedError, match="old is split over processes"):
        kvb.optim.grow(optimizer, values, nn.Parameter(torch.zeros(4, 9, 3)))


def _given(split):
    keys = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(0))
    module = parallelize(kvb.KeyValueBottleneck(4, 8, 2, 3, init_values="zeros"), mesh(2), **{split: "table"})
    module.set_keys(keys)
    assert torch.equal(module.state_dict()["keys"].full_tensor(), keys)
    codes = module.eval().encode(keys.transpose(0, 1).contiguous())
    assert torch.equal(codes, torch.arange(8)[:, None].expand(8, 4))
    module.reset_parameters(torch.Generator().manual_seed(1))
    assert not module.values.full_tensor().any()
    module.train()(torch.randn(40, 4, 2))
    return module.perplexity().tolist(), module.usage().tolist()


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_split_tables_do_not_grow(processes, split):
    processes(2, _refused, split)


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_keys_are_given_to_split_tables(processes, split):
    first, second = processes(2, _given, split)
    assert first[0] == second[0]
    shares = torch.cat([torch.tensor(one[1]) for one in (first, second)], 0 if split == "codebooks" else 1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(4))
    assert all(1 < found <= 8 for found in first[0])
