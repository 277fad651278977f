"""Domain-incremental learning: every task has all classes, and only they are told; images that are turned."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kvb.experiments import Examples, Head, NearestMeanHead, domains, learn, protocol

V, CHANNELS = 6, 12
RECIPE = protocol.Recipe(
    **{"codebooks": 5, "pairs": 16, "dim_keys": 4, "key_init": "sample", "key_steps": 3, "epochs": 3},
    **{"batch_size": 16, "rates": (0.1, 1.0), "hidden": 8, "projected": 32},
)
CENTRES = 2 * torch.randn(V, CHANNELS, generator=torch.Generator().manual_seed(0))


def blobs(each, seed):
    labels = torch.arange(V).repeat_interleave(each)
    noise = torch.randn(len(labels), CHANNELS, generator=torch.Generator().manual_seed(seed))
    return Examples(CENTRES[labels] + 0.3 * noise, labels)


DATA = protocol.normalised(protocol.Data(blobs(20, 3).features, blobs(25, 1), blobs(10, 2)))
TASKS = tuple(torch.arange(V).split(2))
train = partial(learn, train=DATA.train, test=DATA.test, tasks=TASKS, rate=0.3, budget=RECIPE.budget, seed=0)


class Spy(Head):
    """Remembers the labels of every batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def step(self, prepared, labels, *, rate, budget):
        self.seen.append(labels.tolist())
        return torch.zeros(())

    def forward(self, prepared):
        return prepared.new_zeros(len(prepared), V)


def in_domains(data):
    """Three classes, each in two domains: labels 0 to 2 and 3 to 5, on the blobs."""
    return data._replace(domains=(torch.arange(3), torch.arange(3, 6)), classes=torch.arange(6) % 3)


def test_domains_come_one_after_the_other_and_only_classes_are_told():
    data = in_domains(DATA)
    run = protocol.run(RECIPE, data, 1, scenarios=("domain-incremental",))
    assert sorted(run.tasks) == [[0, 1, 2], [3, 4, 5]]
    results = run.results["domain-incremental"]
    assert tuple(results) == protocol.HEADS
    assert all(len(result.scores) == 2 for result in results.values())
    assert results["counting"].final > 0.95
    assert results["nearest mean"].final < results["counting"].final  # one mean of two blobs
    first = run.tasks[0]
    spy = Spy()
    list(train(spy, tasks=data.domains, scenario="domain-incremental", outputs=data.classes))
    assert {label for batch in spy.seen for label in batch} == {0, 1, 2}
    head = NearestMeanHead(CHANNELS, 3)
    score = next(
        train(head, tasks=[torch.tensor(first), data.domains[0]], scenario="domain-incremental", outputs=data.classes)
    )
    rows = torch.isin(DATA.test.labels, torch.tensor(first))
    right = head(DATA.test.features[rows]).argmax(-1) == DATA.test.labels[rows] % 3
    assert score.seen == right.double().mean()


def test_domains_and_scenarios_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected scenarios of .'domain-incremental',."):
        protocol.run(RECIPE, in_domains(DATA), 0)
    with pytest.raises(ValueError, match="takes outputs"):
        next(train(Spy(), scenario="domain-incremental"))
    with pytest.raises(ValueError, match="takes outputs"):
        next(train(Spy(), outputs=torch.arange(V)))


def test_key_data_of_domains_keeps_them():
    data = protocol.normalised(in_domains(DATA))
    assert len(data.domains) == 2
    assert data.classes.tolist() == [0, 1, 2, 0, 1, 2]


def test_images_are_turned_and_labels_say_how():
    images = torch.zeros(30, 1, 9, 9)
    images[:, :, 4, 6:] = 1.0  # from the middle to the right
    labels = torch.arange(30) % 3
    turned, names = domains.turned(images, labels, 3, angles=(0, 90))
    assert torch.equal(names % 3, labels)
    assert names.bincount().sum() == 30
    assert (names // 3).bincount().tolist() == [15, 15]
    torch.testing.assert_close(turned[names < 3], images[names < 3])
    up = turned[names >= 3]
    assert up[:, 0, :3, 4].mean() > 0.9
    assert up[:, 0, 4, 6:].max() < 0.1
