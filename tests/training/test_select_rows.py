"""Row selection for sparse finetuning: counts, the two measures, and rows that stay what they are."""

from __future__ import annotations

import math

import pytest
import torch

import kvb
from kvb.memory import ProductKeyMemory
from kvb.optim import RowCounts, keep_rows_, select_rows


def counted(K, *batches):
    found = RowCounts(K)
    for batch in batches:
        found.add(torch.tensor(batch))
    return found


def test_counts_written_by_hand():
    found = counted(5, [0, 0, 3], [3, 4], [3])
    assert found.counts.tolist() == [2, 0, 0, 3, 1]
    assert found.batches_with.tolist() == [1, 0, 0, 3, 1]
    assert found.batches == 3
    merged = counted(5, [1]).merge(found)
    assert merged.counts.tolist() == [2, 1, 0, 3, 1]
    assert merged.batches == 4
    copy = RowCounts(5)
    copy.load_state_dict(merged.state_dict())
    assert copy.counts.tolist() == merged.counts.tolist()
    assert copy.total().batches_with.tolist() == merged.batches_with.tolist()


def test_codes_of_a_bottleneck():
    bottleneck = kvb.KeyValueBottleneck(2, 4, dim_keys=3, dim_values=5)
    codes = torch.tensor([[[0, 1], [3, 3]]])  # [B = 1, C = 2, 2]
    found = RowCounts(*bottleneck.values.shape[:-1]).add(codes)
    assert found.counts.tolist() == [[1, 1, 0, 0], [0, 0, 0, 2]]
    assert select_rows(found, RowCounts(2, 4), 1).tolist() == [7]  # without a background: the one fetched most


def test_tfidf_written_by_hand():
    background = counted(4, [0, 1], [0], [0])
    new = counted(4, [0, 0, 0, 0, 1, 1, 2])
    scores = [4 / 7 * math.log(4 / 4), 2 / 7 * math.log(4 / 2), 1 / 7 * math.log(4 / 1)]
    assert scores[1] == pytest.approx(scores[2], rel=1e-12)  # equal: the row that was fetched more goes first
    assert select_rows(new, background, 1).tolist() == [1]
    assert select_rows(new, background, 2).tolist() == [1, 2]
    assert select_rows(new, background, 9).tolist() == [0, 1, 2]  # row 3 was never fetched


def test_kl_written_by_hand():
    background = counted(4, [0] * 5, [1])  # one more of each: 6, 2, 1, 1 of 10
    new = counted(4, [0] * 6, [1] * 2, [2] * 2)
    scores = [0.6 * math.log(0.6 / 0.6), 0.2 * math.log(0.2 / 0.2), 0.2 * math.log(0.2 / 0.1)]
    assert max(range(3), key=scores.__getitem__) == 2
    assert select_rows(new, background, 1, by="kl").tolist() == [2]


@pytest.mark.parametrize("sparse_grad", [True, False])
@pytest.mark.parametrize("optimizer", [kvb.optim.RowwiseSGD, kvb.optim.RowwiseAdam, kvb.optim.RowwiseAdagrad])
def test_rows_that_were_not_chosen_keep_all_bits(sparse_grad, optimizer):
    memory = ProductKeyMemory(8, 20, topk=4, heads=2, sparse_grad=sparse_grad)
    memory.counter = RowCounts(memory.num_pairs)
    learner = optimizer([memory.values], lr=0.1, rowwise=True)
    before = memory.values.detach().clone()
    memory(torch.randn(9, 8)).square().sum().backward()
    rows = select_rows(memory.counter, RowCounts(memory.num_pairs), 5)
    keep_rows_(memory.values, rows)
    learner.step()
    assert torch.equal((memory.values != before).any(-1).nonzero()[:, 0], rows)


@pytest.mark.parametrize("sparse_grad", [True, False])
def test_rows_of_a_bottleneck(sparse_grad):
    bottleneck = kvb.KeyValueBottleneck(2, 6, dim_keys=3, dim_values=5, sparse_grad=sparse_grad).freeze_keys()
    bottleneck(torch.randn(30, 2, 3)).sum().backward()
    keep_rows_(bottleneck.values, torch.tensor([1, 8]))
    grad = bottleneck.values.grad.to_dense().flatten(0, 1)
    assert set(grad.any(-1).nonzero()[:, 0].tolist()) <= {1, 8}


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "shape must be K, or C and K", lambda: RowCounts()),
        (TypeError, "expected integer indices", lambda: RowCounts(3).add(torch.zeros(2))),
        (IndexError, r"in \[0, 3\), got 0 to 3", lambda: counted(3, [0, 3])),
        (TypeError, "other must be a RowCounts", lambda: RowCounts(3).merge({})),
        (ValueError, r"expected counts \(3,\), got \(4,\)", lambda: RowCounts(3).merge(RowCounts(4))),
        (TypeError, "counts must be a kvb.optim.RowCounts", lambda: select_rows(torch.zeros(3), RowCounts(3), 1)),
        (ValueError, "a background of the same table", lambda: select_rows(RowCounts(3), RowCounts(4), 1)),
        (ValueError, "by must be one of 'tfidf', 'kl'", lambda: select_rows(RowCounts(3), RowCounts(3), 1, by="df")),
        (ValueError, "number must be", lambda: select_rows(RowCounts(3), RowCounts(3), 0)),
        (IndexError, r"rows must be in \[0, 3\)", lambda: keep_rows_(torch.zeros(3, 2), torch.tensor([3]))),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()
