"""The metrics against what the modules count, and against matrices worked out by hand."""

import pytest
import torch

import kvb

pytestmark = pytest.mark.integrations
pytest.importorskip("torchmetrics", reason="pip install 'kvb[integrations]'")
metrics = pytest.importorskip("kvb.integrations.torchmetrics")


def test_usage_is_that_of_the_module():
    module = kvb.KeyValueBottleneck(3, 40, 4, 5).freeze_keys().train()
    usage, perplexity = metrics.CodebookUsage(3, 40), metrics.Perplexity(3, 40)
    assert perplexity.compute() == 0
    for B in (7, 20):
        x = torch.randn(B, 3, 2, 4)
        mask = torch.rand(B, 2) < 0.7
        module(x, mask=mask)
        for metric in (usage, perplexity):
            metric.update(module.encode(x, mask=mask, dtype=torch.int16), mask)
    torch.testing.assert_close(usage.compute(), 1 - module.fraction_of_unused_keys())
    torch.testing.assert_close(perplexity.compute(), module.perplexity().mean())
    usage.reset()
    assert usage.compute() == 0


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "expected integer indices"),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, "expected indices of shape"),
        (torch.full((2, 3), 40), IndexError, r"expected indices in \[0, 40\), got 40 to 40"),
    ],
)
def test_what_is_no_codes(indices, error, message):
    with pytest.raises(error, match=message):
        metrics.CodebookUsage(3, 40).update(indices)


# After learning each of three tasks: of ten samples of a task, so many are right.
RIGHT = [[9], [6, 8], [7, 5, 10]]


def tell(metric, after=3):
    for learnt, row in enumerate(RIGHT[:after]):
        for task, right in enumerate(row):
            target = torch.full((10,), task)
            preds = torch.where(torch.arange(10) < right, target, -1)
            scores = torch.nn.functional.one_hot(preds % 5, 5).float()
            metric.update(*((scores, target) if task % 2 else (preds, target)), task=task, learnt=learnt)
    return metric


def test_average_incremental_accuracy():
    found = tell(metrics.AverageIncrementalAccuracy(3)).compute()
    torch.testing.assert_close(found, torch.tensor((0.9 + 0.7 + 22 / 30) / 3))
    torch.testing.assert_close(tell(metrics.AverageIncrementalAccuracy(3), 2).compute(), torch.tensor(0.8))


def test_forgetting():
    torch.testing.assert_close(tell(metrics.Forgetting(3)).compute(), torch.tensor((0.2 + 0.3) / 2))
    torch.testing.assert_close(tell(metrics.Forgetting(3), 2).compute(), torch.tensor(0.3))
    assert tell(metrics.Forgetting(3), 1).compute() == 0


def test_tasks_that_are_not_there():
    metric = metrics.Forgetting(3)
    with pytest.raises(ValueError, match=r"task must be in \[0, 3\), got 3"):
        metric.update(torch.zeros(2), torch.zeros(2), task=3, learnt=0)
    with pytest.raises(ValueError, match="expected preds of shape"):
        metric.update(torch.zeros(2), torch.zeros(3), task=0, learnt=0)
