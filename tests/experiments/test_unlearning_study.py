"""The study of unlearning: every class of the digits can be forgotten, its measures, its command line."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from kvb import __main__, unlearning

study = pytest.importorskip("kvb.experiments.unlearning", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
demo = importlib.import_module("kvb.experiments.demo")
DIGITS = importlib.import_module("kvb.experiments.data.digits").STUDY


@pytest.fixture(scope="module")
def subject():
    return study.Subject(DIGITS, demo.load(DIGITS, 0), 0)


@pytest.fixture
def one(subject):
    """The subject, which every test gives back as it was."""
    yield subject
    assert subject.bottleneck.pair_mask is None
    assert torch.equal(subject.bottleneck.values, subject.learned)


@pytest.mark.parametrize("way", ["activations", "weighed", "examples"])
def test_every_class_is_forgotten_and_the_others_kept(one, way):
    for label in range(10):
        classes, forget = torch.tensor([label]), one.hits[label]
        before = one.measure(None, classes, one.test_codes)
        retain = one.hits.sum(0) - forget if way == "weighed" else None
        if way == "examples":
            mask = unlearning.mask_by_examples(one.bottleneck, one.codes[one.train.labels == label])
        else:
            mask = unlearning.mask_by_activations(forget, share=study.SHARE, retain_hits=retain)
        point = one.masked(way, mask, classes)
        assert before.forget > 0.8
        assert point.forget <= 0.02
        assert before.retain - point.retain <= 0.02


def test_weighed_hits_forget_more_with_as_many_pairs(one):
    def forgotten(n, weighed):
        points = []
        for label in range(10):
            forget = one.hits[label]
            retain = one.hits.sum(0) - forget if weighed else None
            mask = unlearning.mask_by_activations(forget, n, retain_hits=retain)
            points.append(one.masked("weighed", mask, torch.tensor([label])).forget)
        return sum(points) / 10

    assert forgotten(1475, True) < forgotten(1475, False) - 0.05


def test_masks_of_several_classes_add_up(one):
    points = study.forget_one_after_another(one, [4, 1, 7])
    assert [label for label, _ in points] == [4, 1, 7]
    for _, point in points:
        assert point.forget <= 0.02
        assert point.retain >= 0.95


def test_an_outcome(one):
    outcome = study.forget_classes(one, [3, 8])
    for way, points in outcome.curves.items():
        assert points[0] == outcome.before
        assert points[-1].forget < 0.1, way
        pairs = [point.pairs for point in points]
        assert pairs == sorted(pairs)
    assert outcome.relearned["unmasked"] == outcome.before
    for name in ("pairs left", "pairs erased"):
        relearned = outcome.relearned[name]
        assert relearned.forget > 0.5
        assert relearned.retain > outcome.before.retain - 0.05
    assert outcome.drop("weighed") == outcome.before.retain - outcome.chosen["weighed"].retain


def test_the_files_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "PARTS", (0.05, 0.2))
    monkeypatch.setattr(study, "EXAMPLES", (5,))
    __main__.main(["unlearn", "--classes", "3", "--out", str(tmp_path / "new")])
    record = json.loads((tmp_path / "new" / "unlearning-digits.json").read_text())
    assert record["all_pairs"] == 64 * 256
    assert len(record["overlap"]) == 10
    (outcome,) = record["outcomes"]
    assert outcome["classes"] == [3]
    assert outcome["chosen"]["weighed"]["forget"] <= 0.02
    assert set(outcome["curves"]) == set(record["ways"])
    assert (tmp_path / "new" / "unlearning-digits.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "forgetting class 3" in printed
    assert "-0.0" not in printed


@pytest.mark.parametrize("classes", [[10], [-1], [3, 3], list(range(10))])
def test_classes_that_cannot_be_forgotten_are_refused(classes, tmp_path):
    with pytest.raises(SystemExit, match="different numbers from 0 to 9, and not all of them"):
        __main__.main(["unlearn", "--out", str(tmp_path), "--classes", *map(str, classes)])
    assert not list(tmp_path.iterdir())
