"""Codebook voting."""

from __future__ import annotations

import pytest
import torch

from kvb.decoders import CodebookVoting


@pytest.mark.parametrize("shape", [(), (7,), (2, 4, 5)])
def test_the_mean_vote_is_the_logits(shape):
    values = torch.randn(3, 6, *shape, 10)
    want = torch.stack([sample.reshape(-1, 10).mean(0) for sample in values])
    torch.testing.assert_close(CodebookVoting(10)(values), want)


def test_nothing_learns():
    vote = CodebookVoting(10)
    assert list(vote.parameters()) == []
    assert list(vote.state_dict()) == []
    assert repr(vote) == "CodebookVoting(10 classes)"


def test_value_dim_must_be_the_classes():
    with pytest.raises(ValueError, match=r"\(B, C, \*shape, 10\), got \(3, 6, 9\).*dim_values equal to the number of"):
        CodebookVoting(10)(torch.randn(3, 6, 9))
    with pytest.raises(ValueError, match="expected values of shape"):
        CodebookVoting(10)(torch.randn(3, 10))
