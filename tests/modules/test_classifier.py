"""``KeyValueClassifier``: scikit-learn's checks and tools, exact forgetting, later classes, files, loaders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch.utils.data import DataLoader, TensorDataset

import kvb
from kvb.checkpoints import CheckpointError
from kvb.classifier import KeyValueClassifier
from kvb.projection import WhitenedProjection, local_whitening

IMAGES, DIGITS = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
ORDER = torch.randperm(len(DIGITS), generator=torch.Generator().manual_seed(0))  # writers come one after the other
IMAGES, DIGITS, TRAIN, TEST = IMAGES[ORDER].float() / 16, DIGITS[ORDER], slice(0, 400), slice(400, 700)
# Checks that cannot run here, and none that fails.
SKIPPED = {
    "check_array_api_input": "needs an environment variable of SciPy",
    "check_classifier_data_not_an_array": "needs pandas",
    "check_n_features_in_after_fitting": "needs pandas",
    "check_dataframe_column_names_consistency": "needs pandas, and no feature names are kept",
}


def classifier(**options):
    return KeyValueClassifier(**{"codebooks": 16, **options})


def trained(rows=TRAIN, **options):
    return classifier(**options).fit_keys(IMAGES[400:]).fit(IMAGES[rows], DIGITS[rows])


@pytest.fixture(scope="module")
def digits():
    return trained()


@pytest.mark.parametrize("method", ["count", "sgd"])
@pytest.mark.filterwarnings("ignore:Estimator KeyValueClassifier does not inherit")
def test_the_checks_of_scikit_learn(method):
    results = check_estimator(classifier(method=method), on_fail=None, on_skip=None)
    assert len(results) > 40
    assert {one["check_name"] for one in results if one["status"] == "skipped"} <= set(SKIPPED)
    failed = [
        f"{one['check_name']}: {one['exception']}" for one in results if one["status"] not in ("passed", "skipped")
    ]
    assert not failed


@pytest.mark.parametrize(("method", "least"), [("count", 0.95), ("sgd", 0.93)])
def test_it_learns(method, least):
    model = trained(method=method)
    assert model.score(IMAGES[TEST], DIGITS[TEST]) > least
    probabilities = model.predict_proba(IMAGES[TEST])
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(300, dtype=torch.float64))
    assert torch.equal(model.classes_[probabilities.argmax(-1)], model.predict(IMAGES[TEST]))
    assert torch.equal(probabilities.argmax(-1), model.decision_function(IMAGES[TEST]).argmax(-1))


def test_tasks_in_any_order_end_alike(digits):
    """Five tasks of two classes, nothing replayed: the very scores of learning all at once."""
    model = classifier().fit_keys(IMAGES[400:])
    for task in torch.randperm(10).split(2):
        rows = torch.isin(DIGITS[TRAIN], task).nonzero()[:, 0]
        model.partial_fit(IMAGES[rows], DIGITS[rows])
    assert torch.equal(model.decision_function(IMAGES[TEST]), digits.decision_function(IMAGES[TEST]))
    assert model.classes_.tolist() == list(range(10))


def test_any_subset_is_forgotten_bit_for_bit():
    model = trained(codebooks=8)
    never = classifier(codebooks=8).fit_keys(IMAGES[400:])
    for _ in range(100):
        gone = torch.rand(400) < 0.9 * torch.rand(())
        gone[torch.randint(400, ())] = True
        rows = gone.nonzero()[:, 0][torch.randperm(int(gone.sum()))]
        kept = (~gone).nonzero()[:, 0][torch.randperm(int((~gone).sum()))]
        for part in rows.split(int(torch.randint(20, 400, ()))):
            model.forget(IMAGES[part], DIGITS[part])
        never.fit(IMAGES[kept], DIGITS[kept])
        mine, theirs = (
            {name: m.counts_.counts[..., place] for name, place in m._slots.items()} for m in (model, never)
        )
        assert all(torch.equal(mine[name], counts) for name, counts in theirs.items())
        assert torch.equal(model.decision_function(IMAGES[:50]), never.decision_function(IMAGES[:50]))
        model.partial_fit(IMAGES[rows], DIGITS[rows])


def test_what_was_not_learned_is_not_forgotten():
    model = trained(slice(0, 200))
    before = model.counts_.counts.clone()
    with pytest.raises(ValueError, match="learned with these labels"):
        model.forget(DataLoader(TensorDataset(IMAGES[100:300], DIGITS[100:300]), batch_size=50))
    with pytest.raises(ValueError, match="labels that were learned, got 11"):
        model.forget(IMAGES[:2], torch.tensor([3, 11]))
    assert torch.equal(model.counts_.counts, before)
    with pytest.raises(ValueError, match="method='count'"):
        trained(slice(0, 50), method="sgd", epochs=1).forget(IMAGES[:2], DIGITS[:2])


def test_a_new_class_leaves_the_scores_of_the_others():
    old = DIGITS[TRAIN] < 8
    model = classifier().fit_keys(IMAGES[400:]).fit(IMAGES[TRAIN][old], DIGITS[TRAIN][old])
    before = model.decision_function(IMAGES[TEST])
    model.partial_fit(IMAGES[TRAIN][~old], DIGITS[TRAIN][~old])
    assert torch.equal(model.decision_function(IMAGES[TEST])[:, :8], before)
    model.forget_classes([8, 9])
    assert model.classes_.tolist() == list(range(8))
    assert torch.equal(model.decision_function(IMAGES[TEST]), before)


@pytest.mark.parametrize("method", ["count", "sgd"])
def test_classes_are_forgotten(method):
    model = trained(method=method, epochs=5).forget_classes([3])
    assert 3 not in model.classes_
    assert 3 not in model.predict(IMAGES[TEST])
    model.partial_fit(IMAGES[TRAIN], DIGITS[TRAIN])
    assert 3 in model.classes_


def test_batches_do_not_change_a_bit(digits):
    whole = digits.decision_function(IMAGES[TEST])
    for size in (1, 7, 64):
        parts = [digits.decision_function(part) for part in IMAGES[TEST][: 3 * size].split(size)]
        assert torch.equal(torch.cat(parts), whole[: 3 * size])


def test_projections_are_sums_without_rounding():
    x = torch.randn(200, 300) * torch.logspace(-3, 3, 200)[:, None]
    projection = WhitenedProjection(300, 4, 8).fit(x, torch.Generator().manual_seed(0))
    want = projection(x)
    order = torch.randperm(300)
    shuffled = WhitenedProjection(300, 4, 8)
    shuffled.load_state_dict(
        {"mean": projection.mean[order], "matrix": projection.matrix[order], "scale": projection.scale}
    )
    assert torch.equal(shuffled(x[:, order]), want)
    assert torch.equal(torch.cat([projection(row[None]) for row in x]), want)
    exact = (x.double() - projection.mean.double()) @ (projection.matrix * projection.scale)
    error = (want.flatten(1) - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert error.max() < 1e-4


def test_local_whitening_finds_what_varies_inside_of_clusters():
    x = torch.randn(500, 12) * torch.tensor([0.05, *[0.5] * 11])
    x[:, 0] += torch.randint(2, (500,)) * 4 - 2
    scale = local_whitening(x, ridge=1e-3).diagonal()
    assert scale[0] > 3 * scale[1:].max()
    assert torch.equal(local_whitening(x[:2]), torch.eye(12, dtype=torch.float64))
    assert torch.equal(local_whitening(torch.ones(9, 3)), torch.eye(3, dtype=torch.float64))


def test_arrays_tensors_and_loaders_are_alike(digits):
    loader = DataLoader(TensorDataset(IMAGES[TRAIN], DIGITS[TRAIN]), batch_size=96)
    rest = IMAGES[400:].numpy().astype(np.float64)
    want = digits.decision_function(IMAGES[TEST])
    arrays = classifier().fit_keys(rest).fit(IMAGES[TRAIN].numpy(), DIGITS[TRAIN].numpy())
    assert isinstance(arrays.predict(rest), np.ndarray)
    np.testing.assert_array_equal(arrays.decision_function(IMAGES[TEST].numpy()), want.numpy())
    loaded = classifier().fit_keys(rest).fit(loader)
    np.testing.assert_array_equal(loaded.decision_function(loader)[:5], digits.decision_function(IMAGES[:5]).numpy())
    assert loaded.score(loader) == digits.score(IMAGES[TRAIN], DIGITS[TRAIN])
    assert loaded.forget(loader).counts_.counts.sum() == 0


def test_sentences_with_an_encoder():
    """Any callable from a list of sentences to features."""

    def letters(sentences):
        return np.array([[sentence.count(letter) for letter in "abcdefgh"] for sentence in sentences])

    sentences = [letter * n + "h" for n in range(2, 20) for letter in "ab"]
    labels = [sentence[0].upper() for sentence in sentences]
    model = classifier(encoder=letters).fit(sentences, labels)
    assert model.predict(["aaa h", "bbbbb"]).tolist() == ["A", "B"]
    model.partial_fit(["ccccch", "ccch"], ["C", "C"])
    assert model.classes_.tolist() == ["A", "B", "C"]
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Dropout(0.5))
    model = classifier(encoder=module).fit(IMAGES[TRAIN], DIGITS[TRAIN])
    assert model.score(IMAGES[TEST], DIGITS[TEST]) > 0.8


def test_pipelines_searches_and_calibration():
    X, y = IMAGES[TRAIN].numpy(), DIGITS[TRAIN].numpy()
    pipeline = make_pipeline(StandardScaler(), classifier()).fit(X, y)
    assert pipeline.score(IMAGES[TEST].numpy(), DIGITS[TEST].numpy()) > 0.85
    search = GridSearchCV(pipeline, {"keyvalueclassifier__topk": [1, 8]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.85
    assert search.best_estimator_[-1].topk == search.best_params_["keyvalueclassifier__topk"]
    calibrated = CalibratedClassifierCV(classifier(), cv=2).fit(X, y)
    assert calibrated.score(IMAGES[TEST].numpy(), DIGITS[TEST].numpy()) > 0.9


@pytest.mark.parametrize("method", ["count", "sgd"])
def test_a_file_holds_everything(method, tmp_path):
    names = np.array([f"digit {n}" for n in DIGITS])
    model = classifier(method=method, epochs=2).fit(IMAGES[TRAIN].numpy(), names[TRAIN])
    model.save(tmp_path / "model.pt")
    loaded = kvb.KeyValueClassifier.load(tmp_path / "model.pt")
    assert loaded.get_params() == model.get_params()
    np.testing.assert_array_equal(loaded.predict_proba(IMAGES[TEST]), model.predict_proba(IMAGES[TEST]))
    assert loaded.predict(IMAGES[:1])[0] == names[0]
    model.partial_fit(IMAGES[TEST].numpy(), names[TEST])
    loaded.partial_fit(IMAGES[TEST].numpy(), names[TEST])
    np.testing.assert_array_equal(loaded.decision_function(IMAGES[TEST]), model.decision_function(IMAGES[TEST]))
    kvb.save(torch.nn.Linear(2, 2), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no KeyValueClassifier"):
        kvb.KeyValueClassifier.load(tmp_path / "other.pt")


def test_wrong_arguments_are_named(digits):
    X, y = IMAGES[TRAIN], DIGITS[TRAIN]
    for error, message, call in (
        (NotFittedError, "not fitted yet", lambda: classifier().predict(X)),
        (ValueError, "method must be one of 'count', 'sgd'", lambda: classifier(method="knn").fit(X, y)),
        (ValueError, "topk must be a positive integer", lambda: classifier(topk=0).fit(X, y)),
        (TypeError, "encoder must be callable", lambda: classifier(encoder=3).fit(X, y)),
        (ValueError, "Reshape your data", lambda: classifier().fit(X.view(400, 8, 8), y)),
        (ValueError, "inconsistent numbers of samples", lambda: classifier().fit(X, y[1:])),
        (ValueError, "NaN", lambda: classifier().fit(X / 0, y)),
        (ValueError, "63 features, but KeyValueClassifier is expecting 64", lambda: digits.predict(X[:, 1:])),
        (ValueError, "continuous", lambda: classifier().fit(X, y + 0.5)),
        (
            ValueError,
            "y must be None where X is a loader",
            lambda: classifier().fit(DataLoader(TensorDataset(X, y)), y),
        ),
        (ValueError, "Invalid parameter 'depth'", lambda: classifier().set_params(depth=3)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert repr(KeyValueClassifier("sgd", topk=4)) == "KeyValueClassifier(method='sgd', topk=4)"


def test_what_no_key_is_near_to_is_told(tmp_path):
    """Samples like those of the keys are far in a hundredth of the codebooks; other ones in nearly all."""
    model, fresh = trained(codebooks=64), IMAGES[TRAIN]  # keys are of others
    known, other = model.novelty(fresh), model.novelty(fresh.flip(1) + torch.rand(400, 64))
    assert known.shape == (400,)
    assert known.mean() < 0.03
    assert other.mean() > 0.8
    assert model.novelty(fresh, share=0.5).mean() == pytest.approx(0.5, abs=0.1)
    model.save(tmp_path / "model.pt")
    assert torch.equal(KeyValueClassifier.load(tmp_path / "model.pt").novelty(fresh), known)
    assert torch.equal(torch.cat([model.novelty(part) for part in fresh.split(7)]), known)


def test_a_class_that_keys_never_saw_is_newer_than_the_others():
    old = DIGITS != 3
    model = classifier(codebooks=64).fit_keys(IMAGES[old][:900])
    found = model.novelty(IMAGES[900:].numpy())
    assert isinstance(found, np.ndarray)
    assert found[DIGITS[900:].numpy() == 3].mean() > 5 * found[DIGITS[900:].numpy() != 3].mean()
    with pytest.raises(ValueError, match="share must be in"):
        model.novelty(IMAGES, share=2.0)
    with pytest.raises(NotFittedError):
        classifier().novelty(IMAGES)
