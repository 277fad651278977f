"""The baselines: against scikit-learn and by hand; no order of batches or tasks changes what they answer."""

from __future__ import annotations

import pytest
import torch

from kvb.experiments import baselines
from kvb.experiments.heads import Budget

V, CHANNELS = 4, 6
BUDGET = Budget(epochs=1, batch_size=16, label_smoothing=0.0, clip_norm=1.0)
OPTIONS = {"hidden": 8, "projected": 24, "from_zero": True}
ONE_PASS = [name for name in baselines.BASELINES if name not in ("linear", "MLP")]


def examples(each=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(V, CHANNELS, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(V).repeat_interleave(each)
    mix = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(8))
    return centres[labels] + torch.randn(len(labels), CHANNELS, generator=generator) @ mix, labels


def taught(head, features, labels, order):
    prepared = head.prepare(features)
    for rows in order.split(16):
        head.step(prepared[rows], labels[rows], rate=0.0, budget=BUDGET)
    return head


def build(name):
    torch.manual_seed(0)
    (head,) = baselines.BASELINES[name](CHANNELS, [V], **OPTIONS)
    return head


@pytest.mark.parametrize("name", ONE_PASS)
def test_they_learn_in_one_pass_whatever_the_order(name):
    (features, labels), (held, wanted) = examples(), examples(seed=1)
    answers = []
    for order in (torch.arange(len(labels)), torch.randperm(len(labels))):
        head = taught(build(name), features, labels, order)
        answers.append(head(head.prepare(held)).argmax(-1))
        assert head.passes == 1
    assert (answers[0] == wanted).double().mean() > 0.75
    if name not in ("ridge", "RanPAC"):  # which examples choose the penalty depends on the order
        assert torch.equal(*answers)


@pytest.mark.parametrize("name", ONE_PASS)
def test_classes_without_an_example_are_never_answered(name):
    features, labels = examples()
    seen = labels < 2
    head = taught(build(name), features[seen], labels[seen], torch.arange(int(seen.sum())))
    assert head(head.prepare(features)).argmax(-1).max() < 2


def test_slda_is_the_discriminant_of_scikit_learn():
    discriminants = pytest.importorskip("sklearn.discriminant_analysis")
    (features, labels), (held, _) = examples(), examples(seed=1)
    head = taught(build("SLDA"), features, labels, torch.randperm(len(labels)))
    other = discriminants.LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / V] * V).fit(features.double(), labels)
    logits = head(head.prepare(held))
    theirs = torch.from_numpy(other.decision_function(held.double().numpy()))
    gaps, wanted = logits - logits[:, :1], theirs - theirs[:, :1]
    torch.testing.assert_close(gaps, wanted, rtol=2e-3, atol=2e-3)  # RIDGE is their shrinkage of 0


@pytest.mark.parametrize("name", ["ridge", "RanPAC"])
def test_ridge_is_the_regression_of_scikit_learn(name, monkeypatch):
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(baselines, "PENALTIES", (3.0,))
    (features, labels), (held, _) = examples(), examples(seed=1)
    head = taught(build(name), features, labels, torch.randperm(len(labels)))
    hot = torch.nn.functional.one_hot(labels, V).double()
    other = linear_model.Ridge(3.0, fit_intercept=False).fit(head.prepare(features).double(), hot)
    theirs = torch.from_numpy(other.predict(head.prepare(held).double().numpy()))
    torch.testing.assert_close(head(head.prepare(held)), theirs)


def test_every_fifth_example_of_a_class_is_held_out():
    """Whatever the batches: a task of one batch must not choose for a class that is gone."""
    features, labels = torch.arange(24.0).double()[:, None], torch.tensor([0, 0, 1] * 8)
    for order in (torch.arange(24).split(24), torch.arange(24).split(7), torch.arange(24).split(1)):
        head = baselines.RidgeHead(1, 2)
        for rows in order:
            head.add(features[rows], labels[rows])
        held, wanted = (torch.cat(parts) for parts in zip(*head.held, strict=True))
        assert held[:, 0].tolist() == [6.0, 13.0, 14.0, 21.0]
        assert wanted.tolist() == [0, 0, 1, 0]


def test_one_example_of_a_class_is_enough():
    """A penalty is chosen, and a covariance used, where there is something to do that with."""
    features, labels = torch.eye(4).double(), torch.arange(4)
    for head in (baselines.RidgeHead(4, 4), baselines.FeCAMHead(4, 4), baselines.SLDAHead(4, 4)):
        head.add(head.prepare(features), labels)
        assert head(head.prepare(features)).argmax(-1).tolist() == [0, 1, 2, 3], type(head).__name__


def test_the_penalty_is_the_best_on_held_out_examples(monkeypatch):
    """More columns of noise than examples: a large penalty errs less on what was held out, and is chosen."""
    torch.manual_seed(1)
    labels = torch.arange(2).repeat(40)
    features = torch.randn(80, 70)
    features[:, 0] += 3 * labels - 1.5
    head = taught(baselines.RidgeHead(70, 2), features, labels, torch.randperm(80))
    rows, wanted = (torch.cat(parts) for parts in zip(*head.held, strict=True))
    fit = {}
    for penalty in (baselines.PENALTIES[0], baselines.PENALTIES[-3]):
        monkeypatch.setattr(baselines, "PENALTIES", (penalty,))
        weight = torch.linalg.solve(
            head.products - rows.T @ rows + penalty * torch.eye(70).double(),
            head.sums.index_add(0, wanted, rows, alpha=-1).T,
        )
        fit[penalty] = (rows @ weight - torch.nn.functional.one_hot(wanted)).square().mean().item()
    assert fit[1e-4] > fit[1e4]
    monkeypatch.setattr(baselines, "PENALTIES", tuple(fit))
    weight, _ = head.solve()
    want = torch.linalg.solve(head.products + 1e4 * torch.eye(70).double(), head.sums.T).T
    torch.testing.assert_close(weight, want)


def test_neighbours_are_those_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (features, labels), (held, _) = examples(), examples(seed=1)
    head = taught(build("20 neighbours"), features, labels, torch.arange(len(labels)))
    other = neighbors.KNeighborsClassifier(
        baselines.NEIGHBOURS, metric="cosine", algorithm="brute", weights=lambda gaps: (1 - gaps).clip(1e-9)
    ).fit(features.double(), labels)
    assert head(head.prepare(held)).argmax(-1).tolist() == other.predict(held.double()).tolist()


def test_fecam_by_hand():
    """One class along one axis: the distance is counted in its own directions."""
    torch.manual_seed(2)
    wide, narrow = torch.randn(400, 2) * torch.tensor([9.0, 1.0]), torch.randn(400, 2) + torch.tensor([8.0, 6.0])
    features, labels = torch.cat([wide, narrow]), torch.arange(2).repeat_interleave(400)
    head = taught(baselines.FeCAMHead(2, 2), features, labels, torch.arange(800))
    rows = head.prepare(features[labels == 0]).double()
    covariance = torch.cov(rows.T, correction=0)
    variance, apart, eye = covariance.diagonal().mean(), covariance[0, 1], torch.eye(2).double()
    shrunk = covariance + variance * eye + apart * (1 - eye)
    scale = shrunk.diagonal().sqrt()
    want = torch.linalg.inv(shrunk / scale.outer(scale))
    place = head.prepare(torch.tensor([[3.0, -2.0]]))
    gap = place.double()[0] - rows.mean(0)
    assert head(place)[0, 0].item() == pytest.approx(-(gap @ want @ gap).item(), rel=1e-9)
